"""Public entry points besides the torch.compile backend."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from graphquant._torch import original
from graphquant.accuracy.budget import Budget, LeftInFloat, goal
from graphquant.accuracy.calls import copies, each_call, preserve_rng
from graphquant.accuracy.compare import Comparison, FloatRun, Int8Run
from graphquant.accuracy.counted import Counted, PaddingMask
from graphquant.accuracy.pair import Pair
from graphquant.accuracy.report import AccuracyReport
from graphquant.accuracy.search import Trials
from graphquant.calibration import Calibration, Record
from graphquant.calibration.observed import Observed
from graphquant.capture.aten import reset_dynamo_afterwards
from graphquant.capture.tracing import Trace, root_of
from graphquant.config import Config, escape
from graphquant.errors import GraphquantError, OptionError, UnsupportedInputError
from graphquant.exporters.program import require_program, to_program, unpack_weights
from graphquant.exporters.standalone import PRODUCTS, without_ops
from graphquant.failure import raise_failures, stage
from graphquant.ir.captured import Captured
from graphquant.ir.interpret import Paths
from graphquant.ir.tokens import Masks, counted
from graphquant.passes.attention.dtype import with_bfloat16_attention
from graphquant.passes.notes import with_machine_notes
from graphquant.passes.pipeline import rewrite
from graphquant.report import Report, log_notes
from graphquant.utils.progress import bar, compilation, length

log = logging.getLogger(__name__)

COMPILE_OPTIONS = (
    *("inner", "mode", "inductor", "tensorrt", "free_weights"),
    "attention_dtype",
)


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Report of what `torch.compile(model, backend="graphquant", options=options)` would do.

    Captures `model(*args, **kwargs)` and applies the rules, without packing or compiling; the model
    runs once, unchanged. Call it under the same `torch.inference_mode()` or `torch.no_grad()` as
    the model: what needs a gradient stays float.

    Raises UnsupportedInputError if the model is not callable, OptionError for invalid options.
    """
    if not callable(model):
        raise UnsupportedInputError(f"explain needs a torch.nn.Module, got {type(model).__name__}")
    config = Config.of(options or {})

    def take(captured: Captured, gm: GraphModule) -> tuple[Report, Callable[..., Any]]:
        report = with_machine_notes(rewrite(captured, config).report, captured)
        return with_bfloat16_attention(report, captured, config), gm.forward

    trace = Trace(take)
    with compilation("explain", config.progress), reset_dynamo_afterwards(trace.observe):
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
    """Export the model in int8 as a torch.export program, to be saved, compiled or converted.

    model           a torch.nn.Module in eval mode; it is not changed
    args, kwargs    example inputs as for torch.export.export, which fix dtypes and device, and all
                    sizes that are not in `dynamic_shapes`
    dynamic_shapes  as for torch.export.export: {"pixel_values": {0: torch.export.Dim("batch")}}
    options         as for `torch.compile(model, backend="graphquant", options=options)`, except
                    those of compilation; `on_report` gets the Report

    The rules are the same as under torch.compile. On a CPU, `select` is "always" unless given: the
    processor that exports a program need not be the one that runs it. Int8 weights are buffers of
    the program, named after the linears ("layers.0.fc1.wq", "w_scale", "w_sum"); float weights that
    nothing reads are left out. The program does not track later changes of the model's weights.

    On a CPU with graphquant's kernels, wq is packed in the order in which they read it, and the
    program is for CPUs: export on CUDA for CUDA. Without kernels, the ops' references read the same
    file, with the same results. `standalone`, ONNX and TensorRT get wq [N, K].

    A process that loads the file must import graphquant first, for its ops.

    Raises UnsupportedInputError if the model is not a module or is in training mode; OptionError
    for options that are unknown or of compilation; and what torch.export raises if it cannot trace
    the model into one graph.
    """
    model = _in_eval_mode("export", model)
    for name in COMPILE_OPTIONS:
        if name in options:
            raise OptionError(f"{name} is an option of torch.compile; export does not compile")
    on_cuda = any(t.is_cuda for t in chain(model.parameters(), model.buffers()))
    config = Config.of(options if on_cuda else {"select": "always", **options})
    with raise_failures("export"), compilation("export", config.progress):
        program, report = to_program(model, args, kwargs or {}, dynamic_shapes, config)
    log_notes(report.notes, log)
    if config.on_report is not None:
        config.on_report(report)
    return program


