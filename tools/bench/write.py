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

from tools.bench.records import ISA, MIN_COSINE, SKIPPED, Encoder, Line, OpTime, Run, latest

NONE, FAILED = "-", "failed"
WIDE_SPREAD = 0.05  # from here a time is shown with its spread

# --- one record, one row of a table -------------------------------------------------------------


def number(form: str, value: float | None) -> str:
    return NONE if value is None else format(value, form)


def _name(r: Encoder) -> str:
    cut = "" if r.layers is None else f", cut to {r.layers} layer{'s' * (r.layers != 1)}"
    return r.model + cut


def _ms(r: Encoder) -> str:
    text = milliseconds(r.ms)
    around = (r.spread or 0) > WIDE_SPREAD and r.threads is None  # not around a minimum
    return f"{text} ± {50 * (r.spread or 0):.0f} %" if around else text


def milliseconds(value: float | None) -> str:
    return number(".3f" if (value or 0) < 10 else ".2f", value)


def speedup_text(line: Line, clock: str = "ms") -> str:
    speedup = line.run.speedup(line.record, clock)
    if speedup is None:
        return NONE
    is_base = line.record == line.run.baseline(line.record.row, clock)
    return "1 (baseline)" if is_base else f"{speedup:.2f}x"


def _us(value: float | None) -> str:
    return number(".1f" if (value or 0) < 1000 else ".0f", value)


def _beside(line: Line, variant: str) -> float | None:
    """The time of another implementation of the same row, in the same run."""
    same = (r for r in line.run.ops if r.row == line.record.row and r.variant == variant)
    return next((r.us for r in same), None)


def _ratio(line: Line, variant: str, form: str) -> str:
    """Of another implementation's time to this one's; none is told if an op is wrong."""
    other = _beside(line, variant)
    return NONE if other is None or line.run.wrong_ops else form.format(other / line.record.us)


