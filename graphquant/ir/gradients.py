"""Which values of a graph can need a gradient."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import Graph, Node

from graphquant.ir.aliases import families, writes
from graphquant.ir.contexts import regions
from graphquant.ir.graph import aten


def needs_gradient(graph: Graph, differentiable: Iterable[Node], grad_enabled: bool) -> set[Node]:
    """Values through which a gradient can flow back to one of the differentiable inputs."""
    found = set(differentiable)
    if not found:
        return found
    head = families(graph)
    for node, region in regions(graph, grad_enabled):
        if (
            region.records
            and node.op == "call_function"
            and node.target is not aten.detach.default
            and any(i in found for i in node.all_input_nodes)
            and _can_need_gradient(node)
        ):
            found.add(node)
        if node in found and (written := {head(n) for n in writes(node)}):
            # an in-place write passes the gradient on to what it wrote, whatever its name
            found |= {n for n in graph.nodes if head(n) in written}
    return found


def _can_need_gradient(node: Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return value.is_floating_point() or value.is_complex()
    return not isinstance(value, (int, torch.SymInt, torch.SymFloat, torch.SymBool, bool, float))
