"""RewriteState: the graph that the rules rewrite, with the analyses that they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch.fx import Graph, GraphModule, Node

from graphquant._torch import FakeTensorMode
from graphquant.config import Config
from graphquant.ir.constants import Constants
from graphquant.passes.policy.ranges import Range
from graphquant.passes.recognize import Activation, Norm, Recognized
from graphquant.passes.record import Record


@dataclass
class RewriteState:
    """One graph during its rewrite; implements rule.View.

    written   values that the graph writes in place
    names     parameter nodes -> their names in the model
    ranges    names of linears' nodes -> the static ranges of their inputs
    replaced  nodes at recognition time -> the nodes that replaced them
    """

    gm: GraphModule
    fake_mode: FakeTensorMode
    constants: Constants
    recognized: Recognized
    needs_gradient: set[Node]
    written: set[Node]
    record: Record
    config: Config
    names: Mapping[Node, str]
    ranges: dict[str, Range] = field(default_factory=dict)
    replaced: dict[Node, Node] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        return self.gm.graph

    def norm(self, out: Node) -> Norm | None:
        found = self.recognized.norms.get(out)
        if found is None:
            return None
        gamma, beta = (p and self._current(p) for p in (found.gamma, found.beta))
        return replace(found, x=self._current(found.x), gamma=gamma, beta=beta)

    def activation(self, out: Node) -> Activation | None:
        found = self.recognized.activations.get(out)
        return found and replace(found, x=self._current(found.x))

    def _current(self, node: Node) -> Node:
        """The node that replaced this one, for recognition ran before any rewrite."""
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def is_eligible(self, linear: Node) -> bool:
        return self.record.is_eligible(linear)