def mib(value: int | None) -> str:
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
    "cosine": lambda n: number(".5f", n.record.cosine),
    "worst token": lambda n: number(".5f", n.record.worst_cosine),
    "activations MiB": lambda n: mib(n.record.peak_bytes),
    "weights MiB": lambda n: mib(n.record.weight_bytes),
    "host ms": lambda n: number(".2f", n.record.host_ms),
    "int8 linears": lambda n: (
        NONE if n.record.linears is None else f"{n.record.int8} of {n.record.linears}"
    ),
    "compile s": lambda n: number(".0f", n.record.compile_s) + " (cached)" * bool(n.record.cached),
    "run": lambda n: str(n.number),
}
ON_CPU: Columns = {
    **{k: ENCODERS[k] for k in ("model", "batch x tokens", "variant", "ms", "speed-up")},
    "CPU ms": lambda n: milliseconds(n.record.cpu_ms),
    "by CPU ms": lambda n: speedup_text(n, "cpu_ms"),
    **{k: ENCODERS[k] for k in ("cosine", "worst token", "int8 linears", "compile s", "run")},
}
GEMMS: Columns = {
    "M x N x K": lambda n: f"{n.record.M} x {n.record.N} x {n.record.K}",
    "implementation": lambda n: n.record.variant,
    "epilogue": lambda n: n.record.detail,
    "us": lambda n: _us(n.record.us),
    "TOPS": lambda n: number(".0f", n.record.tops),
    "against bf16": lambda n: _ratio(n, "bf16 F.linear", "{:.2f}x"),
    "error": lambda n: number(".1e", n.record.error),
    "host us": lambda n: number(".1f", n.record.host_us),
    "run": lambda n: str(n.number),
}
QUANTIZERS: Columns = {
    "op": lambda n: n.record.op,
    "": lambda n: n.record.detail,
    "M x K": lambda n: f"{n.record.M} x {n.record.K}",
    "us": lambda n: _us(n.record.us),
    "copy of the same bytes, us": lambda n: number(".1f", _beside(n, "copy")),
    "share of its bandwidth": lambda n: _ratio(n, "copy", "{:.0%}"),
    "TB/s": lambda n: number(".2f", n.record.bytes and n.record.bytes / n.record.us / 1e6),
    "worst value, steps": lambda n: number(".3f", n.record.error),
    "host us": lambda n: number(".1f", n.record.host_us),
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
    """One for each of: encoders, encoders on a processor by threads, GEMMs, quantizers."""
    every = [n for n in lines if not n.record.failed.startswith(SKIPPED)]
    on_cpu: dict[str, list[Line]] = {}
    for n in every:
        if threads := getattr(n.record, "threads", None):
            title = f"{n.run.machine}, {threads} thread{'s' * (threads != 1)}"
            on_cpu.setdefault(title, []).append(n)
    ops = [n for n in every if isinstance(n.record, OpTime) and n.record.variant != "copy"]
    kinds: list[tuple[str, Columns, list[Line]]] = [
        ("Encoders", ENCODERS, [n for n in every if getattr(n.record, "threads", 0) is None]),
        *((title, ON_CPU, found) for title, found in on_cpu.items()),
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
    table = markdown([sheet.columns, sides, *sheet.rows])
    notes = "".join(f"\n- {note}" for note in sheet.notes)
    return f"**{sheet.title}**\n\n{table}" + (f"\n\nFailed:\n{notes}" if notes else "")


def markdown(rows: Iterable[Sequence[str]]) -> str:
    cells = ([c.replace("|", "\\|").replace("\n", " ") for c in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


# --- the page -----------------------------------------------------------------------------------

TEMPLATE = Path(__file__).with_name("performance.template.md")


def page(runs: Sequence[Run], chart: str | None = None, cpu_chart: str | None = None) -> str:
    """performance.md. The charts: the pictures' addresses, relative to the page."""
    on_gpu, on_cpu = _parted(runs)
    return Template(TEMPLATE.read_text()).substitute(
        encoders=_picture("bfloat16", chart) + _sections(latest(on_gpu, "encoders")),
        cpu=_picture("float", cpu_chart) + _sections(latest(on_cpu, "encoders")),
        ops=_sections(latest(on_gpu, "ops")),
        runs=_runs(on_gpu),
        cpu_runs=_runs(on_cpu),
        min_cosine=MIN_COSINE,
        wide=f"{WIDE_SPREAD / 2:.1%}",
    )


def _parted(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Those on GPUs, those on CPUs."""
    return [r for r in runs if not r.machine], [r for r in runs if r.machine]


def _picture(baseline: str, chart: str | None) -> str:
    return f"![speed-ups over the fastest {baseline} variant]({chart})\n\n" if chart else ""


def _sections(lines: Sequence[Line]) -> str:
    return "\n\n".join(map(for_markdown, sheets(lines))) or "Not measured yet."


def _runs(runs: Sequence[Run]) -> str:
    """Where, when and with what: a column for each run."""
    if not runs:
        return ""
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
    return markdown(rows) + "".join(wrong)


def write_page(runs: Sequence[Run], file: Path, *charts: Path | None) -> None:
    """charts: as `draw_all` returns them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    here = [Path(os.path.relpath(c, file.parent)).as_posix() if c else None for c in charts]
    file.write_text(page(runs, *here))


# --- the chart ----------------------------------------------------------------------------------

COLORS = {
    "graphquant": "#1f6fb4",
    "graphquant-fp32": "#6db1e6",
    "graphquant-reduce-overhead": "#6db1e6",
    "openvino-int8": "#5b8c5a",
    "openvino-bf16": "#a9cba4",
    "onnxruntime-int8": "#9a6fb0",
    "torchao-int8": "#d9822b",
    "torchao-fp8": "#f0c37a",
}


def bars(runs: Sequence[Run]) -> list[tuple[str, dict[str, float]]]:
    """(label, speed-ups by variant) of every row with one to tell, in the table's order."""
    found: dict[tuple[Any, ...], tuple[str, Encoder, dict[str, float], dict[str, None]]] = {}
    for line in latest(runs, "encoders"):
        r: Encoder = line.record
        base, speedup = line.run.baseline(r.row), line.run.speedup(r)
        if r.variant in COLORS and base and speedup:
            n = r.threads
            where = f", {line.run.header[ISA]}, {n} thread{'s' * (n != 1)}" if n else ""
            row = (line.run.machine, *r.row)
            *_, some, bases = found.setdefault(row, (where, r, {}, {}))
            some[r.variant], bases[base.variant] = speedup, None  # bases: more if runs differ
    return [
        (
            f"{_name(r)}\n{r.batch} x {r.tokens} tokens{where}\nover {', '.join(bases)}",
            {v: some[v] for v in COLORS if v in some},
        )
        for where, r, some, bases in found.values()
    ]


def draw_all(runs: Sequence[Run], file: Path) -> tuple[Path | None, Path | None]:
    """The charts of GPUs, `file`, and of CPUs, `file` with -cpu; None where there is nothing."""
    (on_gpu, on_cpu), second = _parted(runs), file.with_stem(f"{file.stem}-cpu")
    return file if draw(on_gpu, file) else None, second if draw(on_cpu, second) else None


def draw(runs: Sequence[Run], file: Path) -> bool:
    """A bar for each speed-up, as PNG. False if there is none to draw. Needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = bars(runs)
    if not rows:
        return False
    slots = sum(len(some) + 1 for _, some in rows)  # a bar, or the gap behind a row
    figure = Figure(figsize=(9, 1.4 + max(0.18 * slots, 0.6 * len(rows))), layout="constrained")
    axes = figure.subplots()
    ticks, y = [], 0
    for _, some in rows:
        ticks.append(y + (len(some) - 1) / 2)
        for variant, speedup in some.items():
            bar = axes.barh(y, speedup, 0.9, color=COLORS[variant])
            axes.bar_label(bar, fmt="%.2fx", padding=2, fontsize=7)
            y += 1
        y += 1
    axes.axvline(1, color="black", linewidth=1, zorder=0)
    axes.set_yticks(ticks, [label for label, _ in rows], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.01)
    baseline = "float" if runs[0].machine else "bfloat16"
    axes.set_xlabel(f"speed-up over the fastest {baseline} variant of the same run (1 = as fast)")
    axes.spines[["top", "right"]].set_visible(False)
    there = [v for v in COLORS if any(v in some for _, some in rows)]
    patches = [Patch(color=COLORS[v], label=v) for v in there]
    columns = min(4, len(there))
    figure.legend(handles=patches, loc="outside upper center", ncols=columns, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, metadata={"Software": None})
    return True
