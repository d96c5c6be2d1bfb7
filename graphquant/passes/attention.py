"""Attention stays in floats. It loses masks that mask nothing and gets torch's fastest kernel.

A mask that every token passes costs the fused kernels: torch computes attention with any mask in
separate float32 steps, at twice the whole model's time. Tracing makes such masks (a model checks
whether it may skip one only when it is not traced). Where a mask is computed from no input, it is
evaluated here.

Which of torch's kernels (cuDNN, flash, efficient) and of ours is fastest depends on the card and
the sizes, so on CUDA it is measured, for equal sizes once (graphquant/ops/measure.py).
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from graphquant.ops import attention
from graphquant.ops.attention.op import TILES, WIDEST
from graphquant.ops.measure import times
from graphquant.passes.graph import aten, calls, full_args, is_random, written_in_place
from graphquant.passes.select import MEASURED, random_like

log = logging.getLogger(__name__)

SDPA = aten.scaled_dot_product_attention.default
MOST_ELEMENTS = 2**28  # of a mask that is evaluated at compile time
HALVES = (torch.float16, torch.bfloat16)


def drop_empty_masks(graph: Graph) -> None:
    """attn_mask=None where the mask is computed from no input and masks nothing. Exact."""
    written = written_in_place(graph)
    known: dict[Node, bool] = {}  # layers share a mask
    for node in calls(graph, lambda n: n.target is SDPA):
        mask = full_args(node)[3]
        if mask is None:
            continue
        if mask not in known:
            known[mask] = _masks_nothing(mask, written)
        if known[mask]:
            arguments = list(full_args(node))
            arguments[3] = None
            node.args, node.kwargs = _spelled(arguments)
            log.debug("%s: its mask masks nothing", node.name)
    graph.eliminate_dead_code()


def _spelled(arguments: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    q, k, v, mask, dropout, causal, scale, gqa = arguments
    return (q, k, v, mask, dropout, causal), {"scale": scale, "enable_gqa": gqa}


def _masks_nothing(mask: Node, written: set[Node]) -> bool:
    order = _computed_from_nothing(mask)
    if order is None or not written.isdisjoint(order):
        return False
    values: dict[Node, Any] = {}

    def on_cpu(argument: Any) -> Any:
        if isinstance(argument, Node):
            return values[argument]
        return torch.device("cpu") if isinstance(argument, torch.device) else argument

    with unset_fake_temporarily(), torch.no_grad():
        for node in order:
            args, kwargs = map_aggregate((node.args, node.kwargs), on_cpu)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        value: Tensor = values[mask]
        return bool(value.all()) if value.dtype == torch.bool else not bool(value.any())


def _computed_from_nothing(mask: Node) -> list[Node] | None:
    """All that a value is computed from, in order, if that is no input and no random number."""
    found: set[Node] = set()
    edge = [mask]
    while edge:
        node = edge.pop()
        if node in found:
            continue
        if (
            not isinstance(node.target, torch._ops.OpOverload)
            or node.is_impure()
            or is_random(node)
        ):
            return None  # vmap's own functions, say, mean nothing without their surroundings
        value = node.meta.get("val")
        size = value.numel() if isinstance(value, Tensor) else None
        if not isinstance(size, int) or size > MOST_ELEMENTS:
            return None
        found.add(node)
        edge += node.all_input_nodes
    return sorted(found)


def choose_kernels(graph: Graph, needs_gradient: set[Node]) -> None:
    """Every attention without a mask calls the kernel that was measured to be the fastest."""
    for node in calls(graph, lambda n: n.target is SDPA and n not in needs_gradient):
        q, k, v, mask, dropout, causal, scale, gqa = full_args(node)
        values = [n.meta["val"] for n in (q, k, v)]
        if mask is not None or dropout or gqa or not all(map(_is_timed, values)):
            continue
        if not _fits_together(values, causal):
            continue
        scale = values[0].shape[-1] ** -0.5 if scale is None else scale
        allowed = {n: k for n, k in KERNELS.items() if k.takes(values[0].shape[-1], causal, scale)}
        if len(allowed) < 2:
            continue
        question = f"attention {[_layout(t) for t in values]} causal={causal}"
        inputs = cache(partial(_like, values))  # made only if there is something to measure
        with unset_fake_temporarily(), torch.inference_mode():
            found = times(
                question,
                values[0].device,
                {n: partial(_run, k, inputs, causal, scale) for n, k in allowed.items()},
            )
        if not found:
            continue
        fastest = min(found, key=lambda name: found[name])
        log.debug("%s: %s", node.name, fastest)
        with graph.inserting_before(node):
            made = KERNELS[fastest].insert(graph, node, (q, k, v), causal, scale)
        node.replace_all_uses_with(made)
        graph.erase_node(node)


@dataclass(frozen=True)
class OfTorch:
    """One of torch's kernels. `extra` stands between v and what all of them take."""

    op: Any
    allowed: Callable[[], bool]
    extra: tuple[Any, ...]

    def takes(self, width: int, causal: bool, scale: float) -> bool:
        return self.allowed()

    def call(self, qkv: Sequence[Any], causal: bool, scale: float) -> Any:
        return self.op(*qkv, *self.extra, 0.0, causal, scale=scale)

    def insert(
        self, graph: Graph, old: Node, qkv: Sequence[Node], causal: bool, scale: float
    ) -> Node:
        args = (*qkv, *self.extra, 0.0, causal)
        results = graph.call_function(self.op, args, {"scale": scale})
        made = graph.call_function(operator.getitem, (results, 0))
        results.meta.update(old.meta)
        made.meta.update(old.meta)
        results.meta["val"] = (old.meta["val"],)  # nothing reads the rest
        return made


