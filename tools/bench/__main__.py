"""How fast whole encoders, and single ops, run beside what one would use instead.

    python -m tools.bench siglip-so400m --batch 8 64 --variants bf16-default graphquant
    python -m tools.bench --preset headline --jobs 4 --json run.json
    python -m tools.bench --preset grid --layers 4 --jobs 8
    python -m tools.bench --preset cpu --threads 1 2 --json cpu.json
    python -m tools.bench ops siglip-so400m --batch 64
    python -m tools.bench write docs/performance.json --add run.json

All variants of a model run in one process, on the same random bfloat16 weights and inputs, in turn
(A B C A B C ...); the median of CUDA event times counts, and ratios are within one run. A variant
whose cosine to the float32 model is under 0.999 gets no speed-up printed, and nothing does when an
op is wrong on this device. `write` needs no GPU.

On a CPU, fp32 variants run the same weights in float32, and the shortest call counts: by the clock,
and by the processor's time in all threads. A variant whose package is missing is left out.

Compilation takes most of the time. --jobs 4 measures four rows at once, each in a process of its
own, of which all but one are stopped while it times its variants. $TORCHINDUCTOR_CACHE_DIR kept
from an earlier run saves it too, and the records then say "cached".

Exit codes: 0, 1 if an op is wrong or nothing was timed, 2 for wrong arguments, 3 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from graphquant.cli.arguments import count, positive
from tests.ops.float64_checks import wrong_ops
from tools.bench import apart, encoders, ops, summary, write
from tools.bench.encoders import PRESET_LIMIT, PRESETS, Limit, Row
from tools.bench.models import MODELS
from tools.bench.records import LATE, Encoder, Line, OpTime, Run, header, load, merge, save
from tools.bench.timing import CpuTimer, Timer
from tools.bench.variants import CPU_USUAL, USUAL, VARIANTS

WIDTH = 190  # of the tables printed at the end
OPS_MODELS = ("siglip-so400m", "clip-l-336")


def main(
    argv: Sequence[str] | None = None,
    *,
    timer: Timer | None = None,
    check: Callable[[str], list[str]] = wrong_ops,
) -> int:
    """timer: how and where to measure; None for --device. check: of the ops, on a device."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["write"]:
        return _write(given[1:])
    is_ops = given[:1] == ["ops"]
    parser = _ops_parser() if is_ops else _encoders_parser()
    args = parser.parse_args(given[is_ops:])
    timers = [timer] if timer else _timers(parser, args)
    rows = [] if is_ops else _rows(parser, args)
    if args.chart:
        _needs_matplotlib(parser)
    if timers[0].device == "cuda" and not torch.cuda.is_available():
        print("NOTHING WAS TIMED: torch sees no NVIDIA GPU on this machine", file=sys.stderr)
        return 3
    _quiet()
    limit = Limit.after(args.time_limit)
    run = Run(header(given, on_cpu=bool(timers[0].threads)), check(timers[0].device))

    def done(new: Sequence[Encoder | OpTime]) -> None:
        """After every row, so that an interrupted run leaves what it has."""
        run.encoders += [r for r in new if isinstance(r, Encoder)]
        run.ops += [r for r in new if isinstance(r, OpTime)]
        for record in new:
            _say(write.one_line(Line(record, run, 1)))
        if args.json:
            save([run], args.json)

    for why in run.wrong_ops:
        _say(f"WRONG OP, NO SPEED-UP WILL BE TOLD: {why}")
    if is_ops:
        models = [MODELS[name] for name in args.models]
        ops.run(models, args.batch, timers[0], seconds=args.seconds, limit=limit, done=done)
    else:
        _encoders(rows, args, timers, limit, done)
    done([])
    for sheet in write.sheets(Line(r, run, 1) for r in run.records):
        Console(width=WIDTH).print(write.for_terminal(sheet))
    _publish([run], args.markdown, args.chart)
    timed = any(not r.failed for r in run.records)
    return 0 if timed and not run.wrong_ops else 1


def _encoders(
    rows: Sequence[Row],
    args: argparse.Namespace,
    timers: Sequence[Timer],
    limit: Limit,
    done: Callable[[list[Encoder]], None],
) -> None:
    todo = [(t, r) for t in timers for r in rows if not _done(r, args.layers, t, args.skip_done)]
    if args.jobs:
        device = timers[0].device
        cut = [replace(row, layers=args.layers or row.layers) for _, row in todo]
        tasks = [apart.Task(row, args.seconds, device) for row in cut]
        apart.measure_all(tasks, args.jobs, limit, done, _say)
        return
    for timer, row in todo:
        if limit.passed:
            _say(f"{row.model} x {row.batch} {LATE}")
            continue
        if timer.threads is not None:
            torch.set_num_threads(timer.threads)
        settings: dict[str, Any] = {"seconds": args.seconds, "layers": args.layers}
        done(encoders.measure(row, timer, limit=limit, **settings))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _quiet() -> None:
    """Only what the benchmark says itself, as far as that is in our hands."""
    import torch._inductor.select_algorithm as select

    select.PRINT_AUTOTUNE = False
    warnings.filterwarnings("ignore", module="torchao")


