"""Fingerprint of a model: names, shapes, dtypes and sampled values of its parameters."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from graphquant.utils.serialization import Field

SAMPLES = 64  # values of each parameter, evenly spaced, with the first and the last
MAX_NAMED = 5  # parameters named in a message


class ParameterFingerprint(NamedTuple):
    """Dtype, shape and checksum of one parameter."""

    dtype: str
    shape: tuple[int, ...]
    values: int | None  # CRC-32 of the sampled values; None if they cannot be read

    @classmethod
    def of(cls, parameter: Tensor) -> ParameterFingerprint:
        dtype = str(parameter.dtype).removeprefix("torch.")
        return cls(dtype, tuple(parameter.shape), _checksum(parameter))

    @classmethod
    def read(cls, data: Field) -> ParameterFingerprint:
        """Parse an entry of a file. Raises FileError."""
        entry = data.list()
        if len(entry) != len(cls._fields):
            data.refuse("[type, shape, checksum]")
        dtype, shape, values = entry
        checksum = None if values.value is None else values.integer(most=2**32 - 1)
        return cls(dtype.text(), tuple(one.integer() for one in shape.list()), checksum)


Fingerprint = Mapping[str, ParameterFingerprint]


def fingerprint(model: nn.Module) -> Fingerprint:
    """Fingerprint of all parameters of the model, without its buffers.

    Detects parameters that are missing, new, renamed or have another shape or dtype, and weights
    that were trained, reloaded or folded. Does not detect a change that spares all sampled values,
    another order of the layers, or another configuration of modules without parameters.
    """
    return {
        name: ParameterFingerprint.of(p)
        for name, p in model.named_parameters(remove_duplicate=False)
    }


def differences(was: Fingerprint, now: Fingerprint) -> Iterator[tuple[str, str]]:
    """(name, what differs) of every parameter that differs."""
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
def _checksum(parameter: Tensor) -> int | None:
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
