"""Before and after side by side as one self-contained HTML page.

    text = page("vit", inspect(model, args, kwargs))
    text = one_sided("vit.onnx", onnx_model.read("vit.onnx"))

The modules form a collapsible tree; layout and search are in page.html, a Jinja template. Jinja, a
dependency of torch, escapes what comes from the model. The page's content security policy blocks
all requests.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from graphquant.accuracy.report import AccuracyReport, SiteAccuracy
from graphquant.metrics import Error
from graphquant.report import Outcome, Report
from graphquant.visualize.colors import COLORS, GONE, KIND_COLORS, Rules, rules_of
from graphquant.visualize.lines import Inspected, Line, Row
from graphquant.visualize.tree import Module, tree

FEW = 6  # a module without submodules and with at most this many rows is always expanded
WORST = 5  # linears named at the top
MARKS = {"-": "removed", "+": "new", "~": "other inputs"}

Sites = Mapping[str, tuple[Outcome, SiteAccuracy | None]]  # by the `node` of a line before


@dataclass(frozen=True)
class Cell:
    """One line on one side of a row.

    mark   one of MARKS; "" if it is the same on both sides
    rules  those that rewrote or made it
    colors of the rules; GONE for a removed line without rules
    """

    line: Line
    mark: str
    rules: tuple[str, ...]
    colors: tuple[str, ...]

    @property
    def paint(self) -> str:
        """CSS: the colors as stacked stripes."""
        part = 100 / max(len(self.colors), 1)
        stops = (f"{c} {i * part:.0f}% {(i + 1) * part:.0f}%" for i, c in enumerate(self.colors))
        return f"linear-gradient({','.join(stops)})"


@dataclass(frozen=True)
class Entry:
    """One row of the page.

    label  the module that called it, relative to the enclosing one
    find   what the search matches besides the visible text
    """

    label: str
    find: str
    cells: tuple[Cell | None, ...]
    outcome: Outcome | None
    accuracy: SiteAccuracy | None


@dataclass(frozen=True)
class Branch:
    """A module in the collapsible tree.

    opened  expanded initially: the modules around the layers
    sizes   operations on each side
    alike   an earlier sibling with the same content
    """

    name: str
    path: str
    depth: int
    opened: bool
    sizes: tuple[int, ...]
    outcomes: tuple[Outcome, ...]
    colors: tuple[str, ...]
    worst: Error | None
    alike: str
    items: tuple[Branch | Entry, ...]


@dataclass(frozen=True)
class _Graph:
    """Lookup tables for the rows of one graph."""

    sites: Sites
    taken: Rules
    made: Rules
    sides: int
    colors: Mapping[str, str]


def page(
    name: str,
    found: Sequence[Inspected],
    accuracy: AccuracyReport | None = None,
    facts: Sequence[str] = (),
) -> str:
    """HTML of a model's graphs, before and after.

    accuracy  what graphquant.compare found for the same model, options and inputs
    facts     shown at the top: options, versions
    """
    report = Report.merge(one.report for one in found)
    sites = _sites([one.report for one in found], accuracy)
    graphs = []
    for one, known in zip(found, sites, strict=True):
        graph = _Graph(known, *rules_of(one), 2, COLORS)
        graphs.append(_branches(tree(one.before, one.after), graph))
    lines = {(i, line.node) for i, one in enumerate(found) for line in one.before}
    lost = [
        o for i, one in enumerate(found) for o in one.report.outcomes if (i, o.node) not in lines
    ]
    uses = Counter(rule for o in report.outcomes for rule in o.rules)
    drawn = {line.rule for one in found for line in one.after} | uses.keys()
    return _render(
        name=name,
        facts=facts,
        sides=("before", "after"),
        graphs=graphs,
        legend=[(rule, color, uses[rule]) for rule, color in COLORS.items() if rule in drawn],
        gone=GONE,
        summary=report.summary(),
        refused=Counter((o.kind, o.refused) for o in report.outcomes if o.refused).most_common(),
        notes=[*report.notes, *map(str, lost)],
        accuracy=accuracy,
    )


def one_sided(name: str, lines: Sequence[Line], facts: Sequence[str] = ()) -> str:
    """HTML of a single graph, not before and after. `rule` of its lines: a key of KIND_COLORS."""
    uses = Counter(line.rule for line in lines if line.rule)
    graph = _Graph({}, {}, {line.node: (line.rule,) for line in lines if line.rule}, 1, KIND_COLORS)
    ops = Counter(line.op for line in lines if line.op not in ("input", "return"))
    return _render(
        name=name,
        facts=facts,
        sides=("operations",),
        graphs=[_branches(tree(lines), graph)],
        legend=[(kind, color, uses[kind]) for kind, color in KIND_COLORS.items() if uses[kind]],
        gone="",
        summary=", ".join(f"{op} {n}" for op, n in ops.most_common()),
        refused=[],
        notes=[],
        accuracy=None,
    )


def _render(**what: object) -> str:
    here = FileSystemLoader(Path(__file__).parent)
    jinja = Environment(
        loader=here,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters["word"] = _word
    jinja.tests["branch"] = lambda item: isinstance(item, Branch)
    jinja.filters["dB"] = lambda error: "exact" if error.exact else f"{error.sqnr:.1f} dB"
    return jinja.get_template("page.html").render(
        what, worst=WORST, meaning=MARKS, color_of=COLORS | KIND_COLORS
    )


def _sites(reports: Iterable[Report], accuracy: AccuracyReport | None) -> list[Sites]:
    """The Sites of each graph. Reports and compare are both in the order of execution."""
    left = list(accuracy.sites) if accuracy else []
    return [{o.node: (o, _take(o, left) if o.int8 else None) for o in r.outcomes} for r in reports]


def _take(outcome: Outcome, left: list[SiteAccuracy]) -> SiteAccuracy | None:
    """Remove this linear from `left` and return it; None if it is not there. After a graph break a
    graph knows only the end of the path; compare knows all of it, from the weight."""
    same = [s for s in left if (s.outcome.N, s.outcome.K) == (outcome.N, outcome.K)]
    found = [s for s in same if s.path == outcome.path]
    found += [s for s in same if not outcome.path or s.path.endswith(f".{outcome.path}")]
    if not found:
        return None
    left.remove(found[0])
    return found[0]


def _branches(items: Sequence[Module | Row], graph: _Graph) -> tuple[Branch | Entry, ...]:
    return tuple(_items(items, graph, "", 0))


def _items(
    items: Sequence[Module | Row], graph: _Graph, path: str, depth: int
) -> Iterator[Branch | Entry]:
    alike: dict[object, str] = {}
    for item in items:
        if isinstance(item, Row):
            yield _entry(item, graph, path)
        elif len(item.items) <= FEW and all(isinstance(row, Row) for row in item.items):
            yield from (_entry(row, graph, path) for row in item.rows())
        else:
            looks = _looks(item, graph)
            yield _branch(item, graph, depth, alike.get(looks, ""))
            alike.setdefault(looks, item.name)


def _branch(module: Module, graph: _Graph, depth: int, alike: str) -> Branch:
    rows = list(module.rows())
    sites = [graph.sites[r.before.node] for r in rows if r.before and r.before.node in graph.sites]
    rules = {rule for row in rows for cell in _cells(row, graph) if cell for rule in cell.rules}
    errors = [accuracy.local for _, accuracy in sites if accuracy]
    worst = min(errors, key=lambda e: -math.inf if math.isnan(e.sqnr) else e.sqnr, default=None)
    return Branch(
        name=module.name,
        path=module.path,
        depth=depth,
        opened=not _numbered(module.name) and _holds_layers(module),
        sizes=tuple(
            sum(side is not None for side in column)
            for column in ([r.before for r in rows], [r.after for r in rows])[: graph.sides]
        ),
        outcomes=tuple(outcome for outcome, _ in sites),
        colors=tuple(color for rule, color in graph.colors.items() if rule in rules),
        worst=worst,
        alike=alike,
        items=tuple(_items(module.items, graph, module.path, depth + 1)),
    )


def _numbered(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _holds_layers(module: Module) -> bool:
    inner = [item for item in module.items if isinstance(item, Module)]
    return any(_numbered(item.name) or _holds_layers(item) for item in inner)


def _looks(module: Module, graph: _Graph) -> object:
    """A key that is equal for layers that differ in their names only."""
    above = len(module.path)
    return tuple(
        (line.path[above:], line.op, line.values, _fate(line, graph))
        for row in module.rows()
        for cell in _cells(row, graph)
        if cell and (line := cell.line)
    )


def _fate(line: Line, graph: _Graph) -> object:
    outcome, _ = graph.sites.get(line.node, (None, None))
    return outcome and (outcome.rules, outcome.refused)


def _entry(row: Row, graph: _Graph, path: str) -> Entry:
    cells = _cells(row, graph)
    lines = [cell.line for cell in cells if cell]
    outcome, accuracy = graph.sites.get(lines[0].node if row.before else "", (None, None))
    rules = dict.fromkeys(rule for cell in cells if cell for rule in cell.rules)
    if outcome and outcome.refused:
        rules["refused"] = None
    words = [*dict.fromkeys(line.path for line in lines), *map(_word, rules)]
    label = lines[0].path.removeprefix(path).removeprefix(".")
    return Entry(label, " ".join(words), cells, outcome, accuracy)


def _word(rule: str) -> str:
    """The search term of a button of the legend."""
    return f"rule:{rule.replace(' ', '_')}"


def _cells(row: Row, graph: _Graph) -> tuple[Cell | None, ...]:
    if graph.sides == 1:
        assert row.before is not None
        return (_cell(row.before, "", graph.made, graph),)
    if row.kind != "replaced":
        assert row.before is not None and row.after is not None
        mark = "~" if row.kind == "changed" else ""
        return tuple(_cell(line, mark, {}, graph) for line in (row.before, row.after))
    return (
        _cell(row.before, "-", graph.taken, graph, GONE) if row.before else None,
        _cell(row.after, "+", graph.made, graph) if row.after else None,
    )


def _cell(line: Line, mark: str, rules: Rules, graph: _Graph, other: str = "") -> Cell:
    mine = rules.get(line.node, ())
    colors = tuple(graph.colors[rule] for rule in mine) or (other,) * bool(other)
    return Cell(line, mark, mine, colors)
