"""AccuracyReport, the result of `graphquant.compare`: int8 errors as text, JSON and chart.

    SQNR            10 log10(sum y^2 / sum (y8 - y)^2)    dB; 6 dB are one bit
    relative error  |y8 - y| / |y|                        Frobenius norms: 10^(-SQNR / 20)
    cosine          <y8, y> / (|y8| |y|)

y is a value of the float model, y8 its int8 counterpart. Sums are in float64 over all elements of
all batches.
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from graphquant.errors import MissingPackageError
from graphquant.metrics import Error, RowCosines, finite_or_none
from graphquant.report import Outcome, Report
from graphquant.utils import serialization


@dataclass(frozen=True)
class SiteAccuracy:
    """The errors of one int8 linear.

    outcome      its outcome in the Report; M is that of the first batch
    call         index among the runs of this linear within one call of the model
    local        the error of its int8 result on the float model's input
    accumulated  the error of its result in the int8 model, with all errors in front of it
    """

    outcome: Outcome
    call: int
    local: Error
    accumulated: Error

    @property
    def path(self) -> str:
        """Its module path, "encoder.layers.0.fc1"."""
        return self.outcome.path

    @property
    def name(self) -> str:
        """The path, with the call's number from the second on."""
        return f"{self.path or self.outcome.node}{f' (call {self.call + 1})' * (self.call > 0)}"


@dataclass(frozen=True)
class OutputAccuracy:
    """The error of one floating-point tensor in the model's result.

    name     "last_hidden_state", "[0]", "hidden_states[2]", or "output" for a bare tensor
    error    over all elements
    cosines  of the rows
    """

    name: str
    error: Error
    cosines: RowCosines


@dataclass(frozen=True)
class Padding:
    """The rows that do not count, because a mask says that they are padding.

    mask     the name of the input, or "mask" for the argument
    ignored  rows that are padding, in all batches
    rows     rows that the mask describes: B * S of each batch
    """

    mask: str
    ignored: int
    rows: int

    def __str__(self) -> str:
        return f"{self.ignored} of {self.rows} rows are padding by {self.mask} and do not count"


