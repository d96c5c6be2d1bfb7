"""What graphquant makes of a model: its graph before and after, and the report.

    python -m tools.show_graph vit
    python -m tools.show_graph vit --config quantize=False exclude=*.fc2
    python -m tools.show_graph --model my_module:make --svg graph.svg
    python -m tools.show_graph vit --compare --html graph.html
    python -m tools.show_graph --onnx model.onnx --html graph.html

MODEL is a name from tests.zoo (--list), or "module:callable" for a callable that returns (module,
args, kwargs). Lines: `-` is gone, `+` is new, `~` reads something else by now.

--html writes one page for a browser that needs no network: the modules as a tree to open, before
and after side by side in the colours of the rules; for each linear, norm and activation the rules
that took it or why none did, its times where they were measured (on CUDA) and, with --compare, its
error; and a search ("/" goes to it, Enter to the next match). --onnx shows the nodes of an exported
model by the modules that they come from, as text and in the same page; it needs onnx.

The exit code is 2 for an unknown model or option, for a file that is no ONNX model, and for a model
that --compare cannot call.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

if not __package__:  # run as a file, `python tools/show_graph.py`: find the folder tools as well
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import graphquant
from graphquant.accuracy.report import AccuracyReport
from graphquant.config import Config
from graphquant.errors import GraphquantError, OptionError, UnsupportedInputError
from graphquant.report import Report
from tools import html_graph, onnx_graph
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
        if args.onnx:
            show_onnx(console, args)
            return 0
        chosen = options(args)
        config = Config.of(chosen)
        entry = load(args)
        if args.svg and not can_draw():
            raise UsageError(f"--svg: {NO_DOT}")
        model = entry.build(args.attn)
        inputs, keywords = entry.inputs(args.batch)
        accuracy = None
        if args.compare:
            accuracy = graphquant.compare(model, [(inputs, keywords)], options=chosen)
    except (UsageError, OptionError, UnsupportedInputError) as wrong:
        print(wrong, file=sys.stderr)
        return BAD_USAGE
    found = inspect(model, inputs, keywords, config, export=args.export)
    if not found:
        print(f"no tensor code was captured in {entry.name}", file=sys.stderr)
        return 1
    show(console, found)
    if accuracy:
        console.print(accuracy)
    if args.json:
        Path(args.json).write_text(to_json(entry.name, found, accuracy) + "\n")
    if args.svg:
        Path(args.svg).write_bytes(render(dot(found)))
        console.print(f"wrote {args.svg}", markup=False)
    if args.html:
        facts = [" ".join(("torch", torch.__version__, *args.config))]
        _write(console, args.html, html_graph.page(entry.name, found, accuracy, facts))
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
    p.add_argument("--html", metavar="FILE", help="write a page with a tree of the modules")
    p.add_argument("--json", metavar="FILE", help="write lines and report as JSON")
    p.add_argument("--compare", action="store_true", help="also measure the error of every linear")
    p.add_argument("--onnx", metavar="FILE", help="show this ONNX model, with --html as a page")
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


def show_onnx(console: Console, args: argparse.Namespace) -> None:
    """An ONNX model as text, and as a page if one is asked for. Raises UsageError."""
    if args.name or args.model or args.svg or args.json or args.compare:
        raise UsageError("--onnx shows a file: it goes with --html and without a model")
    try:
        lines = onnx_graph.read(args.onnx)
    except (OSError, GraphquantError) as wrong:
        raise UsageError(f"--onnx: {wrong}") from wrong
    console.print(one_sided(lines))
    if args.html:
        _write(console, args.html, html_graph.one_sided(Path(args.onnx).name, lines))


def _write(console: Console, path: str, text: str) -> None:
    Path(path).write_text(text, encoding="utf-8")
    console.print(f"wrote {path}", markup=False)


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


if __name__ == "__main__":
    sys.exit(main())
