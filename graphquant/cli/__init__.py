"""`python -m graphquant`: inspect this machine, and what graphquant does to a model.

doctor   this machine, its kernels and caches, for a bug report
explain  what torch.compile(model, backend="graphquant") would do, linear by linear
compare  the error of int8 against float, linear by linear
show     the graph before and after, as text, a picture or a page
bench    the latency in float, compiled, in bfloat16 and in int8
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from graphquant.cli import bench, compare, doctor, explain, show
from graphquant.cli.arguments import Parser, run
from graphquant.cli.models import Source, known

COMMANDS = {
    "doctor": doctor,
    "explain": explain,
    "compare": compare,
    "show": show,
    "bench": bench,
}


def main(
    argv: Sequence[str] | None = None, *, named: Mapping[str, Mapping[str, Source]] | None = None
) -> int:
    """Run a command and return its exit code: 2 for a usage error, which is reported in one line.

    named  models that the command line may name, by table and name; for this repository's tools
    """
    parser = Parser(prog="python -m graphquant", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        about = command.__doc__ or ""
        one = commands.add_parser(
            name, help=about.partition(":")[0].partition("\n")[0], description=about
        )
        command.add_arguments(one)
        one.set_defaults(run=partial(_list_or_run, command.run), named=named or {})
    return run(parser, argv)


def _list_or_run(command: Callable[[Namespace], int], args: Namespace) -> int:
    if getattr(args, "list", False):  # of commands that take a model
        print(known(args.named))
        return 0
    return command(args)
