"""Records as tables for a terminal, as Markdown, and as a chart."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from rich.markup import escape
from rich.table import Table

from tools.bench.records import MIN_COSINE, Encoder, Line, OpTime, Run, latest

NONE, FAILED = "-", "failed"
WIDE_SPREAD = 0.05  # from here a time is shown with its spread

# --- one record, one row of a table -------------------------------------------------------------


def _number(form: str, value: float | None) -> str:
    return NONE if value is None else format(value, form)


def _name(r: Encoder) -> str:
    cut = "" if r.layers is None else f", cut to {r.layers} layer{'s' * (r.layers != 1)}"
    return r.model + cut


def _ms(r: Encoder) -> str:
    text = _number(".3f" if (r.ms or 0) < 10 else ".2f", r.ms)
    return text if (r.spread or 0) <= WIDE_SPREAD else f"{text} ± {50 * (r.spread or 0):.0f} %"


def speedup_text(line: Line) -> str:
    speedup = line.run.speedup(line.record)
    if speedup is None:
        return NONE
    is_base = line.record == line.run.baseline(line.record.row)
    return "1 (baseline)" if is_base else f"{speedup:.2f}x"


def _us(value: float | None) -> str:
    return _number(".1f" if (value or 0) < 1000 else ".0f", value)


def _beside(line: Line, variant: str) -> float | None:
    """The time of another implementation of the same row, in the same run."""
    same = (r for r in line.run.ops if r.row == line.record.row and r.variant == variant)
    return next((r.us for r in same), None)


def _ratio(line: Line, variant: str, form: str) -> str:
    """Of another implementation's time to this one's; none is told if an op is wrong."""
    other = _beside(line, variant)
    return NONE if other is None or line.run.wrong_ops else form.format(other / line.record.us)


def _mib(value: int | None) -> str:
    return NONE if value is None else f"{value / 2**20:.0f}"


# title -> cell. The first HEAD say what was measured, and are there if it failed as well.
HEAD = 3
LEFT = {"model", "variant", "implementation", "epilogue", "op", ""}
Columns = Mapping[str, Callable[[Line], str]]
ENCODERS: Columns = {
    "model": lambda n: _name(n.record),
    "batch x tokens": lambda n: f"{n.record.batch} x {n.record.tokens}",
    "variant": lambda n: n.record.variant,
    "ms": lambda n: _ms(n.record),
    "speed-up": speedup_text,
    "cosine": lambda n: _number(".5f", n.record.cosine),
    "worst token": lambda n: _number(".5f", n.record.worst_cosine),
    "activations MiB": lambda n: _mib(n.record.peak_bytes),
    "weights MiB": lambda n: _mib(n.record.weight_bytes),
    "host ms": lambda n: _number(".2f", n.record.host_ms),
    "int8 linears": lambda n: (
        NONE if n.record.linears is None else f"{n.record.int8} of {n.record.linears}"
    ),
    "compile s": lambda n: _number(".0f", n.record.compile_s) + " (cached)" * bool(n.record.cached),
    "run": lambda n: str(n.number),
}
GEMMS: Columns = {
    "M x N x K": lambda n: f"{n.record.M} x {n.record.N} x {n.record.K}",
    "implementation": lambda n: n.record.variant,
    "epilogue": lambda n: n.record.detail,
    "us": lambda n: _us(n.record.us),
    "TOPS": lambda n: _number(".0f", n.record.tops),
    "against bf16": lambda n: _ratio(n, "bf16 F.linear", "{:.2f}x"),
    "error": lambda n: _number(".1e", n.record.error),
    "host us": lambda n: _number(".1f", n.record.host_us),
    "run": lambda n: str(n.number),
}
QUANTIZERS: Columns = {
    "op": lambda n: n.record.op,
    "": lambda n: n.record.detail,
    "M x K": lambda n: f"{n.record.M} x {n.record.K}",
    "us": lambda n: _us(n.record.us),
    "copy of the same bytes, us": lambda n: _number(".1f", _beside(n, "copy")),
    "share of its bandwidth": lambda n: _ratio(n, "copy", "{:.0%}"),
    "TB/s": lambda n: _number(".2f", n.record.bytes and n.record.bytes / n.record.us / 1e6),
    "worst value, steps": lambda n: _number(".3f", n.record.error),
    "host us": lambda n: _number(".1f", n.record.host_us),
    "run": lambda n: str(n.number),
}


def _cells(columns: Columns, line: Line) -> list[str]:
    if not line.record.failed:
        return [cell(line) for cell in columns.values()]
    head = [cell(line) for cell in list(columns.values())[:HEAD]]
    return [*head, FAILED, *[NONE] * (len(columns) - HEAD - 2), str(line.number)]


def one_line(line: Line) -> str:
    """For a log."""
    r = line.record
    if isinstance(r, Encoder):
        what = f"{_name(r)} x {r.batch} {r.variant}"
        return f"{what}: {r.failed or f'{_ms(r)} ms, {speedup_text(line)}'}"
    sizes = " x ".join(str(n) for n in (r.M, r.N, r.K) if n)
    return f"{f'{r.op} {sizes} {r.variant} {r.detail}'.rstrip()}: {r.failed or f'{_us(r.us)} us'}"


# --- tables -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sheet:
    """A table without its looks. notes: why something failed."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    notes: list[str]


