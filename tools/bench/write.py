"""Records as tables for a terminal, as Markdown, and as a chart."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from rich.markup import escape
from rich.table import Table

from tools.bench.records import MIN_COSINE, Encoder, Line, OpTime, Run, latest

NONE, FAILED = "-", "failed"

# --- one record, one row of a table -------------------------------------------------------------

ENCODER_COLUMNS = (
    "model", "batch x tokens", "variant", "ms", "speed-up", "cosine", "worst token",
    "activations MiB", "weights MiB", "host ms", "int8 linears", "compile s", "run",
)  # fmt: skip
LINEAR_COLUMNS = (
    "M x N x K", "implementation", "epilogue", "us", "TOPS", "against bf16", "error", "host us",
    "run",
)  # fmt: skip
ROW_COLUMNS = (
    "op", "", "M x K", "us", "copy of the same bytes, us", "share of its bandwidth",
    "TB/s", "worst value, steps", "host us", "run",
)  # fmt: skip
LEFT = {"model", "variant", "implementation", "epilogue", "op", ""}
WIDE_SPREAD = 0.05  # from here a time is shown with its spread


def encoder_cells(line: Line) -> list[str]:
    r: Encoder = line.record
    head = [_name(r), f"{r.batch} x {r.tokens}", r.variant]
    if r.failed:
        return [*head, FAILED, *[NONE] * (len(ENCODER_COLUMNS) - 5), str(line.number)]
    of = NONE if r.linears is None else f"{r.int8} of {r.linears}"
    return [
        *head,
        _with_spread(r),
        speedup_text(line),
        _number(r.cosine, ".5f"),
        _number(r.worst_cosine, ".5f"),
        _mib(r.peak_bytes),
        _mib(r.weight_bytes),
        _number(r.host_ms, ".2f"),
        of,
        _number(r.compile_s, ".0f") + (" (cached)" if r.cached else ""),
        str(line.number),
    ]


def speedup_text(line: Line) -> str:
    speedup = line.run.speedup(line.record)
    if speedup is None:
        return NONE
    if line.record == line.run.baseline(line.record.row):
        return "1 (baseline)"
    return f"{speedup:.2f}x"


def linear_cells(line: Line) -> list[str]:
    r: OpTime = line.record
    head = [f"{r.M} x {r.N} x {r.K}", r.variant, r.detail]
    if r.us is None:
        return [*head, FAILED, *[NONE] * (len(LINEAR_COLUMNS) - 5), str(line.number)]
    base = _of(line, "bf16 F.linear")
    ratio = NONE if base is None or line.run.wrong_ops else f"{base / r.us:.2f}x"
    host = _number(r.host_us, ".1f")
    tops, error = _number(r.tops, ".0f"), _number(r.error, ".1e")
    return [*head, _us(r.us), tops, ratio, error, host, str(line.number)]


def row_cells(line: Line) -> list[str]:
    r: OpTime = line.record
    head = [r.op, r.detail, f"{r.M} x {r.K}"]
    if r.us is None:
        return [*head, FAILED, *[NONE] * (len(ROW_COLUMNS) - 5), str(line.number)]
    copied = _of(line, "copy")
    share = NONE if copied is None or line.run.wrong_ops else f"{copied / r.us:.0%}"
    speed = NONE if r.bytes is None else f"{r.bytes / r.us / 1e6:.2f}"
    times = [_us(r.us), _number(copied, ".1f"), share, speed]
    return [*head, *times, _number(r.error, ".3f"), _number(r.host_us, ".1f"), str(line.number)]


def _of(line: Line, variant: str) -> float | None:
    """The time of another implementation of the same row, in the same run."""
    same = (r for r in line.run.ops if r.row == line.record.row and r.variant == variant)
    return next((r.us for r in same), None)


def _name(r: Encoder) -> str:
    if r.layers is None:
        return r.model
    return f"{r.model}, cut to {r.layers} layer{'s' * (r.layers != 1)}"


def _with_spread(r: Encoder) -> str:
    text = _number(r.ms, ".3f" if (r.ms or 0) < 10 else ".2f")
    wide = r.spread is not None and r.spread > WIDE_SPREAD
    return f"{text} ± {50 * r.spread:.0f} %" if wide and r.spread is not None else text


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _us(value: float) -> str:
    return format(value, ".1f" if value < 1000 else ".0f")


def _mib(value: int | None) -> str:
    return NONE if value is None else f"{value / 2**20:.0f}"


# --- tables -------------------------------------------------------------------------------------

Cells = Callable[[Line], list[str]]


@dataclass(frozen=True)
class Sheet:
    """A table without its looks. notes: why something failed."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    notes: list[str]


