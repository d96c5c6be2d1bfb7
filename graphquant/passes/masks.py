"""Attention masks that mask nothing are dropped.

A mask that every token passes costs the fused kernels: torch computes attention with any mask in
separate float32 steps, at twice the whole model's time. Tracing makes such masks (a model checks
whether it may skip one only when it is not traced). Where a mask is computed from no input, it is
evaluated here.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from graphquant._torch import OpOverload, unset_fake_temporarily
from graphquant.ir.aliases import written_in_place
from graphquant.ir.evaluate import evaluate
from graphquant.ir.graph import (
    SDPA,
    arguments,
    calls,
    drop_dead_code,
    is_impure,
    is_random,
    with_arguments,
)

log = logging.getLogger(__name__)

MOST_ELEMENTS = 2**28  # of a mask that is evaluated at compile time


def drop_empty_masks(graph: Graph) -> None:
    """attn_mask=None where the mask is computed from no input and masks nothing. Exact."""
    written = written_in_place(graph)
    known: dict[Node, bool] = {}  # layers share a mask
    for node in calls(graph, lambda n: n.target is SDPA):
        mask = arguments(node).attn_mask
        if mask is None:
            continue
        if mask not in known:
            known[mask] = _masks_nothing(mask, written)
        if known[mask]:
            unmasked = list(with_arguments(node, attn_mask=None))
            node.args, node.kwargs = _spelled(unmasked)
            log.debug("%s: its mask masks nothing", node.name)
    drop_dead_code(graph)


def _spelled(arguments: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    q, k, v, mask, dropout, causal, scale, gqa = arguments
    return (q, k, v, mask, dropout, causal), {"scale": scale, "enable_gqa": gqa}


def _masks_nothing(mask: Node, written: set[Node]) -> bool:
    order = _computed_from_nothing(mask)
    if order is None or not written.isdisjoint(order):
        return False

    def on_cpu(argument: Any) -> Any:
        return torch.device("cpu") if isinstance(argument, torch.device) else argument

    with unset_fake_temporarily(), torch.no_grad():
        value: Tensor = evaluate(order, {}, on_cpu)[mask]
        return bool(value.all()) if value.dtype == torch.bool else not bool(value.any())


def _computed_from_nothing(mask: Node) -> list[Node] | None:
    """All that a value is computed from, in order, if that is no input and no random number."""
    found: set[Node] = set()
    edge = [mask]
    while edge:
        node = edge.pop()
        if node in found:
            continue
        if not isinstance(node.target, OpOverload) or is_impure(node) or is_random(node):
            return None  # vmap's own functions, say, mean nothing without their surroundings
        value = node.meta.get("val")
        size = value.numel() if isinstance(value, Tensor) else None
        if not isinstance(size, int) or size > MOST_ELEMENTS:
            return None
        found.add(node)
        edge += node.all_input_nodes
    return sorted(found)