def sheets(lines: Iterable[Line]) -> list[Sheet]:
    """Encoders, GEMMs, quantizers: a sheet for each of them that the lines are about."""
    every = list(lines)
    ops = [n for n in every if isinstance(n.record, OpTime) and n.record.variant != "copy"]
    kinds: list[tuple[str, Columns, list[Line]]] = [
        ("Encoders", ENCODERS, [n for n in every if isinstance(n.record, Encoder)]),
        ("GEMMs", GEMMS, [n for n in ops if n.record.N]),
        ("Quantizers", QUANTIZERS, [n for n in ops if not n.record.N]),
    ]
    return [_sheet(*kind) for kind in kinds if kind[-1]]


def _sheet(title: str, columns: Columns, lines: list[Line]) -> Sheet:
    rows = [_cells(columns, n) for n in lines]
    pairs = zip(rows, lines, strict=True)
    notes = [f"{', '.join(row[:HEAD])}: {n.record.failed}" for row, n in pairs if n.record.failed]
    names = tuple(columns)
    if {n.number for n in lines} == {1}:  # the column says nothing
        names, rows = names[:-1], [row[:-1] for row in rows]
    return Sheet(_title(title, lines), names, rows, notes)


def _title(title: str, lines: Sequence[Line]) -> str:
    depths = {getattr(n.record, "layers", None) for n in lines}
    cut = sorted(d for d in depths if d is not None)
    if not cut:
        return title
    some = "some models" if None in depths else "models"
    layers = ", ".join(map(str, cut)) + f" layer{'s' * (cut != [1])}"
    return f"{title} ({some} cut to {layers}: no measure of a whole one)"


def for_terminal(sheet: Sheet) -> Table:
    notes = escape("\n".join(sheet.notes)) or None
    table = Table(title=sheet.title, title_justify="left", caption=notes, caption_justify="left")
    for column in sheet.columns:
        left = column in LEFT
        table.add_column(column, justify="left" if left else "right", no_wrap=left)
    for row in sheet.rows:
        table.add_row(*map(escape, row))
    return table


def for_markdown(sheet: Sheet) -> str:
    sides = ["---" if c in LEFT else "---:" for c in sheet.columns]
    table = _markdown([sheet.columns, sides, *sheet.rows])
    notes = "".join(f"\n- {note}" for note in sheet.notes)
    return f"**{sheet.title}**\n\n{table}" + (f"\n\nFailed:\n{notes}" if notes else "")


def _markdown(rows: Iterable[Sequence[str]]) -> str:
    cells = ([c.replace("|", "\\|").replace("\n", " ") for c in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


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
    """Where, when and with what: a column for each run."""
    head = ["run", *map(str, range(1, len(runs) + 1))]
    rows = [head, ["---"] * len(head)]
    for name in dict.fromkeys(k for run in runs for k in run.header):
        form = "`{}`" if name == "command" else "{}"
        rows.append([name, *(form.format(run.header.get(name, NONE)) for run in runs)])
    wrong = (
        f"\n\nRun {number}: the check of the ops failed, no speed-up is told: {why}"
        for number, run in enumerate(runs, 1)
        for why in run.wrong_ops
    )
    return _markdown(rows) + "".join(wrong)


def write_page(runs: Sequence[Run], file: Path, chart: Path | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    address = None if chart is None else Path(os.path.relpath(chart, file.parent)).as_posix()
    file.write_text(page(runs, address))


# --- the chart ----------------------------------------------------------------------------------

COLORS = {
    "graphquant": "#1f6fb4",
    "graphquant-reduce-overhead": "#6db1e6",
    "torchao-int8": "#d9822b",
    "torchao-fp8": "#f0c37a",
}


def bars(runs: Sequence[Run]) -> list[tuple[str, dict[str, float]]]:
    """(label, speed-ups by variant) of every row with one to tell, in the table's order."""
    found: dict[tuple[Any, ...], tuple[Encoder, dict[str, float], dict[str, None]]] = {}
    for line in latest(runs, "encoders"):
        r: Encoder = line.record
        base, speedup = line.run.baseline(r.row), line.run.speedup(r)
        if r.variant in COLORS and base and speedup:
            _, some, bases = found.setdefault(r.row, (r, {}, {}))
            some[r.variant], bases[base.variant] = speedup, None  # bases: more if runs differ
    return [
        (
            f"{_name(r)}\n{r.batch} x {r.tokens} tokens\nover {', '.join(bases)}",
            {v: some[v] for v in COLORS if v in some},
        )
        for r, some, bases in found.values()
    ]


def draw(runs: Sequence[Run], file: Path) -> bool:
    """A bar for each speed-up, as PNG. False if there is none to draw. Needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = bars(runs)
    if not rows:
        return False
    figure = Figure(figsize=(9, 1.4 + 0.9 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for i, (_, some) in enumerate(rows):
        for j, (variant, speedup) in enumerate(some.items()):
            y = i + 0.4 * (j - (len(some) - 1) / 2)
            bar = axes.barh(y, speedup, 0.36, color=COLORS[variant])
            axes.bar_label(bar, fmt="%.2fx", padding=2, fontsize=9)
    axes.axvline(1, color="black", linewidth=1, zorder=0)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.01)
    axes.set_xlabel("speed-up over the fastest bfloat16 variant of the same run (1 = as fast)")
    axes.spines[["top", "right"]].set_visible(False)
    there = [v for v in COLORS if any(v in some for _, some in rows)]
    patches = [Patch(color=COLORS[v], label=v) for v in there]
    figure.legend(handles=patches, loc="outside upper center", ncols=len(there), frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, metadata={"Software": None})
    return True
