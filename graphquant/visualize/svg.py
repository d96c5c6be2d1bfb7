"""Before and after side by side as a picture, drawn by Graphviz.

    svg = render(dot(inspect(model, args, kwargs)))

One box per operation, a frame per layer, no parameters. A box is filled in the colors of the rules
that rewrote or made it, as stripes.
"""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from graphquant.report import Report
from graphquant.visualize.colors import COLORS, GONE, rules_of
from graphquant.visualize.lines import Inspected, Line, align

NO_DOT = (
    "drawing needs Graphviz's program `dot`, which is not on the PATH: apt-get install graphviz"
)

LEGEND_WIDTH = 4  # cells in a row


def dot(found: Sequence[Inspected]) -> str:
    """The DOT text of one picture with every graph in it."""
    body = "\n".join(part for i, one in enumerate(found) for part in _graph(f"g{i}", one))
    return f"""digraph graphquant {{
graph [label=<{_legend(found)}>, labelloc=t, fontname="Helvetica", fontsize=14, newrank=true,
       nodesep=0.15, ranksep=0.22]
node [shape=box, style="rounded,filled", fillcolor=white, color="#666666", fontname="Helvetica",
      fontsize=10, height=0.3, width=0.6, margin="0.09,0.04"]
edge [arrowsize=0.5, color="#777777"]
{body}
}}
"""


def can_draw() -> bool:
    return shutil.which("dot") is not None


def render(text: str, kind: str = "svg") -> bytes:
    """Run `dot` on a DOT text. Raises FileNotFoundError if it is not installed."""
    if not can_draw():
        raise FileNotFoundError(NO_DOT)
    command = ["dot", f"-T{kind}"]
    return subprocess.run(command, input=text.encode(), stdout=subprocess.PIPE, check=True).stdout


def _graph(name: str, one: Inspected) -> Iterator[str]:
    kept = [
        row.before.node
        for row in align(one.before, one.after)
        if row.kind != "replaced" and row.before is not None
    ]
    taken, made = rules_of(one)
    gone = {line.node: taken.get(line.node) or (GONE,) for line in one.before}
    gone |= dict.fromkeys(kept, ())
    yield from _side(f"{name}_before", f"before: {len(one.before)} operations", one.before, gone)
    yield from _side(f"{name}_after", f"after: {len(one.after)} operations", one.after, made)
    for i, node in enumerate(kept):
        ends = f'"{name}_before_{node}"', f'"{name}_after_{node}"'
        yield f"{{rank=same; {' '.join(ends)}}}"
        if i == 0:
            yield f"{' -> '.join(ends)} [style=invis]"  # before on the left


def _side(
    name: str, title: str, lines: Sequence[Line], rules: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    yield f'subgraph "cluster_{name}" {{ label="{title}"; color="#bbbbbb"; style=rounded'
    by_section = sorted(lines, key=lambda line: line.section)  # stable: else in graph order
    for section, members in groupby(by_section, key=lambda line: line.section):
        if section:
            yield f'subgraph "cluster_{name}_{section}" {{ label="{section}"; fontsize=11'
            yield 'labeljust=l; color="#dddddd"; style="rounded,filled"; fillcolor="#fafafa"'
        yield from (_box(name, line, rules.get(line.node, ())) for line in members)
        if section:
            yield "}"
    yield "}"
    for line in lines:
        for read in line.reads:
            yield f'"{name}_{read}" -> "{name}_{line.node}"'


def _box(name: str, line: Line, rules: Sequence[str]) -> str:
    colors = [COLORS.get(rule, GONE) for rule in rules]
    look = f', fillcolor="{":".join(colors)}"' if colors else ""
    if len(colors) > 1:
        look += ", style=striped"
    small = [_weight(line.weights[0])] if line.weights else []
    small += [line.values[0]] if line.values else []
    rest = "".join(f'<br/><font point-size="8">{html.escape(t)}</font>' for t in small)
    hint = html.escape(line.text)
    head = html.escape(line.names[0] if line.op == "input" else line.op)
    return f'"{name}_{line.node}" [label=<<b>{head}</b>{rest}>, tooltip="{hint}"{look}]'


def _weight(text: str) -> str:
    """ "int8({q,k,v}_proj.weight)" -> "{q,k,v}_proj"."""
    return re.sub(r"^int8\((.*)\)$", r"\1", text).removesuffix(".weight")


def _legend(found: Sequence[Inspected]) -> str:
    report = Report.merge(one.report for one in found)
    uses = {rule: sum(rule in o.rules for o in report.outcomes) for rule in COLORS}
    cells = [(COLORS[rule], f"{rule}: {n}") for rule, n in uses.items()]
    cells.append((GONE, "dropped, or part of the next"))
    named = [f'<td bgcolor="{color}">{html.escape(text)}</td>' for color, text in cells]
    rows = [named[i : i + LEGEND_WIDTH] for i in range(0, len(named), LEGEND_WIDTH)]
    share = f"{report.coverage:.1%} of the linears' FLOPs in int8"
    return (
        '<table border="0" cellborder="1" cellspacing="4" cellpadding="4">'
        f'<tr><td border="0" colspan="{LEGEND_WIDTH}">{html.escape(share)}</td></tr>'
        f"{''.join(f'<tr>{chr(10).join(row)}</tr>' for row in rows)}</table>"
    )
