"""What the tools that look at one model say on the command line: which model, which options."""

from __future__ import annotations

import argparse
import ast
import difflib
import os
from collections.abc import Callable
from typing import Any

from rich.console import Console

from tests import zoo

BAD_USAGE = 2  # the exit code


class UsageError(Exception):
    """Something on the command line has no meaning. The message is for the user."""


def add_model(p: argparse.ArgumentParser) -> None:
    p.add_argument("name", nargs="?", metavar="MODEL", help='a name of the zoo, "module:callable"')
    p.add_argument("--model", metavar="M:C", help="a callable that returns (module, args, kwargs)")
    p.add_argument("--list", action="store_true", help="the names of the zoo")
    p.add_argument(
        "--config", nargs="+", action="extend", default=[], metavar="K=V", help="graphquant options"
    )
    p.add_argument("--attn", choices=zoo.BOTH, default="sdpa", help="attention implementation")
    p.add_argument("--batch", type=int, default=2, metavar="N", help="batch size (2)")


def add_page(p: argparse.ArgumentParser, width: int) -> None:
    p.add_argument("--width", type=int, metavar="N", help=f"columns (the terminal's, else {width})")
    p.add_argument("--no-color", action="store_true")


def page(args: argparse.Namespace, width: int) -> Console:
    """width: in columns, where there is no terminal to ask."""
    console = Console(no_color=args.no_color, highlight=False)
    if args.width or not console.is_terminal:
        console.width = args.width or width
    return console


def options(args: argparse.Namespace) -> dict[str, Any]:
    """graphquant's options, as --config gives them."""
    return dict(map(_option, args.config))


def _option(text: str) -> tuple[str, Any]:
    """ "quantize=False" -> ("quantize", False); what is no Python literal is text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--config takes name=value, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def known_models() -> str:
    return "\n".join(f"{title}: {', '.join(entries)}" for title, entries in zoo.TABLES.items())


def load(args: argparse.Namespace) -> zoo.Entry:
    """An entry of the zoo, or the user's own."""
    if (args.name is None) == (args.model is None):
        raise UsageError("name one model: a name of the zoo (--list), or --model module:callable")
    spec = args.name or args.model
    if ":" in spec:
        return found(zoo.load, spec)
    try:
        return zoo.load(spec)
    except KeyError:
        names = [name for entries in zoo.TABLES.values() for name in entries]
        close = difflib.get_close_matches(spec, names, n=1)
        hint = f", did you mean {close[0]!r}?" if close else "."
        raise UsageError(f"unknown model {spec!r}{hint} Known:\n{known_models()}") from None


def found(load: Callable[[str, str], Any], spec: str) -> Any:
    """load("module:callable", working directory)."""
    try:
        return load(spec, os.getcwd())
    except (ModuleNotFoundError, AttributeError) as missing:
        raise UsageError(f"cannot load {spec!r}: {missing}") from missing
