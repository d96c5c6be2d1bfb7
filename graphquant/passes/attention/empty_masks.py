"""Removes attention masks that mask nothing.

With any mask, torch does not use its fused attention kernels, which can double a model's time.
Tracing adds such masks: models skip the check for an empty mask while traced. A mask that depends
on no input is evaluated here.
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

MAX_ELEMENTS = 2**28  # largest mask evaluated at compile time


def drop_empty_masks(graph: Graph) -> None:
    """Set attn_mask=None where the mask depends on no input and masks nothing. Exact."""
    written = written_in_place(graph)
    known: dict[Node, bool] = {}  # layers share masks
    for node in calls(graph, lambda n: n.target is SDPA):
        mask = arguments(node).attn_mask
        if mask is None:
            continue
        if mask not in known:
            known[mask] = _masks_nothing(mask, written)
        if known[mask]:
            unmasked = list(with_arguments(node, attn_mask=None))
            node.args, node.kwargs = _sdpa_args(unmasked)
            log.debug("%s: its mask masks nothing", node.name)
    drop_dead_code(graph)


def _sdpa_args(arguments: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    q, k, v, mask, dropout, causal, scale, gqa = arguments
    return (q, k, v, mask, dropout, causal), {"scale": scale, "enable_gqa": gqa}


def _masks_nothing(mask: Node, written: set[Node]) -> bool:
    order = _constant_subgraph(mask)
    if order is None or not written.isdisjoint(order):
        return False

    def on_cpu(argument: Any) -> Any:
        return torch.device("cpu") if isinstance(argument, torch.device) else argument

    with unset_fake_temporarily(), torch.no_grad():
        value: Tensor = evaluate(order, {}, on_cpu)[mask]
        return bool(value.all()) if value.dtype == torch.bool else not bool(value.any())


def _constant_subgraph(mask: Node) -> list[Node] | None:
    """The nodes that compute a value, in order; None if it depends on inputs or randomness."""
    found: set[Node] = set()
    edge = [mask]
    while edge:
        node = edge.pop()
        if node in found:
            continue
        if not isinstance(node.target, OpOverload) or is_impure(node) or is_random(node):
            return None  # vmap's internal functions, for example, depend on global state
        value = node.meta.get("val")
        size = value.numel() if isinstance(value, Tensor) else None
        if not isinstance(size, int) or size > MAX_ELEMENTS:
            return None
        found.add(node)
        edge += node.all_input_nodes
    return sorted(found)
