"""The graph that rules rewrite, and what is known about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from graphquant.config import Config
from graphquant.ir.constants import Constants
from graphquant.passes.policy.ranges import Range
from graphquant.passes.recognize import Activation, Norm, Recognized
from graphquant.passes.record import Record


@dataclass
class RewriteState:
    """One graph in the middle of its rewrite (what rules see of it: rule.View).

    written   values whose memory the graph writes to
    names     of parameters
    ranges    static ranges of the linears' inputs, by the names of the linears' nodes
    replaced  nodes of the graph as it was recognized -> what stands for them by now
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
        gamma, beta = (p and self._now(p) for p in (found.gamma, found.beta))
        return replace(found, x=self._now(found.x), gamma=gamma, beta=beta)

    def activation(self, out: Node) -> Activation | None:
        found = self.recognized.activations.get(out)
        return found and replace(found, x=self._now(found.x))

    def _now(self, node: Node) -> Node:
        """What stands for this node: norms and activations are recognized before any rewrite."""
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def open(self, linear: Node) -> bool:
        return self.record.open(linear)
