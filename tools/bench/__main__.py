"""How fast whole encoders, and single ops, run beside what one would use instead.

    python -m tools.bench siglip-so400m --batch 8 64 --variants bf16-default graphquant
    python -m tools.bench --preset headline --jobs 4 --json run.json
    python -m tools.bench --preset grid --layers 4 --jobs 8
    python -m tools.bench ops siglip-so400m --batch 64
    python -m tools.bench write docs/performance.json --add run.json

All variants of a model run in one process, on the same random bfloat16 weights and inputs, in turn
(A B C A B C ...); the median of CUDA event times counts, and ratios are within one run. A variant
whose cosine to the float32 model is under 0.999 gets no speed-up printed, and nothing does when an
op is wrong on this device. `write` needs no GPU.

Compilation takes most of the time. --jobs 4 does it in four processes, which time what they choose
between one after the other; $TORCHINDUCTOR_CACHE_DIR kept from an earlier run saves it too. Neither
changes a kernel; the records then say "cached".

Exit codes: 0, 1 if an op is wrong or nothing was timed, 2 for wrong arguments, 3 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from tools.bench import ahead, encoders, ops, write
from tools.bench.checks import wrong_ops
from tools.bench.encoders import PRESET_LIMIT, PRESETS, Limit, Row
from tools.bench.models import MODELS
from tools.bench.records import LATE, Encoder, Line, OpTime, Run, header, load, merge, save
from tools.bench.timing import CudaTimer, Timer
from tools.bench.variants import USUAL, VARIANTS

WIDTH = 190  # of the tables printed at the end
OPS_MODELS = ("siglip-so400m", "clip-l-336")
Check = Callable[[str], "list[str]"]


def main(
    argv: Sequence[str] | None = None,
    *,
    timer: Timer | None = None,
    check: Check = wrong_ops,
) -> int:
    """timer: how and where to measure; None for CUDA. check: of the ops, on a device."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["write"]:
        return _write(given[1:])
    is_ops = given[:1] == ["ops"]
    parser = _ops_parser() if is_ops else _encoders_parser()
    args = parser.parse_args(given[is_ops:])
    rows = [] if is_ops else _rows(parser, args)
    if args.chart and importlib.util.find_spec("matplotlib") is None:
        parser.error("--chart needs matplotlib: pip install matplotlib")
    if timer is None:
        if not torch.cuda.is_available():
            print("NOTHING WAS TIMED: torch sees no NVIDIA GPU on this machine", file=sys.stderr)
            return 3
        timer = CudaTimer()
    _quiet()
    limit = Limit.after(args.time_limit)
    run = Run(header(given), check(timer.device))
    out = _Output(run, args.json, args.markdown, args.chart)
    for why in run.wrong_ops:
        print(f"WRONG OP, NO SPEED-UP WILL BE TOLD: {why}", file=sys.stderr)
    if is_ops:
        models = [MODELS[name] for name in args.models]
        ops.run(models, args.batch, timer, seconds=args.seconds, limit=limit, done=out.add_ops)
    else:
        late: dict[ahead.Task, str] = {}
        if args.jobs:
            todo = ahead.tasks(rows, args.layers, timer.device)
            late = ahead.compile_all(todo, args.jobs, limit.half(), _say)
        for row in rows:
            if limit.passed:
                _say(f"{row.model} x {row.batch} {LATE}")
                continue
            without = {t.variant: w for t, w in late.items() if t.row == (row.model, row.batch)}
            new = encoders.measure(
                row,
                timer,
                seconds=args.seconds,
                layers=args.layers,
                limit=limit,
                without=without,
            )
            out.add_encoders(new)
    out.finish()
    timed = any(not r.failed for r in run.records)
    return 0 if timed and not run.wrong_ops else 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _quiet() -> None:
    """Only what the benchmark says itself, as far as that is in our hands."""
    import torch._inductor.select_algorithm as select

    select.PRINT_AUTOTUNE = False
    warnings.filterwarnings("ignore", module="torchao")


@dataclass
class _Output:
    """Writes what there is after every row, so that an interrupted run leaves what it has."""

    run: Run
    json: Path | None
    markdown: Path | None
    chart: Path | None
    console: Console = field(default_factory=lambda: Console(width=WIDTH))

    def add_encoders(self, new: list[Encoder]) -> None:
        self.run.encoders += new
        self._tell(new)

    def add_ops(self, new: list[OpTime]) -> None:
        self.run.ops += new
        self._tell(new)

    def _tell(self, new: Sequence[Encoder | OpTime]) -> None:
        for record in new:
            print(write.one_line(Line(record, self.run, 1)), file=sys.stderr, flush=True)
        if self.json:
            save([self.run], self.json)

    def finish(self) -> None:
        if self.json:
            save([self.run], self.json)
        for table in write.for_terminal(Line(r, self.run, 1) for r in self.run.records):
            self.console.print(table)
        _publish([self.run], self.markdown, self.chart)


