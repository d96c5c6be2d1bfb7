"""The notes of a report: facts about the rewrite beyond the outcome of each linear."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch.fx import Graph, Node

from graphquant.config import matches
from graphquant.ir.captured import Captured
from graphquant.ir.graph import LINEAR, calls, full_args
from graphquant.ops import OPS, cpu, int8_linear
from graphquant.ops.define import Op
from graphquant.ops.int8_linear import onednn
from graphquant.ops.runtime.chips import never_ran, slow_int8
from graphquant.ops.runtime.device import gpu_properties
from graphquant.passes.eligibility import NEEDS_GRADIENT
from graphquant.passes.policy.accuracy import AccuracyGate
from graphquant.passes.policy.smoothquant import NO_NORM
from graphquant.passes.policy.speed import NO_KERNELS
from graphquant.passes.state import RewriteState
from graphquant.report import Once, Outcome, Pattern, Quiet, Report

HOOKS = "accelerate/hooks.py"  # in the stack of what they call


def patterns_of(state: RewriteState) -> Iterator[Pattern]:
    paths = [o.path for o in state.record.outcomes() if o.kind == "linear"]
    for option in ("include", "exclude"):
        for pattern in dict.fromkeys(getattr(state.config, option)):
            yield Pattern(option, pattern, sum(matches(pattern, path) for path in paths))


def may_match_elsewhere(pattern: Pattern, captured: Captured) -> bool:
    """Does it match a linear of the model in another graph?"""
    return any(matches(pattern.pattern, path) for path in captured.elsewhere)


def hook_notes(graph: Graph) -> Iterator[str]:
    """That the graph is a fragment of a model, between hooks of accelerate."""
    if any(HOOKS in n.meta.get("stack_trace", "") for n in graph.nodes):
        yield Once(
            "hooks of accelerate (device_map, dispatch_model, cpu_offload, disk_offload) interrupt "
            "the model at each of its modules, and what torch.compile cannot see stays float: "
            "optimize blocks without hooks inside of them, see docs/recipes/accelerate.md"
        )


def training_notes(captured: Captured) -> Iterator[str]:
    if training := captured.training:
        which = "the model is" if "" in training else f"{len(training)} of its modules are"
        such = "" if "" in training else f", such as {training[0]}"
        note = f"{which} in training mode{such}: for inference, call model.eval()"
        yield Quiet(note) if captured.grad_enabled else note  # no warning during training


def shard_notes(captured: Captured) -> Iterator[str]:
    """That sizes in the report are those of shards."""
    if captured.shards is not None and (n := captured.shards.linears):
        yield Quiet(
            f"{n} linears have weights sharded over processes (DTensor): N and K are those of this "
            "process's shards, and each process quantizes its own"
        )


def with_machine_notes(report: Report, captured: Captured) -> Report:
    """The report, with notes on int8 where the graph runs: on this machine's CPU and GPUs."""
    graph = captured.gm.graph
    found = (*_cpu_notes(report, graph), *_gpu_notes(graph))
    return replace(report, notes=(*report.notes, *found))


def without_kernels() -> str:
    """What computes int8 on this CPU where our kernels do not run."""
    return "PyTorch's operators" if onednn.missing() else "oneDNN and PyTorch's operators"


def _cpu_notes(report: Report, graph: Graph) -> Iterator[str]:
    ours = {op.target: op for op in OPS.values() if op.has_cpu_kernel}
    nodes = [n for n in calls(graph, lambda n: n.target in ours) if _device(n) == "cpu"]
    floats = calls(graph, lambda n: n.target is LINEAR and _device(n) == "cpu")
    slower = any(o.float_us for o in report.linears) and any(floats)
    if not nodes and not slower:
        return
    if (why := cpu.missing()) is not None:
        yield Once(f"int8 on this CPU is left to {without_kernels()}: {why}")
        return
    if not cpu.library().isa.has_dot and any(n.target is int8_linear.target for n in nodes):
        yield Once(f"{cpu.NO_DOT}: int8, as select='always' asks for, is not faster")
    every = Counter((ours[n.target].name, _refusal(ours[n.target], n)) for n in nodes)  # type: ignore[index]
    for (name, refusal), count in every.items():
        if refusal is not None:
            yield f"{count} of the calls of {name} are computed by PyTorch's operators: {refusal}"


def _gpu_notes(graph: Graph) -> Iterator[str]:
    """What is known of int8 on the GPUs that compute linears."""
    if not torch.cuda.is_available():  # a graph that another machine will run
        return
    linears = calls(graph, lambda n: n.target in (LINEAR, int8_linear.target))
    devices = {n.all_input_nodes[0].meta["val"].device for n in linears}
    for sm in sorted({gpu_properties(d).sm for d in devices if d.type == "cuda"}):
        if (why := slow_int8(sm)) is not None:
            yield Once(f"{why}: int8 is rarely the faster one")
        if (why := never_ran(sm)) is not None:
            yield Quiet(why)


def _device(node: Node) -> str:
    kind: str = node.all_input_nodes[0].meta["val"].device.type
    return kind


def _refusal(op: Op, call: Node) -> str | None:
    """Why the CPU kernel does not compute this call, or None."""
    return op.cpu_refusal(*(a.meta["val"] if isinstance(a, Node) else a for a in full_args(call)))


def _left_in_float(linears: Sequence[Outcome]) -> Iterator[str]:
    """That nothing was measured, and so no linear is int8."""
    reasons = {o.refused for o in linears} & {cpu.NO_DOT, NO_KERNELS}
    if reasons and not any(o.int8 for o in linears):
        (why,) = reasons
        because = f" ({cpu.missing()})" if why == NO_KERNELS else ""
        yield Once(f"{why}: every linear stays float{because}")


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
    yield from _left_in_float(linears)
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
