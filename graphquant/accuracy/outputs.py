"""Finds the floating-point tensors in a model's result."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from graphquant._torch import tree_leaves
from graphquant.errors import UnsupportedInputError

Named = tuple[str, Tensor]

# without tensors to compare
_VALUES = (
    *(type(None), bool, int, float, complex, str, bytes, type, range),
    *(torch.dtype, torch.device, torch.Size, torch.SymInt, torch.SymFloat, torch.SymBool),
    *(nn.Module, FunctionType, MethodType, ModuleType),
)


def copy_outputs(result: Any) -> dict[str, Tensor]:
    """Name (as in OutputAccuracy) -> copy of each floating-point tensor in a model's result, whose
    memory the next call may reuse.

    Raises UnsupportedInputError if there are none, or for objects of unknown structure.
    """
    found = {name: tensor.detach().clone() for name, tensor in _tensors(result)}
    if not found:
        raise UnsupportedInputError("the model returns no floating-point tensor to compare")
    return found


def _tensors(value: Any, name: str = "", above: tuple[int, ...] = ()) -> Iterator[Named]:
    """(name, tensor) of each floating-point tensor; complex ones as real."""
    if isinstance(value, Tensor):
        if value.is_complex():
            value = torch.view_as_real(value)
        if value.is_floating_point():
            yield name or "output", value
    elif not isinstance(value, _VALUES) and id(value) not in above:
        for inner, part in _parts(value, name):
            yield from _tensors(part, inner, (*above, id(value)))


def _parts(value: Any, name: str) -> Iterable[tuple[str, Any]]:
    """(name, value) of each element of a container."""
    if isinstance(value, Mapping):  # such as transformers' ModelOutput
        return ((f"{name}.{k}" if name else str(k), v) for k, v in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _fields(name, value, value._fields)
    if isinstance(value, (tuple, list, deque)):
        return ((f"{name}[{i}]", v) for i, v in enumerate(value))
    if dataclasses.is_dataclass(value):
        return _fields(name, value, [f.name for f in dataclasses.fields(value)])
    leaves = tree_leaves(value)
    if not (len(leaves) == 1 and leaves[0] is value):  # a registered pytree
        return ((f"{name}[{i}]", v) for i, v in enumerate(leaves))
    if hasattr(value, "__dict__"):  # such as a KV cache
        return _fields(name, value, list(vars(value)))
    raise UnsupportedInputError(
        f"{name or 'what the model returns'} is a {type(value).__name__}, which cannot be compared"
    )


def _fields(name: str, value: Any, fields: Iterable[str]) -> Iterator[tuple[str, Any]]:
    return ((f"{name}.{f}" if name else f, getattr(value, f)) for f in fields)
