"""The order of all passes: the whole rewrite on one page."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch.fx import Node

from graphquant.config import Config, matches
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
from graphquant.passes.apply import Workbench, apply
from graphquant.passes.attention_kernels import choose_kernels
from graphquant.passes.eligibility import NEEDS_GRADIENT, _enter_all, _others
from graphquant.passes.layout import restore_layouts
from graphquant.passes.masks import drop_empty_masks
from graphquant.passes.normalize import merge_equal_views, normalize
from graphquant.passes.policy.ranges import static_ranges
from graphquant.passes.policy.smoothquant import NO_NORM
from graphquant.passes.recognize import Recognized, recognize
from graphquant.passes.record import Record
from graphquant.passes.rule import Rule
from graphquant.passes.rules.act_linear import ActLinear
from graphquant.passes.rules.layer_scale import LayerScale
from graphquant.passes.rules.linear import AnyLinear
from graphquant.passes.rules.norm_linear import NormLinear
from graphquant.passes.rules.patch_linear import PatchLinear
from graphquant.passes.rules.residual import Residual
from graphquant.passes.rules.stack_siblings import StackSiblings
from graphquant.passes.verify import verifier
from graphquant.report import SLOW_ON_CPU, Outcome, Pattern, Quiet, Report

log = logging.getLogger(__name__)

FLOAT_RULES: tuple[Rule[Any], ...] = (StackSiblings(), PatchLinear())
INT8_RULES: tuple[Rule[Any], ...] = (
    StackSiblings(),  # first: three readers of a norm become one
    NormLinear(),
    ActLinear(),
    AnyLinear(),  # what no fusion took
    LayerScale(),  # before the residual, as in the models
    Residual(),
    PatchLinear(),  # last: pixels stay in float
)

STANDS_FOR, LINEARS = "graphquant_stands_for", "graphquant_linears"  # see _leave_traces


def rewrite(captured: Captured, config: Config) -> Report:
    """Rewrite the captured graph in place and say what was done. Weights stay to be packed."""
    gm = captured.gm
    verify = verifier(captured)

    @contextmanager
    def step(name: str) -> Iterator[None]:
        with stage(name):
            yield
            verify(name, bench.record if bench is not None else None)

    bench: Workbench | None = None
    with step("normalize"):
        normalize(captured)
    with step("empty masks"):
        drop_empty_masks(gm.graph)
    with stage("recognize"):
        bench = _workbench(captured, config)
    with stage("the record of linears"):
        _enter_all(bench, captured, config)
        products = tuple(_others(bench))
    if config.activation == "static" and config.calibration is not None:
        with stage("static ranges"):
            bench.ranges = static_ranges(_open_linears(bench), config.calibration)
    for rule in INT8_RULES if config.quantize else FLOAT_RULES:
        with step(f"rule {rule.name}"):
            apply(bench, rule)
    if bench.select and missing() is None:
        with step("the choice of attention kernels"):
            choose_kernels(gm.graph, bench.needs_gradient)
    with step("the layout of what is seen"):
        restore_layouts(gm.graph, bench.fake_mode)
    with step("the end of the rewrite"):
        merge_equal_views(gm.graph)  # a rule may have made one that the model has as well
        drop_dead_code(gm.graph)
    with stage("the report"):
        gm.graph.lint()
        gm.recompile()
        _leave_traces(bench)
        patterns = tuple(_patterns(bench, config))
        missed = (p for p in patterns if not p.matched and not _elsewhere(p, captured))
        notes = (*_notes(bench, config), *_in_training(captured), *(p.note for p in missed))
        report = Report(bench.record.outcomes(), 1, notes, products, patterns)
    log.info("%s", report.summary())
    return report


def _workbench(captured: Captured, config: Config) -> Workbench:
    gm = captured.gm
    constants, written = Constants(captured.parameters), written_in_place(gm.graph)
    return Workbench(
        gm=gm,
        fake_mode=captured.fake_mode,
        constants=constants,
        recognized=_unwritten(recognize(gm.graph, constants), written),
        needs_gradient=needs_gradient(gm.graph, captured.differentiable, captured.grad_enabled),
        written=written,
        record=Record(),
        config=config,
        parameters=captured.parameters,
        names=captured.names,
        select=config.select == "faster",
    )


def _unwritten(found: Recognized, written: set[Node]) -> Recognized:
    """Without those of which a step is written in place: they compute something else."""
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


def _patterns(bench: Workbench, config: Config) -> Iterator[Pattern]:
    paths = [o.path for o in bench.record.outcomes() if o.kind == "linear"]
    for option in ("include", "exclude"):
        for pattern in dict.fromkeys(getattr(config, option)):
            yield Pattern(option, pattern, sum(matches(pattern, path) for path in paths))


def _elsewhere(pattern: Pattern, captured: Captured) -> bool:
    """Could it match a linear of the model that is in another graph?"""
    return any(matches(pattern.pattern, path) for path in captured.elsewhere)


def _in_training(captured: Captured) -> Iterator[str]:
    if training := captured.training:
        which = "the model is" if "" in training else f"{len(training)} of its modules are"
        such = "" if "" in training else f", such as {training[0]}"
        note = f"{which} in training mode{such}: for inference, call model.eval()"
        yield Quiet(note) if captured.grad_enabled else note  # who trains needs no warning


def slow_here(report: Report, captured: Captured) -> Report:
    """The report, with a note if int8 products run on a processor that is slower with them."""
    products = calls(captured.gm.graph, lambda n: n.target is int8_linear.target)
    if not any(node.meta["val"].device.type == "cpu" for node in products):
        return report
    return replace(report, notes=(*report.notes, SLOW_ON_CPU))


def _open_linears(bench: Workbench) -> dict[Node, str]:
    """The linears that rules may rewrite, and their module paths."""
    return {
        node: outcome.path
        for node in calls(bench.graph, lambda n: n.target is LINEAR)
        for outcome, _ in bench.record.carried(node)
        if bench.open(node)
    }


def _leave_traces(bench: Workbench) -> None:
    """What ties the rewritten graph to the model's, by names: the model's nodes may be gone.

    meta[STANDS_FOR]  of a node that a rule made: the node whose value it holds
    meta[LINEARS]     of a linear, in int8 or not: Record.carried
    """
    for old, new in bench.replaced.items():  # in the order of the rewrites: chains are followed
        new.meta[STANDS_FOR] = old.meta.get(STANDS_FOR, old.name)
    for node in calls(bench.graph, lambda n: n.target in (LINEAR, int8_linear.target)):
        node.meta[LINEARS] = bench.record.carried(node)


def _left_rough(linears: Sequence[Outcome]) -> Iterator[str]:
    """Linears that the options ask to smooth, and that are not; what is behind no norm was never
    meant by "norm", unless that is all."""
    reasons = Counter(o.not_smoothed for o in linears if o.not_smoothed)
    if NO_NORM in reasons and any(o.smoothed for o in linears):
        del reasons[NO_NORM]
    for reason, n in reasons.items():
        yield f"{n} of {sum(o.int8 for o in linears)} int8 linears are not smoothed: {reason}"


def _notes(bench: Workbench, config: Config) -> Iterator[str]:
    outcomes = bench.record.outcomes()
    linears = [o for o in outcomes if o.kind == "linear"]
    yield from _left_rough(linears)
    if linears and all(o.refused == NEEDS_GRADIENT for o in linears):
        yield (
            "every linear can need a gradient, so none is int8: for inference, call the model "
            "under torch.inference_mode() or torch.no_grad()"
        )
    if unjudged := sum(o.int8 and o.node in bench.unjudged for o in linears):
        yield (
            f"min_sqnr did not judge {unjudged} of {sum(o.int8 for o in linears)} int8 linears: "
            "the calibration has no rows of what they read"
        )
    if config.activation == "static" and (
        unknown := [
            o.path or o.node
            for o in linears
            if o.int8 and o.node not in bench.ranges and not o.smoothed
        ]
    ):
        yield (
            f"{len(unknown)} of {sum(o.int8 for o in linears)} int8 linears stay dynamic, because "
            f"the calibration has no range for what they read: {', '.join(unknown)}"
        )
