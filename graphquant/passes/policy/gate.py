"""The interface of gates, which accept or refuse a rewrite after its nodes were added.

A gate takes a Candidate and returns a Verdict. `apply` calls the gates in order, up to the first
that refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch.fx import Node

from graphquant.passes.record import Times
from graphquant.passes.rule import Rewrite, Site


class Candidate(NamedTuple):
    """A rewrite whose nodes are in the graph, and have no users yet.

    made  all nodes that it added
    """

    site: Site
    rewrite: Rewrite
    made: Sequence[Node]


class Verdict(NamedTuple):
    """A gate's decision.

    reason  why the float nodes stay, for the report; "" to accept the rewrite
    times   measured times, if any
    final   the linear becomes ineligible for all rules
    """

    reason: str = ""
    times: Times | None = None
    final: bool = False


class Gate(Protocol):
    def __call__(self, candidate: Candidate) -> Verdict: ...