def _publish(runs: Sequence[Run], markdown: Path | None, chart: Path | None) -> None:
    drawn = write.draw_all(runs, chart) if chart else []
    if markdown:
        write.write_page(runs, markdown, *drawn)


def _needs_matplotlib(parser: argparse.ArgumentParser) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the chart needs matplotlib: pip install matplotlib")


def _rows(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[Row]:
    if args.preset:
        if args.models or args.batch or args.variants:
            parser.error("--preset names models, batches and variants itself")
        if len({*map(_is_for_cpu, args.preset)}) > 1:
            parser.error("some of these presets are for a GPU, others for a CPU")
        rows = [row for preset in args.preset for row in PRESETS[preset]]
        if args.time_limit is None and args.device == "cuda":
            args.time_limit = PRESET_LIMIT
    else:
        usual = CPU_USUAL if args.device == "cpu" else USUAL
        variants = tuple(dict.fromkeys(args.variants or usual))
        models, batches = args.models or ["siglip-so400m"], args.batch or [8]
        rows = [Row(m, b, variants) for m in models for b in batches]
    try:
        args.skip_done = [run for file in args.skip_done for run in load(file)]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return rows


def _timers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[Timer]:
    """Those of --device and --threads."""
    if args.device is None:
        named = args.preset or ()
        on_gpu = not any(map(_is_for_cpu, named)) if named else torch.cuda.is_available()
        args.device = "cuda" if on_gpu else "cpu"
    if args.device == "cuda":
        return [Timer()]
    if args.jobs:
        parser.error("--jobs is for a GPU: on a CPU, processes would disturb each other's times")
    return [CpuTimer(n) for n in dict.fromkeys(args.threads or (1, torch.get_num_threads()))]


def _is_for_cpu(preset: str) -> bool:
    return preset.startswith("cpu")


def _done(row: Row, layers: int | None, timer: Timer, runs: Sequence[Run]) -> bool:
    """Does one of these runs have times of everything in the row?"""
    wanted = {(row.model, row.batch, layers or row.layers, timer.threads, v) for v in row.variants}
    return any(
        wanted <= {(*r.row, r.variant) for r in run.encoders if not r.failed} for run in runs
    )


def _model(name: str) -> str:
    if name not in MODELS:
        raise argparse.ArgumentTypeError(f"no model {name}: there are {', '.join(MODELS)}")
    return name


def _parser(prog: str) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=form)
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="needs matplotlib")
    return parser


def _measuring(prog: str, seconds: float) -> argparse.ArgumentParser:
    parser = _parser(prog)
    add = parser.add_argument
    add("models", nargs="*", type=_model, metavar="MODEL", help=", ".join(MODELS))
    add("--batch", nargs="+", type=count)
    add("--seconds", type=positive, default=seconds, help=f"of each variant ({seconds:g})")
    add("--time-limit", type=positive, metavar="S", help="start nothing new after S seconds")
    add("--json", type=Path, metavar="FILE", help="the records, after every row")
    return parser


def _encoders_parser() -> argparse.ArgumentParser:
    parser = _measuring("python -m tools.bench", 2.0)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), help="(cuda if there is a GPU)")
    add("--threads", nargs="+", type=count, metavar="N", help="on a CPU (1, and all)")
    add("--variants", nargs="+", choices=VARIANTS)
    presets = f"on a GPU in {PRESET_LIMIT:g} s unless told"
    add("--preset", nargs="+", choices=PRESETS, help=presets)
    jobs = "compile N rows at once, each in its process; they are timed one by one"
    add("--jobs", type=count, default=0, metavar="N", help=jobs)
    add("--layers", type=count, metavar="N", help="cut every model to N layers")
    done = "leave out rows that these records have"
    add("--skip-done", nargs="+", type=Path, default=[], metavar="FILE", help=done)
    return parser


def _ops_parser() -> argparse.ArgumentParser:
    parser = _measuring("python -m tools.bench ops", 0.3)
    parser.set_defaults(models=list(OPS_MODELS), batch=[1, 64], device="cuda")
    return parser


def _write(argv: Sequence[str]) -> int:
    """Regenerate a page and a chart from records, without a GPU."""
    parser = _parser("python -m tools.bench write")
    parser.add_argument("file", type=Path, metavar="FILE.json", help="the records of the page")
    add = "put these runs into FILE.json first, which need not exist yet"
    parser.add_argument("--add", nargs="+", type=Path, default=[], metavar="FILE.json", help=add)
    args = parser.parse_args(argv)
    markdown = args.markdown or args.file.with_suffix(".md")
    chart = args.chart or args.file.with_suffix(".png")
    _needs_matplotlib(parser)
    try:
        there = [args.file] if args.file.exists() or not args.add else []
        runs = merge(run for file in (*there, *args.add) for run in load(file))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.add:
        save(runs, args.file)
    _publish(runs, markdown, chart)
    more = summary.write(runs, markdown.parent)
    print(f"{len(runs)} runs: {', '.join(map(str, (markdown, chart, *more)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
