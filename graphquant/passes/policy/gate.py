"""Gates: the last word on an int8 rewrite, once its nodes stand in the graph beside the float ones.

A gate takes a Candidate and returns a Verdict. `apply` asks them in order, and stops at the first
that decides against the rewrite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch.fx import Node

from graphquant.passes.record import Times
from graphquant.passes.rule import Rewrite, Site


class Candidate(NamedTuple):
    """A rewrite that stands in the graph, and that nothing reads yet.

    made  all nodes that it added
    """

    site: Site
    rewrite: Rewrite
    made: Sequence[Node]


class Verdict(NamedTuple):
    """A gate's decision.

    reason  why the float nodes stay, for the report; "" if the rewrite is kept
    times   what was measured, if anything was
    final   no other rule may try this linear
    """

    reason: str = ""
    times: Times | None = None
    final: bool = False


class Gate(Protocol):
    def __call__(self, candidate: Candidate) -> Verdict: ...
