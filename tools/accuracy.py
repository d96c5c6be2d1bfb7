"""How far int8 takes a model from float: `python -m graphquant compare`, which also knows the
models of tests.zoo by name.

    python -m tools.accuracy vit --batches 4 --plot layers.png
    python -m tools.accuracy vit --budget 0.9999 --save budget.json
    python -m tools.accuracy --help
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from graphquant import cli
from tests import zoo


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    return cli.main(["compare", *given], named=zoo.TABLES)


if __name__ == "__main__":
    sys.exit(main())
