"""What tensors were when something was computed from them, and whether they still are.

A write through an alias (`p.data += delta`, a write through numpy, or to the flat buffer that
parameters are views of) leaves object, version, address and storage alone. So some values are
remembered as well, and compared as bytes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from graphquant._torch import getters, version_of
from graphquant.errors import KernelBuildError
from graphquant.ops.runtime.launch import extension
from graphquant.weights.released import is_released

log = logging.getLogger(__name__)

# Values that are compared of a large tensor. A write that moves a bfloat16 weight by a thousandth
# changes one in five of them: that all of these miss it has a probability of 4e-13.
SAMPLES = 128
WHOLE = 8192  # bytes up to which a tensor is compared as a whole: biases, norms


class Snapshot(Protocol):
    """The tensors at some positions of a call's arguments. It does not keep them alive."""

    def still(self, args: Sequence[Any], /) -> bool: ...


@dataclass(frozen=True)
class Seen:
    """One tensor: what tells that it was changed or replaced, and some of its values."""

    version: int | None
    address: int  # 0 of a released weight, which has none: asking for it raises
    storage: StorageWeakRef  # `p.data = new` may land on the address of what it replaces
    values: bytes | None = None  # None: they were not looked at

    @classmethod
    def of(cls, t: Tensor, values: bytes | None = None) -> Seen:
        storage = StorageWeakRef(t.untyped_storage())
        return cls(version_of(t), 0 if is_released(t) else t.data_ptr(), storage, values)

    def visible(self) -> tuple[Any, ...]:
        return self.version, self.address, self.storage.cdata

    def equals(self, other: Seen) -> bool:
        known = self.values is not None and other.values is not None
        return self.visible() == other.visible() and not (known and self.values != other.values)


def snapshot(positions: Sequence[int], tensors: Sequence[Tensor], seen: Sequence[Seen]) -> Snapshot:
    """`seen` is what these tensors are now."""
    native = _native()
    if native is None:
        return _InPython(tuple(positions), tuple(map(id, tensors)), tuple(seen))
    storages = tuple(s.storage for s in seen)
    samples = tuple(map(_samples, tensors, seen))
    addresses = tuple(s.address for s in seen)
    made: Snapshot = native.Snapshot(
        tuple(positions), tuple(tensors), addresses, storages, samples, *getters()
    )
    return made


@dataclass(frozen=True)
class _InPython:
    """The same without a C compiler: milliseconds for a model of many layers."""

    positions: tuple[int, ...]
    ids: tuple[int, ...]
    seen: tuple[Seen, ...]

    def still(self, args: Sequence[Any], /) -> bool:
        return all(
            position < len(args) and id(args[position]) == i and is_still(args[position], seen)
            for position, i, seen in zip(self.positions, self.ids, self.seen, strict=True)
        )


def is_still(t: Tensor, seen: Seen) -> bool:
    """Is this tensor what was seen, as far as can be told without waiting for a GPU?"""
    return (
        Seen.of(t).visible() == seen.visible()
        and not seen.storage.expired()
        and (seen.values is None or t.device.type != "cpu" or values(t) == seen.values)
    )


def values(t: Tensor) -> bytes | None:
    """Some values of a tensor in this process's memory, or all if it is small."""
    if t.device.type != "cpu" or not has_values(t):
        return None
    with torch.inference_mode():
        x = t.detach()
        # a copy in either case: storage that numpy has seen can never be resized again
        x = x.clone().view(-1) if _is_whole(t) else torch.take(x, _places(t.numel()))
        return _bytes(x.view(torch.uint8))


def has_values(t: Tensor) -> bool:
    return t.layout == torch.strided and t.numel() > 0 and not is_released(t)


@functools.lru_cache(maxsize=256)
def _places(numel: int) -> Tensor:
    """One element of each SAMPLES-th of a tensor, at random, the same ones every time."""
    count = min(SAMPLES, numel)
    random = torch.Generator().manual_seed(numel)
    with torch.inference_mode(False):
        part = torch.rand(count, generator=random, dtype=torch.float64, device="cpu")
        part += torch.arange(count, device="cpu")
        return (part * (numel / count)).long().clamp_(max=numel - 1)


def _is_whole(t: Tensor) -> bool:
    return t.numel() * t.element_size() <= WHOLE and t.is_contiguous()


def _samples(t: Tensor, seen: Seen) -> tuple[int, bytes, bytes] | None:
    """For snapshot.c: the bytes of one value, the offsets of the values, the values."""
    if seen.values is None or t.device.type != "cpu":
        return None
    if _is_whole(t):
        return len(seen.values), bytes(8), seen.values
    return t.element_size(), offsets(t), seen.values


def offsets(t: Tensor) -> bytes:
    """Where the values lie that are compared of a large tensor: int64, in bytes from the first."""
    return _offsets(t.shape, t.stride(), t.element_size())


@functools.lru_cache(maxsize=256)
def _offsets(shape: torch.Size, strides: tuple[int, ...], size: int) -> bytes:
    """Where the elements at _places lie, in bytes from the first."""
    with torch.inference_mode():
        indices = torch.unravel_index(_places(shape.numel()), shape)
        at = torch.zeros(len(indices[0]), dtype=torch.int64, device="cpu")
        for index, stride in zip(indices, strides, strict=True):
            at += index * stride * size
        return _bytes(at)


def _bytes(x: Tensor) -> bytes:
    raw: bytes = x.numpy().tobytes()
    return raw


@functools.cache
def _native() -> Any:
    try:
        return extension(Path(__file__).with_suffix(".c"), "graphquant_snapshot")
    except KernelBuildError as why:
        log.debug("weights are compared in Python, which takes longer: %s", why)
        return None
