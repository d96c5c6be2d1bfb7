"""Many spellings become one. Nothing here changes a number that the model computes.

In order: traces of tracing go (assertions on metadata, eval-mode dropout, casts to the same type);
in-place ops on values of their own become plain ones; equal views become one; a product with a
constant matrix becomes `aten.linear`; what is computed from parameters alone moves to the top.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from graphquant.passes.graph import (
    CASTS,
    LINEAR,
    ROW_VIEWS,
    Constants,
    aten,
    calls,
    drop_dead_code,
    dtype,
    fake_result,
    full_args,
    is_call,
    may_alias,
    shape,
    written_in_place,
)
from graphquant.passes.ir import Captured
from graphquant.passes.regions import sets_state

_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
_FUNCTIONAL = {
    getattr(getattr(aten, f"{op}_"), overload): getattr(getattr(aten, op), overload)
    for ops, overloads in (
        (("add", "sub", "mul", "div"), ("Tensor", "Scalar")),
        (("relu", "silu", "gelu", "sigmoid", "tanh"), ("default",)),
    )
    for op in ops
    for overload in overloads
    if overload in getattr(aten, f"{op}_").overloads()
}


def normalize(captured: Captured) -> None:
    graph = captured.gm.graph
    _drop_no_ops(graph, differentiable=bool(captured.differentiable))
    _make_functional(captured)
    merge_equal_views(graph)
    constants = Constants(captured.parameters)
    _spell_linear(graph, constants)
    _hoist_weights(graph, constants)
    drop_dead_code(graph)


def _drop_no_ops(graph: Graph, *, differentiable: bool) -> None:
    for node in calls(graph, lambda n: True):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)  # it would keep what a rule replaced alive
        elif _is_no_op(node, differentiable):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
    written = written_in_place(graph)
    for node in calls(graph, lambda n: n.target is aten.lift_fresh_copy.default):
        if node not in written:  # else the constant itself would be written, once per call
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)


def _is_no_op(node: Node, differentiable: bool) -> bool:
    if is_call(node, *_DROPOUTS):
        _, p, train = full_args(node)
        return not train or p == 0
    if is_call(node, aten.alias.default):
        return True
    if is_call(node, aten.detach.default):
        return not differentiable
    if is_call(node, aten.detach_.default):  # how torch.tensor(...) ends
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


def _make_functional(captured: Captured) -> None:
    """`y.add_(z)` on a value that has no other name becomes `y = y + z`."""
    graph = captured.gm.graph
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node in calls(graph, lambda n: n.target in _FUNCTIONAL):
        target = node.args[0]
        assert isinstance(target, Node)
        if target.op != "call_function" or may_alias(target):
            continue
        if any(target in may_alias(user) for user in target.users if user is not node):
            continue
        plain = _FUNCTIONAL[node.target]
        value = fake_result(captured.fake_mode, plain, node.args, node.kwargs)
        if value.dtype != dtype(target):
            continue  # in place keeps the type that the plain op would widen
        node.target = plain
        for user in list(target.users):
            if order.get(user, 0) > order[node]:
                user.replace_input_with(target, node)


def merge_equal_views(graph: Graph) -> None:
    """Siblings often make the same view of their input each: one is enough."""
    seen: dict[Any, Node] = {}
    written = written_in_place(graph)  # a reshape may copy: two copies of such are not one
    for node in calls(
        graph,
        lambda n: n.target in ROW_VIEWS and n.target is not aten.clone.default and n not in written,
    ):
        key = (node.target, repr(node.args), repr(node.kwargs), node.all_input_nodes[0])
        if (first := seen.setdefault(key, node)) is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _spell_linear(graph: Graph, constants: Constants) -> None:
    """x @ W and b + x @ W with a constant matrix W [K, N] -> linear(x, W^T, b)."""
    for node in calls(graph, lambda n: n.target in (aten.mm.default, aten.matmul.default)):
        x, weight = full_args(node)
        _to_linear(graph, constants, node, x, weight, None)
    for node in calls(graph, lambda n: n.target is aten.addmm.default):
        bias, x, weight, beta, alpha = full_args(node)
        if beta == alpha == 1 and bias in constants and shape(bias) == shape(weight)[1:]:
            _to_linear(graph, constants, node, x, weight, bias)


def _to_linear(
    graph: Graph, constants: Constants, node: Node, x: Node, weight: Node, bias: Node | None
) -> None:
    if (
        weight not in constants
        or constants.is_fixed(x)
        or len(shape(weight)) != 2
        or not shape(x)[:-1]
    ):
        return
    if not dtype(node).is_floating_point:
        return
    with graph.inserting_before(node):
        if is_call(weight, aten.t.default):
            transposed = weight.all_input_nodes[0]
        else:
            transposed = graph.call_function(aten.t.default, (weight,))
            transposed.meta["val"] = weight.meta["val"].t()
        linear = graph.call_function(LINEAR, (x, transposed, bias))
    linear.meta.update(node.meta)
    node.replace_all_uses_with(linear)
    graph.erase_node(node)


def _hoist_weights(graph: Graph, constants: Constants) -> None:
    """Weights that are computed (cast, split, transposed) are ready before the first linear."""
    wanted: set[Node] = set()
    edge = [a for n in calls(graph, lambda n: n.target is LINEAR) for a in n.args[1:]]
    while edge:
        value = edge.pop()
        if isinstance(value, Node) and constants.is_fixed(value) and value not in wanted:
            wanted.add(value)
            edge += value.all_input_nodes
    if written := written_in_place(graph):  # it matters when such a weight is read
        wanted = {n for n in wanted if written.isdisjoint(constants.made_from(n))}
    first: Node | None = None  # since a context began or ended: they say what a call computes
    for node in list(graph.nodes):
        if node in wanted:
            if first is not None and node.op != "placeholder":
                first.prepend(node)
        elif sets_state(node):
            first = None
        elif first is None and node.op == "call_function":
            first = node
