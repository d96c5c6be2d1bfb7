"""Latency of one call of a model: in float, compiled, in bfloat16 and in int8.

    python -m graphquant bench my_module:make_model --batch 8
    python -m graphquant bench path/to/model --device cuda --dtype bfloat16

All variants run in one process with the same weights and inputs, and take turns (A B C A B C ...),
so that other load on the machine affects all of them alike. Times are medians over the turns of
torch.utils.benchmark. Two ratios: to the eager model, and to the fastest variant without
graphquant. The cosine compares the outputs with those of the eager model.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from graphquant._torch import tree_leaves, tree_map
from graphquant._torch.dynamo import patch_config
from graphquant.backend import graphquant as backend
from graphquant.cli.arguments import add_model, add_output, options, page, positive, write_json
from graphquant.cli.doctor import environment
from graphquant.cli.models import Inputs, load
from graphquant.metrics import Error
from graphquant.report import Report

VARIANTS = {  # name -> (in bfloat16, how it is compiled)
    "eager": (False, ""),
    "compile": (False, "inductor"),
    "bf16-eager": (True, ""),
    "bf16-compile": (True, "inductor"),
    "graphquant": (False, "graphquant"),
    "bf16-graphquant": (True, "graphquant"),
}
USUAL = ("eager", "compile", "bf16-compile", "graphquant", "bf16-graphquant")
TURN_S = 0.1  # length of one variant's turn, about
MIN_TURNS = 3
MIN_COSINE = 0.99  # outputs below this are reported as wrong


@dataclass
class Time:
    """Times of one variant. ms: median of a call. spread: (max - min) / median of the turns."""

    variant: str
    ms: float | None = None
    spread: float | None = None
    first_s: float | None = None
    cosine: float | None = None
    coverage: float | None = None
    notes: tuple[str, ...] = ()
    failed: str = ""
    turns: list[float] = field(default_factory=list, repr=False)

    @property
    def is_int8(self) -> bool:
        return VARIANTS[self.variant][1] == "graphquant"


def add_arguments(p: argparse.ArgumentParser) -> None:
    add_model(p)
    p.add_argument("--variants", nargs="+", choices=VARIANTS, help=f"({' '.join(USUAL)})")
    p.add_argument("--seconds", type=positive, default=2.0, metavar="S", help="of each (2)")
    add_output(p, 120)


def run(args: argparse.Namespace) -> int:
    chosen = options(args)
    name, model, make = load(args)
    floats = [p for p in model.parameters() if p.is_floating_point()]
    is_bf16 = bool(floats) and all(p.dtype == torch.bfloat16 for p in floats)
    wanted = dict.fromkeys(("eager", *(args.variants or USUAL)))
    variants = [v for v in wanted if not (is_bf16 and v.startswith("bf16-"))]
    times = measure(model, make(0), variants, chosen, args.seconds)
    about = environment()
    device = str(next((p.device for p in floats), torch.device("cpu")))
    where = about["device"] if device.startswith("cuda") else about["processor"]
    dtype = str(floats[0].dtype).removeprefix("torch.") if floats else "no weights"
    title = f"{name}, batch {args.batch}, {dtype} on {where}, torch {torch.__version__}"
    with page(args) as console:
        console.print(table(title, times))
    facts = {"model": name, "batch": args.batch, "dtype": dtype, "environment": about}
    facts["variants"] = [{**asdict(t), **ratios(t, times)} for t in times]
    write_json(args, json.dumps(facts, indent=2))
    return 0 if all(not t.failed for t in times) else 1


def measure(
    model: nn.Module,
    inputs: Inputs,
    variants: Sequence[str],
    chosen: Mapping[str, Any],
    seconds: float,
) -> list[Time]:
    """A Time for each variant, the eager model first."""
    times = {v: Time(v) for v in variants}
    calls: dict[str, Callable[[], Any]] = {}
    narrow: list[tuple[nn.Module, Inputs]] = []  # made on first use
    want: Tensor | None = None
    # guards distinguish the variants, so one forward is compiled several times
    with patch_config(recompile_limit=64), torch.inference_mode():
        for variant, time_ in times.items():
            in_bf16, how = VARIANTS[variant]
            if in_bf16 and not narrow:
                narrow.append(_in_bfloat16(model, inputs))
            one, given = narrow[0] if in_bf16 else (model, inputs)
            reports: list[Report] = []
            call = _compiled(one, given, how, chosen, reports)
            try:
                start = time.perf_counter()
                got = _flat(call())
                time_.first_s = time.perf_counter() - start
            except Exception as error:  # noqa: BLE001 - reported in its row
                lines = [*str(error).strip().splitlines(), ""]
                time_.failed = f"{type(error).__name__}: {lines[0]}"
                continue
            want = got if want is None else want
            time_.cosine = _cosine(got, want)
            if reports:
                report = Report.merge(reports)
                time_.coverage, time_.notes = report.coverage, report.notes
            calls[variant] = call
        gc.collect()
        _take_turns(calls, times, seconds)
    return list(times.values())


def _take_turns(
    calls: Mapping[str, Callable[[], Any]], times: Mapping[str, Time], seconds: float
) -> None:
    timers = {
        v: Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        for v, call in calls.items()
    }
    once = {v: timer.timeit(1).median for v, timer in timers.items()}
    numbers = {v: max(1, round(min(TURN_S, seconds / MIN_TURNS) / once[v])) for v in timers}
    start, turns = time.perf_counter(), 0
    while turns < MIN_TURNS or time.perf_counter() - start < seconds * len(timers):
        for v, timer in timers.items():
            times[v].turns.append(1e3 * timer.timeit(numbers[v]).median)
        turns += 1
    for v in timers:
        ms = times[v].turns
        times[v].ms = statistics.median(ms)
        times[v].spread = (max(ms) - min(ms)) / statistics.median(ms)


def _compiled(
    model: nn.Module, inputs: Inputs, how: str, chosen: Mapping[str, Any], reports: list[Report]
) -> Callable[[], Any]:
    args, kwargs = inputs
    run: Callable[..., Any] = model
    if how == "inductor":
        run = torch.compile(model)
    elif how == "graphquant":
        settings = {"on_report": reports.append, **chosen}
        # not by its name, which only an installed package has
        run = torch.compile(model, backend=backend, options=settings)
    return lambda: run(*args, **kwargs)


def _in_bfloat16(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    def narrow(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(torch.bfloat16) if is_float else value

    made: Inputs = tree_map(narrow, inputs)
    return copy.deepcopy(model).to(torch.bfloat16), made


def _flat(results: Any) -> Tensor:
    """All floating-point outputs, flattened: [n] float64."""
    leaves = [t for t in tree_leaves(results) if isinstance(t, Tensor) and t.is_floating_point()]
    return torch.cat([t.flatten().double() for t in leaves]) if leaves else torch.zeros(0)


def _cosine(got: Tensor, want: Tensor) -> float | None:
    """None where there is nothing to compare."""
    if got.shape != want.shape or not len(got):
        return None
    return Error.of(got, want).cosine


def ratios(one: Time, times: Sequence[Time]) -> dict[str, float | None]:
    """Speedups over the first variant and over the fastest one without graphquant."""
    floats = [t.ms for t in times if t.ms and not t.is_int8]
    first = times[0].ms
    if not one.ms or not first:
        return {"over_eager": None, "over_fastest": None}
    return {"over_eager": first / one.ms, "over_fastest": min(floats) / one.ms}


def table(title: str, times: Sequence[Time]) -> Table:
    made = Table(title=escape(title), title_justify="left", caption_justify="left")
    made.add_column("variant", no_wrap=True)
    for column in ("ms", "±", "over eager", "over the fastest float", "cosine", "first call, s"):
        made.add_column(column, justify="right")
    notes = []
    for t in times:
        if t.failed or t.ms is None:
            made.add_row(t.variant, "failed", *[""] * 5)
            notes.append(f"{t.variant}: {t.failed}")
            continue
        r = ratios(t, times)
        assert t.spread is not None and r["over_eager"] and r["over_fastest"]
        made.add_row(
            t.variant,
            f"{t.ms:.3f}" if t.ms < 10 else f"{t.ms:.1f}",
            f"{t.spread / 2:.0%}",
            f"{r['over_eager']:.2f}x",
            f"{r['over_fastest']:.2f}x",
            "" if t.cosine is None else f"{t.cosine:.5f}",
            f"{t.first_s:.1f}",
        )
        if t.coverage is not None:
            notes.append(f"{t.variant}: {t.coverage:.1%} of the linears' FLOPs in int8")
        notes += (f"note: {note}" for note in t.notes)
        if t.cosine is not None and not t.cosine >= MIN_COSINE:
            notes.append(f"{t.variant}: ITS OUTPUTS ARE NOT THE MODEL'S")
    made.caption = escape("\n".join(dict.fromkeys(notes))) or None
    return made
