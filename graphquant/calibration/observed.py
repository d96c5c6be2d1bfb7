"""A captured graph that tells what its linears read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node

from graphquant.ir.aliases import written_in_place
from graphquant.ir.captured import Captured
from graphquant.ir.constants import Constants
from graphquant.ir.graph import LINEAR, arguments, calls, dtype, full_args
from graphquant.ir.interpret import Caller, Paths, Watched
from graphquant.passes.eligibility import path_of
from graphquant.passes.normalize import normalize

Found = Callable[[Sequence[str], Tensor], None]


class Observed:
    """The float graph, as the rules see it before the first of them.

    found(paths, x) is called for every value x [..., K] that linears read, once, with the module
    paths of all of them. Linears are those with a floating-point input and a weight that is made
    from parameters. If x is written to in place, each of its readers may see other numbers: then
    each one's x counts for itself.
    """

    def __init__(self, captured: Captured, paths: Paths, found: Found) -> None:
        normalize(captured)
        graph = captured.gm.graph
        self._gm = captured.gm
        self._paths = paths
        self._found = found
        self._readers: dict[Node, list[Caller]] = {}  # by the first linear that reads it
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

    def run(self, *args: Any) -> Any:
        """The float graph's results."""

        def after(node: Node, value: Any, env: Mapping[Node, Any]) -> None:
            if readers := self._readers.get(node):
                paths = [p for reader in readers for p in self._paths.of(reader, args)]
                self._found(paths, env[arguments(node).input])

        return Watched(self._gm, after).run(*args)
