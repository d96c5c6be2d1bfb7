"""Probes: compare sampled values of parameters on a GPU, without synchronizing.

A comparison costs the launch of one small kernel on the current stream. The kernel sets a flag in
host memory if a value has changed; later calls read the flag. Without Triton nothing is compared.
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
from graphquant.weights.snapshot import SAMPLES, TensorState, has_values, offsets, values

_FLAGS = 256  # flags per allocation


def values_of(tensors: Sequence[Tensor]) -> list[bytes | None]:
    """Sampled values of each tensor, for TensorState. Waits for the GPUs.

    None for what cannot be read, such as everything on a GPU that is capturing a CUDA graph.
    """
    found = [values(t) for t in tensors]
    for device in _devices(tensors):
        indices = [i for i, t in enumerate(tensors) if _readable(t, device)]
        with torch.cuda.device(device), torch.inference_mode():
            if torch.cuda.is_current_stream_capturing():
                continue
            rows = read(_table([tensors[i] for i in indices]).to(device)).cpu().numpy()
        for i, row in zip(indices, rows, strict=True):
            found[i] = row.tobytes()
    return found


def probes(tensors: Sequence[Tensor], states: Sequence[TensorState]) -> list[Probe]:
    """One probe per GPU, for these tensors in their current states."""
    result = []
    for device in _devices(tensors):
        known = [
            s.values is not None and _readable(t, device)
            for t, s in zip(tensors, states, strict=True)
        ]
        indices = [i for i, k in enumerate(known) if k]
        if indices and not _is_capturing(device):
            result.append(
                Probe([tensors[i] for i in indices], [states[i] for i in indices], device)
            )
    return result


def read(table: Tensor) -> Tensor:
    """The values that a table of addresses (`_table`) points to, [tensors, SAMPLES] int32."""
    from graphquant.ops.triton_samples import gather

    out = torch.empty(table.shape[0], table.shape[2], dtype=torch.int32, device=table.device)
    gather(table, out)
    return out


class Probe:
    """Compares sampled values of tensors on one device with those of a known state.

    Does not keep the tensors alive, and must not be used once one of them is freed or moved.
    """

    def __init__(
        self, tensors: Sequence[Tensor], states: Sequence[TensorState], device: torch.device
    ) -> None:
        table = _table(tensors, states)
        with torch.inference_mode(False):
            self._table = table.to(device)
        self._device = device
        self._flag, self._raised = _take_flag(device)
        finalize(self, _free_flags.append, (self._flag, self._raised))
        self._compare = _comparison(device)
        self._stream = stream_of(device) if device.type == "cuda" else 0

    def raised(self) -> bool:
        """Has a comparison that is done found a change?"""
        return bool(self._raised[0])

    def changed(self) -> bool:
        """The result of earlier comparisons. Launches another one."""
        if self._raised[0]:
            return True
        if self._device.type != "cuda":
            self._compare(0, self._table, self._flag)
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
        if stream != self._stream:  # the table must not be freed before the kernel ran
            self._table.record_stream(torch.cuda.current_stream(self._device))
        self._compare(stream, self._table, self._flag)


def _comparison(device: torch.device) -> Callable[[int, Tensor, Tensor], Any]:
    from graphquant.ops.triton_samples import compare

    if device.type != "cuda":  # Triton's interpreter
        return lambda stream, table, flag: compare(table, flag)
    site: Callable[[int, Tensor, Tensor], Any] = native().Site(
        lambda table, flag: prepare(lambda: compare(table, flag), (table, flag))
    )
    return site


# A kernel may set a flag after its Probe was freed. So the memory of flags is never freed, only
# reused by other probes, where a flag that is set wrongly costs one comparison on the host.
_free_flags: list[tuple[Tensor, Any]] = []


def _take_flag(device: torch.device) -> tuple[Tensor, Any]:
    """A cleared flag, as a tensor for kernels and as an array for the host."""
    if not _free_flags:
        with torch.inference_mode(False):
            flags = torch.zeros(_FLAGS, 4, dtype=torch.int32, device="cpu")  # 16 bytes for each
            if device.type == "cuda":
                flags = flags.pin_memory()
        _free_flags.extend((f, f.numpy()) for f in flags)
    flag, raised = _free_flags.pop()
    raised[0] = 0
    return flag, raised


def _table(tensors: Sequence[Tensor], states: Sequence[TensorState] | None = None) -> Tensor:
    """Addresses, expected values and sizes, [tensors, 3, SAMPLES] int64 (ops/triton_samples.py)."""
    table = np.zeros((len(tensors), 3, SAMPLES), dtype=np.int64)
    for i, t in enumerate(tensors):
        at = np.frombuffer(offsets(t), dtype=np.int64)
        table[i, 0] = t.data_ptr() + np.resize(at, SAMPLES)
        if states is not None:
            table[i, 1] = np.frombuffer(states[i].values or b"", dtype=np.int32)
        table[i, 2] = t.element_size()
    return torch.from_numpy(table)


def _devices(tensors: Sequence[Tensor]) -> list[torch.device]:
    found = list(dict.fromkeys(t.device for t in tensors if t.device.type == "cuda"))
    return found if found and importlib.util.find_spec("triton") else []


def _readable(t: Tensor, device: torch.device) -> bool:
    return t.device == device and t.element_size() <= 8 and has_values(t)


def _is_capturing(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
