"""Canonicalization of the captured graph, without any change of its numbers.

In order: drop no-ops (metadata assertions, eval-mode dropout, casts to the same dtype);
functionalize in-place writes to intermediates (functionalize.py); merge equal views; turn products
with parameters into `aten.linear` (products.py); hoist what is computed from parameters alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from graphquant.ir.aliases import leaving, memory, written_in_place
from graphquant.ir.captured import Captured
from graphquant.ir.constants import Constants
from graphquant.ir.contexts import sets_state
from graphquant.ir.gradients import needs_gradient
from graphquant.ir.graph import (
    LINEAR,
    aten,
    calls,
    drop_dead_code,
    drops_nothing,
    full_args,
    is_call,
)
from graphquant.ir.rows import CASTS, ROW_VIEWS
from graphquant.passes.functionalize import make_functional
from graphquant.passes.products import to_linears

# They return their input, even where the fake value is a new tensor.
_ALIASES = frozenset({aten.alias.default, aten.lift.default, aten.lift_fresh.default})


def normalize(captured: Captured) -> None:
    """Canonicalize a captured graph in place."""
    graph = captured.gm.graph
    _drop_no_ops(graph, differentiable=bool(captured.differentiable))
    make_functional(captured)
    _drop_copies_of_constants(graph)
    merge_equal_views(graph)
    constants = Constants(captured.parameters)
    needs_grad = needs_gradient(graph, captured.differentiable, captured.grad_enabled)
    to_linears(graph, captured.fake_mode, constants, needs_grad)
    _hoist_weights(graph, constants)
    drop_dead_code(graph)


def _drop_no_ops(graph: Graph, *, differentiable: bool) -> None:
    for node in calls(graph, lambda n: True):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)  # it would keep replaced nodes alive
        elif _is_no_op(node, differentiable):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)


def _drop_copies_of_constants(graph: Graph) -> None:
    """Drop the copy that torch.tensor(0.5) in forward makes, unless it is written or returned."""
    copies = list(calls(graph, lambda n: n.target is aten.lift_fresh_copy.default))
    if not copies:
        return
    kept = written_in_place(graph) | leaving(graph)
    for node in copies:
        if node not in kept:
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)


def _is_no_op(node: Node, differentiable: bool) -> bool:
    if drops_nothing(node):
        return True
    if is_call(node, *_ALIASES):
        return True
    if is_call(node, aten.detach.default):
        return not differentiable
    if is_call(node, aten.detach_.default):  # the last op of torch.tensor(...)
        fresh = is_call(node.all_input_nodes[0], aten.lift_fresh_copy.default)
        return fresh or not differentiable
    if is_call(node, *CASTS):
        source = node.all_input_nodes[0]
        before, after = source.meta["val"], node.meta["val"]
        copies = node.target is aten._to_copy.default or any(
            value is True or isinstance(value, torch.memory_format)
            for value in full_args(node)  # copy=True, memory_format=...
        )
        return not copies and (before.dtype, before.device) == (after.dtype, after.device)
    return False


def merge_equal_views(graph: Graph) -> None:
    """Merge equal views, such as those that q, k and v each make of their input.

    A reshape that copies is not merged if a copy is written in place or returned.
    """
    seen: dict[Any, Node] = {}
    written, returned = written_in_place(graph), leaving(graph)
    for node in calls(
        graph,
        lambda n: n.target in ROW_VIEWS and n.target is not aten.clone.default and n not in written,
    ):
        if node in returned and memory(node).isdisjoint(memory(node.all_input_nodes[0])):
            continue
        key = (node.target, repr(node.args), repr(node.kwargs), node.all_input_nodes[0])
        if (first := seen.setdefault(key, node)) is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _hoist_weights(graph: Graph, constants: Constants) -> None:
    """Move computed weights (casts, splits, transposes) to the top, or behind the last context."""
    wanted: set[Node] = set()
    edge = [a for n in calls(graph, lambda n: n.target is LINEAR) for a in n.args[1:]]
    while edge:
        value = edge.pop()
        if isinstance(value, Node) and constants.is_fixed(value) and value not in wanted:
            wanted.add(value)
            edge += value.all_input_nodes
    first: Node | None = None  # call since the last context change, such as autocast
    for node in list(graph.nodes):
        if node in wanted:
            if first is not None and node.op != "placeholder":
                first.prepend(node)
        elif sets_state(node):
            first = None
        elif first is None and node.op == "call_function":
            first = node
