"""Values of a graph's nodes on small inputs, to prove what masks and readers of padding do."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from graphquant.ir.aliases import writes
from graphquant.ir.captured import Captured
from graphquant.ir.evaluate import call_target, evaluate
from graphquant.ir.graph import (
    ancestors,
    aten,
    described,
    draws_nothing,
    hint,
    hints,
    is_random,
    is_tensor,
    read_by_value,
)
from graphquant.passes.padding.attention import is_pointwise

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
        self._run([n for n in order if not self._is_leaf(n)], self._values)
        return self._values[node]

    def row(self, node: Node, b: int) -> Tensor:
        """Row b of a value, or its only one, [1, ...]. Pointwise ops, whose results can be large,
        are computed for this row alone."""
        if self._constants is not None and node in self._constants:
            return self._constants.row(node, b)
        region = self._pointwise_region(node)
        if not region:
            return _row(self(node), b)
        rank = node.meta["val"].dim()
        values: dict[Node, Any] = {}
        for i in _read_by(region):
            values[i] = self.row(i, b) if has_rows(i, rank) else self(i)
        self._run([n for n in sorted(region) if not self._is_leaf(n)], values, _call_on_row)
        found: Tensor = values[node]
        return found

    def equal_rows(self, node: Node, b: int, c: int) -> bool:
        """Are two rows of a value equal? They are if pointwise ops compute them from equal rows,
        which are often much smaller."""
        rank = node.meta["val"].dim()
        region = self._pointwise_region(node)
        read = (i for i in _read_by(region) if has_rows(i, rank))
        if region and all(self._are_equal(i, b, c) for i in read):
            return True
        return self._are_equal(node, b, c)

    def _are_equal(self, node: Node, b: int, c: int) -> bool:
        one, other = self.row(node, b), self.row(node, c)
        return one is other or torch.equal(one, other)

    def _pointwise_region(self, node: Node) -> set[Node]:
        """The pointwise ops that this value is computed by, back to inputs that are not."""
        found: set[Node] = set()
        edge = [node]
        while edge:
            n = edge.pop()
            if n not in found and self._is_row_by_row(n, node.meta["val"].dim()):
                found.add(n)
                edge += n.all_input_nodes
        return found

    def _is_row_by_row(self, node: Node, rank: int) -> bool:
        """Is each row of this value computed from those of its inputs with as many dims, or from
        all of the others, which have no rows?"""
        return (
            node not in self._values
            and (self._constants is None or node not in self._constants)
            and has_rows(node, rank)
            and is_pointwise(node)
            and not writes(node)
        )

    def _run(
        self,
        calls: Sequence[Node],
        values: dict[Node, Any],
        call: Callable[[Node, tuple[Any, ...], dict[str, Any]], Any] = call_target,
    ) -> None:
        """Add the results of these nodes to the values."""
        try:
            evaluate(calls, values, self._on_cpu, call)
        except _FAILURES as why:
            failed = next(n for n in calls if n not in values)
            raise CannotEvaluate(f"{self._told(failed)} cannot be evaluated: {why}") from why

    def given(self, more: Mapping[Node, Any]) -> Evaluation:
        """The same with more values given, of nodes that nothing computed so far reads."""
        return Evaluation(self._captured, {**self._values, **more}, self._sizes, self._constants)

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
        known = {s: sympy.Integer(self._sizes[s]) for s in expr.free_symbols if s in self._sizes}
        if not known:
            return hint(value) if isinstance(value, torch.SymInt) else value.node.hint
        if len(known) < len(expr.free_symbols):
            raise Kept(f"{expr} mixes other numbers with batch and length")
        number = expr.xreplace(known)
        return int(number) if isinstance(value, torch.SymInt) else float(number)

    def _on_cpu(self, argument: Any) -> Any:
        return torch.device("cpu") if isinstance(argument, torch.device) else argument

    def _told(self, node: Node) -> str:
        return told(self._captured, node)


class Constants(Evaluation):
    """Values that depend on no input, computed once for several evaluations at the same sizes."""

    def __init__(self, captured: Captured, sizes: Sizes | None = None) -> None:
        super().__init__(captured, {}, sizes)
        self._nodes: set[Node] = set()
        self._rows: dict[Node, Tensor] = {}
        for node in captured.gm.graph.nodes:
            if not _is_given(captured, node) and self._nodes.issuperset(read_by_value(node)):
                self._nodes.add(node)

    def __contains__(self, node: Node) -> bool:
        return node in self._nodes

    def row(self, node: Node, b: int) -> Tensor:
        """One row of a bias that is expanded to all sentences is computed, and no copy for each."""
        if node not in self._rows:
            region = self._pointwise_region(node)
            rank = node.meta["val"].dim()
            expanded = region and not any(has_rows(i, rank) for i in _read_by(region))
            self._rows[node] = super().row(node, 0) if expanded else self(node)
        return _row(self._rows[node], b)

    def read_by(self, node: Node, given: Collection[Node]) -> dict[Node, Any]:
        """Those constants that `node` is computed from, and that are not given."""
        missing = ancestors([node], {*given, *self._nodes}, of_sizes=False)
        return {n: self(n) for n in missing & self._nodes if n not in given}


def has_rows(node: Node, rank: int) -> bool:
    """Has this operand of a pointwise op, whose result has `rank` dims, a row for each of those?"""
    return is_tensor(node) and 0 < len(hints(node)) == rank and hints(node)[0] != 1


def _row(value: Tensor, b: int) -> Tensor:
    return value[b : b + 1] if value.shape[0] > 1 else value


def _read_by(region: set[Node]) -> list[Node]:
    """What a region is computed from, in order."""
    return sorted({i for n in region for i in n.all_input_nodes} - region)


def _call_on_row(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.target is aten.expand.default:  # the only pointwise op that is told a size
        x, (_, *others) = args
        args = (x, [1, *others])
    return call_target(node, args, kwargs)


def told(captured: Captured, node: Node) -> str:
    """What a value is, for a message."""
    return described(node, {**captured.inputs, **captured.names})


def inputs_of(captured: Captured, nodes: Iterable[Node], cut: Collection[Node] = ()) -> list[Node]:
    """The model's tensor inputs, without parameters, whose values these are computed from, in
    order."""
    found = ancestors(nodes, cut, of_sizes=False)
    return sorted(n for n in found if n not in cut and is_input(captured, n))


def is_input(captured: Captured, node: Node) -> bool:
    return _is_given(captured, node) and node.meta["val"].dim() > 0


def _is_given(captured: Captured, node: Node) -> bool:
    """Is it a tensor of a call, or a Python float in one?"""
    return node.op == "placeholder" and node not in captured.parameters and is_tensor(node)
