"""Report: the Outcome of every linear, norm and activation, and why some stay in float."""

from __future__ import annotations

import io
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from graphquant.utils import serialization

INT8_RULES = frozenset({"norm_linear", "act_linear", "linear"})


class Quiet(str):
    """A note that is logged at INFO, not WARNING."""

    __slots__ = ()


class Once(str):
    """A note that is a WARNING the first time that a process logs it, then INFO: about this machine
    or a whole model, not about a graph."""

    __slots__ = ()


_said: set[str] = set()  # of these notes


def log_notes(notes: Iterable[str], log: logging.Logger) -> None:
    for note in notes:
        quiet = isinstance(note, Quiet) or (isinstance(note, Once) and note in _said)
        log.log(logging.INFO if quiet else logging.WARNING, "%s", note)
        if isinstance(note, Once):
            _said.add(note)


@dataclass(frozen=True)
class Outcome:
    """Outcome of the rewrite for one linear, norm, activation or other product.

    kind     "linear" | "norm" | "activation"; for other products "attention", "convolution" or
             "matmul"
    path     module path, e.g. "encoder.layers.0.self_attn.q_proj"
    node     name in the captured graph
    rules    rules that rewrote it, in order; empty if none did
    refused  why no rule applied, or why a linear stacked with others is in float; else ""
    M, N, K  of a linear [M, K] x [N, K]^T at the sizes seen at compile time; only K for a norm
    smoothed how the input channels of an int8 linear were smoothed, "alpha 0.5"; "" if not
    not_smoothed  why not, if the options ask for it
    float_us, int8_us  measured microseconds of its chain (with its norm or activation and its
             siblings) in float and in int8; 0 if not measured
    product_flops  of a product that is not a linear
    """

    kind: str
    path: str
    node: str
    rules: tuple[str, ...] = ()
    refused: str = ""
    M: int = 0
    N: int = 0
    K: int = 0
    smoothed: str = ""
    not_smoothed: str = ""
    float_us: float = 0.0
    int8_us: float = 0.0
    product_flops: int = 0

    @property
    def applied(self) -> bool:
        return bool(self.rules)

    @property
    def int8(self) -> bool:
        """Does this linear run on int8 operands?"""
        return self.kind == "linear" and not INT8_RULES.isdisjoint(self.rules)

    @property
    def flops(self) -> int:
        """FLOPs of a linear, 2 M N K, or of another product; 0 for norms and activations."""
        return 2 * self.M * self.N * self.K if self.kind == "linear" else self.product_flops

    def __str__(self) -> str:
        size = f" {self.M}x{self.N}x{self.K}" if self.kind == "linear" else ""
        taken = [self.taken] * self.applied
        refused = [f"refused: {self.refused}"] * (not self.applied or self.refused != "")
        return f"{self.kind} {self.path or self.node}{size}: {'; '.join((*taken, *refused))}"

    @property
    def taken(self) -> str:
        """Rules, smoothing and times as text: "norm_linear, smoothed (alpha 0.5)"."""
        smoothed = f", smoothed ({self.smoothed})" if self.smoothed else ""
        smoothed += f", not smoothed: {self.not_smoothed}" if self.not_smoothed else ""
        return " + ".join(self.rules) + smoothed + self._timed()

    def _timed(self) -> str:
        if not self.applied or self.refused or not self.float_us:
            return ""  # a refusal for speed contains the times
        return f" ({self.int8_us:.1f} us, float {self.float_us:.1f} us)"


@dataclass(frozen=True)
class Pattern:
    """A pattern of the options `include` and `exclude`, and how many linears it matched."""

    option: str
    pattern: str
    matched: int

    @property
    def note(self) -> str:
        return (
            f"{self.option}: no linear has a path that {self.pattern!r} matches; patterns match "
            "whole paths, as the report shows them"
        )


