"""Which values of a graph are constant: the same at every call."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from graphquant.ir.aliases import written_in_place
from graphquant.ir.graph import LITERAL, aten, is_impure, is_random

# Ops without tensor inputs that return the same tensor at every call.
FACTORIES = frozenset(
    {
        aten.arange.default,
        aten.arange.start,
        aten.arange.start_step,
        aten.eye.default,
        aten.eye.m,
        aten.full.default,
        aten.linspace.default,
        aten.logspace.default,
        aten.ones.default,
        aten.scalar_tensor.default,
        aten.tril_indices.default,
        aten.triu_indices.default,
        aten.zeros.default,
    }
)


UNSET = frozenset({aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default})


class Constants:
    """Which nodes depend on parameters and buffers only. `roots` are those themselves.

    A value that the graph writes to is not constant, under any alias: it differs before and after
    the write, and the next run starts from the written one.

    Tensors made of numbers alone (LITERAL, FACTORIES) may take part, but are no weights by
    themselves: a packed weight belongs to parameters.
    """

    def __init__(self, roots: Iterable[Node]) -> None:
        self.roots = frozenset(roots)
        self._written = {
            n for graph in {r.graph for r in self.roots} for n in written_in_place(graph)
        }
        self._fixed = {root: root not in self._written for root in self.roots}
        self._rooted = set(self.roots)

    def __contains__(self, node: object) -> bool:
        return isinstance(node, Node) and self.is_fixed(node) and node in self._rooted

    def is_fixed(self, node: Node) -> bool:
        """The same at every call, as long as the parameters are?"""
        if node not in self._fixed:
            inputs = node.all_input_nodes
            self._fixed[node] = LITERAL in node.meta or (
                node.op == "call_function"
                and (bool(inputs) or node.target in FACTORIES)
                and node.target not in UNSET
                and node not in self._written
                and not is_impure(node)
                and not is_random(node)
                and all(map(self.is_fixed, inputs))
            )
            if any(i in self._rooted for i in inputs):
                self._rooted.add(node)
        return self._fixed[node]

    def roots_of(self, node: Node) -> list[Node]:
        """The parameters a constant is computed from, in the order they are read."""
        seen: set[Node] = set()
        found, edge = [], [node]
        while edge:
            value = edge.pop()
            if value not in seen:
                seen.add(value)
                if value in self.roots:
                    found.append(value)
                else:
                    edge += reversed(value.all_input_nodes)
        return found

    def made_from(self, node: Node) -> list[Node]:
        """A constant and every value that it is computed from."""
        found, edge = {node: None}, [node]
        for value in edge:
            if value not in self.roots:
                fresh = [i for i in value.all_input_nodes if i not in found]
                found |= dict.fromkeys(fresh)
                edge += fresh
        return list(found)

    def written_in(self, node: Node) -> Node | None:
        """The value whose in-place write keeps this one from being constant: a parameter, or a
        value computed from parameters. None if there is another reason."""
        edge, seen = [node], {node}
        for value in edge:
            if value not in self.roots and (value.op != "call_function" or is_random(value)):
                return None
            fresh = [i for i in value.all_input_nodes if not self.is_fixed(i) and i not in seen]
            seen.update(fresh)
            edge += fresh
        return min((n for n in edge if n in self._written), default=None)
