"""Who sees how a value lies in memory sees what eager gives.

A rule replaces a value by an equal one that may lie otherwise: a slice of a stacked product, tokens
for pixels. Most readers do not care. The caller does, who gets the graph's results, views them, or
saves them with all the memory that they hold; and so do ops that read strides, offsets or bytes.
Where such a value reaches one of them, through views or through ops that follow their input's
layout, it is copied into the layout that the model gave it.

    EAGER in a node's meta    the fake value as the model had it, if the node's own lies otherwise
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

_READERS = frozenset(
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
_KNOWN = frozenset({"aten", "prims", "graphquant"})  # namespaces of ops that are not a user's
_OF_BYTES = (aten.view.dtype, aten.view_copy.dtype)


def stands_for(now: Node, old: Node) -> None:
    """`now` takes the place of `old`: note how that lay in memory."""
    value = old.meta.get(EAGER, old.meta["val"])
    if same_layout(now.meta["val"], value):
        now.meta["val"] = value  # with it, what is known of aliases
    else:
        now.meta[EAGER] = value


def reads_layout(node: Node) -> bool:
    """Does it depend on how its inputs lie in memory, or may it?"""
    target = node.target
    if not isinstance(target, OpOverload):
        return node.op == "call_function" and target is not operator.getitem
    if target.namespace not in _KNOWN:
        return True
    name = target._schema.name.partition("::")[2]
    if torch.Tag.nondeterministic_seeded in target.tags and "attention" not in name:
        return True  # rand_like draws in the order of memory; attention, only for its dropout
    return target in _OF_BYTES or name in _READERS


def restore_layouts(graph: Graph, fake_mode: FakeTensorMode) -> None:
    """Copy what lies otherwise than in the model, where that shows."""
    sources = [n for n in graph.nodes if EAGER in n.meta]
    stuck: set[Node] = set()
    while sources:
        failed = _follow(graph, fake_mode, _shown(graph, stuck))
        if failed is None or failed in stuck:
            break
        stuck.add(failed)  # it cannot read its input as it lies: once more, with a copy
        for node in graph.nodes:
            if EAGER in node.meta and node not in sources:
                node.meta["val"] = node.meta.pop(EAGER)
    for node in graph.nodes:
        node.meta.pop(EAGER, None)


def _shown(graph: Graph, stuck: Iterable[Node]) -> set[Node]:
    """Values whose layout shows, and those of which they are views."""
    readers = [n for n in graph.nodes if n.op == "output" or reads_layout(n)]
    edge = [i for n in (*readers, *stuck) for i in n.all_input_nodes]
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
    """Where it lies, and where it lay in the model."""
    return memory(node) | memory_of(node.meta.get(EAGER))


def _follow(graph: Graph, fake_mode: FakeTensorMode, shown: set[Node]) -> Node | None:
    """Infer again what is computed from values that lie otherwise; copy them where it shows.

    Returns a node that cannot be computed from them, if there is one.
    """
    nodes: list[Node] = list(graph.nodes)
    for node in nodes:
        if any(EAGER in i.meta for i in node.all_input_nodes) and not _infer(node, fake_mode):
            return node
        if EAGER in node.meta and node in shown and is_tensor(node):
            _restore(node, fake_mode)
    return None


def _infer(node: Node, fake_mode: FakeTensorMode) -> bool:
    """The fake value that a node has by now; False if it can have none."""
    if node.op != "call_function" or not _is_op(node):
        return True
    old = node.meta.get("val")
    if old is None or free_unbacked_symbols(old):
        return True  # a size that is known from the data has one name
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
    """Everyone reads a copy of the node, which lies as it lay in the model."""
    readers, value = list(node.users), node.meta.pop(EAGER)
    made = _copy(node, value, fake_mode)
    for reader in readers:
        reader.replace_input_with(node, made)
    made.meta["val"] = value


def _copy(node: Node, value: Tensor, fake_mode: FakeTensorMode) -> Node:
    """A copy of the node with the strides of `value`."""
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
