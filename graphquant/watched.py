"""A captured graph, run with a view of every value, and the layers of a model that it runs for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

from torch import nn
from torch.fx import GraphModule, Interpreter, Node

from graphquant.passes.pipeline import linear_path


class Watched(Interpreter):
    """Runs a graph and calls after(node, value, values of its inputs) behind every node. What that
    returns, if it is not None, stands for the node's value from there on."""

    def __init__(
        self, gm: GraphModule, after: Callable[[Node, Any, Mapping[Node, Any]], Any]
    ) -> None:
        super().__init__(gm)
        self._after = after

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        instead = self._after(n, value, self.env)
        return value if instead is None else instead


class Paths:
    """The module paths of a model's linears, by the weight.

    Layers may share one graph, and behind a graph break the graph does not know where in the model
    it is; the weights that it is called with do.
    """

    def __init__(self, model: nn.Module) -> None:
        self._known: dict[int, list[str]] = {}
        named = (model.named_parameters, model.named_buffers)
        for name, tensor in chain(*(each(remove_duplicate=False) for each in named)):
            self._known.setdefault(id(tensor), []).append(linear_path(name))

    def of(self, weight: Any, path: str) -> tuple[str, ...]:
        """Every path of the linears with this weight: several if it is tied, `path` first if it is
        one of them. `path` alone for a weight that the model does not have."""
        known = self._known.get(id(weight), [path])
        return tuple(sorted(known, key=lambda p: p != path))
