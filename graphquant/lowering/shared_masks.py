"""Attention masks and biases that several layers read are computed once.

    before  each attention turns the bool mask into floats, and Inductor writes a copy of the mask,
            or of the position bias [B, H, S, S], for each
    after   one float mask, written once (graphquant::materialize)

For Inductor only: what computes the mask is pointwise, so Inductor would rather compute it again
than keep it, and then needs it in memory for each attention.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from graphquant._torch import OpOverload
from graphquant.ir.aliases import written_in_place
from graphquant.ir.contexts import regions
from graphquant.ir.graph import (
    SDPA,
    arguments,
    aten,
    calls,
    dtype,
    is_call,
    is_impure,
    is_random,
    new_call,
)
from graphquant.ops.define import LIB

LIB.define("materialize(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
MATERIALIZE = torch.ops.graphquant.materialize.default
VIEWS = frozenset(
    {
        aten.alias.default,
        aten.expand.default,
        aten.reshape.default,
        aten.slice.Tensor,
        aten.squeeze.dim,
        aten.unsqueeze.default,
        aten.view.default,
    }
)


def materialize(x: Tensor) -> Tensor:
    """A copy; to Inductor, x itself, computed and in memory."""
    return x.clone()


LIB.impl("materialize", materialize, "CompositeExplicitAutograd")
torch.library.register_autograd("graphquant::materialize", lambda _, gradient: gradient, lib=LIB)


def share_masks(graph: Graph) -> None:
    """Materialize every mask that several attentions read, as floats."""
    written = written_in_place(graph)
    first = _first_equals(graph, written)
    readers: defaultdict[tuple[Node, torch.dtype], list[Node]] = defaultdict(list)
    for node in calls(graph, lambda n: n.target is SDPA):
        call = arguments(node)
        if call.attn_mask is not None:
            source = first[_source(call.attn_mask)]
            is_bool = dtype(source) == torch.bool
            readers[source, dtype(call.query if is_bool else source)].append(node)
    for (source, floats), attentions in readers.items():
        is_computed = source.op == "call_function" or dtype(source) != floats
        if len(attentions) > 1 and is_computed and source not in written:
            _share(graph, source, floats, attentions)


def _source(mask: Node) -> Node:
    """The value that a mask is a view of."""
    return _source(mask.all_input_nodes[0]) if is_call(mask, *VIEWS) else mask


def _first_equals(graph: Graph, written: AbstractSet[Node]) -> dict[Node, Node]:
    """For each node, the first that computes the same value: layers add a mask to a bias each."""
    first: dict[Node, Node] = {}
    by_call: dict[Any, Node] = {}
    for node, region in regions(graph):
        first[node] = node
        if not isinstance(node.target, OpOverload) or is_impure(node) or is_random(node):
            continue
        if written.isdisjoint((node, *node.all_input_nodes)):
            call = map_arg((node.args, node.kwargs), first.__getitem__)
            first[node] = by_call.setdefault((node.target, repr(call), region), node)
    return first


def _share(graph: Graph, source: Node, floats: torch.dtype, attentions: Iterable[Node]) -> None:
    def call(target: Any, *args: Any, like: Node = source) -> Node:
        made = new_call(graph, source.meta["val"].fake_mode, target, *args)
        made.meta.update(like.meta | {"val": made.meta["val"]})
        return made

    def replaced(mask: Node) -> Node:
        if not is_call(mask, *VIEWS):
            return floats_of_source
        if mask not in views:
            x, *rest = mask.args
            assert isinstance(x, Node)
            views[mask] = call(mask.target, replaced(x), *rest, like=mask)
        return views[mask]

    views: dict[Node, Node] = {}
    first, *_ = attentions
    with graph.inserting_before(first):
        made = source
        if dtype(source) == torch.bool:  # as torch does for each attention
            made = call(aten.where.Scalar, made, 0.0, -torch.inf)
            made = call(aten.to.dtype, made, floats)
        floats_of_source = call(MATERIALIZE, made)
    for attention in attentions:
        mask = arguments(attention).attn_mask
        with graph.inserting_before(attention):
            attention.replace_input_with(mask, replaced(mask))