def sheets(lines: Iterable[Line]) -> list[Sheet]:
    """Encoders, GEMMs, quantisers: a sheet for each of them that the lines are about."""
    every = list(lines)
    linears = [n for n in every if isinstance(n.record, OpTime) and n.record.N]
    rows = [n for n in every if isinstance(n.record, OpTime) and not n.record.N]
    encoders = [n for n in every if isinstance(n.record, Encoder)]
    kinds: list[tuple[str, tuple[str, ...], Cells, list[Line]]] = [
        ("Encoders", ENCODER_COLUMNS, encoder_cells, encoders),
        ("GEMMs", LINEAR_COLUMNS, linear_cells, linears),
        ("Quantisers", ROW_COLUMNS, row_cells, [n for n in rows if n.record.variant != "copy"]),
    ]
    return [_sheet(*kind) for kind in kinds if kind[-1]]


def _sheet(title: str, columns: tuple[str, ...], cells: Cells, lines: list[Line]) -> Sheet:
    rows = [cells(n) for n in lines]
    notes = [
        f"{', '.join(row[:3])}: {n.record.failed}"
        for row, n in zip(rows, lines, strict=True)
        if n.record.failed
    ]
    if len({n.number for n in lines}) == 1 and lines[0].number == 1:  # the column says nothing
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Sheet(_title(title, lines), columns, rows, notes)


def _title(title: str, lines: Sequence[Line]) -> str:
    depths = {getattr(n.record, "layers", None) for n in lines}
    cut = sorted(d for d in depths if d is not None)
    if not cut:
        return title
    some = "some models" if None in depths else "models"
    layers = ", ".join(map(str, cut)) + f" layer{'s' * (cut != [1])}"
    return f"{title} ({some} cut to {layers}: no measure of a whole one)"


def for_terminal(lines: Iterable[Line]) -> list[Table]:
    made = []
    for sheet in sheets(lines):
        notes = "\n".join(sheet.notes)
        table = Table(title=sheet.title, title_justify="left", caption=escape(notes) or None)
        table.caption_justify = "left"
        for column in sheet.columns:
            left = column in LEFT
            table.add_column(column, justify="left" if left else "right", no_wrap=left)
        for row in sheet.rows:
            table.add_row(*map(escape, row))
        made.append(table)
    return made


def one_line(line: Line) -> str:
    """For a log."""
    r = line.record
    if isinstance(r, Encoder):
        ms, *_ = encoder_cells(line)[3:]
        head = f"{_name(r)} x {r.batch} {r.variant}"
        return f"{head}: {r.failed or f'{ms} ms, {speedup_text(line)}'}"
    head = f"{r.op} {r.M} x {r.N or ''}{' x ' * bool(r.N)}{r.K} {r.variant} {r.detail}".rstrip()
    return f"{head}: {r.failed or f'{_us(r.us)} us'}"


def for_markdown(sheet: Sheet) -> str:
    sides = ["---" if c in LEFT else "---:" for c in sheet.columns]
    notes = "".join(f"\n- {note}" for note in sheet.notes)
    table = _markdown(sheet.columns, sides, sheet.rows)
    return f"**{sheet.title}**\n\n{table}" + (f"\n\nFailed:\n{notes}" if notes else "")


def _markdown(head: Sequence[str], sides: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(map(_cell, r)) + " |" for r in (head, sides, *rows))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# --- the page -----------------------------------------------------------------------------------

TEMPLATE = Path(__file__).with_name("performance.template.md")