@dataclass(frozen=True)
class Ours:
    """graphquant::attention in one of its tiles."""

    tile: str

    def takes(self, width: int, causal: bool, scale: float) -> bool:
        return width <= WIDEST and not causal and scale > 0

    def call(self, qkv: Sequence[Any], causal: bool, scale: float) -> Any:
        return attention(*qkv, scale, self.tile)

    def insert(
        self, graph: Graph, old: Node, qkv: Sequence[Node], causal: bool, scale: float
    ) -> Node:
        made = graph.call_function(attention.target, (*qkv, scale, self.tile))
        made.meta.update(old.meta)
        made.meta["val"] = old.meta["val"].transpose(1, 2).contiguous().transpose(1, 2)
        return made


KERNELS: dict[str, OfTorch | Ours] = {
    "cudnn": OfTorch(
        aten._scaled_dot_product_cudnn_attention.default,
        torch.backends.cuda.cudnn_sdp_enabled,
        (None, False),  # no bias, no log-sum-exp
    ),
    "flash": OfTorch(
        aten._scaled_dot_product_flash_attention.default,
        torch.backends.cuda.flash_sdp_enabled,
        (),
    ),
    "efficient": OfTorch(
        aten._scaled_dot_product_efficient_attention.default,
        torch.backends.cuda.mem_efficient_sdp_enabled,
        (None, False),
    ),
    **{f"graphquant {tile}": Ours(tile) for tile in TILES},
}


def _like(values: Sequence[Tensor]) -> list[Tensor]:
    return [random_like(t) for t in values]


def _run(
    kernel: OfTorch | Ours, inputs: Callable[[], Sequence[Tensor]], causal: bool, scale: float
) -> object:
    return kernel.call(inputs(), causal, scale)


def _is_timed(value: Tensor) -> bool:
    """The kernels take half floats [B, H, S, D], D a multiple of 8 next to each other."""
    return (
        value.device.type in MEASURED
        and value.dtype in HALVES
        and value.dim() == 4
        and all(isinstance(n, int) for n in (*value.shape, *value.stride()))
        and value.shape[-1] % 8 == 0
        and value.stride(-1) == 1
    )


def _fits_together(qkv: Sequence[Tensor], causal: bool) -> bool:
    """The kernels broadcast nothing, and do not agree on where the diagonal of a part begins."""
    q, k, v = qkv
    square = q.shape[2] == k.shape[2]
    return q.shape[:2] == k.shape[:2] == v.shape[:2] and (square or not causal)


def _layout(value: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    return tuple(value.shape), value.stride(), value.dtype
