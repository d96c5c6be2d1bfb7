"""Terminal output: graphs side by side (`-` removed, `+` new, `~` other inputs), and counts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphquant.accuracy.report import AccuracyReport
from graphquant.report import Report
from graphquant.visualize.lines import Inspected, Line, align


def show(console: Console, found: Sequence[Inspected]) -> None:
    """Print graphs and reports one after the other, then the counts over all of them."""
    for i, one in enumerate(found):
        if len(found) > 1:
            console.rule(f"graph {i + 1} of {len(found)}")
        console.print(side_by_side(one))
        console.print(one.report)
        console.print()
    total = Report.merge(one.report for one in found)
    console.print(by_rule(total))
    console.print(by_reason(total))
    console.print(f"coverage: {total.coverage:.1%} of the linears' FLOPs in int8")


def one_sided(lines: Sequence[Line]) -> Table:
    table = Table(expand=True, box=None, header_style="bold", padding=(0, 1))
    table.add_column(f"{len(lines)} operations", overflow="fold")
    section = ""
    for line in lines:
        if line.section and line.section != section:
            section = line.section
            table.add_row(Text(section, "bold blue"))
        table.add_row(_cell(line, "  ", ""))
    return table


def side_by_side(one: Inspected) -> Table:
    table = Table(expand=True, box=None, header_style="bold", padding=(0, 1))
    for title, lines in (("before", one.before), ("after", one.after)):
        table.add_column(f"{title}: {len(lines)} operations", ratio=1, overflow="fold")
    section = ""
    for row in align(one.before, one.after):
        if row.section and row.section != section:
            section = row.section
            table.add_row(Text(section, "bold blue"), Text(section, "bold blue"))
        if row.kind == "replaced":
            table.add_row(_cell(row.before, "- ", "red"), _cell(row.after, "+ ", "green"))
        else:
            mark, style = ("~ ", "yellow") if row.kind == "changed" else ("  ", "")
            table.add_row(_cell(row.before, mark, style), _cell(row.after, mark, style))
    return table


def _cell(line: Line | None, mark: str, style: str) -> Text:
    if line is None:
        return Text()
    cell = Text(mark + line.text, style)
    cell.append(f"  {', '.join(line.values)}", "dim")
    if line.rule:
        cell.append(f"  <{line.rule}>", "bold magenta")
    return cell


def by_rule(report: Report) -> Table:
    """How many linears, norms and activations each rule rewrote."""
    kinds = ("linear", "norm", "activation")
    uses = Counter((rule, o.kind) for o in report.outcomes for rule in o.rules)
    table = Table("rule", *(f"{kind}s" for kind in kinds), title="applied", title_justify="left")
    for rule in dict.fromkeys(rule for rule, _ in uses):
        table.add_row(rule, *(str(uses[rule, kind] or "") for kind in kinds))
    return table


def by_reason(report: Report) -> Table:
    """How often each reason was given, most frequent first."""
    reasons = Counter((o.kind, o.refused) for o in report.refused)
    table = Table("refused because", "what", "times", title="refused", title_justify="left")
    for (kind, reason), times in reasons.most_common():
        table.add_row(Text(reason), kind, str(times))
    return table


def to_json(name: str, found: Sequence[Inspected], accuracy: AccuracyReport | None = None) -> str:
    graphs = [
        {
            "before": [asdict(line) for line in one.before],
            "after": [asdict(line) for line in one.after],
            "report": json.loads(one.report.to_json()),
        }
        for one in found
    ]
    data: dict[str, Any] = {"model": name, "graphs": graphs}
    if accuracy:
        data["accuracy"] = json.loads(accuracy.to_json())
    return json.dumps(data, indent=2)
