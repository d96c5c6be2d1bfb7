"""Autotunes attention, which stays in float: on CUDA, calls the fastest kernel for its shapes.

The candidates are torch's kernels (cuDNN, flash, efficient) and graphquant's. Each combination of
shapes is measured once per GPU (ops/timing.py).
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
from torch.fx import Graph, Node

from graphquant._torch import sdpa_backends, unset_fake_temporarily
from graphquant.ir.contexts import regions
from graphquant.ir.graph import SDPA, aten, calls, full_args, hint, sdpa_scale
from graphquant.ops import attention
from graphquant.ops.attention.hopper_tiles import MASKED, ONLY, TILES, WIDEST
from graphquant.ops.runtime.device import gpu_properties
from graphquant.ops.timing import times
from graphquant.passes.layout import inherit_layout
from graphquant.passes.policy.speed import random_like

log = logging.getLogger(__name__)

DTYPES = (torch.float16, torch.bfloat16)
MEASURED = ("cuda",)  # device types


def choose_kernels(graph: Graph, needs_gradient: set[Node]) -> None:
    """Make every attention without mask, dropout and gradient call its fastest kernel."""
    pinned = pinned_by_model(graph)
    for node in calls(graph, lambda n: n.target is SDPA and n not in needs_gradient | pinned):
        q, k, v, mask, dropout, causal, _, gqa = full_args(node)
        values = [n.meta["val"] for n in (q, k, v)]
        if mask is not None or dropout or gqa or not all(map(is_supported, values)):
            continue
        if not _shapes_match(values, causal):
            continue
        scale = sdpa_scale(node)
        width, sm = values[0].shape[-1], gpu_properties(values[0].device).sm
        allowed = {n: k for n, k in KERNELS.items() if k.takes(width, causal, scale, sm)}
        if len(allowed) < 2:
            continue
        question = f"attention {[layout_of(t) for t in values]} causal={causal}"
        inputs = cache(partial(_random_inputs, values))  # only made for a measurement
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
        inherit_layout(made, node)
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def pinned_by_model(graph: Graph) -> set[Node]:
    """Attention for which the model itself selects kernels with torch.nn.attention.sdpa_kernel."""

    def outside(backends: tuple[str, ...], by_priority: bool) -> bool:
        now = [b.name for b in sdpa_backends(by_priority=by_priority)]
        return list(backends) == now if by_priority else set(backends) == set(now)

    return {
        node
        for node, region in regions(graph)
        if node.target is SDPA and region.sdpa is not None and not outside(*region.sdpa)
    }


@dataclass(frozen=True)
class TorchKernel:
    """One of torch's kernels.

    allowed  whether torch's global switches enable it
    extra    its arguments between v and those that all kernels take
    """

    op: Any
    allowed: Callable[[], bool]
    extra: tuple[Any, ...]

    def takes(self, width: int, causal: bool, scale: float, sm: int) -> bool:
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
        fakes = [n.meta["val"] for n in qkv]
        with fakes[0].fake_mode:
            results.meta["val"] = self.call(fakes, causal, scale)
        made.meta["val"] = results.meta["val"][0]
        return made


@dataclass(frozen=True)
class GraphquantKernel:
    """graphquant::attention with one of its tiles."""

    tile: str

    def takes(self, width: int, causal: bool, scale: float, sm: int) -> bool:
        if self.tile == MASKED:
            fits = width <= WIDEST
        else:
            fits = TILES[self.tile].refuses(width) is None and not causal
        return sm == ONLY and fits and scale > 0 and fused_enabled()

    def call(self, qkv: Sequence[Any], causal: bool, scale: float) -> Any:
        return attention(*qkv, *self._rest(causal, scale))

    def _rest(self, causal: bool, scale: float) -> tuple[Any, ...]:
        return scale, self.tile, *((None, True) if causal else ())

    def insert(
        self, graph: Graph, old: Node, qkv: Sequence[Node], causal: bool, scale: float
    ) -> Node:
        made = graph.call_function(attention.target, (*qkv, *self._rest(causal, scale)))
        made.meta.update(old.meta)
        made.meta["val"] = old.meta["val"].transpose(1, 2).contiguous().transpose(1, 2)
        return made


KERNELS: dict[str, TorchKernel | GraphquantKernel] = {
    "cudnn": TorchKernel(
        aten._scaled_dot_product_cudnn_attention.default,
        torch.backends.cuda.cudnn_sdp_enabled,
        (None, False),  # no bias, no log-sum-exp
    ),
    "flash": TorchKernel(
        aten._scaled_dot_product_flash_attention.default,
        torch.backends.cuda.flash_sdp_enabled,
        (),
    ),
    "efficient": TorchKernel(
        aten._scaled_dot_product_efficient_attention.default,
        torch.backends.cuda.mem_efficient_sdp_enabled,
        (None, False),
    ),
    **{f"graphquant {tile}": GraphquantKernel(tile) for tile in (*TILES, MASKED)},
}


def fused_enabled() -> bool:
    """Does torch allow any fused kernel? If not, ours is off as well."""
    return any(k.allowed() for k in KERNELS.values() if isinstance(k, TorchKernel))


def _random_inputs(values: Sequence[Tensor]) -> list[Tensor]:
    return [random_like(t) for t in values]


def _run(
    kernel: TorchKernel | GraphquantKernel,
    inputs: Callable[[], Sequence[Tensor]],
    causal: bool,
    scale: float,
) -> object:
    return kernel.call(inputs(), causal, scale)


def is_supported(value: Tensor) -> bool:
    """The kernels take fp16 and bf16 [B, H, S, D] with D a multiple of 8 and of stride 1."""
    return (
        value.device.type in MEASURED
        and value.dtype in DTYPES
        and value.dim() == 4
        and all(isinstance(n, int) for n in (*value.shape, *value.stride()))
        and value.shape[-1] % 8 == 0
        and value.stride(-1) == 1
    )


def _shapes_match(qkv: Sequence[Tensor], causal: bool) -> bool:
    """Equal B and H, for no kernel broadcasts; for causal also equal lengths, as kernels align the
    diagonal differently."""
    q, k, v = qkv
    square = q.shape[2] == k.shape[2]
    return q.shape[:2] == k.shape[:2] == v.shape[:2] and (square or not causal)


def layout_of(value: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    """Sizes and strides as they were seen at compile time, and the dtype: part of a question."""
    return tuple(map(hint, value.shape)), tuple(map(hint, value.stride())), value.dtype
