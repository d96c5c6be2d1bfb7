"""The running record of a rewrite: what became of every linear, norm and activation.

Each of them is entered before the first rule runs. A rule that takes one in moves its entry to the
new node; the report is read off at the end, so nothing can be skipped in silence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch.fx import Node

from graphquant.report import Outcome

ENOUGH = 0.98  # of the float time: what only draws level is left in float, which is more exact


class Times(NamedTuple):
    """Microseconds of one site."""

    float_us: float
    int8_us: float

    @property
    def why_not(self) -> str:
        """A reason to stay in float, or ""."""
        if self.int8_us <= ENOUGH * self.float_us:
            return ""
        return f"measured: int8 takes {self.int8_us:.1f} us, float {self.float_us:.1f} us"


class Carried(NamedTuple):
    """A linear among those that one node computes.

    value  the name of the model's node that held the same value, a residual left out
    """

    outcome: Outcome
    value: str


@dataclass
class Entry:
    """One linear, norm or activation on its way through the rules."""

    outcome: Outcome  # its `refused` is what to say if no rule ever looks at it
    value: str  # the node of the model whose value a linear's columns hold, a residual left out
    rules: list[str] = field(default_factory=list)
    barred: str = ""  # no rule may touch it, for this reason
    declined: dict[str, str] = field(default_factory=dict)  # rule -> its reason
    float_us: float = 0.0  # measured, of the site that it is in
    int8_us: float = 0.0

    def done(self) -> Outcome:
        timed = replace(self.outcome, float_us=self.float_us, int8_us=self.int8_us)
        why_not = self.barred or "; ".join(self.declined.values())
        if not self.rules:
            return replace(timed, refused=why_not or self.outcome.refused)
        taken = replace(timed, rules=tuple(self.rules), refused="")
        in_float = taken.kind == "linear" and not taken.int8
        return replace(taken, refused=why_not) if in_float else taken


class Record:
    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._at: dict[Node, list[Entry]] = {}

    def enter(self, node: Node, outcome: Outcome, barred: str = "") -> None:
        entry = Entry(outcome, node.name, barred=barred)
        self._entries.append(entry)
        self._at.setdefault(node, []).append(entry)

    def enter_outside(self, outcome: Outcome) -> None:
        """Something no rule can reach, such as a linear inside a higher-order op."""
        self._entries.append(Entry(outcome, ""))

    def open(self, node: Node) -> bool:
        return not any(e.barred for e in self._at.get(node, ()))

    def apply(
        self,
        rule: str,
        subjects: Iterable[Node],
        onto: Node,
        times: Times | None = None,
        value: str = "",
    ) -> None:
        """value: the node of the model whose value `onto` computes, if that is another one now."""
        for node in subjects:
            entries = self._at.pop(node, [])
            for entry in entries:
                entry.rules.append(rule)
                if times is not None:
                    entry.float_us, entry.int8_us = times
                entry.value = value or entry.value
            self._at.setdefault(onto, []).extend(e for e in entries if e.outcome.kind == "linear")

    def smooth(self, subjects: Iterable[Node], smoothed: str, not_smoothed: str) -> None:
        """How the linears among these were smoothed, or why they were not."""
        for entry in (e for node in subjects for e in self._at.get(node, ())):
            if (smoothed or not_smoothed) and entry.outcome.kind == "linear":
                entry.outcome = replace(entry.outcome, smoothed=smoothed, not_smoothed=not_smoothed)

    def decline(
        self, rule: str, subjects: Iterable[Node], reason: str, times: Times | None = None
    ) -> None:
        for node in subjects:
            for entry in self._at.get(node, ()):
                entry.declined[rule] = reason
                if times is not None:
                    entry.float_us, entry.int8_us = times

    def bar(self, linear: Node, reason: str) -> None:
        """From now on no rule may touch it."""
        for entry in self._at.get(linear, ()):
            entry.barred = reason

    def carried(self, node: Node) -> tuple[Carried, ...]:
        """The linears whose columns this node computes, in the columns' order."""
        return tuple(Carried(e.done(), e.value) for e in self._at.get(node, ()))

    def linears(self) -> dict[Node, list[str]]:
        """The nodes that compute the linears on record, and the paths of these."""
        found = {
            node: [e.outcome.path or e.outcome.node for e in entries if e.outcome.kind == "linear"]
            for node, entries in self._at.items()
        }
        return {node: paths for node, paths in found.items() if paths}

    def outcomes(self) -> tuple[Outcome, ...]:
        """Every Outcome, in graph order."""
        return tuple(e.done() for e in self._entries)
