"""Which model a calibration is of: its parameters' names, shapes, types, and some of the values."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from graphquant.utils.serialization import Field

SAMPLES = 64  # values of each parameter, evenly spaced, the first and the last among them
NAMED = 5  # parameters in a message


class Parameter(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    values: int | None  # CRC-32 of the samples' bytes; None where they cannot be read

    @classmethod
    def of(cls, parameter: Tensor) -> Parameter:
        dtype = str(parameter.dtype).removeprefix("torch.")
        return cls(dtype, tuple(parameter.shape), _crc(parameter))

    @classmethod
    def read(cls, data: Field) -> Parameter:
        """What a file holds. Raises FileError."""
        entry = data.list()
        if len(entry) != len(cls._fields):
            data.refuse("[type, shape, checksum]")
        dtype, shape, values = entry
        crc = None if values.value is None else values.integer(most=2**32 - 1)
        return cls(dtype.text(), tuple(one.integer() for one in shape.list()), crc)


Fingerprint = Mapping[str, Parameter]


def fingerprint(model: nn.Module) -> Fingerprint:
    """Of all parameters of the model; buffers do not count.

    It notices a parameter that is missing, new, renamed, of another shape or type, and weights that
    were trained, reloaded or folded. It does not notice a change that leaves all samples as they
    are, another order of the layers' calls, another configuration of modules without parameters.
    """
    return {name: Parameter.of(p) for name, p in model.named_parameters(remove_duplicate=False)}


def differences(was: Fingerprint, now: Fingerprint) -> Iterator[tuple[str, str]]:
    """(name, what differs) of every parameter that is not the same."""
    for name in was.keys() | now.keys():
        if name not in now:
            yield name, "is missing"
        elif name not in was:
            yield name, "is new"
        elif (old := was[name]) != (new := now[name]):
            if old[:2] != new[:2]:
                yield name, f"was {old.dtype} {[*old.shape]}, is {new.dtype} {[*new.shape]}"
            elif old.values is not None and new.values is not None:
                yield name, "has other values"


@torch.no_grad()
def _crc(parameter: Tensor) -> int | None:
    plain = type(parameter) in (Tensor, nn.Parameter) and parameter.layout is torch.strided
    if not plain or parameter.device.type == "meta" or not parameter.numel():
        return None
    if not parameter.untyped_storage().nbytes():
        return None  # released by free_weights=True
    flat = parameter.detach()
    at = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64)
    where = torch.unravel_index(at.long().to(flat.device), flat.shape)
    samples = flat[where] if flat.dim() else flat.reshape(1)
    return zlib.crc32(samples.contiguous().view(torch.uint8).cpu().numpy().tobytes())