def _publish(runs: Sequence[Run], markdown: Path | None, chart: Path | None) -> None:
    drawn = chart if chart and write.draw(runs, chart) else None
    if markdown:
        write.write_page(runs, markdown, drawn)


def _rows(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[Row]:
    if args.preset:
        if args.models or args.batch or args.variants:
            parser.error("--preset names models, batches and variants itself")
        rows = list(PRESETS[args.preset])
        args.time_limit = PRESET_LIMIT if args.time_limit is None else args.time_limit
    else:
        _known(parser, args.models)
        variants = tuple(dict.fromkeys(args.variants or USUAL))
        models, batches = args.models or ["siglip-so400m"], args.batch or [8]
        rows = [Row(m, b, variants) for m in models for b in batches]
    try:
        return [r for r in rows if not _done(r, args.layers, args.skip_done)]
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _done(row: Row, layers: int | None, files: Sequence[Path]) -> bool:
    """Does one run of these files have times of everything in the row?"""
    wanted = {(row.model, row.batch, layers, v) for v in row.variants}
    runs = (run for file in files for run in load(file))
    return any(
        wanted <= {(*r.row, r.variant) for r in run.encoders if not r.failed} for run in runs
    )


def _known(parser: argparse.ArgumentParser, models: Sequence[str]) -> None:
    if unknown := [m for m in models if m not in MODELS]:
        parser.error(f"no model {', '.join(unknown)}: there are {', '.join(MODELS)}")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def _common(parser: argparse.ArgumentParser, seconds: float) -> None:
    parser.add_argument(
        "--seconds", type=_positive, default=seconds, help=f"of each variant ({seconds:g})"
    )
    parser.add_argument(
        "--time-limit", type=_positive, metavar="S", help="start nothing new after S seconds"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the records, after every row")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="needs matplotlib")


def _encoders_parser() -> argparse.ArgumentParser:
    parser = _parser("python -m tools.bench")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--batch", nargs="+", type=_count)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--preset", choices=PRESETS, help=f"in {PRESET_LIMIT:g} s unless told")
    parser.add_argument(
        "--jobs", type=_count, default=0, metavar="N",
        help="first compile in N processes at once, for half of the time limit at most",
    )  # fmt: skip
    parser.add_argument("--layers", type=_count, metavar="N", help="cut every model to N layers")
    parser.add_argument(
        "--skip-done", nargs="+", type=Path, default=[], metavar="FILE",
        help="leave out rows that these records have",
    )  # fmt: skip
    _common(parser, 2.0)
    return parser


def _ops_parser() -> argparse.ArgumentParser:
    parser = _parser("python -m tools.bench ops")
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", default=list(OPS_MODELS), type=_model,
        help=f"whose shapes ({' '.join(OPS_MODELS)})",
    )  # fmt: skip
    parser.add_argument("--batch", nargs="+", type=_count, default=[1, 64])
    _common(parser, 0.3)
    return parser


def _write(argv: Sequence[str]) -> int:
    """Regenerate a page and a chart from records, without a GPU."""
    parser = _parser("python -m tools.bench write")
    parser.add_argument("file", type=Path, metavar="FILE.json", help="the records of the page")
    parser.add_argument(
        "--add", nargs="+", type=Path, default=[], metavar="FILE.json",
        help="put these runs into FILE.json first, which need not exist yet",
    )  # fmt: skip
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="(FILE.md)")
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="(FILE.png)")
    args = parser.parse_args(argv)
    markdown = args.markdown or args.file.with_suffix(".md")
    chart = args.chart or args.file.with_suffix(".png")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the chart needs matplotlib: pip install matplotlib")
    try:
        there = [args.file] if args.file.exists() or not args.add else []
        runs = merge(run for file in (*there, *args.add) for run in load(file))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.add:
        save(runs, args.file)
    _publish(runs, markdown, chart)
    print(f"{len(runs)} runs: {markdown}, {chart}")
    return 0


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return value


def _model(name: str) -> str:
    if name not in MODELS:
        raise argparse.ArgumentTypeError(f"no model {name}: there are {', '.join(MODELS)}")
    return name


if __name__ == "__main__":
    sys.exit(main())
