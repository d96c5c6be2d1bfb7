"""Weights whose float values are not on the device any more: `free_weights=True` and "host".

A released weight keeps its sizes, strides, dtype, device and version, so that Dynamo's guards hold
and other sizes can be compiled, but it has no memory. It must never look like a weight that has:

    writes, data_ptr(), numpy, views, torch.save and pickles raise in every build of torch
    reads raise as well, with a message of ours, in builds for CUDA
    in builds for the CPU alone, some operators read past torch's check: there they find NaN

With "host" a weight is a CUDA tensor as before, but in pinned host memory, which the device reads
and writes over the bus: everything that works on a weight works on this one, slower.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from graphquant._torch import forbid_reads, forbid_writes, point_at

log = logging.getLogger(__name__)

_in_host_memory: set[StorageWeakRef] = set()
_nans: list[Tensor] = []  # bytes; older ones may still be read


def is_released(t: Tensor) -> bool:
    """Was the memory of this tensor given back by free_weights=True?"""
    return t.numel() > 0 and t.untyped_storage().nbytes() == 0


def is_in_host_memory(t: Tensor) -> bool:
    """Was this tensor moved by free_weights="host"?"""
    return StorageWeakRef(t.untyped_storage()) in _in_host_memory


def let_go(t: Tensor, name: str, how: bool | str, needed: Container[StorageWeakRef]) -> int | None:
    """Take a weight off its device, unless its memory is needed or belongs to other tensors too.

    how  True: its values are given up. "host": they move to host memory.

    Whoever holds the same memory under another name keeps it, with its values. Returns the bytes of
    device memory that became free; None if nothing was done.
    """
    storage = t.untyped_storage()
    size, memory = storage.nbytes(), StorageWeakRef(storage)
    if not size or memory in needed or size != t.numel() * t.element_size():
        return None
    instead = in_host_memory(t) if how == "host" else without_memory(t, name)
    if instead is None:
        return None
    t.data = instead
    del storage
    return size if memory.expired() else 0


def without_memory(t: Tensor, name: str) -> Tensor:
    """A tensor like this one that holds no memory: to read or to write it raises."""
    with torch.inference_mode(t.is_inference()), torch.no_grad():
        empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    storage = empty.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    # torch makes its own dead tensors raise by these two
    raises = forbid_reads(
        storage,
        f"{name}: free_weights=True released the float values of this weight. "
        "load_state_dict(values, assign=True) brings them back",
    )
    if not raises and t.device.type == "cpu":
        point_at(storage, _address_of_nans(size), t.device)
    forbid_writes(empty)
    return empty


def _address_of_nans(size: int) -> int:
    """Memory of at least `size` bytes that every floating-point dtype reads as NaN. It is never
    freed: storages that point to it do not keep it."""
    if not _nans or _nans[-1].numel() < size:
        larger = max(size, 2 * _nans[-1].numel() if _nans else 0)
        with torch.inference_mode(False):
            _nans.append(torch.full((larger,), 0xFF, dtype=torch.uint8))
    return _nans[-1].data_ptr()


class _Pinned:
    """Host memory as CUDA libraries hand memory to each other. What reads it keeps it alive."""

    def __init__(self, size: int) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        address = self.memory.data_ptr()  # the same on the device: addresses are unified
        return {
            "shape": (self.memory.numel(),),
            "typestr": "|u1",  # no typestr stands for bfloat16
            "data": (address, False),
            "version": 3,
        }


def in_host_memory(t: Tensor) -> Tensor | None:
    """A tensor on the same device with the same values, in host memory. None where this one is
    there already, and on the CPU, where all weights are."""
    if t.device.type != "cuda" or is_in_host_memory(t):
        return None
    with torch.inference_mode(t.is_inference()), torch.no_grad(), torch.cuda.device(t.device):
        pinned = _Pinned(t.numel() * t.element_size())
        flat = torch.as_tensor(pinned, device=t.device)
        if flat.data_ptr() != pinned.memory.data_ptr():
            log.warning(
                'free_weights="host" left a weight on %s: it cannot address this host memory',
                t.device,
            )
            return None
        host = flat.view(t.dtype).as_strided(t.shape, t.stride())
        host.copy_(t)
    _in_host_memory.difference_update([s for s in _in_host_memory if s.expired()])
    _in_host_memory.add(StorageWeakRef(host.untyped_storage()))
    return host


def bring_back(tensors: Iterable[Tensor]) -> None:
    """Undo `in_host_memory` for those that were moved: they are on their device again."""
    for t in tensors:
        if is_in_host_memory(t):
            with torch.inference_mode(t.is_inference()), torch.no_grad():
                t.data = t.detach().clone()
