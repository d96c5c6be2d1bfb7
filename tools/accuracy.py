"""How far int8 takes a model from float: every int8 linear, the worst first, and the outputs.

    python -m tools.accuracy vit
    python -m tools.accuracy vit --config exclude=*.fc2 --batches 4 --json accuracy.json
    python -m tools.accuracy vit --budget 0.9999 --save budget.json
    python -m tools.accuracy --model my_module:make --data my_module:batches --plot accuracy.png

MODEL is a name from tests.zoo (--list), or "module:callable" for a callable that returns (module,
args, kwargs). Batches are random, each other numbers, unless --data names a callable that returns
them: an iterable of what graphquant.compare takes. With --budget the options are those of
graphquant.fit_budget, and --save writes them for graphquant.Budget.load. The exit code is 2 for an
unknown model or option, for batches that the model cannot be called with and for a budget that is
no cosine.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import graphquant
from tests import zoo
from tools.arguments import (
    BAD_USAGE,
    UsageError,
    add_model,
    add_page,
    found,
    known_models,
    load,
    options,
    page,
)

PAGE = 140  # columns, where there is no terminal to ask


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    console = page(args, PAGE)
    try:
        if args.list:
            print(known_models())
            return 0
        chosen, entry = options(args), load(args)
        if args.plot and importlib.util.find_spec("matplotlib") is None:
            raise UsageError("--plot needs matplotlib: pip install matplotlib")
        if args.batches < 1:
            raise UsageError(f"--batches must be at least 1, got {args.batches}")
        if args.save and args.budget is None:
            raise UsageError("--save writes what --budget finds: give both")
        model = entry.build(args.attn)
        batches = _given(args.data) if args.data else _random(entry, args.batch, args.batches)
        if args.budget is not None:
            batches = list(batches)  # for two
            budget = _fitted(model, batches, args.budget, chosen)
            chosen = dict(budget.options)
            console.print(budget)
            if args.save:
                budget.save(args.save)
                console.print(f"wrote {args.save}", markup=False)
        report = graphquant.compare(model, batches, options=chosen)
    except (UsageError, graphquant.OptionError, graphquant.UnsupportedInputError) as wrong:
        print(wrong, file=sys.stderr)
        return BAD_USAGE
    console.print(report)
    if args.json:
        Path(args.json).write_text(report.to_json() + "\n")
    if args.plot:
        report.plot(args.plot)
        console.print(f"wrote {args.plot}", markup=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    about, _, more = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(
        prog="python -m tools.accuracy",
        description=about,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(p)
    p.add_argument("--batches", type=int, default=1, metavar="N", help="random batches (1)")
    p.add_argument("--data", metavar="M:C", help="a callable that returns the batches")
    p.add_argument("--budget", type=float, metavar="C", help="fit to this mean cosine, below 1")
    p.add_argument("--save", metavar="FILE", help="write the fitted options as JSON")
    p.add_argument("--json", metavar="FILE", help="write all numbers as JSON")
    p.add_argument("--plot", metavar="FILE.png", help="SQNR by layer; needs matplotlib")
    add_page(p, PAGE)
    return p


def _random(entry: zoo.Entry, batch: int, count: int) -> Iterator[zoo.Inputs]:
    return (entry.inputs(batch, draw) for draw in range(count))


def _fitted(
    model: nn.Module, batches: Sequence[Any], cosine: float, options: dict[str, Any]
) -> graphquant.Budget:
    return graphquant.fit_budget(
        model, batches, cosine=cosine, options=options, progress=sys.stderr.isatty()
    )


def _given(spec: str) -> Iterable[Any]:
    """What the callable "module:callable" returns. The module may lie in the working directory."""
    if ":" not in spec:
        raise UsageError(f"--data takes module:callable, got {spec!r}")
    batches: Iterable[Any] = found(zoo.imported, spec)()
    return batches


if __name__ == "__main__":
    sys.exit(main())
