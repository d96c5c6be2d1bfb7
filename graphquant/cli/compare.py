"""Error of int8 against float: every int8 linear, the worst first, and the outputs.

    python -m graphquant compare path/to/model --batches 4
    python -m graphquant compare my_module:make --data my_module:batches --plot accuracy.png
    python -m graphquant compare my_module:make --budget 0.9999 --save budget.json

Batches are random and differ from each other, unless --data names a callable that returns them: an
iterable of what graphquant.compare takes. With --budget the options are those that
graphquant.fit_budget finds, and --save writes them for graphquant.Budget.load.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterable
from typing import Any

import graphquant
from graphquant.cli.arguments import (
    UsageError,
    add_model,
    add_output,
    count,
    options,
    page,
    write_json,
)
from graphquant.cli.models import imported, load, user_errors


def add_arguments(p: argparse.ArgumentParser) -> None:
    add_model(p)
    p.add_argument("--batches", type=count, default=1, metavar="N", help="random batches (1)")
    p.add_argument("--data", metavar="M:C", help="a callable that returns the batches")
    p.add_argument("--budget", type=float, metavar="C", help="fit to this mean cosine, below 1")
    p.add_argument("--save", metavar="FILE", help="write the fitted options as JSON")
    p.add_argument("--plot", metavar="FILE.png", help="SQNR by layer; needs matplotlib")
    add_output(p, 140)


def run(args: argparse.Namespace) -> int:
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install matplotlib")
    if args.save and args.budget is None:
        raise UsageError("--save writes what --budget finds: give both")
    chosen = options(args)
    batches = _batches(args.data) if args.data else None
    _, model, inputs = load(args)
    if batches is None:
        batches = [inputs(draw) for draw in range(args.batches)]
    budget = None
    if args.budget is not None:
        batches = list(batches)  # read twice
        budget = graphquant.fit_budget(model, batches, cosine=args.budget, options=chosen)
        chosen = dict(budget.options)
    report = graphquant.compare(model, batches, options=chosen)
    with page(args) as console:
        if budget is not None:
            console.print(budget)
            if args.save:
                budget.save(args.save)
                console.print(f"wrote {args.save}", markup=False)
        console.print(report)
        if args.plot:
            report.plot(args.plot)
            console.print(f"wrote {args.plot}", markup=False)
    write_json(args, report.to_json())
    return 0


def _batches(spec: str) -> Iterable[Any]:
    """What "module:callable" returns. The module may be in the working directory."""
    if ":" not in spec:
        raise UsageError(f"--data takes module:callable, got {spec!r}")
    make = imported(spec)
    with user_errors(f"{spec} failed"):
        batches: Iterable[Any] = make()
    return batches
