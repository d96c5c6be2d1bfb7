"""Tells int8 ops how many rows of their inputs are tokens.

Where tokens stand in front of B * S rows, their number is known on the device only. Ops that are
given it leave early; what they write behind the tokens is never read.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator

from torch.fx import Graph, Node

from graphquant.ir.graph import hints, with_arguments
from graphquant.ir.rows import rows
from graphquant.ops import int8_linear, norm_quantize, norm_quantize_keep, quantize
from graphquant.passes.padding.rewrite import PACKED, SCATTERED, TOKENS

COUNT = 5  # the result of token_index with the number of tokens
LIMITED = frozenset(op.target for op in (int8_linear, norm_quantize, norm_quantize_keep, quantize))


def limit_rows(graph: Graph) -> None:
    """Set `num_rows` of int8 ops on packed values, in place."""
    counts: dict[Node, Node] = {}
    for node, index in list(_packed(graph)):
        x = node.args[0]
        assert isinstance(x, Node)
        if node.target not in LIMITED or rows(x) != _total(index):  # rows of something else
            continue
        if index not in counts:
            with graph.inserting_after(index):
                counts[index] = graph.call_function(operator.getitem, (index, COUNT))
            counts[index].meta["val"] = index.meta["val"][COUNT]
        node.args, node.kwargs = with_arguments(node, num_rows=counts[index]), {}


def shares_of_rows(graph: Graph) -> dict[Node, float]:
    """The share of rows that are tokens, of values in which others follow them."""
    return {n: index.meta[TOKENS] / _total(index) for n, index in _packed(graph)}


def _packed(graph: Graph) -> Iterator[tuple[Node, Node]]:
    """Nodes whose rows are tokens in front of others, and their token_index."""
    found: dict[Node, Node] = {}
    for node in graph.nodes:
        if PACKED in node.meta:
            found[node] = node.meta[PACKED]
        elif SCATTERED not in node.meta:
            indices = (found[i] for i in node.all_input_nodes if i in found)
            if (index := next(indices, None)) is not None:
                found[node] = index
        if node in found and found[node].args[1]:
            yield node, found[node]


def _total(index: Node) -> int:
    return math.prod(hints(index.all_input_nodes[0]))
