"""Interpreter that observes every intermediate, and the module paths of a graph's linears."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from graphquant.ir.paths import Places, moved_path, weight_path


class ObservingInterpreter(Interpreter):
    """Runs a graph and calls after(node, value, values of all nodes so far) after every node. A
    result other than None replaces the node's value."""

    def __init__(
        self, gm: GraphModule, after: Callable[[Node, Any, Mapping[Node, Any]], Any]
    ) -> None:
        super().__init__(gm)
        self._after = after

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        replacement = self._after(n, value, self.env)
        return value if replacement is None else replacement


class Caller(NamedTuple):
    """A linear of a captured graph.

    path    its module path, as captured
    name    the name of a parameter that its weight is computed from
    weight  that parameter
    place   the index of that parameter among the graph's inputs
    """

    path: str
    name: str
    weight: Tensor
    place: int


class Paths:
    """The module paths of a model's linears.

    Layers may share one graph, whose paths are those of the layer that it was captured from; the
    weights of a call tell which layer runs.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._places = Places(model)
        self._ran: set[str] = set()

    def of(self, linear: Caller, args: Sequence[Any]) -> tuple[str, ...]:
        """The path of this linear in a call of its graph, followed by those of other linears with
        the same weight."""
        weight = args[linear.place]
        names = self._places.names(weight)
        if weight is linear.weight:
            self._ran.add(linear.path)
            tied = (path for path in map(weight_path, names) if path in self._ran)
            return tuple(dict.fromkeys((linear.path, *tied)))
        moved = (moved_path(linear.path, linear.name, n) for n in names)  # any, if it is tied
        return tuple(dict.fromkeys(moved)) or (linear.path,)
