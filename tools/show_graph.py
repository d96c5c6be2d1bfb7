"""What graphquant makes of a model: `python -m graphquant show`, which also knows the models of
tests.zoo by name.

    python -m tools.show_graph vit
    python -m tools.show_graph --list
    python -m tools.show_graph --help
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file, `python tools/show_graph.py`: find the packages as well
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from graphquant import cli
from tests import zoo


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    return cli.main(["show", *given], named=zoo.TABLES)


if __name__ == "__main__":
    sys.exit(main())
