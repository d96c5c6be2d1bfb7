"""`python -m graphquant`: what this machine can do, and what becomes of a model.

doctor   this machine, its kernels and caches: the report to paste into a bug
explain  what torch.compile(model, backend="graphquant") would do, linear by linear
compare  how far int8 takes the model from float
show     its graph before and after, as text, a picture or a page
bench    its time in float, compiled, in bfloat16 and in int8
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graphquant.cli import bench, compare, doctor, explain, show
from graphquant.cli.arguments import Parser, run
from graphquant.cli.models import Source

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
    """The exit code: 2 for what has no meaning on the command line, said in one line.

    named  models that the command line may name, by table and name; for tools of this repository
    """
    parser = Parser(prog="python -m graphquant", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        about = command.__doc__ or ""
        one = commands.add_parser(
            name, help=about.partition(":")[0].partition("\n")[0], description=about
        )
        command.add_arguments(one)
        one.set_defaults(run=command.run, named=named or {})
    return run(parser, argv)
