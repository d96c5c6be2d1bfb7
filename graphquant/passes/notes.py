"""The notes of a report: facts about the rewrite beyond the outcome of each linear."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from graphquant.config import matches
from graphquant.ir.captured import Captured
from graphquant.ir.graph import calls
from graphquant.ops import int8_linear
from graphquant.passes.eligibility import NEEDS_GRADIENT
from graphquant.passes.policy.accuracy import AccuracyGate
from graphquant.passes.policy.smoothquant import NO_NORM
from graphquant.passes.state import RewriteState
from graphquant.report import SLOW_ON_CPU, Outcome, Pattern, Quiet, Report


def patterns_of(state: RewriteState) -> Iterator[Pattern]:
    paths = [o.path for o in state.record.outcomes() if o.kind == "linear"]
    for option in ("include", "exclude"):
        for pattern in dict.fromkeys(getattr(state.config, option)):
            yield Pattern(option, pattern, sum(matches(pattern, path) for path in paths))


def may_match_elsewhere(pattern: Pattern, captured: Captured) -> bool:
    """Does it match a linear of the model in another graph?"""
    return any(matches(pattern.pattern, path) for path in captured.elsewhere)


def training_notes(captured: Captured) -> Iterator[str]:
    if training := captured.training:
        which = "the model is" if "" in training else f"{len(training)} of its modules are"
        such = "" if "" in training else f", such as {training[0]}"
        note = f"{which} in training mode{such}: for inference, call model.eval()"
        yield Quiet(note) if captured.grad_enabled else note  # no warning during training


def with_slow_cpu_note(report: Report, captured: Captured) -> Report:
    """The report, with the note SLOW_ON_CPU if int8 linears run on a CPU."""
    products = calls(captured.gm.graph, lambda n: n.target is int8_linear.target)
    if not any(node.meta["val"].device.type == "cpu" for node in products):
        return report
    return replace(report, notes=(*report.notes, SLOW_ON_CPU))


def _not_smoothed(linears: Sequence[Outcome]) -> Iterator[str]:
    """Why linears are not smoothed although the options ask for it; with smooth="norm", those
    without a norm count only if no linear is smoothed."""
    reasons = Counter(o.not_smoothed for o in linears if o.not_smoothed)
    if NO_NORM in reasons and any(o.smoothed for o in linears):
        del reasons[NO_NORM]
    for reason, n in reasons.items():
        yield f"{n} of {sum(o.int8 for o in linears)} int8 linears are not smoothed: {reason}"


def notes_of(state: RewriteState, accuracy: AccuracyGate) -> Iterator[str]:
    config = state.config
    outcomes = state.record.outcomes()
    linears = [o for o in outcomes if o.kind == "linear"]
    yield from _not_smoothed(linears)
    if linears and all(o.refused == NEEDS_GRADIENT for o in linears):
        yield (
            "every linear can need a gradient, so none is int8: for inference, call the model "
            "under torch.inference_mode() or torch.no_grad()"
        )
    if unmeasured := sum(o.int8 and o.node in accuracy.unmeasured for o in linears):
        yield (
            f"min_sqnr was not checked for {unmeasured} of {sum(o.int8 for o in linears)} int8 "
            "linears: the calibration has no rows of their inputs"
        )
    if config.activation == "static" and (
        unknown := [
            o.path or o.node
            for o in linears
            if o.int8 and o.node not in state.ranges and not o.smoothed
        ]
    ):
        yield (
            f"{len(unknown)} of {sum(o.int8 for o in linears)} int8 linears stay dynamic, because "
            f"the calibration has no range of their inputs: {', '.join(unknown)}"
        )
