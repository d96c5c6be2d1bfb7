"""Released weights: float values that are no longer in device memory (`free_weights`).

With True, a released weight keeps its sizes, strides, dtype, device and version, so that Dynamo's
guards hold and other sizes can be compiled, but has no memory. It must never pass for a valid one:

    writes, data_ptr(), numpy, views, torch.save and pickles raise in every build of torch
    reads raise as well, with graphquant's message, in builds for CUDA
    in builds for the CPU alone, some operators bypass torch's check and read NaN

With "host" a weight stays a CUDA tensor, in pinned host memory that the device accesses over the
bus: everything that works on a weight works on this one, slower.
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
_nans: list[Tensor] = []  # uint8, larger each time; the older ones may still be read


def is_released(t: Tensor) -> bool:
    """Was the memory of this tensor freed by free_weights=True?"""
    return t.numel() > 0 and t.untyped_storage().nbytes() == 0


def is_in_host_memory(t: Tensor) -> bool:
    """Was this tensor moved by free_weights="host"?"""
    return StorageWeakRef(t.untyped_storage()) in _in_host_memory


def release_memory(
    t: Tensor, name: str, how: bool | str, needed: Container[StorageWeakRef]
) -> int | None:
    """Free the device memory of a weight, unless it is needed or `t` is only a part of it.

    how  True: its values are dropped. "host": they move to host memory.

    Memory that another tensor shares is kept, with its values. Returns the bytes of device memory
    freed; None if nothing was done.
    """
    storage = t.untyped_storage()
    size, memory = storage.nbytes(), StorageWeakRef(storage)
    if not size or memory in needed or size != t.numel() * t.element_size():
        return None
    replacement = in_host_memory(t) if how == "host" else without_memory(t, name)
    if replacement is None:
        return None
    t.data = replacement
    del storage
    return size if memory.expired() else 0


def without_memory(t: Tensor, name: str) -> Tensor:
    """A tensor like this one without memory: reads and writes raise."""
    with torch.inference_mode(t.is_inference()), torch.no_grad():
        empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    storage = empty.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    # torch invalidates tensors of its own by these two
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
    """Address of at least `size` bytes that are NaN in every floating-point dtype.

    The memory is never freed: storages that point to it do not keep it alive.
    """
    if not _nans or _nans[-1].numel() < size:
        larger = max(size, 2 * _nans[-1].numel() if _nans else 0)
        with torch.inference_mode(False):
            _nans.append(torch.full((larger,), 0xFF, dtype=torch.uint8))
    return _nans[-1].data_ptr()


class _Pinned:
    """Pinned host memory as a CUDA array. Tensors made from it keep it alive."""

    def __init__(self, size: int) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        address = self.memory.data_ptr()  # the same on the device: addresses are unified
        return {
            "shape": (self.memory.numel(),),
            "typestr": "|u1",  # there is no typestr for bfloat16
            "data": (address, False),
            "version": 3,
        }


def in_host_memory(t: Tensor) -> Tensor | None:
    """A copy in host memory that the same device can access.

    None if this tensor is in host memory already, as all CPU tensors are.
    """
    if t.device.type != "cuda" or is_in_host_memory(t):
        return None
    with torch.inference_mode(t.is_inference()), torch.no_grad(), torch.cuda.device(t.device):
        pinned = _Pinned(t.numel() * t.element_size())
        flat = torch.as_tensor(pinned, device=t.device)
        if flat.data_ptr() != pinned.memory.data_ptr():
            log.warning(
                'free_weights="host" left a weight on %s: it cannot address pinned host memory',
                t.device,
            )
            return None
        host = flat.view(t.dtype).as_strided(t.shape, t.stride())
        host.copy_(t)
    _in_host_memory.difference_update([s for s in _in_host_memory if s.expired()])
    _in_host_memory.add(StorageWeakRef(host.untyped_storage()))
    return host


def move_back(tensors: Iterable[Tensor]) -> None:
    """Undo `in_host_memory`: move these tensors back to device memory."""
    for t in tensors:
        if is_in_host_memory(t):
            with torch.inference_mode(t.is_inference()), torch.no_grad():
                t.data = t.detach().clone()
