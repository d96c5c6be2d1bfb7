"""The entries beside torch.compile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from tqdm import tqdm

from graphquant.accuracy import AccuracyReport
from graphquant.calibration import Calibration, Record
from graphquant.calibration.observed import Observed
from graphquant.capture import forgotten_afterwards, from_dynamo
from graphquant.config import Config
from graphquant.errors import CaptureError, GraphquantError, UnsupportedInputError
from graphquant.paired import Pair
from graphquant.passes.ir import Captured
from graphquant.passes.pipeline import rewrite
from graphquant.report import Report
from graphquant.tally import Tally, copies, each_call, own_generators
from graphquant.watched import Paths

log = logging.getLogger(__name__)


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
        return rewrite(captured, config), gm.forward

    trace = _Trace(take)
    with forgotten_afterwards(trace.observe):
        trace(model, args, kwargs)
    return trace.report(model)


def compare(
    model: nn.Module, batches: Iterable[Any], *, options: Mapping[str, Any] | None = None
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
    model = _in_eval_mode("compare", model)
    config = Config.of(options or {})
    paths = Paths(model)
    tally = Tally()

    def take(captured: Captured, gm: GraphModule) -> tuple[Report, Callable[..., Any]]:
        pair = Pair(captured, config, paths)
        return pair.report, partial(tally.run, pair)

    trace = _Trace(take)
    report = None
    with torch.no_grad(), forgotten_afterwards(trace.observe):
        for args, kwargs in each_call(batches):
            with tally.float_run():
                want = trace(model, *copies(args, kwargs))
            report = report or trace.report(model)
            with tally.int8_run():
                got = trace(model, *copies(args, kwargs))
            tally.outputs(got, want)
    if report is None:
        raise UnsupportedInputError("compare needs at least one batch, got none")
    return tally.result(report)


def calibrate(
    model: nn.Module,
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
    model = _in_eval_mode("calibrate", model)
    calibration = Calibration(model, method=method, percentile=percentile)
    if resume is not None:
        calibration = calibration.merge(resume)
    paths = Paths(model)

    def found(readers: Sequence[str], x: Tensor) -> None:
        calibration.add(readers, Record.of(x))

    def take(captured: Captured, gm: GraphModule) -> tuple[Report, Callable[..., Any]]:
        return Report(()), Observed(captured, paths, found).run

    trace = _Trace(take)
    before = calibration.batches
    total = len(batches) if isinstance(batches, Sized) else None
    with torch.no_grad(), forgotten_afterwards(trace.observe):
        calls = tqdm(each_call(batches), "calibrate", total, unit="batch", disable=not progress)
        for args, kwargs in calls:
            with own_generators():
                trace(model, *copies(args, kwargs))
            calibration.batches += 1
    if calibration.batches == before:
        raise UnsupportedInputError("calibrate needs at least one batch, got none")
    for warning in (*trace.report(model).notes, *calibration.warnings()):
        log.warning("%s", warning)
    return calibration


def _in_eval_mode(entry: str, model: nn.Module) -> nn.Module:
    """The module itself, if it is one and may be run as in inference."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod  # what torch.compile returned
    if not isinstance(model, nn.Module):
        raise UnsupportedInputError(f"{entry} needs a torch.nn.Module, got {type(model).__name__}")
    if training := [n or "the model" for n, m in model.named_modules() if m.training]:
        raise UnsupportedInputError(
            f"{entry} needs a model in eval mode, but {training[0]} is in training mode: "
            "call model.eval()"
        )
    return model


class _Trace:
    """torch.compile with a view of every graph.

    take(captured, Dynamo's graph) -> (its report, what runs in its place), once for each graph
    """

    def __init__(
        self, take: Callable[[Captured, GraphModule], tuple[Report, Callable[..., Any]]]
    ) -> None:
        self._take = take
        self._reports: list[Report] = []
        self._seen: set[int] = set()  # ids of parameters
        # Dynamo counts compilations by code object, and runs eager after a few: this one is new
        call = FunctionType(_call.__code__.replace(), globals())
        self._compiled = torch.compile(call, backend=self.observe)

    def __call__(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        many = {"recompile_limit": 2**16, "accumulated_recompile_limit": 2**16}
        with torch._dynamo.config.patch(many):
            return self._compiled(model, *args, **kwargs)

    def observe(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        run: Callable[..., Any] = gm.forward
        try:
            captured = from_dynamo(gm, example_inputs)
        except CaptureError as why:
            self._reports.append(Report.left(why))
            return run
        if captured is not None:
            self._seen.update(map(id, captured.parameters.values()))
            report, run = self._take(captured, gm)
            self._reports.append(report)
        return run

    def report(self, model: Callable[..., Any]) -> Report:
        """Of all graphs until now."""
        if not self._reports:
            raise GraphquantError(f"torch.compile found no tensor code in {type(model).__name__}")
        report = Report.merge(self._reports)
        return replace(report, notes=(*report.notes, *_unseen(model, self._seen)))


def _unseen(model: Callable[..., Any], seen: set[int]) -> Iterator[str]:
    """A note if the model has linears that no graph holds: coverage does not count them."""
    if not isinstance(model, nn.Module):
        return
    every = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if missing := [n for n, m in every.items() if id(m.weight) not in seen]:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        yield (
            f"{len(missing)} of {len(every)} nn.Linear modules are in no captured graph and not "
            f"counted ({names}): this call did not reach them, torch.compile skipped their code, "
            "or they share another layer's graph"
        )


def _call(self: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return self(*args, **kwargs)  # named as in a method: paths in the report begin behind it
