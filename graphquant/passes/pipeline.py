"""The pass pipeline: normalize, recognize, apply the rules, restore layouts, report."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from graphquant.config import Config
from graphquant.failure import stage
from graphquant.ir.aliases import written_in_place
from graphquant.ir.captured import Captured
from graphquant.ir.constants import Constants
from graphquant.ir.gradients import needs_gradient
from graphquant.ir.graph import (
    LINEAR,
    between,
    calls,
    drop_dead_code,
)
from graphquant.ops import int8_linear
from graphquant.ops.define import missing
from graphquant.passes.apply import apply
from graphquant.passes.attention.empty_masks import drop_empty_masks
from graphquant.passes.attention.kernels import choose_kernels
from graphquant.passes.attention.masked import choose_masked_kernels
from graphquant.passes.attention.written_out import fuse_written_out
from graphquant.passes.eligibility import enter_all, other_products_of
from graphquant.passes.layout import restore_layouts
from graphquant.passes.normalize import merge_equal_views, normalize
from graphquant.passes.notes import (
    hook_notes,
    may_match_elsewhere,
    notes_of,
    patterns_of,
    shard_notes,
    training_notes,
)
from graphquant.passes.padding.limit_rows import limit_rows, shares_of_rows
from graphquant.passes.padding.remove import remove_padding
from graphquant.passes.policy.accuracy import AccuracyGate
from graphquant.passes.policy.gate import Gate
from graphquant.passes.policy.ranges import static_ranges
from graphquant.passes.policy.speed import SpeedGate
from graphquant.passes.recognize import Recognized, recognize
from graphquant.passes.record import Record, RecordedLinear
from graphquant.passes.rule import Rule
from graphquant.passes.rules.act_linear import ActLinear
from graphquant.passes.rules.layer_scale import LayerScale
from graphquant.passes.rules.linear import AnyLinear
from graphquant.passes.rules.norm_linear import NormLinear
from graphquant.passes.rules.patch_linear import PatchLinear
from graphquant.passes.rules.residual import Residual
from graphquant.passes.rules.stack_siblings import StackSiblings
from graphquant.passes.state import RewriteState
from graphquant.passes.verify import verifier
from graphquant.report import Report

log = logging.getLogger(__name__)

FLOAT_RULES: tuple[Rule[Any], ...] = (StackSiblings(), PatchLinear())
INT8_RULES: tuple[Rule[Any], ...] = (
    StackSiblings(),  # first: three linears behind a norm become one
    NormLinear(),
    ActLinear(),
    AnyLinear(),  # linears that no fusion took
    LayerScale(),  # before the residual, as in the models
    Residual(),
    PatchLinear(),  # last: patch embeddings stay in float
)


@dataclass(frozen=True)
class Rewritten:
    """The result of rewriting a captured graph.

    replaces  new node -> the name of the model's node that it replaces
    linears   int8 or float linear node -> the linears that it computes, in column order
    """

    report: Report
    replaces: Mapping[Node, str]
    linears: Mapping[Node, tuple[RecordedLinear, ...]]


def prepare(captured: Captured, config: Config) -> tuple[str, ...]:
    """Bring the captured graph into the form that `rewrite` takes, in place; its results for tokens
    stay the same. Returns notes for the report."""
    verify = verifier(captured)
    with stage("normalize"):
        normalize(captured)
        verify("normalize")
    with stage("empty masks"):
        drop_empty_masks(captured.gm.graph)
        verify("empty masks")
    notes: tuple[str, ...] = ()
    if config.padding == "remove":
        with stage("the removal of padding"):
            notes = remove_padding(captured, config)
            verify("the removal of padding")
    with stage("attention that is written out"):
        fuse_written_out(captured)
        verify("attention that is written out")
    return notes


def rewrite(
    captured: Captured, config: Config, padding: tuple[str, ...] | None = None
) -> Rewritten:
    """Rewrite the captured graph in place. Weights stay expressions of parameters (prepack.py).

    padding  notes of `prepare`, if that was called already

    Raises RuleError for a rule that breaks its contract, OptionError for a calibration whose ranges
    are invalid.
    """
    gm = captured.gm
    if padding is None:
        padding = prepare(captured, config)
    verify = verifier(captured)

    @contextmanager
    def step(name: str) -> Iterator[None]:
        with stage(name):
            yield
            verify(name, state.record)

    with stage("recognize"):
        state = _state(captured, config)
        accuracy, gates = _gates(state, captured)
    with stage("the record of linears"):
        enter_all(state, captured)
        products = tuple(other_products_of(state))
    if config.activation == "static" and config.calibration is not None:
        with stage("static ranges"):
            state.ranges.update(static_ranges(_eligible_linears(state), config.calibration))
    for rule in INT8_RULES if config.quantize else FLOAT_RULES:
        with step(f"rule {rule.name}"):
            apply(state, rule, gates)
    with step("the number of tokens"):
        limit_rows(gm.graph)
    if config.select == "faster" and missing() is None:
        with step("the choice of attention kernels"):
            choose_kernels(gm.graph, state.needs_gradient)
            choose_masked_kernels(captured, state.needs_gradient)
    with step("the memory layout of outputs and stride-dependent ops"):
        restore_layouts(gm.graph, state.fake_mode)
    with step("the end of the rewrite"):
        merge_equal_views(gm.graph)  # rules may duplicate a view of the model
        drop_dead_code(gm.graph)
    with stage("the report"):
        gm.graph.lint()
        gm.recompile()
        patterns = tuple(patterns_of(state))
        missed = (p for p in patterns if not p.matched and not may_match_elsewhere(p, captured))
        notes = (
            *notes_of(state, accuracy),
            *training_notes(captured),
            *hook_notes(gm.graph),
            *shard_notes(captured),
            *padding,
            *(p.note for p in missed),
        )
        report = Report(state.record.outcomes(), 1, notes, products, patterns)
        rewritten = Rewritten(report, _replaced_names(state), _linears(state))
    log.info("%s", report.summary())
    return rewritten


def _state(captured: Captured, config: Config) -> RewriteState:
    gm = captured.gm
    constants, written = Constants(captured.parameters), written_in_place(gm.graph)
    return RewriteState(
        gm=gm,
        fake_mode=captured.fake_mode,
        constants=constants,
        recognized=_without_written(recognize(gm.graph, constants), written),
        needs_gradient=needs_gradient(gm.graph, captured.differentiable, captured.grad_enabled),
        written=written,
        record=Record(),
        config=config,
        names=captured.names,
    )


def _gates(state: RewriteState, captured: Captured) -> tuple[AccuracyGate, tuple[Gate, ...]]:
    """The accuracy gate, and all gates in order: accuracy before speed."""
    config, constants = state.config, state.constants
    speed = SpeedGate(constants, shares_of_rows(captured.gm.graph))
    accuracy = AccuracyGate(config, state.record, state.ranges, constants, captured.parameters)
    return accuracy, (accuracy, speed) if config.select == "faster" else (accuracy,)


def _without_written(found: Recognized, written: set[Node]) -> Recognized:
    """Without the norms and activations of which an intermediate is written in place."""
    if not written:
        return found
    norms, acts, unusable = dict(found.norms), dict(found.activations), dict(found.unusable)
    inputs = {out: norm.x for out, norm in norms.items()}
    inputs |= {out: act.x for out, act in acts.items()}
    for out, x in inputs.items():
        if not written.isdisjoint(between(out, x)):
            norms.pop(out, None)
            acts.pop(out, None)
            unusable[out] = "a step of it is written in place"
    return Recognized(norms, acts, unusable)


def _eligible_linears(state: RewriteState) -> dict[Node, str]:
    """Linears that rules may rewrite -> their module paths."""
    return {
        node: outcome.path
        for node in calls(state.graph, lambda n: n.target is LINEAR)
        for outcome, _ in state.record.linears_of(node)
        if state.is_eligible(node)
    }


def _replaced_names(state: RewriteState) -> dict[Node, str]:
    found: dict[Node, str] = {}
    for old, new in state.replaced.items():  # in rewrite order, so chains resolve
        found[new] = found.get(old, old.name)
    return found


def _linears(state: RewriteState) -> dict[Node, tuple[RecordedLinear, ...]]:
    nodes = calls(state.graph, lambda n: n.target in (LINEAR, int8_linear.target))
    return {node: state.record.linears_of(node) for node in nodes}
