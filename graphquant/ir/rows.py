"""Views and casts that keep the rows (slices along the last dim) of a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch.fx import Node

from graphquant.ir.graph import aten, dtype, hint, is_call, shape

CASTS = frozenset(
    {
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten._to_copy.default,
        aten.type_as.default,
    }
)


# Casts between these round by less than int8's steps. Float8's steps are coarser.
ROUND_FINELY = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


SIZED_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})


# Views of the same values in the same order, with other sizes.
RESHAPES = SIZED_VIEWS | frozenset(
    {
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
    }
)


# Views that may keep every row (last dim) whole; `keeps_rows` decides for one node.
ROW_VIEWS = RESHAPES | frozenset(
    {
        aten.transpose.int,
        aten.permute.default,
        aten.contiguous.default,
        aten.clone.default,
    }
)


def rows(node: Node) -> int:
    """How many rows (product of all dims but the last) the node's value had at compile time."""
    total = 1
    for size in shape(node)[:-1]:
        total *= hint(size)
    return total


def width(node: Node) -> int:
    """The size of the last dim of the node's value at compile time; 1 where it has none."""
    return hint(*shape(node)[-1:] or (1,))


def is_widening(node: Node) -> bool:
    """A lossless cast: its dtype represents every value of its input's."""
    if not is_float_cast(node):
        return False
    old, new = torch.finfo(dtype(node.all_input_nodes[0])), torch.finfo(dtype(node))
    return new.max >= old.max and new.eps <= old.eps and new.smallest_normal <= old.smallest_normal


def is_float_cast(node: object) -> TypeGuard[Node]:
    """A cast between dtypes of ROUND_FINELY, on one device: it rounds less than int8 does."""
    if not is_call(node, *CASTS):
        return False
    old, new = node.all_input_nodes[0].meta["val"], node.meta["val"]
    return {old.dtype, new.dtype} <= ROUND_FINELY and old.device == new.device


def overflowing(value: Node, producer: Node, given: torch.dtype) -> Node | None:
    """The cast on the way from a producer to this value (views and casts) that may turn finite
    numbers of dtype `given` into inf; None if there is none."""
    found = None
    while value is not producer:
        source = value.all_input_nodes[0]
        if is_float_cast(value) and torch.finfo(dtype(value)).max < torch.finfo(given).max / 2:
            found = value  # half: bfloat16's maximum is float32's up to rounding
        value = source
    return found


def keeps_rows(node: Node) -> bool:
    """A view or copy whose rows (slices along the last dim) are its input's rows."""
    if not is_call(node, *ROW_VIEWS):
        return False
    before, after = shape(node.all_input_nodes[0]), shape(node)
    widths = before[-1:] + after[-1:]
    if not all(isinstance(w, int) for w in widths) or len(set(widths)) != 1 or len(widths) != 2:
        return False
    last = len(before) - 1
    if node.target is aten.transpose.int:
        return last not in (node.args[1] % len(before), node.args[2] % len(before))  # type: ignore[operator]
    if node.target is aten.permute.default:
        return bool(node.args[1][-1] % len(before) == last)  # type: ignore[index, operator]
    if node.target in (aten.unflatten.int, aten.squeeze.dim):
        return last != node.args[1] % len(before)  # type: ignore[operator]
    if node.target is aten.squeeze.dims:
        return last not in [d % len(before) for d in node.args[1]]  # type: ignore[operator, union-attr]
    return True


def origin(node: Node, found: Callable[[Node], object]) -> tuple[Node, list[Node]]:
    """Walk up through row-keeping views and float casts: (producer, views in data order).

    found  stops the walk at a node: a decomposed norm may itself end in a cast
    """
    views: list[Node] = []
    while not found(node) and (keeps_rows(node) or is_float_cast(node)):
        if not is_float_cast(node):
            views.append(node)
        node = node.all_input_nodes[0]
    return node, views[::-1]


def leads_only_to(node: Node, goal: Node) -> bool:
    """Is every use of this value, through row-keeping views and casts, an argument of `goal`?"""
    return all(
        user is goal or ((keeps_rows(user) or is_float_cast(user)) and leads_only_to(user, goal))
        for user in node.users
    )
