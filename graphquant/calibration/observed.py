"""Interpreter that reports the inputs of all linears of a captured graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node

from graphquant.ir.aliases import written_in_place
from graphquant.ir.captured import Captured
from graphquant.ir.constants import Constants
from graphquant.ir.graph import LINEAR, arguments, calls, dtype, full_args
from graphquant.ir.interpret import Caller, ObservingInterpreter, Paths
from graphquant.ir.tokens import Masks, TokenRows
from graphquant.passes.eligibility import path_of
from graphquant.passes.normalize import normalize

OnInput = Callable[[Sequence[str], Tensor, Tensor | None], None]


class Observed:
    """The normalized float graph, before any rule.

    on_input(paths, x, rows) is called once for every value x [..., K] that linears read, with the
    module paths of all these linears, and with rows [...] bool, True for the tokens of x by the
    masks of the call; None if all count. Only linears with a floating-point input and a weight that
    is computed from parameters count. If x is written in place, its readers may see different
    values: then it is called for each of them.
    """

    def __init__(self, captured: Captured, paths: Paths, on_input: OnInput) -> None:
        normalize(captured)
        graph = captured.gm.graph
        self._gm = captured.gm
        self._paths = paths
        self._on_input = on_input
        self._readers: dict[Node, list[Caller]] = {}  # by the first linear that reads the input
        inputs = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
        constants = Constants(captured.parameters)
        written = written_in_place(graph)
        first: dict[Node, Node] = {}
        for node in calls(graph, lambda n: n.target is LINEAR):
            x, weight, _ = full_args(node)
            if weight in constants and dtype(x).is_floating_point:
                root = constants.roots_of(weight)[0]
                path = path_of(node, captured, constants)
                reader = Caller(path, captured.names[root], captured.parameters[root], inputs[root])
                at = node if x in written else first.setdefault(x, node)
                self._readers.setdefault(at, []).append(reader)

    def run(self, args: Sequence[Any], masks: Masks) -> Any:
        """Run the float graph; returns its results."""
        tokens = TokenRows(masks)

        def after(node: Node, value: Any, env: Mapping[Node, Any]) -> None:
            tokens.after(node, value, env)
            if readers := self._readers.get(node):
                paths = [p for reader in readers for p in self._paths.of(reader, args)]
                x = arguments(node).input
                self._on_input(paths, env[x], tokens.of(x, env[x]))

        return ObservingInterpreter(self._gm, after).run(*args)
