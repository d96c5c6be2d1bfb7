"""Values of a graph's nodes on small inputs, to prove what masks and readers of padding do."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import sympy
import torch
from torch.fx import Node

from graphquant.ir.captured import Captured
from graphquant.ir.evaluate import evaluate
from graphquant.ir.graph import (
    ancestors,
    described,
    draws_nothing,
    hint,
    is_random,
    is_tensor,
    read_by_value,
)

_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, AssertionError)
Sizes = Mapping[sympy.Symbol, int]


class Kept(Exception):
    """Why padding is kept."""


class CannotEvaluate(Kept):
    """An op failed, such as one with a size that is not the one given."""


class Evaluation:
    """Values of nodes on the CPU, computed when they are asked for.

    given      values of some nodes
    sizes      values of symbolic sizes; those at compile time by default
    constants  has the values that depend on no input, at the same sizes

    Raises Kept for a value that depends on an input that is not given, or that is random;
    CannotEvaluate if an op fails.
    """

    def __init__(
        self,
        captured: Captured,
        given: Mapping[Node, Any],
        sizes: Sizes | None = None,
        constants: Constants | None = None,
    ) -> None:
        self._captured = captured
        self._sizes = sizes or {}
        self._values = dict(given)
        self._constants = constants

    def __call__(self, node: Node) -> Any:
        if self._constants is not None:
            self._values |= self._constants.read_by(node, self._values)
        missing = ancestors([node], self._values, of_sizes=False)
        order = sorted(n for n in missing if n not in self._values)
        calls = [n for n in order if not self._is_leaf(n)]
        try:
            evaluate(calls, self._values, self._on_cpu)
        except _FAILURES as why:
            failed = next(n for n in calls if n not in self._values)
            raise CannotEvaluate(f"{self._told(failed)} cannot be evaluated: {why}") from why
        return self._values[node]

    def given(self, more: Mapping[Node, Any]) -> Evaluation:
        """The same with more values given, of nodes that nothing computed so far reads."""
        return Evaluation(self._captured, {**self._values, **more}, self._sizes, self._constants)

    def only(self, values: Mapping[Node, Any]) -> Evaluation:
        """The same with only these values given."""
        return Evaluation(self._captured, values, self._sizes)

    def _is_leaf(self, node: Node) -> bool:
        """Parameters, constants and sizes, which are added to the values."""
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            self._values[node] = self._number(value)
        elif node in self._captured.parameters:
            self._values[node] = self._captured.parameters[node].detach().cpu()
        elif node.op == "get_attr":
            held = operator.attrgetter(str(node.target))(self._captured.gm)
            self._values[node] = held.cpu() if isinstance(held, torch.Tensor) else held
        elif node.op == "placeholder":
            if isinstance(value, torch.Tensor):
                raise Kept(f"it depends on {self._told(node)}")
            self._values[node] = value
        elif is_random(node) and not draws_nothing(node):
            raise Kept(f"{self._told(node)} is random")
        else:
            return False
        return True

    def _number(self, value: Any) -> Any:
        expr = value.node.expr
        known = {s: self._sizes[s] for s in expr.free_symbols if s in self._sizes}
        if len(known) < len(expr.free_symbols):
            return hint(value) if isinstance(value, torch.SymInt) else value.node.hint
        return int(expr.xreplace({s: sympy.Integer(n) for s, n in known.items()}))

    def _on_cpu(self, argument: Any) -> Any:
        return torch.device("cpu") if isinstance(argument, torch.device) else argument

    def _told(self, node: Node) -> str:
        return told(self._captured, node)


class Constants(Evaluation):
    """Values that depend on no input, computed once for several evaluations at the same sizes."""

    def __init__(self, captured: Captured, sizes: Sizes | None = None) -> None:
        super().__init__(captured, {}, sizes)
        self._nodes: set[Node] = set()
        for node in captured.gm.graph.nodes:
            if not is_input(captured, node) and self._nodes.issuperset(read_by_value(node)):
                self._nodes.add(node)

    def read_by(self, node: Node, given: Collection[Node]) -> dict[Node, Any]:
        """Those constants that `node` is computed from, and that are not given."""
        missing = ancestors([node], {*given, *self._nodes}, of_sizes=False)
        return {n: self(n) for n in missing & self._nodes if n not in given}


def told(captured: Captured, node: Node) -> str:
    """What a value is, for a message."""
    return described(node, {**captured.inputs, **captured.names})


def inputs_of(captured: Captured, nodes: Iterable[Node], cut: Collection[Node] = ()) -> list[Node]:
    """The model's tensor inputs, without parameters, whose values these are computed from, in
    order."""
    found = ancestors(nodes, cut, of_sizes=False)
    return sorted(n for n in found if n not in cut and is_input(captured, n))


def is_input(captured: Captured, node: Node) -> bool:
    return (
        node.op == "placeholder"
        and node not in captured.parameters
        and is_tensor(node)
        and node.meta["val"].dim() > 0
    )
