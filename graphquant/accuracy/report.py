"""How far int8 is from float: the numbers that `graphquant.compare` returns, as text, JSON, chart.

    SQNR            10 log10(sum y^2 / sum (y8 - y)^2)    dB; 6 dB are one bit
    relative error  |y8 - y| / |y|                        Frobenius norms: 10^(-SQNR / 20)
    cosine          <y8, y> / (|y8| |y|)

y is a value of the float model, y8 its int8 counterpart. Sums run in float64 over all elements of
all batches, so that a batch of twice the size counts twice.
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
from graphquant.metrics import Error, RowCosines, _finite
from graphquant.report import Outcome, Report
from graphquant.utils import serialization


@dataclass(frozen=True)
class SiteAccuracy:
    """One int8 linear.

    outcome      what the Report says of it; M is that of the first batch
    call         0, or n for the (n+1)-th time that one call of the model comes to this linear
    local        its int8 product on the float model's values
    accumulated  its int8 product in the int8 model, where what it reads is off already
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
        """The path, and which call of it, if one call of the model has several."""
        return f"{self.path or self.outcome.node}{f' (call {self.call + 1})' * (self.call > 0)}"


@dataclass(frozen=True)
class OutputAccuracy:
    """One floating-point tensor of what the model returns.

    name     where it stands: "last_hidden_state", "[0]", "hidden_states[2]", "output" if alone
    error    over all its elements
    cosines  row by row
    """

    name: str
    error: Error
    cosines: RowCosines


@dataclass(frozen=True)
class AccuracyReport:
    """What int8 costs in accuracy, linear by linear and at the model's end.

    sites    every int8 linear, in the order in which the model runs them
    outputs  every floating-point tensor that the model returns
    report   what was rewritten and what was not, at the first batch
    batches  how many were compared
    """

    sites: tuple[SiteAccuracy, ...]
    outputs: tuple[OutputAccuracy, ...]
    report: Report
    batches: int

    @property
    def ranked(self) -> tuple[SiteAccuracy, ...]:
        """The sites, the one with the lowest local SQNR first."""
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
        """One line: how many linears and batches, and the worst of them."""
        linears = f"{len(self.sites)} int8 linear{'s' * (len(self.sites) != 1)}"
        count = f"{linears} on {self.batches} batch{'es' * (self.batches != 1)}"
        if self.worst is None:
            return count
        return f"{count}; the worst, {self.worst.name}: {_db(self.worst.local)} dB locally"

    def table(self) -> RenderableType:
        """For a rich console: sites, the worst first; outputs; linears left in float."""
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
        notes = (f"note: {n}" for n in self.report.notes)
        return Group(sites, outputs, *map(escape, (self.summary(), *left, *notes)))

    def __rich__(self) -> RenderableType:
        return self.table()

    def __str__(self) -> str:
        """The table without colour, wide enough for its longest row."""
        rules = [" + ".join(s.outcome.rules) for s in self.sites]
        longest = [max(map(len, c), default=0) for c in ([s.name for s in self.sites], rules)]
        width = min(max(100, sum(longest) + 60), 200)
        page = Console(file=io.StringIO(), width=width, color_system=None)
        page.print(self)
        text: str = page.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())

    def to_json(self, *, indent: int | None = 2) -> str:
        """Sites in model order. Numbers that are not finite are null."""
        return json.dumps(
            {
                "batches": self.batches,
                "sites": [
                    {
                        **{k: v for k, v in asdict(s.outcome).items() if k in _TOLD},
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
                        "mean_row_cosine": _finite(o.cosines.mean),
                        "worst_row_cosine": _finite(o.cosines.worst),
                    }
                    for o in self.outputs
                ],
                "report": json.loads(self.report.to_json()),
            },
            indent=indent,
            allow_nan=False,
        )

    def plot(self, path: str | Path) -> None:
        """A PNG: SQNR of every site in model order, local and accumulated. Needs matplotlib.

        Raises MissingPackageError without it. Sites that are exact or not finite have no dot.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ModuleNotFoundError as missing:
            raise MissingPackageError("plot needs matplotlib: pip install matplotlib") from missing
        tall = 0.2  # inches of one site
        figure = Figure(figsize=(9, 1.5 + tall * max(len(self.sites), 4)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        lanes = range(len(self.sites))
        for label, colour, errors in (
            ("local", "#1f6fb4", [s.local for s in self.sites]),
            ("accumulated", "#d9822b", [s.accumulated for s in self.sites]),
        ):
            values = [e.sqnr if math.isfinite(e.sqnr) else math.nan for e in errors]
            axes.plot(values, lanes, "o-", color=colour, label=label, markersize=4, linewidth=0.8)
        axes.set_yticks(lanes, [s.name for s in self.sites], fontsize=7)
        axes.set_ylim(len(self.sites) - 0.4, -0.6)  # the first layer on top
        axes.set_xlabel("SQNR of the int8 linear, dB (more is better)")
        axes.grid(axis="x", linewidth=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=150, metadata={"Software": None})
        serialization.write(path, picture.getvalue())


_TOLD = ("path", "node", "rules", "M", "N", "K")


def _order(error: Error) -> float:
    return -math.inf if math.isnan(error.sqnr) else error.sqnr


def _cells(error: Error) -> tuple[str, str, str]:
    return _db(error), f"{error.relative:.2%}", f"{error.cosine:.5f}"


def _db(error: Error) -> str:
    return "exact" if error.exact else f"{error.sqnr:.1f}"
