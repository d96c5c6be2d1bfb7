"""`python -m graphquant`, see graphquant.cli."""

import sys

from graphquant.cli import main

if __name__ == "__main__":
    sys.exit(main())