@dataclass(frozen=True)
class AccuracyReport:
    """The int8 errors of a model, by linear and by output.

    sites    every int8 linear, in execution order
    outputs  every floating-point tensor in the model's result
    report   of the rewrite, at the first batch
    batches  the number of batches compared
    padding  the rows that do not count, by mask
    """

    sites: tuple[SiteAccuracy, ...]
    outputs: tuple[OutputAccuracy, ...]
    report: Report
    batches: int
    padding: tuple[Padding, ...] = ()

    @property
    def ranked(self) -> tuple[SiteAccuracy, ...]:
        """The sites by local SQNR, lowest first."""
        return tuple(sorted(self.sites, key=lambda s: _order(s.local)))

    @property
    def worst(self) -> SiteAccuracy | None:
        """The site with the lowest local SQNR. None if nothing is int8."""
        return self.ranked[0] if self.sites else None

    @property
    def left(self) -> tuple[Outcome, ...]:
        """The linears that stay in float; `refused` says why."""
        return tuple(o for o in self.report.linears if not o.int8)

    def summary(self) -> str:
        """One line: the number of linears and batches, and the worst linear."""
        linears = f"{len(self.sites)} int8 linear{'s' * (len(self.sites) != 1)}"
        count = f"{linears} on {self.batches} batch{'es' * (self.batches != 1)}"
        if self.worst is None:
            return count
        return f"{count}; the worst, {self.worst.name}: {_db(self.worst.local)} dB locally"

    def table(self) -> RenderableType:
        """Tables for a rich console: sites, worst first; outputs; linears left in float."""
        sites = Table(title="int8 against float", title_justify="left", header_style="bold")
        sites.add_column("linear", overflow="fold")
        sites.add_column("rules", overflow="fold")
        for name in ("local dB", "error", "accumulated dB", "error"):
            sites.add_column(name, justify="right", no_wrap=True)
        for s in self.ranked:
            rules = " + ".join(s.outcome.rules)
            sites.add_row(escape(s.name), rules, *_cells(s.local)[:2], *_cells(s.accumulated)[:2])
        outputs = Table(title="outputs", title_justify="left", header_style="bold")
        outputs.add_column("output", overflow="fold")
        for name in ("dB", "error", "cosine", "mean row", "worst row"):
            outputs.add_column(name, justify="right", no_wrap=True)
        for o in self.outputs:
            rows = (f"{c:.5f}" for c in (o.cosines.mean, o.cosines.worst))
            outputs.add_row(escape(o.name), *_cells(o.error), *rows)
        left = (f"in float: {o.path or o.node}: {o.refused or 'stacked only'}" for o in self.left)
        padding = (str(p) for p in self.padding if p.ignored)
        notes = (f"note: {n}" for n in self.report.notes)
        return Group(sites, outputs, *map(escape, (self.summary(), *padding, *left, *notes)))

    def __rich__(self) -> RenderableType:
        return self.table()

    def __str__(self) -> str:
        """The tables without color, wide enough for their longest row."""
        rules = [" + ".join(s.outcome.rules) for s in self.sites]
        longest = [max(map(len, c), default=0) for c in ([s.name for s in self.sites], rules)]
        width = min(max(100, sum(longest) + 60), 200)
        page = Console(file=io.StringIO(), width=width, color_system=None)
        page.print(self)
        text: str = page.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())

    def to_json(self, *, indent: int | None = 2) -> str:
        """The report as JSON, sites in execution order. Non-finite numbers are null."""
        return json.dumps(
            {
                "batches": self.batches,
                "padding": [asdict(p) for p in self.padding],
                "sites": [
                    {
                        **{k: v for k, v in asdict(s.outcome).items() if k in _OUTCOME_KEYS},
                        "call": s.call,
                        "local": s.local.to_dict(),
                        "accumulated": s.accumulated.to_dict(),
                    }
                    for s in self.sites
                ],
                "outputs": [
                    {
                        "name": o.name,
                        **o.error.to_dict(),
                        "rows": o.cosines.rows,
                        "mean_row_cosine": finite_or_none(o.cosines.mean),
                        "worst_row_cosine": finite_or_none(o.cosines.worst),
                    }
                    for o in self.outputs
                ],
                "report": json.loads(self.report.to_json()),
            },
            indent=indent,
            allow_nan=False,
        )

    def plot(self, path: str | Path) -> None:
        """Write a PNG chart of every site's local and accumulated SQNR, in execution order.

        Sites with an infinite or nan SQNR have no dot. Raises MissingPackageError without
        matplotlib.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ModuleNotFoundError as missing:
            raise MissingPackageError("plot needs matplotlib: pip install matplotlib") from missing
        height = 1.5 + 0.2 * max(len(self.sites), 4)  # inches
        figure = Figure(figsize=(9, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        lanes = range(len(self.sites))
        for label, color, errors in (
            ("local", "#1f6fb4", [s.local for s in self.sites]),
            ("accumulated", "#d9822b", [s.accumulated for s in self.sites]),
        ):
            values = [e.sqnr if math.isfinite(e.sqnr) else math.nan for e in errors]
            axes.plot(values, lanes, "o-", color=color, label=label, markersize=4, linewidth=0.8)
        axes.set_yticks(lanes, [s.name for s in self.sites], fontsize=7)
        axes.set_ylim(len(self.sites) - 0.4, -0.6)  # the first layer on top
        axes.set_xlabel("SQNR of the int8 linear, dB (more is better)")
        axes.grid(axis="x", linewidth=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=150, metadata={"Software": None})
        serialization.write(path, picture.getvalue())


_OUTCOME_KEYS = ("path", "node", "rules", "M", "N", "K")


def _order(error: Error) -> float:
    return -math.inf if math.isnan(error.sqnr) else error.sqnr


def _cells(error: Error) -> tuple[str, str, str]:
    return _db(error), f"{error.relative:.2%}", f"{error.cosine:.5f}"


def _db(error: Error) -> str:
    return "exact" if error.exact else f"{error.sqnr:.1f}"
