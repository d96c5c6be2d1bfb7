"""On a CPU, calls graphquant's attention in place of torch's where it was measured to be faster.

Attention without a mask, or with one that says which keys are valid: torch's adds it to the scores
of all pairs, ours leaves the other keys out. The result is the same up to rounding; only a sentence
without any valid key has zeros, where a model that adds a large negative number has a mean.

Like dtype.py, and behind it, this runs behind the pipeline, for graphs that graphquant
compiles itself: programs that are exported on a CPU have torch's attention. Sizes that are symbols
are measured as they were seen at compile time.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from graphquant._torch import statically_known_true, unset_fake_temporarily
from graphquant.config import Config
from graphquant.ir.captured import Captured
from graphquant.ir.gradients import needs_gradient
from graphquant.ir.graph import (
    SDPA,
    arguments,
    calls,
    drop_dead_code,
    has_hints,
    hint,
    new_call,
    sdpa_scale,
)
from graphquant.ops import attention, cpu
from graphquant.ops.checks import FLOATS
from graphquant.ops.define import recorded
from graphquant.ops.timing import times
from graphquant.passes.attention.kernels import layout_of, pinned_by_model
from graphquant.passes.attention.mask_forms import Masked, MaskForms, like
from graphquant.passes.layout import inherit_layout, restore_layouts
from graphquant.passes.padding.masks import PaddingMask
from graphquant.passes.policy.speed import random_like, replay
from graphquant.passes.record import MAX_TIME_RATIO
from graphquant.passes.verify import verifier

log = logging.getLogger(__name__)


def choose_attention(captured: Captured, config: Config) -> None:
    """Replace torch's attention by graphquant's wherever that is faster on this machine's CPU."""
    if config.select != "faster":
        return
    forms = MaskForms(captured)
    found = [(n, keys) for n, keys in _replaceable(captured, forms) if _is_faster(n)]
    if not found:
        return
    check = verifier(captured)
    for node, keys in found:
        _replace(captured, node, None if keys is None else forms.valid(keys))
    drop_dead_code(captured.gm.graph)
    restore_layouts(captured.gm.graph, captured.fake_mode)
    check("the choice of attention on the CPU")
    captured.gm.recompile()


def _replaceable(captured: Captured, forms: MaskForms) -> Iterator[tuple[Node, PaddingMask | None]]:
    """Attention that our kernel can compute, and what its mask says of keys."""
    graph = captured.gm.graph
    found = [n for n in calls(graph, lambda n: n.target is SDPA) if _is_supported(n)]
    if not found or not torch.backends.cuda.flash_sdp_enabled() or cpu.missing() is not None:
        return  # that switch is for torch's fused kernel on the CPU, too
    gradient = needs_gradient(graph, captured.differentiable, captured.grad_enabled)
    excluded = gradient | pinned_by_model(graph)
    for node in found:
        if node in excluded:
            continue
        if arguments(node).attn_mask is None:
            yield node, None
        elif (form := forms.of(node)) is not None and form == Masked(form.keys):
            yield node, form.keys


def _is_supported(node: Node) -> bool:
    """Can our kernel compute it, but for its mask? It broadcasts nothing."""
    of = arguments(node)
    if of.dropout_p or of.is_causal or of.enable_gqa:
        return False
    q, k, v = values = _values(node)
    if not all(t.device.type == "cpu" and t.dim() == 4 and has_hints(t) for t in values):
        return False
    dtypes = {t.dtype for t in (*values, node.meta["val"])}  # autocast makes it another
    if len(dtypes) != 1 or not dtypes <= set(FLOATS):
        return False
    pairs = [*zip(q.shape[:2], k.shape[:2], strict=True), *zip(k.shape, v.shape, strict=True)]
    same = all(statically_known_true(a == b) for a, b in (*pairs, (q.shape[3], k.shape[3])))
    return same and hint(k.shape[2]) > 0 and isinstance(q.shape[3], int) and sdpa_scale(node) > 0


def _values(node: Node) -> tuple[Tensor, ...]:
    of = arguments(node)
    return tuple(n.meta["val"] for n in (of.query, of.key, of.value))


def _is_faster(node: Node) -> bool:
    """Measured with all keys valid, which is the slowest case of our kernel."""
    values, scale, mask = _values(node), sdpa_scale(node), arguments(node).attn_mask
    masks = [] if mask is None else [mask.meta["val"]]

    @functools.cache
    def inputs() -> tuple[list[Tensor], Tensor | None]:
        return [random_like(t) for t in values], next(map(like, masks), None)

    def torchs() -> Tensor:
        (q, k, v), added = inputs()
        return F.scaled_dot_product_attention(q, k, v, added, scale=scale)

    @functools.cache
    def ours() -> tuple[object, list[Callable[[], object]]]:
        qkv, added = inputs()
        k = qkv[1]
        keys = None if added is None else k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool)
        return recorded(attention, (*qkv, scale, None, keys))

    with unset_fake_temporarily(), torch.inference_mode():
        found = times(
            f"attention {[layout_of(t) for t in (*values, *masks)]}",
            torch.device("cpu"),
            {"torch": torchs, "graphquant": functools.partial(replay, ours)},
        )
    log.debug("%s: %s", node.name, found)
    if found is None or len(found) < 2:
        return False
    return found["graphquant"] <= MAX_TIME_RATIO * found["torch"]


def _replace(captured: Captured, node: Node, valid: Node | None) -> None:
    graph, of = captured.gm.graph, arguments(node)
    args = (of.query, of.key, of.value, sdpa_scale(node))
    with graph.inserting_before(node):
        more = () if valid is None else (None, valid)
        made = new_call(graph, captured.fake_mode, attention.target, *args, *more)
    made.meta.update(node.meta | {"val": made.meta["val"]})
    inherit_layout(made, node)
    node.replace_all_uses_with(made)
    graph.erase_node(node)
