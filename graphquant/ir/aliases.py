"""Which values of a graph share memory, and which are written in place."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from graphquant._torch import (
    HigherOrderOperator,
    OpOverload,
    statically_known_true,
    storage_id,
    tree_leaves,
)
from graphquant.ir.graph import aten, full_args, is_tensor, nodes_in


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Do two fake values have equal sizes, strides, storage offset and storage size?

    Symbolic sizes are equal only if that is known without a guard.
    """
    return a.dim() == b.dim() and all(
        statically_known_true(m == n) for m, n in zip(_layout(a), _layout(b), strict=True)
    )


def _layout(value: Tensor) -> tuple[Any, ...]:
    storage = value.untyped_storage().nbytes() if _storage(value) is not None else 0
    return (*value.shape, *value.stride(), value.storage_offset(), storage)


def writes(node: Node) -> list[Node]:
    """The arguments whose memory this node writes to."""
    if isinstance(node.target, HigherOrderOperator):
        return _written_inside(node)
    if not isinstance(node.target, OpOverload):
        return []
    mutable, flags = _may_write(node.target)
    if not mutable:
        return []
    names = (a.name for a in node.target._schema.arguments)
    named = dict(zip(names, full_args(node), strict=True))
    if flags and not any(named[flag] is True for flag in flags):
        return []
    return [n for name in mutable for n in nodes_in(named[name])]


@cache
def _may_write(op: OpOverload) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(arguments that an op writes to, flags of which one must be True for that)."""
    if op in _WRITES_NO_VALUE:
        return (), ()
    arguments = {a.name: a for a in op._schema.arguments}
    if op._schema.is_mutable:
        return tuple(n for n, a in arguments.items() if a.alias_info and a.alias_info.is_write), ()
    flags = tuple(flag for flag in _UPDATES_STATISTICS if flag in arguments)
    return tuple(name for name in _STATISTICS if name in arguments and flags), flags


_WRITES_NO_VALUE = frozenset({aten.detach_.default})  # it changes only autograd metadata


# batch_norm, instance_norm and similar ops update these, which their schemas do not declare
_STATISTICS = ("running_mean", "running_var")


_UPDATES_STATISTICS = ("training", "train", "use_input_stats")


def _written_inside(node: Node) -> list[Node]:
    """The arguments that a higher-order op writes to: all of them, if any of its graphs writes."""
    root = node.graph.owning_module
    read = [n for n in node.all_input_nodes if is_tensor(n)]
    names = [n.target for n in node.all_input_nodes if n.op == "get_attr"]
    inner = [g for name in names if isinstance(g := getattr(root, str(name), None), GraphModule)]
    if any(writes(n) for g in inner for n in g.graph.nodes):
        return read
    return read if "mutation" in node.target.name() else []  # type: ignore[union-attr]  # Triton's


def memory(node: Node) -> frozenset[int]:
    """The storages of a node's value. Empty if unknown."""
    return memory_of(node.meta.get("val"))


def memory_of(value: object) -> frozenset[int]:
    """The storages of a fake value, or of several."""
    values = [value] if isinstance(value, Tensor) else tree_leaves(value)
    return frozenset(at for v in values if (at := _storage(v)) is not None)


def _storage(value: object) -> int | None:
    if not isinstance(value, Tensor):
        return None
    try:
        return storage_id(value)
    except (NotImplementedError, RuntimeError):  # sparse tensors and subclasses have none
        return None


def may_alias(node: Node) -> list[Node]:
    """The inputs whose memory this node's value may share.

    Both by the storage of its fake value and by the schema: einsum, meshgrid or broadcast_tensors
    return views that their schemas do not declare; and a reshape that copied when the model was
    traced may return a view once a rule has changed its input's layout.
    """
    if node.op != "call_function":
        return []
    declared: list[Node] = []
    if isinstance(node.target, OpOverload):
        for argument, given in zip(node.target._schema.arguments, full_args(node), strict=True):
            if argument.alias_info is not None:
                declared += nodes_in(given)
    elif node.target is operator.getitem:
        declared = node.all_input_nodes
    own = memory(node)
    return [i for i in node.all_input_nodes if i in declared or not own.isdisjoint(memory(i))]


def families(graph: Graph) -> Callable[[Node], Node]:
    """Union-find of alias sets: a function from a value to the representative of its set."""
    family: dict[Node, Node] = {}
    first: dict[int, Node] = {}

    def head(n: Node) -> Node:
        while n in family:
            n = family[n]
        return n

    for node in graph.nodes:
        here = (first.setdefault(at, node) for at in memory(node))  # inputs share memory as well
        for other in (*may_alias(node), *here):
            if head(node) is not head(other):
                family[head(node)] = head(other)
    return head


def written_in_place(graph: Graph) -> set[Node]:
    """Every value whose memory some node of the graph writes to, through any alias of it."""
    targets = [n for node in graph.nodes for n in writes(node)]
    if not targets:
        return set()
    head = families(graph)
    written = {head(n) for n in targets}
    return {n for n in graph.nodes if head(n) in written}


def leaving(graph: Graph) -> set[Node]:
    """Every value whose memory is returned to the caller, through any alias of it."""
    head = families(graph)
    returned = {head(n) for n in graph.output_node().all_input_nodes}
    return {n for n in graph.nodes if head(n) in returned}
