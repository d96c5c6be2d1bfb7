"""The floating-point tensors of what a model returns."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from graphquant.errors import UnsupportedInputError

Named = tuple[str, Tensor]

# of these nothing is a result
_VALUES = (
    *(type(None), bool, int, float, complex, str, bytes, type, range),
    *(torch.dtype, torch.device, torch.Size, torch.SymInt, torch.SymFloat, torch.SymBool),
    *(nn.Module, FunctionType, MethodType, ModuleType),
)


def kept(result: Any) -> dict[str, Tensor]:
    """Copies of the floating-point tensors of what a model returned, and where each stands: the
    next call may write to the same memory, or into the same mapping.

    Raises UnsupportedInputError if there are none, or if it holds something that cannot be looked
    into.
    """
    found = {name: tensor.detach().clone() for name, tensor in _tensors(result)}
    if not found:
        raise UnsupportedInputError("the model returns no floating-point tensor to compare")
    return found


def _tensors(value: Any, name: str = "", above: tuple[int, ...] = ()) -> Iterator[Named]:
    """The floating-point tensors of a model's output, and where each stands."""
    if isinstance(value, Tensor):
        if value.is_complex():
            value = torch.view_as_real(value)
        if value.is_floating_point():
            yield name or "output", value
    elif not isinstance(value, _VALUES) and id(value) not in above:
        for inner, part in _parts(value, name):
            yield from _tensors(part, inner, (*above, id(value)))


def _parts(value: Any, name: str) -> Iterable[tuple[str, Any]]:
    """What a container holds, and where."""
    if isinstance(value, Mapping):  # transformers' ModelOutput is one
        return ((f"{name}.{k}" if name else str(k), v) for k, v in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _fields(name, value, value._fields)
    if isinstance(value, (tuple, list, deque)):
        return ((f"{name}[{i}]", v) for i, v in enumerate(value))
    if dataclasses.is_dataclass(value):
        return _fields(name, value, [f.name for f in dataclasses.fields(value)])
    leaves = tree_leaves(value)
    if not (len(leaves) == 1 and leaves[0] is value):  # a pytree that was registered
        return ((f"{name}[{i}]", v) for i, v in enumerate(leaves))
    if hasattr(value, "__dict__"):  # such as a cache of keys and values
        return _fields(name, value, list(vars(value)))
    raise UnsupportedInputError(
        f"{name or 'what the model returns'} is a {type(value).__name__}, which cannot be compared"
    )


def _fields(name: str, value: Any, fields: Iterable[str]) -> Iterator[tuple[str, Any]]:
    return ((f"{name}.{f}" if name else f, getattr(value, f)) for f in fields)
