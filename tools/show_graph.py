"""What graphquant makes of a model: its graph before and after, and the report.

    python -m tools.show_graph vit
    python -m tools.show_graph vit --config quantize=False exclude=*.fc2
    python -m tools.show_graph --model my_module:make --svg graph.svg

MODEL is a name from tools.zoo (--list), or "module:callable" for a callable that returns (module,
args, kwargs). Lines: `-` is gone, `+` is new, `~` reads something else by now. The exit code is 2
for an unknown model or option.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

if not __package__:  # run as a file, `python tools/show_graph.py`: find the folder tools as well
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from graphquant.config import Config
from graphquant.errors import OptionError
from graphquant.report import Report
from tools.arguments import (
    BAD_USAGE,
    UsageError,
    add_model,
    add_page,
    known_models,
    load,
    options,
    page,
)
from tools.draw_graph import NO_DOT, can_draw, dot, render
from tools.inspect_graph import Inspected, Line, align, inspect

PAGE = 180  # columns, where there is no terminal to ask


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    console = page(args, PAGE)
    try:
        if args.list:
            print(known_models())
            return 0
        config = Config.of(options(args))
        entry = load(args)
        if args.svg and not can_draw():
            raise UsageError(f"--svg: {NO_DOT}")
    except (UsageError, OptionError) as wrong:
        print(wrong, file=sys.stderr)
        return BAD_USAGE
    model = entry.build(args.attn)
    inputs, keywords = entry.inputs(args.batch)
    found = inspect(model, inputs, keywords, config, export=args.export)
    if not found:
        print(f"no tensor code was captured in {entry.name}", file=sys.stderr)
        return 1
    show(console, found)
    if args.json:
        Path(args.json).write_text(to_json(entry.name, found) + "\n")
    if args.svg:
        Path(args.svg).write_bytes(render(dot(found)))
        console.print(f"wrote {args.svg}", markup=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    about, _, more = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(
        prog="python -m tools.show_graph",
        description=about,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(p)
    p.add_argument("--export", action="store_true", help="capture by torch.export, not Dynamo")
    p.add_argument("--svg", metavar="FILE", help="draw before and after side by side")
    p.add_argument("--json", metavar="FILE", help="write lines and report as JSON")
    add_page(p, PAGE)
    return p


def show(console: Console, found: Sequence[Inspected]) -> None:
    """Graphs and reports one after the other, then the counts over all of them."""
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
    """How many linears, norms and activations each rule took."""
    kinds = ("linear", "norm", "activation")
    uses = Counter((rule, o.kind) for o in report.outcomes for rule in o.rules)
    table = Table("rule", *(f"{kind}s" for kind in kinds), title="applied", title_justify="left")
    for rule in dict.fromkeys(rule for rule, _ in uses):
        table.add_row(rule, *(str(uses[rule, kind] or "") for kind in kinds))
    return table


def by_reason(report: Report) -> Table:
    """How often each reason was given, most often first."""
    reasons = Counter((o.kind, o.refused) for o in report.refused)
    table = Table("refused because", "what", "times", title="refused", title_justify="left")
    for (kind, reason), times in reasons.most_common():
        table.add_row(Text(reason), kind, str(times))
    return table


def to_json(name: str, found: Sequence[Inspected]) -> str:
    graphs = [
        {
            "before": [asdict(line) for line in one.before],
            "after": [asdict(line) for line in one.after],
            "report": json.loads(one.report.to_json()),
        }
        for one in found
    ]
    return json.dumps({"model": name, "graphs": graphs}, indent=2)


if __name__ == "__main__":
    sys.exit(main())
