"""Snapshots of tensors: detect that they were changed or replaced.

A write through an alias (`p.data += delta`, a write through numpy, or to the flat buffer that
parameters are views of) changes neither object nor version, address or storage. So sampled values
are compared as well, as bytes.
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
from graphquant.ops.runtime.build import extension
from graphquant.weights.released import is_released

log = logging.getLogger(__name__)

# Values compared of a large tensor. A write that moves bfloat16 weights by a thousandth changes one
# in five of them, and is missed with a probability of 0.8^128 = 4e-13.
SAMPLES = 128
WHOLE = 8192  # bytes up to which all values of a tensor are compared: biases, norms


class Snapshot(Protocol):
    """State of the tensors at some positions of a call's arguments. Does not keep them alive."""

    def unchanged(self, args: Sequence[Any], /) -> bool: ...


@dataclass(frozen=True)
class TensorState:
    """Version, memory and sampled values of one tensor at one time."""

    version: int | None
    address: int  # 0 for a released weight, whose data_ptr() raises
    storage: StorageWeakRef  # `p.data = new` may reuse the address of the old storage
    values: bytes | None = None  # None: not read

    @classmethod
    def of(cls, t: Tensor, values: bytes | None = None) -> TensorState:
        storage = StorageWeakRef(t.untyped_storage())
        return cls(version_of(t), 0 if is_released(t) else t.data_ptr(), storage, values)

    def metadata(self) -> tuple[Any, ...]:
        return self.version, self.address, self.storage.cdata

    def matches(self, other: TensorState) -> bool:
        known = self.values is not None and other.values is not None
        return self.metadata() == other.metadata() and not (known and self.values != other.values)


def snapshot(
    positions: Sequence[int], tensors: Sequence[Tensor], states: Sequence[TensorState]
) -> Snapshot:
    """A Snapshot of `tensors`, the arguments at `positions`, in their current `states`."""
    native = _native()
    if native is None:
        return _PythonSnapshot(tuple(positions), tuple(map(id, tensors)), tuple(states))
    storages = tuple(s.storage for s in states)
    samples = tuple(map(_samples, tensors, states))
    addresses = tuple(s.address for s in states)
    result: Snapshot = native.Snapshot(
        tuple(positions), tuple(tensors), addresses, storages, samples, *getters()
    )
    return result


@dataclass(frozen=True)
class _PythonSnapshot:
    """Fallback without a C compiler: takes milliseconds for a model of many layers."""

    positions: tuple[int, ...]
    ids: tuple[int, ...]
    states: tuple[TensorState, ...]

    def unchanged(self, args: Sequence[Any], /) -> bool:
        return all(
            position < len(args) and id(args[position]) == i and _unchanged(args[position], state)
            for position, i, state in zip(self.positions, self.ids, self.states, strict=True)
        )


def _unchanged(t: Tensor, state: TensorState) -> bool:
    """Is this the state of the tensor, as far as is known without waiting for a GPU?"""
    return (
        TensorState.of(t).metadata() == state.metadata()
        and not state.storage.expired()
        and (state.values is None or t.device.type != "cpu" or values(t) == state.values)
    )


def values(t: Tensor) -> bytes | None:
    """The bytes of sampled values of a CPU tensor, of all values if it is small; else None."""
    if t.device.type != "cpu" or not has_values(t):
        return None
    with torch.inference_mode():
        x = t.detach()
        # a copy in either case: storage that numpy has shared can never be resized again
        x = x.clone().view(-1) if _is_whole(t) else torch.take(x, _sample_indices(t.numel()))
        return _bytes(x.view(torch.uint8))


def has_values(t: Tensor) -> bool:
    return t.layout == torch.strided and t.numel() > 0 and not is_released(t)


@functools.lru_cache(maxsize=256)
def _sample_indices(numel: int) -> Tensor:
    """A random element of each of SAMPLES equal parts of a tensor; always the same ones."""
    count = min(SAMPLES, numel)
    random = torch.Generator().manual_seed(numel)
    with torch.inference_mode(False):
        part = torch.rand(count, generator=random, dtype=torch.float64, device="cpu")
        part += torch.arange(count, device="cpu")
        return (part * (numel / count)).long().clamp_(max=numel - 1)


def _is_whole(t: Tensor) -> bool:
    return t.numel() * t.element_size() <= WHOLE and t.is_contiguous()


def _samples(t: Tensor, state: TensorState) -> tuple[int, bytes, bytes] | None:
    """For snapshot.c: bytes per value, offsets of the values, the values."""
    if state.values is None or t.device.type != "cpu":
        return None
    if _is_whole(t):
        return len(state.values), bytes(8), state.values
    return t.element_size(), offsets(t), state.values


def offsets(t: Tensor) -> bytes:
    """Byte offsets from the first element of the sampled values, as the bytes of int64."""
    return _offsets(t.shape, t.stride(), t.element_size())


@functools.lru_cache(maxsize=256)
def _offsets(shape: torch.Size, strides: tuple[int, ...], size: int) -> bytes:
    with torch.inference_mode():
        sampled = _sample_indices(shape.numel())
        at = torch.zeros_like(sampled)
        for index, stride in zip(torch.unravel_index(sampled, shape), strides, strict=True):
            at += index * stride * size
        return _bytes(at)


def _bytes(x: Tensor) -> bytes:
    raw: bytes = x.numpy().tobytes()
    return raw


@functools.cache
def _native() -> Any:
    try:
        source = Path(__file__).with_suffix(".c")
        return extension([source], "graphquant_snapshot", "fast checks of weights")
    except KernelBuildError as why:
        log.debug("weights are compared in Python, which is slower: %s", why)
        return None
