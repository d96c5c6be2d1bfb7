"""Eager's memory layout for graph outputs and for ops that depend on strides, offsets or bytes.

A rule replaces a value by an equal one whose layout may differ: a slice of a stacked product, or
tokens for pixels. Where such a value reaches an output or a layout-dependent op, directly, through
views, or through ops that propagate their input's layout, it is copied into the model's layout.

    node.meta[EAGER]    the fake value with the model's layout, where the node's own differs
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from graphquant._torch import FakeTensorMode, OpOverload, statically_known_true, tree_leaves
from graphquant.ir.aliases import may_alias, memory, memory_of, same_layout
from graphquant.ir.graph import aten, autocast_at, fake_result, hint, is_tensor
from graphquant.ir.rows import SIZED_VIEWS

EAGER = "graphquant_eager"

_STRIDE_READERS = frozenset(
    {
        "as_strided",
        "as_strided_",
        "as_strided_copy",
        "as_strided_scatter",
        "is_contiguous",
        "is_non_overlapping_and_dense",
        "is_strides_like_format",
        "resize",
        "resize_",
        "resize_as",
        "resize_as_",
        "set",
        "set_",
        "storage_offset",
        "stride",
        "sym_is_contiguous",
        "sym_storage_offset",
        "sym_stride",
        "view_as_complex",
    }
)
_LIBRARIES = frozenset({"aten", "prims", "graphquant"})  # any other namespace holds custom ops
_BYTE_VIEWS = (aten.view.dtype, aten.view_copy.dtype)


def inherit_layout(now: Node, old: Node) -> None:
    """Note on `now`, which replaces `old`, the layout that `old` had in the model."""
    value = old.meta.get(EAGER, old.meta["val"])
    if same_layout(now.meta["val"], value):
        now.meta["val"] = value  # it carries the storage, and so the aliases
    else:
        now.meta[EAGER] = value


def reads_layout(node: Node) -> bool:
    """May its result depend on the memory layout of its inputs?"""
    target = node.target
    if not isinstance(target, OpOverload):
        return node.op == "call_function" and target is not operator.getitem
    if target.namespace not in _LIBRARIES:
        return True
    name = target._schema.name.partition("::")[2]
    if torch.Tag.nondeterministic_seeded in target.tags and "attention" not in name:
        return True  # rand_like fills in memory order; attention draws only for dropout
    return target in _BYTE_VIEWS or name in _STRIDE_READERS


def restore_layouts(graph: Graph, fake_mode: FakeTensorMode) -> None:
    """Copy values whose layout differs from the model's, where that is visible. Clears EAGER."""
    sources = [n for n in graph.nodes if EAGER in n.meta]
    forced: set[Node] = set()
    while sources:
        failed = _propagate(graph, fake_mode, _layout_visible(graph, forced))
        if failed is None or failed in forced:
            break
        forced.add(failed)  # it cannot read its input in this layout: retry with a copy
        for node in graph.nodes:
            if EAGER in node.meta and node not in sources:
                node.meta["val"] = node.meta.pop(EAGER)
    for node in graph.nodes:
        node.meta.pop(EAGER, None)


def _layout_visible(graph: Graph, forced: Iterable[Node]) -> set[Node]:
    """Values whose layout is visible, and the values that they are views of."""
    readers = [n for n in graph.nodes if n.op == "output" or reads_layout(n)]
    edge = [i for n in (*readers, *forced) for i in n.all_input_nodes]
    found: set[Node] = set()
    while edge:
        node = edge.pop()
        if node not in found:
            found.add(node)
            edge += [i for i in node.all_input_nodes if _is_view_of(node, i)]
    return found


def _is_view_of(node: Node, other: Node) -> bool:
    ours, theirs = _memory(node), _memory(other)
    if ours and theirs:
        return not ours.isdisjoint(theirs)
    return other in may_alias(node)


def _memory(node: Node) -> frozenset[int]:
    """The node's storages, now and in the model."""
    return memory(node) | memory_of(node.meta.get(EAGER))


def _propagate(graph: Graph, fake_mode: FakeTensorMode, visible: set[Node]) -> Node | None:
    """Re-infer fake values downstream of changed layouts; copy where the layout is visible.

    Returns the first node that cannot take its inputs in their new layout, or None.
    """
    nodes: list[Node] = list(graph.nodes)
    for node in nodes:
        if any(EAGER in i.meta for i in node.all_input_nodes) and not _infer(node, fake_mode):
            return node
        if EAGER in node.meta and node in visible and is_tensor(node):
            _restore(node, fake_mode)
    return None


def _infer(node: Node, fake_mode: FakeTensorMode) -> bool:
    """Re-infer a node's fake value. False if the op fails on the new layout."""
    if node.op != "call_function" or not _is_op(node):
        return True
    old = node.meta.get("val")
    if old is None or free_unbacked_symbols(old):
        return True  # running it again would make new unbacked symbols
    try:
        value = _run(node, fake_mode)
    except (RuntimeError, ValueError):
        if node.target not in SIZED_VIEWS:
            return False
        node.target = aten.reshape.default  # where `view` fails, it copies
        value = _run(node, fake_mode)
    read = frozenset[int]().union(*map(memory, node.all_input_nodes))
    pairs = list(zip(tree_leaves(value), tree_leaves(old), strict=True))
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor)]
    if read.isdisjoint(memory_of(value)) and all(same_layout(a, b) for a, b in tensors):
        return True
    node.meta.setdefault(EAGER, old)
    node.meta["val"] = value
    return True


def _is_op(node: Node) -> bool:
    return isinstance(node.target, OpOverload) or node.target is operator.getitem


def _run(node: Node, fake_mode: FakeTensorMode) -> object:
    with autocast_at(node):
        return fake_result(fake_mode, node.target, node.args, node.kwargs)


def _restore(node: Node, fake_mode: FakeTensorMode) -> None:
    """Make all users read a copy of the node in the model's layout."""
    readers, value = list(node.users), node.meta.pop(EAGER)
    made = _copy(node, value, fake_mode)
    for reader in readers:
        reader.replace_input_with(node, made)
    made.meta["val"] = value


def _copy(node: Node, value: Tensor, fake_mode: FakeTensorMode) -> Node:
    """Add a copy of the node with the strides of `value`."""
    graph, last = node.graph, node

    def call(target: object, *args: object, **kwargs: object) -> Node:
        nonlocal last
        with graph.inserting_after(last):
            last = graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
        last.meta.update({k: v for k, v in node.meta.items() if k != "val"})
        last.meta["val"] = _run(last, fake_mode)
        return last

    strides = [hint(s) for s in value.stride()]
    order = sorted(range(value.dim()), key=lambda i: -strides[i])
    if order == sorted(order):
        made = call(aten.clone.default, node, memory_format=torch.contiguous_format)
    else:
        made = call(aten.permute.default, node, order)
        made = call(aten.clone.default, made, memory_format=torch.contiguous_format)
        made = call(aten.permute.default, made, [order.index(i) for i in range(len(order))])
    numbers = (*value.shape, *value.stride())
    if _same_strides(made.meta["val"], value) or not all(isinstance(n, int) for n in numbers):
        return made
    room = call(aten.new_empty_strided.default, node, list(value.shape), list(value.stride()))
    return call(aten.copy_.default, room, node)


def _same_strides(a: Tensor, b: Tensor) -> bool:
    return all(statically_known_true(m == n) for m, n in zip(a.stride(), b.stride(), strict=True))