def page(runs: Sequence[Run], chart: str | None = None) -> str:
    """performance.md. chart: the picture's address, relative to the page."""
    picture = f"![speed-ups over the fastest bfloat16 variant]({chart})\n\n" if chart else ""
    return Template(TEMPLATE.read_text()).substitute(
        encoders=picture + _sections(latest(runs, "encoders")),
        ops=_sections(latest(runs, "ops")),
        runs=_runs(runs),
        min_cosine=MIN_COSINE,
        wide=f"{WIDE_SPREAD / 2:.1%}",
    )


def _sections(lines: Sequence[Line]) -> str:
    return "\n\n".join(map(for_markdown, sheets(lines))) or "Not measured yet."


def _runs(runs: Sequence[Run]) -> str:
    """Where, when and with what."""
    names = list(dict.fromkeys(k for run in runs for k in run.header))
    columns = ["run", *names]
    rows = []
    for number, run in enumerate(runs, 1):
        cells = {**run.header, "command": f"`{run.header.get('command', '')}`"}
        rows.append([str(number), *(cells.get(name, NONE) for name in names)])
    text = _turned(columns, rows)
    for number, run in enumerate(runs, 1):
        for why in run.wrong_ops:
            text += f"\n\nRun {number}: the check of the ops failed, no speed-up is told: {why}"
    return text


def _turned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """One column for each run."""
    head, *lines = zip(columns, *rows, strict=True)
    return _markdown(head, ["---"] * len(head), lines)


def write_page(runs: Sequence[Run], file: Path, chart: Path | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    address = None if chart is None else Path(os.path.relpath(chart, file.parent)).as_posix()
    file.write_text(page(runs, address))


# --- the chart ----------------------------------------------------------------------------------

COLOURS = {
    "graphquant": "#1f6fb4",
    "graphquant-reduce-overhead": "#6db1e6",
    "torchao-int8": "#d9822b",
    "torchao-fp8": "#f0c37a",
}


def bars(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, float]]]]:
    """(label, [(variant, speed-up)]) of every row with a speed-up to tell, in the table's order."""
    found: dict[tuple[Any, ...], list[tuple[str, float]]] = {}
    names: dict[tuple[Any, ...], str] = {}
    bases: dict[tuple[Any, ...], dict[str, None]] = {}  # more than one where runs differ
    for line in latest(runs, "encoders"):
        r: Encoder = line.record
        speedup = line.run.speedup(r)
        base = line.run.baseline(r.row)
        if r.variant not in COLOURS or speedup is None or base is None:
            continue
        found.setdefault(r.row, []).append((r.variant, speedup))
        names[r.row] = f"{_name(r)}\n{r.batch} x {r.tokens} tokens"
        bases.setdefault(r.row, {})[base.variant] = None
    order = list(COLOURS)
    return [
        (
            f"{names[row]}\nover {', '.join(bases[row])}",
            sorted(some, key=lambda b: order.index(b[0])),
        )
        for row, some in found.items()
    ]


def draw(runs: Sequence[Run], file: Path) -> bool:
    """A bar for each speed-up, as PNG. False if there is none to draw. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = bars(runs)
    if not rows:
        return False
    variants = [v for v in COLOURS if any(v == name for _, some in rows for name, _ in some)]
    tall = 0.32  # inches of one bar
    lanes = [len(some) + 1.4 for _, some in rows]
    figure = Figure(figsize=(9, 1.4 + tall * sum(lanes)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # over the line at 1
    at, ticks = 0.0, []
    for (_, some), lane in zip(rows, lanes, strict=True):
        ticks.append(at + (len(some) - 1) / 2)
        for i, (variant, speedup) in enumerate(some):
            axes.barh(at + i, speedup, 0.86, color=COLOURS[variant])
            axes.text(
                speedup + 0.02, at + i, f"{speedup:.2f}x", va="center", fontsize=9, bbox=white
            )
        at += lane
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(ticks, [label for label, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(1.0, *(s for _, some in rows for _, s in some)))
    axes.set_xlabel("speed-up over the fastest bfloat16 variant of the same run (1 = as fast)")
    axes.spines[["top", "right"]].set_visible(False)
    patches = [axes.barh(0, 0, color=COLOURS[v], label=v) for v in variants]
    figure.legend(handles=patches, loc="outside upper center", ncols=len(variants), frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, metadata={"Software": None})
    return True
