"""Shared by the commands: options, output, and errors in one line."""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console

from graphquant.config import Config
from graphquant.errors import MissingPackageError, OptionError, UnsupportedInputError

BAD_USAGE = 2  # the exit code
DTYPES = ("float32", "float16", "bfloat16")
STDOUT = "-"


class UsageError(Exception):
    """A mistake on the command line. The message is for the user."""


class Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print its usage and exit."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help)")


def run(parser: Parser, argv: Sequence[str] | None) -> int:
    """Parse the arguments and run the command. Returns the exit code."""
    try:
        args = parser.parse_args(argv)
        code: int = args.run(args)
    except (UsageError, OptionError, UnsupportedInputError, MissingPackageError) as wrong:
        print(wrong, file=sys.stderr)
        return BAD_USAGE
    return code


def add_model(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "name", nargs="?", metavar="MODEL",
        help='"module:callable", which returns a model or (model, args, kwargs), '
        "or a folder with a config.json of transformers",
    )  # fmt: skip
    p.add_argument("--model", metavar="MODEL", help="the same")
    p.add_argument("--list", action="store_true", help=argparse.SUPPRESS)
    p.add_argument(
        "--config", nargs="+", action="extend", default=[], metavar="K=V",
        help="graphquant's options, exclude=*.fc2",
    )  # fmt: skip
    p.add_argument("--batch", type=count, default=2, metavar="N", help="batch size (2)")
    p.add_argument("--tokens", type=count, metavar="N", help="text length, for a folder (128)")
    p.add_argument("--attn", choices=("sdpa", "eager"), default="sdpa", help="(sdpa)")
    p.add_argument("--dtype", choices=DTYPES, help="of weights and inputs (as they come)")
    p.add_argument("--device", type=_device, metavar="D", help="cuda, cuda:1 (as the model comes)")


def add_output(p: argparse.ArgumentParser, width: int) -> None:
    p.add_argument(
        "--json", metavar="FILE", help='as JSON as well; "-" for stdout, and nothing else'
    )
    p.add_argument("--out", metavar="FILE", help="print into this file")
    p.add_argument("--width", type=count, metavar="N", help=f"columns (the terminal's, or {width})")
    p.add_argument("--no-color", action="store_true")
    p.set_defaults(usual_width=width)


@contextmanager
def page(args: argparse.Namespace) -> Iterator[Console]:
    """The console that a command prints to: the terminal, or the file of --out."""
    if args.out:
        try:
            with open(args.out, "w", encoding="utf-8") as file:
                yield Console(file=file, width=args.width or args.usual_width, highlight=False)
        except OSError as wrong:
            raise UsageError(f"--out: {wrong}") from wrong
        return
    console = Console(no_color=args.no_color, highlight=False, quiet=args.json == STDOUT)
    if args.width or not console.is_terminal:
        console.width = args.width or args.usual_width
    yield console


def write_json(args: argparse.Namespace, text: str) -> None:
    """Write to the file of --json, if it is given."""
    if args.json == STDOUT:
        print(text)
    elif args.json:
        write(args.json, "--json", f"{text}\n")


def write(path: str, option: str, text: str | bytes) -> None:
    """Write a file. Raises UsageError, in the name of the option, if that fails."""
    try:
        Path(path).write_bytes(text.encode() if isinstance(text, str) else text)
    except OSError as wrong:
        raise UsageError(f"{option}: {wrong}") from wrong


def options(args: argparse.Namespace) -> dict[str, Any]:
    """graphquant's options, as --config gives them. Raises OptionError for invalid ones."""
    chosen = dict(map(_option, args.config))
    Config.of(chosen)
    return chosen


def here() -> str:
    """The working directory, where the user's modules may be."""
    return os.getcwd()


def _option(text: str) -> tuple[str, Any]:
    """ "quantize=False" -> ("quantize", False); a value that is no Python literal stays text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--config takes name=value, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def count(text: str) -> int:
    """A number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def positive(text: str) -> float:
    """A number above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a torch device") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r}: graphquant runs on cpu and cuda")
    return device
