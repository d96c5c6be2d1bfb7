"""Autotunes attention with a mask: on Hopper, calls graphquant's kernel where it is faster.

torch's kernels add a mask [B, H, S, S], whatever it is. A mask that says which keys are valid, in
causal order or within a window, and with a bias that depends on positions, is told to our kernel in
these words, so that it computes no more than is seen. Any other float mask is a bias for it.

A query that sees no key gets zeros. torch has the mean of all values if such a mask adds a large
negative number to all keys: of the rows of a sentence that has no valid token at all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.fx import Graph, Node

from graphquant._torch import unset_fake_temporarily
from graphquant.ir.captured import Captured
from graphquant.ir.graph import (
    SDPA,
    arguments,
    aten,
    calls,
    is_tensor,
    new_call,
    sdpa_scale,
)
from graphquant.ops import attention
from graphquant.ops.attention.hopper_tiles import MASKED, ONLY, WIDEST
from graphquant.ops.hopper.attention import MAX_KEYS
from graphquant.ops.runtime.device import gpu_properties
from graphquant.ops.timing import times
from graphquant.passes.attention.kernels import (
    fused_enabled,
    is_supported,
    layout_of,
    pinned_by_model,
)
from graphquant.passes.attention.mask_forms import Masked, MaskForms, is_bias, like
from graphquant.passes.layout import inherit_layout
from graphquant.passes.policy.speed import random_like

log = logging.getLogger(__name__)


def choose_masked_kernels(captured: Captured, needs_gradient: set[Node]) -> None:
    """Make every attention with a mask and without dropout and gradient call our kernel, if it is
    faster than torch's."""
    graph = captured.gm.graph
    excluded = needs_gradient | pinned_by_model(graph)
    forms = MaskForms(captured)
    supported = (n for n in calls(graph, lambda n: n.target is SDPA) if n not in excluded)
    made = {n: _form(forms, n) for n in supported if _is_supported(n)}
    for node, form in made.items():
        if form is not None and _is_faster(node, form):
            _replace(captured, node, form, forms)


def _is_supported(node: Node) -> bool:
    """Can our kernel compute this attention, if its mask is understood?"""
    a = arguments(node)
    q, k, v = values = [n.meta["val"] for n in (a.query, a.key, a.value)]
    if a.dropout_p or not all(map(is_supported, values)):
        return False
    if a.attn_mask is None and not (a.enable_gqa and q.shape[1] != k.shape[1]):
        return False  # kernels.py chooses
    if gpu_properties(q.device).sm != ONLY or not fused_enabled():
        return False
    (B, H, S, D), (Hkv, T) = q.shape, k.shape[1:3]
    grouped = Hkv == H or (a.enable_gqa and H % max(Hkv, 1) == 0)
    return (
        tuple(k.shape) == tuple(v.shape) == (B, Hkv, T, D)
        and grouped
        and min(B, H, S, T) > 0
        and D <= WIDEST
        and sdpa_scale(node) > 0
        and (S == T or not a.is_causal)
    )


def _form(forms: MaskForms, node: Node) -> Masked | None:
    """None if the mask is not understood, and cannot be a bias."""
    a = arguments(node)
    mask = a.attn_mask
    if mask is None:
        return Masked(causal=a.is_causal)
    if a.value.meta["val"].shape[2] <= MAX_KEYS and (form := forms.of(node)) is not None:
        return form
    return Masked(bias=mask) if is_bias(mask) else None


def _is_faster(node: Node, form: Masked) -> bool:
    """Is our kernel faster than torch's? Measured with all keys valid, which is its slowest case;
    to torch's it makes no difference."""
    a = arguments(node)
    values = [n.meta["val"] for n in (a.query, a.key, a.value)]
    given = {"mask": a.attn_mask, "bias": form.bias}
    extra = {name: n.meta["val"] for name, n in given.items() if n is not None}
    q, scale = values[0], sdpa_scale(node)
    B, T = q.shape[0], values[1].shape[2]

    @cache  # only made for a measurement
    def inputs() -> tuple[list[Tensor], dict[str, Tensor], Tensor | None]:
        more = {name: like(t) for name, t in extra.items()}
        keys = None
        if form.keys is not None:
            keys = torch.ones(B, T, dtype=torch.bool, device=q.device)
        return [random_like(t) for t in values], more, keys

    def ours() -> object:
        qkv, more, keys = inputs()
        bias = _four_dims(more["bias"], qkv[0], T) if "bias" in more else None
        return attention(*qkv, scale, MASKED, keys, form.causal, form.window, bias)

    def torchs() -> object:
        qkv, more, _ = inputs()
        mask = more.get("mask")
        return SDPA(*qkv, mask, 0.0, a.is_causal, scale=scale, enable_gqa=a.enable_gqa)

    candidates: dict[str, Callable[[], object]] = {"torch": torchs, "graphquant": ours}
    sizes = [layout_of(t) for t in (*values, *extra.values())]
    question = (
        f"attention {sizes} {list(extra)} keys={form.keys is not None} causal={form.causal} "
        f"window={form.window}"
    )
    with unset_fake_temporarily(), torch.inference_mode():
        found = times(question, q.device, candidates) or {}
    log.debug("%s: %s", node.name, found)
    ready = found.keys() >= candidates.keys()
    return ready and found["graphquant"] < found["torch"]


def _four_dims(bias: Tensor, q: Tensor, T: int) -> Tensor:
    """[B or 1, H or 1, S, T] from what broadcasts to that."""
    bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
    return bias.expand(-1, -1, q.shape[2], T)


def _replace(captured: Captured, node: Node, form: Masked, forms: MaskForms) -> None:
    graph: Graph = captured.gm.graph
    a = arguments(node)
    q = a.query.meta["val"]

    call = partial(new_call, graph, captured.fake_mode)
    keys = None if form.keys is None else forms.valid(form.keys)
    with graph.inserting_before(node):
        bias = form.bias
        if bias is not None:
            value = bias.meta["val"]
            while value.dim() < 4:
                bias = call(aten.unsqueeze.default, bias, 0)
                value = bias.meta["val"]
            want = [-1, -1, q.shape[2], a.key.meta["val"].shape[2]]
            if list(value.shape[2:]) != want[2:]:
                bias = call(aten.expand.default, bias, want)
        args = [
            a.query,
            a.key,
            a.value,
            sdpa_scale(node),
            MASKED,
            keys,
            form.causal,
            form.window,
            bias,
        ]
        while args[-1] in (None, False):
            args.pop()
        made = graph.call_function(attention.target, tuple(args))
    made.meta.update(node.meta)
    made.meta["val"] = node.meta["val"].transpose(1, 2).contiguous().transpose(1, 2)
    assert is_tensor(made)
    inherit_layout(made, node)
    node.replace_all_uses_with(made)
    graph.erase_node(node)