def standalone(program: ExportedProgram, *, products: str | None = None) -> ExportedProgram:
    """The same program without graphquant's ops, which runs without graphquant installed.

    program   result of `export`, also after torch.export.load; it is not changed
    products  how int8 products are computed, exactly in any case: by "int8" (`torch._int_mm`) or by
              "float32" matrix products. By default "int8" on CUDA and on a processor with AVX-512
              VNNI, else "float32"

    Every graphquant op is replaced by torch's own ops. torch.export.load then needs neither
    graphquant nor the model's library: a custom output class becomes a dict with the same names, or
    a tuple.

    For CPUs: results are those of the ops' references, bit for bit, and AOTInductor compiles it to
    a package that C++ runs without Python. On a CPU without AVX-512 VNNI, `torch._int_mm` gives the
    same results, but many times slower: choose "float32" for a file that may run there. On CUDA it
    is slower than a float model; there AOTInductor compiles the original program, with
    graphquant's Triton kernels.

    Raises UnsupportedInputError for anything but an ExportedProgram, OptionError for other
    `products`.
    """
    require_program("standalone", program)
    if products is not None and products not in PRODUCTS:
        raise OptionError(f"products={products!r} is not one of {', '.join(map(repr, PRODUCTS))}")
    return without_ops(unpack_weights(program), products)


