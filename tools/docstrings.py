"""Docstrings as Markdown, for the site: a Griffe extension, named in mkdocs.yml.

In the source, names and what they mean stand in columns, which Markdown would run together:

    model    a torch.nn.Module in eval mode, compiled or not; it stays
             as it is
    batches  what its calls take, one after the other

They become a definition list. Columns of any other form, such as the shapes of an op's arguments,
are kept as they stand.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

COLUMNS = re.compile(r"\S {2,}\S")
ENTRY = re.compile(r"([\w, .]+?) {2,}(\S.*)")


class Docstrings(griffe.Extension):
    """Every docstring that is loaded becomes Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    return "\n\n".join(map(_paragraph, re.split(r"\n{2,}", inspect.cleandoc(docstring))))


def _paragraph(text: str) -> str:
    if text.startswith(" ") or not COLUMNS.search(text):
        return text  # code is indented
    entries = _entries(text)
    if entries is None:
        return "\n".join(f"    {line}" for line in text.splitlines())
    return "\n\n".join(f"`{name}`\n:   {meaning}" for name, meaning in entries)


def _entries(text: str) -> list[tuple[str, str]] | None:
    """(name, meaning) of each entry, or None if these are no such columns."""
    entries: list[tuple[str, str]] = []
    first = ENTRY.match(text)
    if first is None:
        return None
    column = first.start(2)
    for line in text.splitlines():
        if line.startswith(" "):
            name, meaning = entries[-1]
            entries[-1] = name, f"{meaning} {line.strip()}"
        elif found := ENTRY.fullmatch(line):
            entries.append((found[1], found[2]))
        elif re.fullmatch(r"\w+", line[: column - 1]) and line[column - 1 : column] == " ":
            entries.append((line[: column - 1], line[column:]))  # one that fills the column
        else:
            return None
    return entries
