"""Record: the state of every linear, norm and activation during a rewrite, and so the report.

All are entered before the first rule runs. A rule that fuses one moves its entry to the new node,
so the report misses none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch.fx import Node

from graphquant.report import Outcome

MAX_TIME_RATIO = 0.98  # int8 / float; without a gain, float is more accurate


class Times(NamedTuple):
    """Measured times of one site, in microseconds."""

    float_us: float
    int8_us: float

    @property
    def refusal(self) -> str:
        """Why int8 is too slow, or ""."""
        if self.int8_us <= MAX_TIME_RATIO * self.float_us:
            return ""
        return f"measured: int8 takes {self.int8_us:.1f} us, float {self.float_us:.1f} us"


class RecordedLinear(NamedTuple):
    """One of the linears that a node computes.

    value  the name of the model's node with the same value (before a fused residual)
    """

    outcome: Outcome
    value: str


@dataclass
class Entry:
    """One linear, norm or activation, and what the rules did with it."""

    outcome: Outcome  # its `refused` is the reason if no rule considers it
    value: str  # RecordedLinear.value
    rules: list[str] = field(default_factory=list)
    ineligible: str = ""  # why no rule may rewrite it, or ""
    declined: dict[str, str] = field(default_factory=dict)  # rule -> its reason
    float_us: float = 0.0  # measured, of its site
    int8_us: float = 0.0

    def result(self) -> Outcome:
        timed = replace(self.outcome, float_us=self.float_us, int8_us=self.int8_us)
        reason = self.ineligible or "; ".join(self.declined.values())
        if not self.rules:
            return replace(timed, refused=reason or self.outcome.refused)
        taken = replace(timed, rules=tuple(self.rules), refused="")
        in_float = taken.kind == "linear" and not taken.int8
        return replace(taken, refused=reason) if in_float else taken


class Record:
    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._at: dict[Node, list[Entry]] = {}

    def enter(self, node: Node, outcome: Outcome, ineligible: str = "") -> None:
        entry = Entry(outcome, node.name, ineligible=ineligible)
        self._entries.append(entry)
        self._at.setdefault(node, []).append(entry)

    def enter_unreachable(self, outcome: Outcome) -> None:
        """A linear that no rule can reach, such as one inside a higher-order op."""
        self._entries.append(Entry(outcome, ""))

    def is_eligible(self, node: Node) -> bool:
        return not any(e.ineligible for e in self._at.get(node, ()))

    def apply(
        self,
        rule: str,
        subjects: Iterable[Node],
        onto: Node,
        times: Times | None = None,
        value: str = "",
    ) -> None:
        """Move the entries of `subjects` to the node `onto`.

        value  the model's node whose value `onto` computes; "" if unchanged
        """
        for node in subjects:
            entries = self._at.pop(node, [])
            for entry in entries:
                entry.rules.append(rule)
                if times is not None:
                    entry.float_us, entry.int8_us = times
                entry.value = value or entry.value
            self._at.setdefault(onto, []).extend(e for e in entries if e.outcome.kind == "linear")

    def set_smoothing(self, subjects: Iterable[Node], smoothed: str, not_smoothed: str) -> None:
        """Record how the linears among these were smoothed, or why not."""
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

    def exclude(self, linear: Node, reason: str) -> None:
        """Make this linear ineligible for all further rules."""
        for entry in self._at.get(linear, ()):
            entry.ineligible = reason

    def linears_of(self, node: Node) -> tuple[RecordedLinear, ...]:
        """The linears that this node computes, in the order of its columns."""
        return tuple(RecordedLinear(e.result(), e.value) for e in self._at.get(node, ()))

    def linears(self) -> dict[Node, list[str]]:
        """Nodes that compute recorded linears -> the paths of those linears."""
        found = {
            node: [e.outcome.path or e.outcome.node for e in entries if e.outcome.kind == "linear"]
            for node, entries in self._at.items()
        }
        return {node: paths for node, paths in found.items() if paths}

    def outcomes(self) -> tuple[Outcome, ...]:
        """Every Outcome, in graph order."""
        return tuple(e.result() for e in self._entries)
