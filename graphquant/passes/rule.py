"""The words a rule is written in.

A rule is one file with three answers: `sites` finds where its shape stands, `check` says None or a
Refuse with a reason, `rewrite` builds the replacement. The engine (apply.py) does the rest: fake
values, equal shape and dtype, dead code, the record of what happened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor
from torch.fx import Graph, Node

from graphquant.ir.constants import Constants
from graphquant.ir.graph import LINEAR, calls, dtype, full_args
from graphquant.ops.checks import FLOATS
from graphquant.ops.define import Op
from graphquant.passes.recognize import Activation, Norm


class Refuse(NamedTuple):
    """A rule saw its shape and declined: why, and which node it blames."""

    reason: str
    at: Node


class Linear(NamedTuple):
    """y [..., N] = x [..., K] @ weight [N, K]^T + bias [N], as one node."""

    node: Node
    x: Node
    weight: Node
    bias: Node | None


class Smooth(NamedTuple):
    """How a linear's input channels are smoothed: x W^T = (x factor) (W scale)^T.

    Both [K] float32, and None if they are not. A quantiser takes the factor, int8_linear the scale.
    """

    scale: Node | None = None
    factor: Node | None = None


@dataclass(frozen=True)
class Site:
    """Where a rule may apply.

    outputs   the nodes whose values the rewrite replaces, in order
    subjects  the linears, norms and activations that the rewrite takes in; the record credits them
    moved     values that the rewrite reads at another time than the model did; the engine refuses
              the site if anything writes to one of them in place
    """

    outputs: tuple[Node, ...]
    subjects: tuple[Node, ...]
    moved: tuple[Node, ...]


class View(Protocol):
    """What a rule may ask about the graph."""

    @property
    def graph(self) -> Graph: ...

    constants: Constants
    needs_gradient: set[Node]

    def norm(self, out: Node) -> Norm | None:
        """The norm whose result this node holds."""
        ...

    def activation(self, out: Node) -> Activation | None:
        """The activation whose result this node holds."""
        ...

    def open(self, linear: Node) -> bool:
        """May this float linear be rewritten? False for one that was refused for good."""
        ...


class Edit(Protocol):
    """What a rule may do to the graph: add calls, each with its fake value."""

    def call(self, target: Any, *args: Any) -> Node: ...
    def quantized(self, op: Op, *args: Any, linear: Linear, smooth: Smooth) -> Node: ...
    def weigh(self, target: Any, *args: Any) -> Node: ...
    def literal(self, value: Tensor, like: Node) -> Node: ...
    def smooth(
        self, linear: Linear, norm: Norm | None = None, *, one_sided: bool = False
    ) -> Smooth: ...
    def unpack(self, node: Node) -> tuple[Node, ...]: ...
    def replay(self, views: Sequence[Node], x: Node) -> Node: ...
    def sizes(self, node: Node) -> list[Any]: ...
    def int8_linear(
        self, quantized: Node, linear: Linear, smooth: Smooth, views: Sequence[Node] = ()
    ) -> Node: ...


S = TypeVar("S", bound=Site)


class Rule(Protocol[S]):
    """One rewrite. `name` is the same word in the file name, in reports and in logs."""

    name: str

    def sites(self, view: View) -> Iterator[S]: ...
    def check(self, view: View, site: S) -> Refuse | None: ...
    def rewrite(self, edit: Edit, site: S) -> tuple[Node, ...]: ...


def not_floats(*values: Node | None) -> Refuse | None:
    """Why the ops, which take float16, bfloat16 and float32, cannot take one of these values."""
    for value in values:
        if value is not None and dtype(value) not in FLOATS:
            kind = str(dtype(value)).removeprefix("torch.")
            return Refuse(f"it reads {kind}; the ops take float16, bfloat16 and float32", value)
    return None


def linears(view: View) -> Iterator[Linear]:
    """The float linears that are still open, in order."""
    for node in calls(view.graph, lambda n: n.target is LINEAR):
        if view.open(node):
            yield Linear(node, *full_args(node))
