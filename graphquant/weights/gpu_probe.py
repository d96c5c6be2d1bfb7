"""Some values of parameters on a GPU, compared there, without waiting for the answer.

A look costs the launch of one small kernel on the current stream. It raises a flag in host memory
if a value has changed, and later looks read the flag. Without Triton nothing is compared.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

from graphquant.ops.runtime.launch import native, prepare, stream_of
from graphquant.weights.snapshot import SAMPLES, Seen, has_values, offsets, values

_FLAGS = 256  # that are allocated at once


def values_of(tensors: Sequence[Tensor]) -> list[bytes | None]:
    """Some values of each tensor, for Seen. Waits for the GPUs; None for what cannot be looked at,
    such as everything on a GPU that is recording a CUDA graph."""
    found = [values(t) for t in tensors]
    for device in _devices(tensors):
        mine = [i for i, t in enumerate(tensors) if _readable(t, device)]
        with torch.cuda.device(device), torch.inference_mode():
            if torch.cuda.is_current_stream_capturing():
                continue
            rows = read(_table([tensors[i] for i in mine]).to(device)).cpu().numpy()
        for i, row in zip(mine, rows, strict=True):
            found[i] = row.tobytes()
    return found


def probes(tensors: Sequence[Tensor], seen: Sequence[Seen]) -> list[Probe]:
    """One for each GPU. `seen` is what these tensors are now."""
    made = []
    for device in _devices(tensors):
        known = [
            s.values is not None and _readable(t, device)
            for t, s in zip(tensors, seen, strict=True)
        ]
        mine = [i for i, k in enumerate(known) if k]
        if mine and not _captures(device):
            made.append(Probe([tensors[i] for i in mine], [seen[i] for i in mine], device))
    return made


def read(table: Tensor) -> Tensor:
    from graphquant.ops.triton_samples import gather

    out = torch.empty(table.shape[0], table.shape[2], dtype=torch.int32, device=table.device)
    gather(table, out)
    return out


class Probe:
    """Values of tensors on one device. The tensors are not kept alive: it must not be used any more
    once one of them has gone or moved."""

    def __init__(
        self, tensors: Sequence[Tensor], seen: Sequence[Seen], device: torch.device
    ) -> None:
        table = _table(tensors, seen)
        with torch.inference_mode(False):
            self._table = table.to(device)
        self._device = device
        self._flag, self._raised = _take_flag(device)
        finalize(self, _free_flags.append, (self._flag, self._raised))
        self._look = _looker(device)
        self._stream = stream_of(device) if device.type == "cuda" else 0

    def raised(self) -> bool:
        """What looks have found, as far as that is known."""
        return bool(self._raised[0])

    def changed(self) -> bool:
        """What earlier looks have found. Looks again."""
        if self._raised[0]:
            return True
        if self._device.type != "cuda":
            self._look(0, self._table, self._flag)
        elif self._device.index != torch.cuda.current_device():
            with torch.cuda.device(self._device):
                self._launch()
        else:
            self._launch()
        return False

    def _launch(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            return
        stream = stream_of(self._device)
        if stream != self._stream:  # the table's memory must not be used anew before the kernel ran
            self._table.record_stream(torch.cuda.current_stream(self._device))
        self._look(stream, self._table, self._flag)


def _looker(device: torch.device) -> Callable[[int, Tensor, Tensor], Any]:
    from graphquant.ops.triton_samples import compare

    if device.type != "cuda":  # Triton's interpreter
        return lambda stream, table, flag: compare(table, flag)
    site: Callable[[int, Tensor, Tensor], Any] = native().Site(
        lambda table, flag: prepare(lambda: compare(table, flag), (table, flag))
    )
    return site


# A kernel may raise a flag when its Probe is gone. So flags are used again for other probes, where
# one raised in vain costs a look at the values, and their memory is never given back.
_free_flags: list[tuple[Tensor, Any]] = []


def _take_flag(device: torch.device) -> tuple[Tensor, Any]:
    """A flag that is down, as a tensor for kernels and as an array for the host."""
    if not _free_flags:
        with torch.inference_mode(False):
            flags = torch.zeros(_FLAGS, 4, dtype=torch.int32, device="cpu")  # 16 bytes for each
            if device.type == "cuda":
                flags = flags.pin_memory()
        _free_flags.extend((f, f.numpy()) for f in flags)
    flag, raised = _free_flags.pop()
    raised[0] = 0
    return flag, raised


def _table(tensors: Sequence[Tensor], seen: Sequence[Seen] | None = None) -> Tensor:
    """What ops/triton_samples.py reads."""
    table = np.zeros((len(tensors), 3, SAMPLES), dtype=np.int64)
    for i, t in enumerate(tensors):
        at = np.frombuffer(offsets(t), dtype=np.int64)
        table[i, 0] = t.data_ptr() + np.resize(at, SAMPLES)
        if seen is not None:
            table[i, 1] = np.frombuffer(seen[i].values or b"", dtype=np.int32)
        table[i, 2] = t.element_size()
    return torch.from_numpy(table)


def _devices(tensors: Sequence[Tensor]) -> list[torch.device]:
    found = list(dict.fromkeys(t.device for t in tensors if t.device.type == "cuda"))
    return found if found and importlib.util.find_spec("triton") else []


def _readable(t: Tensor, device: torch.device) -> bool:
    return t.device == device and t.element_size() <= 8 and has_values(t)


def _captures(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
