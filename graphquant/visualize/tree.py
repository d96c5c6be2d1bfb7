"""The lines of a graph as a tree of the model's modules, before and after side by side.

    tree(one.before, one.after)  the modules and operations that the model's own forward calls

Level by level, modules and kept operations are aligned with themselves on the other side, and
removed lines are beside new ones. Everything is in graph order, so a module that is called several
times appears several times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby, zip_longest

from graphquant.visualize.lines import Line, Row


@dataclass(frozen=True)
class Module:
    """One call of a module, and everything that it calls.

    name   its part of the path, "attention"; "encoder.layers" if encoder calls nothing else
    path   "encoder.layers.0.attention"
    """

    name: str
    path: str
    items: tuple[Module | Row, ...]

    def rows(self) -> Iterator[Row]:
        for item in self.items:
            if isinstance(item, Row):
                yield item
            else:
                yield from item.rows()


@dataclass(frozen=True)
class _Run:
    """The lines of one call of a module, or one operation of the caller itself.

    child  the module's name; "" for an operation
    """

    child: str
    lines: tuple[Line, ...]

    @property
    def key(self) -> object:
        return self.child or (self.lines[0].node, self.lines[0].values)


def tree(
    before: Sequence[Line], after: Sequence[Line] = (), path: str = ""
) -> tuple[Module | Row, ...]:
    """The items of the module `path`, whose lines are all of these."""
    left, right = (list(_runs(side, path)) for side in (before, after))
    was, now = ([run.key for run in side] for side in (left, right))
    items: list[Module | Row] = []
    for tag, i, i_end, j, j_end in SequenceMatcher(None, was, now, autojunk=False).get_opcodes():
        old, new = left[i:i_end], right[j:j_end]
        if tag == "replace":
            sides = ([line for run in side for line in run.lines] for side in (old, new))
            items += [Row(*lines) for lines in zip_longest(*sides)]
            continue
        for pair in zip_longest(old, new):  # as many on both sides, or none on one
            items.append(_item(path, *pair))
    return tuple(items)


def _item(path: str, old: _Run | None, new: _Run | None) -> Module | Row:
    run = old or new
    assert run is not None
    before, after = (side.lines if side else () for side in (old, new))
    if not run.child:
        return Row(*(lines[0] if lines else None for lines in (before, after)))
    inner = f"{path}.{run.child}" if path else run.child
    items = tree(before, after, inner)
    if len(items) == 1 and isinstance(only := items[0], Module):
        return Module(f"{run.child}.{only.name}", only.path, only.items)
    return Module(run.child, inner, items)


def _runs(lines: Sequence[Line], path: str) -> Iterator[_Run]:
    above = len(path.split(".")) if path else 0

    def child(line: Line) -> str:
        return ".".join(line.path.split(".")[above : above + 1])

    for name, members in groupby(lines, key=child):
        if name:
            yield _Run(name, tuple(members))
        else:
            yield from (_Run("", (line,)) for line in members)
