"""The pass that removes padding: `options={"padding": "remove"}`.

It runs after normalization and before recognition, so that the int8 rules see a graph of tokens.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator

import torch
from torch.fx import Node

from graphquant._torch import unset_fake_temporarily
from graphquant.config import Config, strict
from graphquant.failure import what_failed, what_to_do
from graphquant.ir.captured import Captured
from graphquant.ir.graph import LINEAR, arguments, calls, hints
from graphquant.ops.define import no_kernels
from graphquant.passes.padding.attention import (
    Attention,
    find_attentions,
    is_over_processes,
)
from graphquant.passes.padding.evaluation import Evaluation, Kept, told
from graphquant.passes.padding.masks import Form, Masks, PaddingMask
from graphquant.passes.padding.plan import Plan, guess_mask, make_plan
from graphquant.passes.padding.readers import check_readers
from graphquant.passes.padding.rewrite import pack_tokens
from graphquant.report import Quiet

log = logging.getLogger(__name__)

CUDA_GRAPHS = "triton.cudagraphs"  # Inductor's option


def remove_padding(captured: Captured, config: Config) -> tuple[str, ...]:
    """Compute the graph for valid tokens only, in place, if its results for them stay the same.
    Returns notes for the report."""
    try:
        with unset_fake_temporarily(), torch.no_grad():
            found = list(_plans(captured))
    except Kept as why:
        return (f"padding kept: {why}",)
    except Exception as error:
        if strict():
            raise
        return (f"padding kept: {what_failed(error)}. {what_to_do(error)}",)
    notes: list[str] = []
    front = config.mode == "reduce-overhead" or bool(config.inductor.get(CUDA_GRAPHS))
    for plan, more in found:
        with unset_fake_temporarily(), torch.no_grad():
            tokens = _tokens(captured, plan.mask)
        notes += (Quiet(_done(captured, plan)), *more)
        pack_tokens(captured, plan, tokens, front=front)
    return tuple(notes)


def _plans(captured: Captured) -> Iterator[tuple[Plan, tuple[str, ...]]]:
    """A plan for each padding mask of the graph, with notes."""
    graph = captured.gm.graph
    if why := _exchanges(captured):
        raise Kept(why)
    masks = Masks(captured)
    understood: dict[tuple[Node, bool], list[tuple[Attention, Form]]] = {}
    exact: dict[tuple[Node, bool], bool] = {}
    reasons: list[str] = []
    for attention in find_attentions(graph):
        try:
            mask, form = masks.understand(attention)
        except Kept as why:
            reasons.append(str(why))
            continue
        key = mask.node, mask.inverted
        understood.setdefault(key, []).append((attention, form))
        exact[key] = mask.exact and exact.get(key, True)
    if not understood:
        guess = guess_mask(captured)
        if guess is None:
            raise Kept(reasons[0] if reasons else "no attention with a padding mask was found")
        understood[guess.node, guess.inverted] = []
        exact[guess.node, guess.inverted] = guess.exact
    planned: list[Plan] = []
    for key, attentions in understood.items():
        mask = PaddingMask(*key, exact[key])
        if missing := no_kernels(mask.node.meta["val"].device):
            raise Kept(missing)
        B, S = hints(mask.node)
        if B < 1 or S < 2:
            raise Kept("sentences have one token at most")
        plan = make_plan(captured, mask, attentions)
        if any(not plan.packed.isdisjoint(other.packed) for other in planned):
            raise Kept("attentions have different padding masks")
        planned.append(plan)
        padded = [
            Quiet(f"attention stays padded ({n}): {why}") for why, n in Counter(reasons).items()
        ]
        yield plan, (*_inexact(captured, mask), *padded, *check_readers(captured, plan))


def _exchanges(captured: Captured) -> str | None:
    """A collective between processes that may have other sentences, and so as many tokens as they
    have. Those of DTensors exchange values of the same sentences."""
    groups = captured.shards.groups if captured.shards is not None else ()
    for node in calls(captured.gm.graph, is_over_processes):
        group = vars(arguments(node)).get("group_name")
        if group is not None and group not in groups:
            return f"{node.name} exchanges values with processes that may have other sentences"
    return None


def _inexact(captured: Captured, mask: PaddingMask) -> tuple[str, ...]:
    """Masks that the model adds after arithmetic, so that it sees a 2 differently than a 1."""
    if mask.exact:
        return ()
    return (Quiet(f"{told(captured, mask.node)} is taken to hold only 0 and 1"),)


def _done(captured: Captured, plan: Plan) -> str:
    """What the pass did, for the report."""
    forms = Counter(str(form) for _, form in plan.attentions.values())
    kinds = ", ".join(f"{n} with {form}" if form else f"{n} full" for form, n in forms.items())
    linears = sum(n.target is LINEAR for n in plan.packed)
    every = len(captured.gm.graph.find_nodes(op="call_function", target=LINEAR))
    by = told(captured, plan.mask.node)
    attention = f"{len(plan.attentions)} attentions ({kinds})" if forms else "no attention"
    return (
        f"padding removed by {by}: {linears} of {every} linears and {attention} compute tokens "
        "only; results at padding are zero"
    )


def _tokens(captured: Captured, mask: PaddingMask) -> int:
    """How many tokens the inputs seen at compile time have; all if they were not seen."""
    try:
        value = Evaluation(captured, captured.examples)(mask.node)
    except Kept:
        return math.prod(hints(mask.node))
    return int((value == 0 if mask.inverted else value != 0).sum())