@dataclass(frozen=True)
class Report:
    """Outcomes of one compiled graph, or of several (after graph breaks).

    outcomes  of linears, norms and activations
    graphs    number of graphs
    notes     messages for the user
    products  of other products, which stay in float: attention, convolutions, matmuls
    patterns  of the options `include` and `exclude`
    """

    outcomes: tuple[Outcome, ...]
    graphs: int = 1
    notes: tuple[str, ...] = ()
    products: tuple[Outcome, ...] = ()
    patterns: tuple[Pattern, ...] = ()

    @classmethod
    def left(cls, why: object) -> Report:
        """Report of a graph that runs unchanged."""
        return cls((), notes=(f"a graph was left in float: {why}",))

    @classmethod
    def merge(cls, reports: Iterable[Report]) -> Report:
        every = list(reports)
        matched: Counter[tuple[str, str]] = Counter()
        for p in (p for r in every for p in r.patterns):
            matched[p.option, p.pattern] += p.matched
        patterns = tuple(Pattern(*key, n) for key, n in matched.items())
        notes = dict.fromkeys(n for r in every for n in r.notes)
        for pattern in patterns:
            if pattern.matched:  # in another graph than the one with the note
                notes.pop(pattern.note, None)
        return cls(
            tuple(o for r in every for o in r.outcomes),
            sum(r.graphs for r in every),
            tuple(notes),
            tuple(o for r in every for o in r.products),
            patterns,
        )

    @property
    def linears(self) -> tuple[Outcome, ...]:
        return tuple(o for o in self.outcomes if o.kind == "linear")

    @property
    def applied(self) -> tuple[Outcome, ...]:
        return tuple(o for o in self.outcomes if o.applied)

    @property
    def refused(self) -> tuple[Outcome, ...]:
        return tuple(o for o in self.outcomes if not o.applied)

    @property
    def coverage(self) -> float:
        """Share of the linears' FLOPs in int8, 0 to 1; 0 without linears."""
        total = sum(o.flops for o in self.linears)
        return sum(o.flops for o in self.linears if o.int8) / total if total else 0.0

    @property
    def total_coverage(self) -> float:
        """Share of the FLOPs of all products (linears, attention, convolutions, matmuls) in int8, 0
        to 1; 0 without products."""
        total = sum(o.flops for o in (*self.linears, *self.products))
        return sum(o.flops for o in self.linears if o.int8) / total if total else 0.0

    def counts(self) -> dict[str, int]:
        """Number of linears per combination of rules: {"stack_siblings + norm_linear": 6}."""
        return dict(Counter(" + ".join(o.rules) for o in self.linears if o.rules))

    def reasons(self) -> dict[str, int]:
        """Number of linears refused for each reason."""
        return dict(Counter(o.refused for o in self.linears if o.refused or not o.rules))

    def summary(self) -> str:
        """One line: coverage, rules and refusals."""
        int8 = sum(o.int8 for o in self.linears)
        taken = ", ".join(f"{rules} {n}" for rules, n in self.counts().items())
        refused = ", ".join(f"{reason} ({n})" for reason, n in self.reasons().items())
        graphs = "" if self.graphs == 1 else f" in {self.graphs} graphs"
        others = any(o.flops for o in self.products)
        of_all = f" and {self.total_coverage:.1%} of all products'" if others else ""
        return (
            f"{int8} of {len(self.linears)} linears{graphs} in int8, "
            f"{self.coverage:.1%} of their FLOPs{of_all}"
            + (f"; {taken}" if taken else "")
            + (f"; refused: {refused}" if refused else "")
        )

    def to_json(self, *, indent: int | None = 2) -> str:
        return json.dumps(
            {
                "coverage": self.coverage,
                "total_coverage": self.total_coverage,
                "graphs": self.graphs,
                "counts": self.counts(),
                "notes": list(self.notes),
                "outcomes": [asdict(o) for o in self.outcomes],
                "products": [asdict(o) for o in self.products],
                "patterns": [asdict(p) for p in self.patterns],
            },
            indent=indent,
        )

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Parse the result of `to_json`. Raises FileError for anything else."""
        data = serialization.parse(text, "this is not a report")
        computed = ("coverage", "total_coverage", "counts")
        data.only((*computed, "graphs", "notes", "outcomes", "products", "patterns"))
        outcomes, products, patterns = (
            data[name].list() if data.has(name) or name == "outcomes" else ()
            for name in ("outcomes", "products", "patterns")
        )
        graphs, notes = data["graphs"].integer(), data["notes"].texts()
        return cls(
            tuple(one.record(Outcome) for one in outcomes),
            graphs,
            notes,
            tuple(one.record(Outcome) for one in products),
            tuple(one.record(Pattern) for one in patterns),
        )

    def __rich__(self) -> RenderableType:
        table = Table(title="graphquant", title_justify="left", header_style="bold", expand=False)
        table.add_column("module", overflow="fold")
        table.add_column("kind")
        table.add_column("M x N x K", justify="right")
        table.add_column("outcome", overflow="fold")
        for o in self.outcomes:
            size = f"{o.M} x {o.N} x {o.K}" if o.kind == "linear" else ""
            taken = [f"[green]{escape(o.taken)}[/]"] * o.applied
            refused = [f"[yellow]refused:[/] {escape(o.refused)}"]
            refused *= not o.applied or o.refused != ""
            table.add_row(escape(o.path or o.node), o.kind, size, "; ".join((*taken, *refused)))
        for kind, products in self._by_kind():
            share = sum(o.flops for o in products) / self._flops
            why = "; ".join(dict.fromkeys(escape(o.refused) for o in products))
            where = f"{len(products)} {kind}{'s' * (len(products) != 1 and kind != 'attention')}"
            table.add_row(where, kind, f"{share:.1%} of all FLOPs", f"[yellow]float:[/] {why}")
        notes = (f"note: {n}" for n in self.notes)
        return Group(table, *map(escape, (self.summary(), *notes)))

    @property
    def _flops(self) -> int:
        return sum(o.flops for o in (*self.linears, *self.products)) or 1

    def _by_kind(self) -> Iterator[tuple[str, list[Outcome]]]:
        for kind in dict.fromkeys(o.kind for o in self.products):
            yield kind, [o for o in self.products if o.kind == kind]

    def __str__(self) -> str:
        """The table without color, wide enough for its longest row."""
        widest = max((len(str(o)) for o in self.outcomes), default=0) + 40
        page = Console(file=io.StringIO(), width=min(max(100, widest), 200), color_system=None)
        page.print(self)
        text: str = page.file.getvalue()  # type: ignore[attr-defined]
        return text.rstrip()
