"""The entries beside torch.compile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from tqdm import tqdm

from graphquant._torch import original
from graphquant.accuracy.budget import Budget, LeftInFloat, goal
from graphquant.accuracy.calls import copies, each_call, preserve_rng
from graphquant.accuracy.compare import Comparison, FloatRun, Int8Run
from graphquant.accuracy.outputs import copy_outputs
from graphquant.accuracy.pair import Pair
from graphquant.accuracy.report import AccuracyReport
from graphquant.accuracy.search import Trials
from graphquant.calibration import Calibration, Record
from graphquant.calibration.observed import Observed
from graphquant.capture.aten import forgotten_afterwards
from graphquant.capture.tracing import Trace, root_of
from graphquant.config import Config, literally
from graphquant.errors import GraphquantError, OptionError, UnsupportedInputError
from graphquant.exporters.program import require_program, to_program
from graphquant.exporters.standalone import without_ops
from graphquant.failure import promised, stage
from graphquant.ir.captured import Captured
from graphquant.ir.interpret import Paths
from graphquant.passes.notes import with_slow_cpu_note
from graphquant.passes.pipeline import rewrite
from graphquant.report import Report

log = logging.getLogger(__name__)

OF_COMPILATION = ("inner", "mode", "inductor", "tensorrt", "free_weights")


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """What `torch.compile(model, backend="graphquant", options=options)` would do on this call.

    Captures `model(*args, **kwargs)`, applies the rules and returns the Report. Nothing is packed
    or compiled; the model runs once, in float, as it is. Call it under the same
    `torch.inference_mode()` or `torch.no_grad()` as the model: what needs a gradient stays float.
    """
    if not callable(model):
        raise UnsupportedInputError(f"explain needs a torch.nn.Module, got {type(model).__name__}")
    config = Config.of(options or {})

    def take(captured: Captured, gm: GraphModule) -> tuple[Report, Callable[..., Any]]:
        return with_slow_cpu_note(rewrite(captured, config).report, captured), gm.forward

    trace = Trace(take)
    with forgotten_afterwards(trace.observe):
        trace(model, args, kwargs)
    return trace.report(model)


def export(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    **options: Any,
) -> ExportedProgram:
    """The model in int8 as a torch.export program, to be saved, compiled ahead or converted.

    model           a torch.nn.Module in eval mode; it stays as it is
    args, kwargs    what one call takes, as for torch.export.export: its dtypes and device are those
                    of the program, and its sizes where `dynamic_shapes` does not say otherwise
    dynamic_shapes  as for torch.export.export: {"pixel_values": {0: torch.export.Dim("batch")}}
    options         as for `torch.compile(model, backend="graphquant", options=options)`, but for
                    those of compilation; `on_report` gets the Report

    The same rules rewrite it as under torch.compile. Int8 weights are buffers of the program, named
    after the linears ("layers.0.fc1.wq", "w_scale", "w_sum"), and float weights that nothing reads
    any more are not in it. Weights are those of now: the program does not follow the model.

    A process that loads the file has to import graphquant first, for its ops.

    Raises UnsupportedInputError for a model that is no module or is in training mode; OptionError
    for options that do not exist or say nothing here; and what torch.export raises for a model that
    it cannot trace into one graph.
    """
    model = _in_eval_mode("export", model)
    for name in OF_COMPILATION:
        if name in options:
            raise OptionError(f"{name} is an option of torch.compile: an export compiles nothing")
    config = Config.of(options)
    with promised("export"):
        program, report = to_program(model, args, kwargs or {}, dynamic_shapes, config)
    for note in report.notes:
        log.warning("%s", note)
    if config.on_report is not None:
        config.on_report(report)
    return program


def standalone(program: ExportedProgram) -> ExportedProgram:
    """The same program without graphquant's ops: it runs where graphquant is not.

    program  what `export` returned, or `torch.export.load` of it; it stays as it is

    Every op of graphquant is replaced by what it means in torch's own ops. torch.export.load needs
    no import of graphquant then, nor of the model's library: what the model returned as a class of
    its own is a dict with the same names, or a tuple.

    For a CPU: the results are the same, bit for bit, and AOTInductor compiles it to a package that
    a C++ program runs without Python. On CUDA the int8 products are `torch._int_mm`, and it is
    slower than a float model; there AOTInductor compiles the program as it is, with graphquant's
    Triton kernels, to such a package.

    Raises UnsupportedInputError for anything but an ExportedProgram.
    """
    require_program("standalone", program)
    return without_ops(program)


def compare(
    model: Callable[..., Any], batches: Iterable[Any], *, options: Mapping[str, Any] | None = None
) -> AccuracyReport:
    """How far int8 takes a model from float: at every int8 linear, and in what it returns.

    model    a torch.nn.Module in eval mode, compiled or not; it stays as it is
    batches  what its calls take, one after the other, each of any size: a tensor (the only
             argument), a tuple of arguments, a dict of keyword arguments, or the tuple (tuple or
             list of arguments, dict of keyword arguments)
    options  as for `torch.compile(model, backend="graphquant", options=options)`

    Every batch runs twice, in float and rewritten, under torch.no_grad() and by the ops as they
    stand (no Inductor); nothing is packed. The float results of all int8 linears are kept from one
    run to the other. Compared is what an int8 product adds to the model, y8, with what the float
    model has in its place, y:

        y    linear(x, W, bias), times the layer scale if that was folded into the int8 product
        y8   the same in int8, without the residual that is added in its epilogue

    `local`: y8 on the float model's input x, or, where a norm or an activation was fused with the
    quantisation, on the float model's input of that. `accumulated`: y8 in the int8 model.
    q/k/v that became one product are told apart. A model that changes its own buffers when it is
    called sees two calls for each batch.

    Raises UnsupportedInputError for a model that is no module or is in training mode, for batches
    that hold nothing, and for a batch of another type; OptionError for options that do not exist;
    GraphquantError if the model takes another path in int8 than in float (its control flow or its
    sizes depend on values that int8 has changed).
    """
    model = _callable("compare", model)
    config = Config.of(options or {})
    paths = Paths(root_of(model))
    comparison, active = Comparison(), list[FloatRun | Int8Run]()

    def take(captured: Captured, gm: GraphModule) -> tuple[Report, Callable[..., Any]]:
        with stage("the pairing of float and int8"):
            pair = Pair(captured, config, paths)
        return pair.report, lambda *args: active[-1](pair, args)

    def run(how: FloatRun | Int8Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        active[:] = [how]
        with preserve_rng():  # both runs draw the same numbers
            return trace(model, *copies(args, kwargs))

    trace = Trace(take, "compare")
    report = None
    with torch.no_grad(), forgotten_afterwards(trace.observe):
        for args, kwargs in each_call(batches, model):
            floats = FloatRun()
            want = copy_outputs(run(floats, args, kwargs))
            report = report or trace.report(model)
            int8 = Int8Run(floats.values)
            got = run(int8, args, kwargs)
            int8.check()
            comparison.linears(floats, int8)
            comparison.outputs(got, want)
    if report is None:
        raise UnsupportedInputError("compare needs at least one batch, got none")
    return comparison.result(report)


def calibrate(
    model: Callable[..., Any],
    batches: Iterable[Any],
    *,
    method: str = "absmax",
    percentile: float = 99.99,
    progress: bool = True,
    resume: Calibration | None = None,
) -> Calibration:
    """What the model's linears read on these batches: channels' absmax, a histogram, some rows.

    model       a torch.nn.Module in eval mode, compiled or not; it stays as it is
    batches     what its calls take, one after the other, each of any size, as for `compare`;
                padding counts like anything else
    method      how Calibration.range finds a static range: "absmax", "percentile" or "mse"; all
                three work on what is gathered, so `Calibration.using` can change it later
    percentile  of |x|, for method "percentile"
    progress    show a progress bar
    resume      a Calibration of this model: its data counts as well, and its method stays as it is
                here. Neither it nor anything else is changed.

    The float model runs once for each batch under torch.no_grad(), by the ops as they stand. A
    linear that no batch came to is not in the result, nor is one that torch.compile does not see
    (a warning in the log says how many). Values that are inf or nan are left out, and a warning
    says where.

    Adding up is exact, so it can be done in parts: after each, `calibration = calibrate(model,
    part, resume=calibration)` and `calibration.save(path)`. The model computes in float, and its
    results may depend on how samples are batched in the last bits.

    Raises UnsupportedInputError for a model that is no module or is in training mode, for batches
    that hold nothing, and for a batch of another type; OptionError for a method that does not
    exist; CalibrationError if `resume` is of another model.
    """
    model = _callable("calibrate", model)
    calibration = Calibration(_owner(model), method=method, percentile=percentile)
    if resume is not None:
        calibration = calibration.merge(resume)
    paths = Paths(root_of(model))

    def found(readers: Sequence[str], x: Tensor) -> None:
        calibration.add(readers, Record.of(x))

    def take(captured: Captured, gm: GraphModule) -> tuple[Report, Callable[..., Any]]:
        with stage("normalize"):
            return Report(()), Observed(captured, paths, found).run

    trace = Trace(take, "calibrate")
    before = calibration.batches
    total = len(batches) if isinstance(batches, Sized) else None
    with torch.no_grad(), forgotten_afterwards(trace.observe):
        calls = tqdm(
            each_call(batches, model), "calibrate", total, unit="batch", disable=not progress
        )
        for args, kwargs in calls:
            with preserve_rng():
                trace(model, *copies(args, kwargs))
            calibration.batches += 1
    if calibration.batches == before:
        raise UnsupportedInputError("calibrate needs at least one batch, got none")
    for warning in (*trace.report(model).notes, *calibration.warnings()):
        log.warning("%s", warning)
    return calibration


def fit_budget(
    model: Callable[..., Any],
    batches: Iterable[Any],
    *,
    cosine: float | None = None,
    worst_cosine: float | None = None,
    sqnr: float | None = None,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Budget:
    """Options under which the outputs are this exact: the linears that cost most stay in float.

    model         a torch.nn.Module in eval mode, compiled or not; it stays as it is
    batches       what its calls take, as for `compare`; all are kept, and run again and again
    cosine        the least mean of the cosines of the outputs' rows (slices along the last dim)
    worst_cosine  the least cosine of any row
    sqnr          the least SQNR of the outputs, in dB
    options       as for `torch.compile(model, backend="graphquant", options=options)`
    progress      show a progress bar

    One of the three budgets is given. Each floating-point tensor that the model returns has to keep
    it: wrap the model in a module that returns what counts, such as its pooled embeddings. With a
    `calibration` and no word of `smooth` among the options, smooth="auto" is tried first, and taken
    if the outputs are nearer with it.

    First the outputs are compared with each linear alone in int8. Those that cost most for the time
    that they save (as measured on CUDA; else for their FLOPs) are left in float, as few as suffice,
    in runs of the whole model; and what turns out not to be needed is given back. It takes about
    n + log2(n) + m runs over the batches for n linears of which m stay in float. The result is
    compared at last as it will be compiled.

    Linears are told apart by the module path in the report, so layers that share one graph go
    together. On other data, or with other weights, the outputs may be less exact.

    Raises OptionError unless one budget is given and can be met by a number; GraphquantError if not
    even float keeps it, which is so for a model that computes something else at every call; and as
    `compare` does.
    """
    model = _callable("fit_budget", model)
    metric, least = goal(cosine=cosine, worst_cosine=worst_cosine, sqnr=sqnr)
    calls = list(each_call(batches, model))
    chosen = dict(options or {})
    report = compare(model, calls, options=chosen)
    before = after = metric(report.outputs)
    if after < least and chosen.get("calibration") is not None and "smooth" not in chosen:
        smoothed = {**chosen, "smooth": "auto"}
        tried = compare(model, calls, options=smoothed)
        if (reached := metric(tried.outputs)) > after:
            chosen, report, after = smoothed, tried, reached
    left: list[LeftInFloat] = []
    if after < least:
        trials = Trials(model, calls, Config.of(chosen))
        with forgotten_afterwards(trials.trace.observe):
            found = trials.search(metric, least, progress=progress)
        every = sum(o.flops for o in report.report.linears) or 1
        paths, more = found.left, found.others
        for step in count():  # one try, if it holds as it is compiled
            fitted = {**chosen, "exclude": _excluded(chosen, paths)}
            report = compare(model, calls, options=fitted)
            if (after := metric(report.outputs)) >= least or not more:
                break
            paths, more = paths + more[: 2**step], more[2**step :]
        if not after >= least:
            raise GraphquantError(
                f"this budget cannot be met: with every linear in float the outputs reach "
                f"{metric.shown(after)}, less than {metric.shown(least)}"
            )
        chosen = fitted
        left = [LeftInFloat(p, found.alone[p], trials.flops(p) / every) for p in paths]
    order = sorted(left, key=lambda site: site.alone)
    share = 1 - report.report.coverage
    return Budget(metric.name, least, before, after, tuple(order), share, chosen)


def _excluded(options: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """The option `exclude`, and these paths."""
    return [*Config.of(options).exclude, *map(literally, paths)]


def _callable(entry: str, model: Callable[..., Any]) -> Callable[..., Any]:
    """The module or the method of a module, if it may be run as in inference."""
    owner = getattr(model, "__self__", None)
    if not isinstance(owner, nn.Module):
        return _in_eval_mode(entry, model)
    _in_eval_mode(entry, owner)
    return model


def _owner(model: Callable[..., Any]) -> nn.Module:
    owner = root_of(model)
    assert owner is not None  # _callable has looked
    return owner


def _in_eval_mode(entry: str, model: Any) -> nn.Module:
    """The module itself, if it is one and may be run as in inference."""
    model = original(model)
    if not isinstance(model, nn.Module):
        raise UnsupportedInputError(f"{entry} needs a torch.nn.Module, got {type(model).__name__}")
    if training := [n or "the model" for n, m in model.named_modules() if m.training]:
        raise UnsupportedInputError(
            f"{entry} needs a model in eval mode, but {training[0]} is in training mode: "
            "call model.eval()"
        )
    return model