def compare(
    model: Callable[..., Any],
    batches: Iterable[Any],
    *,
    options: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    mask: PaddingMask | None = None,
    of: Callable[..., Any] | None = None,
) -> AccuracyReport:
    """Compare a model in int8 with float: at every int8 linear, and in its outputs.

    model    a torch.nn.Module in eval mode, compiled or not; it is not changed
    batches  inputs of any number of calls and any size: a tensor (the only argument), a tuple of
             arguments, a dict of keyword arguments, or the tuple (tuple or list of arguments, dict
             of keyword arguments)
    options  as for `torch.compile(model, backend="graphquant", options=options)`
    progress show a progress bar on stderr; None: if it is a terminal
    mask     which rows are padding and do not count: a tensor [B, S] of 0 (padding) and 1 (token),
             the name of the input that is one, or a function from a call's inputs to one. By
             default the inputs named `attention_mask`, `padding_mask` or `key_padding_mask` (there
             True is padding), also in a mapping. False: every row counts
    of       a function from the model's result to what counts of it, such as a pooled embedding;
             of(result, mask=mask) with a [B, S] bool, True for a token, if it has that parameter.
             By default every floating-point tensor in the result

    A mask describes values with rows [B, S, ...], [S, B, ...], [B * S, D] or [B, H, S, D]; all
    rows of others count, such as those of a pooled [B, D].

    Every batch runs twice, in float and in int8, under torch.no_grad(), without Inductor or packed
    weights. The float results of all int8 linears are kept in between. Compared are the result of
    an int8 product, y8, and that of the float model, y:

        y    linear(x, W, bias), times the layer scale if that is folded into the int8 product
        y8   the same in int8, without the residual added in its epilogue

    `local`: y8 on the float model's input, of the linear or of the norm or activation fused with
    its quantization. `accumulated`: y8 in the int8 model. Stacked q/k/v are compared separately. A
    model that changes its own buffers when called sees two calls per batch.

    Raises UnsupportedInputError if the model is not a module or is in training mode, if there are
    no batches, and for a batch of another type; OptionError for invalid options, for a `mask` that
    is no padding mask or describes nothing, and for an `of` that is no function; GraphquantError if
    the model takes another path in int8 than in float (its control flow or its sizes depend on
    values that int8 has changed).
    """
    model = _callable("compare", model)
    config = Config.of(options or {})
    paths = Paths(root_of(model))
    counts = Counted(model, mask, of)
    comparison, active = Comparison(), list[FloatRun | Int8Run]()

    def take(captured: Captured, gm: GraphModule) -> tuple[Report, Callable[..., Any]]:
        with stage("the pairing of float and int8"):
            pair = Pair(captured, config, paths)
        return pair.report, captured.around(lambda *args: active[-1](pair, args))

    def run(how: FloatRun | Int8Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        active[:] = [how]
        with preserve_rng():  # both runs draw the same numbers
            return trace(model, *copies(args, kwargs))

    trace = Trace(take, "compare")
    report = None
    with torch.no_grad(), reset_dynamo_afterwards(trace.observe):
        calls = bar("compare", "batch", progress, each_call(batches, model), length(batches))
        for args, kwargs in calls:
            masks = counts.masks(args, kwargs)
            floats = FloatRun(masks)
            want = counts.outputs(run(floats, args, kwargs), masks)
            report = report or trace.report(model)
            int8 = Int8Run(floats.values)
            got = run(int8, args, kwargs)
            int8.check()
            comparison.linears(floats, int8)
            comparison.outputs(counts.outputs(got, masks), want, masks)
            counts.add(masks)
    if report is None:
        raise UnsupportedInputError("compare needs at least one batch, got none")
    report = replace(report, notes=(*report.notes, *counts.notes))
    return comparison.result(report, counts.padding)


def calibrate(
    model: Callable[..., Any],
    batches: Iterable[Any],
    *,
    method: str = "absmax",
    percentile: float = 99.99,
    progress: bool | None = None,
    resume: Calibration | None = None,
    mask: PaddingMask | None = None,
) -> Calibration:
    """Collect statistics of all linear inputs: absmax per channel, histogram, sampled rows.

    model       a torch.nn.Module in eval mode, compiled or not; it is not changed
    batches     inputs as for `compare`
    method      how Calibration.range chooses a static range: "absmax", "percentile" or "mse";
                `Calibration.using` can change it later, without new data
    percentile  of |x|, for method "percentile"
    progress    show a progress bar on stderr; None: if it is a terminal
    resume      a Calibration of this model to add the data to; it is not changed, and its method is
                not used
    mask        which rows are padding and do not count, as for `compare`; INFO in the log says how
                many they were

    The float model runs once per batch under torch.no_grad(), without Inductor. Linears that no
    batch reaches, or that torch.compile does not capture (a warning says how many), are not in the
    result. inf and nan are left out, with a warning.

    Merging is exact, so calibration can be done in parts: `calibration = calibrate(model, part,
    resume=calibration)` and `calibration.save(path)` after each. The last bits of the float model's
    own results may depend on the batching.

    Raises UnsupportedInputError if the model is not a module or is in training mode, if there are
    no batches, and for a batch of another type; OptionError for an unknown method or a bad `mask`;
    CalibrationError if `resume` is of another model.
    """
    model = _callable("calibrate", model)
    calibration = Calibration(_owner(model), method=method, percentile=percentile)
    if resume is not None:
        calibration = calibration.merge(resume)
    paths = Paths(root_of(model))
    counts, masks = Counted(model, mask), Masks()

    def add(readers: Sequence[str], x: Tensor, rows: Tensor | None) -> None:
        calibration.add(readers, Record.of(counted(x, rows)))

    def take(captured: Captured, gm: GraphModule) -> tuple[Report, Callable[..., Any]]:
        with stage("normalize"):
            observed = Observed(captured, paths, add)
        return Report(()), captured.around(lambda *args: observed.run(args, masks))

    trace = Trace(take, "calibrate")
    before = calibration.batches
    total = length(batches)
    with torch.no_grad(), reset_dynamo_afterwards(trace.observe):
        for args, kwargs in bar("calibrate", "batch", progress, each_call(batches, model), total):
            masks = counts.masks(args, kwargs)
            with preserve_rng():
                trace(model, *copies(args, kwargs))
            counts.add(masks)
            calibration.batches += 1
    if calibration.batches == before:
        raise UnsupportedInputError("calibrate needs at least one batch, got none")
    for warning in (*trace.report(model).notes, *calibration.warnings(), *counts.notes):
        log.warning("%s", warning)
    for padding in counts.padding:
        log.info("%s", padding)
    return calibration


def fit_budget(
    model: Callable[..., Any],
    batches: Iterable[Any],
    *,
    cosine: float | None = None,
    worst_cosine: float | None = None,
    sqnr: float | None = None,
    options: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    mask: PaddingMask | None = None,
    of: Callable[..., Any] | None = None,
) -> Budget:
    """Find options that meet an accuracy budget, by leaving the worst linears in float.

    model         a torch.nn.Module in eval mode, compiled or not; it is not changed
    batches       inputs as for `compare`; all are kept in memory and run many times
    cosine        minimum mean cosine of the outputs' rows (slices along the last dim)
    worst_cosine  minimum cosine of any row
    sqnr          minimum SQNR of the outputs, in dB
    options       as for `torch.compile(model, backend="graphquant", options=options)`
    progress      show progress bars on stderr; None: if it is a terminal
    mask, of      as for `compare`: the rows that are padding, and what of the outputs counts

    Give exactly one of the three budgets. Every floating-point output must meet it: `of` says what
    matters, such as a pooled embedding. With a `calibration` and without `smooth` in the options,
    smooth="auto" is tried first, and kept if it brings the outputs closer.

    First the outputs are compared with each linear alone in int8. The linears with the most error
    per time saved (measured on CUDA; else per FLOP) are left in float, as few as suffice in runs of
    the whole model; those that turn out unnecessary return to int8. It takes about
    n + log2(n) + m runs over the batches for n linears of which m stay in float. Finally the result
    is compared as it will be compiled.

    Linears are identified by the module path in the report, so layers that share a graph are
    decided together. On other data, or with other weights, the outputs may be less accurate.

    Raises OptionError unless exactly one valid budget is given; GraphquantError if even float does
    not meet it, as for a model that is not deterministic; and as `compare` does.
    """
    model = _callable("fit_budget", model)
    metric, least = goal(cosine=cosine, worst_cosine=worst_cosine, sqnr=sqnr)
    calls = list(each_call(batches, model))
    chosen = dict(options or {})

    def compared(options: Mapping[str, Any]) -> AccuracyReport:
        return compare(model, calls, options=options, progress=progress, mask=mask, of=of)

    report = compared(chosen)
    before = after = metric(report.outputs)
    if after < least and chosen.get("calibration") is not None and "smooth" not in chosen:
        smoothed = {**chosen, "smooth": "auto"}
        tried = compared(smoothed)
        if (reached := metric(tried.outputs)) > after:
            chosen, report, after = smoothed, tried, reached
    left: list[LeftInFloat] = []
    if after < least:
        trials = Trials(model, calls, Config.of(chosen), Counted(model, mask, of))
        with reset_dynamo_afterwards(trials.trace.observe):
            found = trials.search(metric, least, progress=progress)
        every = sum(o.flops for o in report.report.linears) or 1
        paths, more = found.left, found.others
        for step in count():  # one step, if the result holds when compiled
            fitted = {**chosen, "exclude": _excluded(chosen, paths)}
            report = compared(fitted)
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
    """The option `exclude` with these paths added."""
    return [*Config.of(options).exclude, *map(escape, paths)]


def _callable(entry: str, model: Callable[..., Any]) -> Callable[..., Any]:
    """The model, a module or a method of one, if it is in eval mode."""
    owner = getattr(model, "__self__", None)
    if not isinstance(owner, nn.Module):
        return _in_eval_mode(entry, model)
    _in_eval_mode(entry, owner)
    return model


def _owner(model: Callable[..., Any]) -> nn.Module:
    owner = root_of(model)
    assert owner is not None  # checked by _callable
    return owner


def _in_eval_mode(entry: str, model: Any) -> nn.Module:
    """The module, not compiled, if it is in eval mode. Raises UnsupportedInputError."""
    model = original(model)
    if not isinstance(model, nn.Module):
        raise UnsupportedInputError(f"{entry} needs a torch.nn.Module, got {type(model).__name__}")
    if training := [n or "the model" for n, m in model.named_modules() if m.training]:
        raise UnsupportedInputError(
            f"{entry} needs a model in eval mode, but {training[0]} is in training mode: "
            "call model.eval()"
        )
    return model
