"""A model's graph before and after, side by side, and the report.

    python -m graphquant show my_module:make_model
    python -m graphquant show path/to/model --config quantize=False exclude=*.fc2
    python -m graphquant show path/to/model --compare --html graph.html --svg graph.svg
    python -m graphquant show --onnx model.onnx --html graph.html

Lines: `-` is removed, `+` is new, `~` has other inputs.

--html writes one self-contained page: a collapsible tree of modules, before and after side by side
in the colors of the rules; for each linear, norm and activation the rules that rewrote it or why
none did, its times where they were measured (on CUDA) and, with --compare, its error; and a search
("/" goes to it, Enter to the next match). --svg needs Graphviz. --onnx shows the nodes of an
exported model by module, as text and in the same page; it needs onnx.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import graphquant
from graphquant.cli.arguments import (
    UsageError,
    add_model,
    add_output,
    options,
    page,
    write,
    write_json,
)
from graphquant.cli.models import load
from graphquant.config import Config
from graphquant.errors import GraphquantError
from graphquant.visualize import html, inspect, onnx_model, svg, text


def add_arguments(p: argparse.ArgumentParser) -> None:
    add_model(p)
    p.add_argument("--export", action="store_true", help="capture by torch.export, not Dynamo")
    p.add_argument("--svg", metavar="FILE", help="draw before and after side by side")
    p.add_argument("--html", metavar="FILE", help="write a page with a tree of the modules")
    p.add_argument("--compare", action="store_true", help="also measure the error of every linear")
    p.add_argument("--onnx", metavar="FILE", help="show this ONNX model, with --html as a page")
    add_output(p, 180)


def run(args: argparse.Namespace) -> int:
    if args.onnx:
        return _onnx(args)
    if args.svg and not svg.can_draw():
        raise UsageError(f"--svg: {svg.NO_DOT}")
    chosen = options(args)
    config = Config.of(chosen)
    name, model, make = load(args)
    given, keywords = make(0)
    accuracy = None
    if args.compare:
        accuracy = graphquant.compare(model, [(given, keywords)], options=chosen)
    found = inspect(model, given, keywords, config, export=args.export)
    if not found:
        print(f"no graph was captured in {name}", file=sys.stderr)
        return 1
    with page(args) as console:
        text.show(console, found)
        if accuracy:
            console.print(accuracy)
        if args.svg:
            write(args.svg, "--svg", svg.render(svg.dot(found)))
            console.print(f"wrote {args.svg}", markup=False)
        if args.html:
            facts = [" ".join(("torch", torch.__version__, *args.config))]
            write(args.html, "--html", html.page(name, found, accuracy, facts))
            console.print(f"wrote {args.html}", markup=False)
    write_json(args, text.to_json(name, found, accuracy))
    return 0


def _onnx(args: argparse.Namespace) -> int:
    """Show an ONNX model as text, and with --html as a page. Returns the exit code."""
    if args.name or args.model or args.svg or args.json or args.compare:
        raise UsageError("--onnx shows a file: it goes with --html and without a model")
    try:
        lines = onnx_model.read(args.onnx)
    except (OSError, GraphquantError) as wrong:
        raise UsageError(f"--onnx: {wrong}") from wrong
    with page(args) as console:
        console.print(text.one_sided(lines))
        if args.html:
            write(args.html, "--html", html.one_sided(Path(args.onnx).name, lines))
            console.print(f"wrote {args.html}", markup=False)
    return 0
