"""The interface of rewrite rules.

A rule has three methods: `sites` finds where its pattern occurs, `check` returns None or a Refuse
with a reason, `rewrite` builds the replacement and returns it as a Rewrite. The engine (apply.py)
does the rest: fake values, checks of shape and dtype, the accuracy and speed gates, dead code, and
the record for the report.
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
    """A rule found its pattern but declines: the reason, and the node that causes it."""

    reason: str
    at: Node


class Linear(NamedTuple):
    """A float linear: y [..., N] = x [..., K] @ weight [N, K]^T + bias [N]."""

    node: Node
    x: Node
    weight: Node
    bias: Node | None


class Smoothing(NamedTuple):
    """SmoothQuant's scaling of a linear's input channels: x W^T = (x factor) (W scale)^T.

    scale   [K] float32, multiplies the weight; None if the linear is not smoothed
    factor  [K] float32, by which the quantizer multiplies x; None if not smoothed, or if folded
            into the preceding norm's parameters
    method  how the scale was found, for the report
    reason  why the linear is not smoothed although the options ask for it
    """

    scale: Node | None = None
    factor: Node | None = None
    method: str = ""
    reason: str = ""


class Int8Product(NamedTuple):
    """An int8_linear that replaces a float linear.

    node     the call of int8_linear
    wq       [N, K] int8, the packed weight
    w_scale  [N] float32, the weight's scales
    """

    node: Node
    linear: Linear
    smoothing: Smoothing
    wq: Node
    w_scale: Node


class Rewrite(NamedTuple):
    """What a rule built at one site.

    values   the nodes that replace the site's outputs, in the same order
    product  the int8 linear among them, if it replaces a float one: the gates check its accuracy
             and speed
    """

    values: tuple[Node, ...]
    product: Int8Product | None = None


@dataclass(frozen=True)
class Site:
    """One match of a rule's pattern.

    outputs   the nodes that the rewrite replaces
    subjects  the linears, norms and activations that the rewrite fuses, for the report
    moved     values that the rewrite reads at another time than the model does; the engine refuses
              the site if one of them is written in place
    """

    outputs: tuple[Node, ...]
    subjects: tuple[Node, ...]
    moved: tuple[Node, ...]


class View(Protocol):
    """A rule's read-only view of the graph."""

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

    def is_eligible(self, linear: Node) -> bool:
        """May rules rewrite this float linear?"""
        ...


class Edit(Protocol):
    """How a rule adds nodes to the graph (editor.py)."""

    def call(self, target: Any, *args: Any) -> Node: ...
    def quantized(self, op: Op, *args: Any, linear: Linear, smoothing: Smoothing) -> Node: ...
    def fold(self, target: Any, *args: Any) -> Node: ...
    def literal(self, value: Tensor, like: Node) -> Node: ...
    def smooth(
        self, linear: Linear, norm: Norm | None = None, *, one_sided: bool = False
    ) -> Smoothing: ...
    def unpack(self, node: Node) -> tuple[Node, ...]: ...
    def replay(self, views: Sequence[Node], x: Node) -> Node: ...
    def sizes(self, node: Node) -> list[Any]: ...
    def int8_linear(
        self, quantized: Node, linear: Linear, smoothing: Smoothing, views: Sequence[Node] = ()
    ) -> Int8Product: ...


S = TypeVar("S", bound=Site)


class Rule(Protocol[S]):
    """One rewrite. `name` is its file's, as in reports and logs."""

    name: str

    def sites(self, view: View) -> Iterator[S]: ...
    def check(self, view: View, site: S) -> Refuse | None: ...
    def rewrite(self, edit: Edit, site: S) -> Rewrite: ...


def refuse_dtype(*values: Node | None) -> Refuse | None:
    """Refuses values that are not float16, bfloat16 or float32."""
    for value in values:
        if value is not None and dtype(value) not in FLOATS:
            kind = str(dtype(value)).removeprefix("torch.")
            return Refuse(f"it reads {kind}; the ops take float16, bfloat16 and float32", value)
    return None


def linears(view: View) -> Iterator[Linear]:
    """The float linears that are still eligible, in graph order."""
    for node in calls(view.graph, lambda n: n.target is LINEAR):
        if view.is_eligible(node):
            yield Linear(node, *full_args(node))
