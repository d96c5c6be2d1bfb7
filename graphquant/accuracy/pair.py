"""Pair: one captured graph in float and in int8, run node by node to compare their linears.

    y   the float model's  linear(x, W, bias), times the layer scale if a rule has folded one in
    y8  the same from int8_linear, before the residual of its epilogue; local y8 in y's dtype

    local        y8 on the float model's values: the quantizer, with what is fused into it, runs on
                 them as in the int8 graph
    accumulated  y8 as the int8 graph computes it

`run_mixed` runs any subset of the linears in int8: there y8 replaces y in the float graph.

This is independent of the rules: `Rewritten.replaces` maps nodes of the rewritten graph to the
model's values, and all others, such as quantizers and packed weights, are computed from those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from graphquant.config import Config
from graphquant.errors import RuleError
from graphquant.ir.captured import Captured
from graphquant.ir.constants import Constants
from graphquant.ir.evaluate import evaluate
from graphquant.ir.graph import LITERAL, arguments, calls, with_arguments
from graphquant.ir.interpret import Caller, ObservingInterpreter, Paths
from graphquant.ir.tokens import Masks, TokenRows
from graphquant.ops import int8_linear
from graphquant.ops.token_index.op import exact_rows
from graphquant.passes.attention.dtype import with_bfloat16_attention
from graphquant.passes.attention.on_cpu import choose_attention
from graphquant.passes.pipeline import prepare, rewrite
from graphquant.report import Outcome


@dataclass(frozen=True)
class _Part:
    """One of the linears that an int8_linear computes.

    outcome  its outcome in the report
    node     the linear in the float graph
    caller   its path, and the index of the graph's input that is its weight
    value    the float graph's node with its result
    columns  its columns of the int8_linear's result
    """

    outcome: Outcome
    node: Node
    caller: Caller
    value: Node
    columns: slice


@dataclass(frozen=True)
class _Product:
    """An int8_linear of the rewritten graph, and the linears that it computes.

    first   the first of them in the float graph, where their input is available
    given   nodes of the int8 graph -> the float graph's node with the same value
    inner   the nodes that compute the local result from `given`, in graph order
    dtype   of the float results; in the int8 graph, q, k and v may be bfloat16
    """

    node: Node
    first: Node
    dtype: torch.dtype
    given: Mapping[Node, Node]
    inner: tuple[Node, ...]
    parts: tuple[_Part, ...]

    @cached_property  # asked for at every node of a run
    def leaves(self) -> frozenset[Node]:
        return frozenset(self.given.values())


class Pair:
    """A captured graph in float and in int8. Rewrites `captured` in place.

    paths  the module paths of the captured model
    """

    def __init__(self, captured: Captured, config: Config, paths: Paths) -> None:
        # before the copy, in which linears have the same names; without padding if asked to
        # each in a row of its own, whatever the mode: what is behind the tokens is no result
        notes = prepare(captured, replace(config, mode=None, inductor={}))
        copies: dict[Node, Node] = {}
        graph = Graph()
        graph.output(graph.graph_copy(captured.gm.graph, copies))
        self._float = GraphModule(captured.gm, graph)
        self._names = {old.name: new for old, new in copies.items()}
        self._inputs = {n: i for i, n in enumerate(graph.find_nodes(op="placeholder"))}
        self._constants = Constants(copies[n] for n in captured.parameters)
        given = captured.gm.graph.find_nodes(op="placeholder")
        self._roots = {
            i: (captured.names[n], captured.parameters[n])
            for i, n in enumerate(given)
            if n in captured.parameters
        }
        self._paths = paths
        self._rewritten = rewrite(captured, config, notes)
        self._int8 = captured.gm
        self._weights = Constants(captured.parameters)
        self._packed: dict[tuple[Node, tuple[int, ...]], dict[Node, Any]] = {}
        self._products = list(self._find_products())
        self.report = with_bfloat16_attention(self._rewritten.report, captured, config)
        choose_attention(captured, config)
        parts = (part for product in self._products for part in product.parts)
        self._parts = sorted(parts, key=lambda part: part.node)

    def _find_products(self) -> Iterator[_Product]:
        for node in calls(self._int8.graph, lambda n: n.target is int8_linear.target):
            start, parts = 0, []
            for outcome, value in self._rewritten.linears[node]:
                linear = self._names[outcome.node]
                root = self._constants.roots_of(arguments(linear).weight)[0]
                columns = slice(start, start := start + outcome.N)
                name, weight = self._roots[self._inputs[root]]
                caller = Caller(outcome.path, name, weight, self._inputs[root])
                parts.append(_Part(outcome, linear, caller, self._names[value], columns))
            first = min(part.node for part in parts)
            dtype = arguments(node).dtype
            yield _Product(node, first, dtype, *self._local_subgraph(node), tuple(parts))

    def _float_node(self, node: Node) -> Node | None:
        """The float graph's node with the same value; unchanged nodes have the same name.

        None for values computed from parameters: the float graph may compute those later, such as a
        layer scale behind the linear.
        """
        found = self._names.get(self._rewritten.replaces.get(node, node.name))
        computed = found in self._constants and found not in self._constants.roots
        return None if computed else found

    def _local_subgraph(self, product: Node) -> tuple[dict[Node, Node], tuple[Node, ...]]:
        """`given` and `inner` of a _Product."""
        given: dict[Node, Node] = {}
        inner = [product]
        for node in inner:
            read: Sequence[Any] = node.all_input_nodes
            if node is product:
                read = with_arguments(node, residual=None)
            for i in (a for a in read if isinstance(a, Node)):
                if (leaf := self._float_node(i)) is not None:
                    given[i] = leaf
                elif i.target is int8_linear.target:
                    raise RuleError(f"{i.name}, in front of {product.name}, has no float value")
                elif i not in inner:
                    inner.append(i)
        return given, tuple(sorted(inner[1:]))

    def _local(
        self, product: _Product, known: Mapping[Node, Any], layer: tuple[int, ...]
    ) -> Tensor:
        """The int8_linear's result on values of the float model.

        layer  ids of the weights that the graph runs with: the key of the cached packed weights
        """
        values = {node: known[leaf] for node, leaf in product.given.items()}
        values |= {n: n.meta[LITERAL] for n in product.inner if LITERAL in n.meta}
        inner = [n for n in product.inner if n not in values]
        fixed = {n: None for n in inner if n in self._weights}
        if (product.node, layer) not in self._packed:
            made = evaluate(fixed, dict(values))
            read = [n for n in fixed if not fixed.keys() >= n.users.keys()]
            self._packed[product.node, layer] = {n: made[n] for n in read}
        values |= self._packed[product.node, layer]
        evaluate((n for n in inner if n not in fixed), values)
        return _multiply(product.node, product.dtype, values.__getitem__)

    @property
    def products(self) -> list[tuple[Outcome, ...]]:
        """The linears of each int8_linear, with their paths in the graph."""
        return [tuple(part.outcome for part in product.parts) for product in self._products]

    def linears(self, args: Sequence[Any]) -> list[Outcome]:
        """The int8 linears in the float graph's order, with the paths of the layers whose weights
        are among these arguments."""
        return [self._named(part, args) for part in self._parts]

    def _named(self, part: _Part, args: Sequence[Any]) -> Outcome:
        return replace(part.outcome, path=self._paths.of(part.caller, args)[0])

    def run_float(
        self,
        args: Sequence[Any],
        found: Callable[[int, Tensor, Tensor, Tensor | None], None],
        masks: Masks,
    ) -> Any:
        """Run the float graph. Calls found(i, y, local y8, rows) for the i-th of `linears`, with
        rows [...] bool, True for those of y that are tokens by these masks; None if all count."""
        return self._run(args, self._products, found, masks)

    def run_mixed(self, args: Sequence[Any], int8: Callable[[Outcome], bool]) -> Any:
        """Run the float graph with the linears in int8 for which int8(outcome) is true. Stacked
        siblings may differ."""
        chosen = {i for i, part in enumerate(self._parts) if int8(part.outcome)}
        parts = {self._parts[i].node for i in chosen}
        products = [p for p in self._products if any(part.node in parts for part in p.parts)]

        def instead(i: int, y: Tensor, y8: Tensor, rows: Tensor | None) -> Tensor | None:
            return y8.clone() if i in chosen else None

        return self._run(args, products, instead, Masks())

    @exact_rows()
    def _run(
        self,
        args: Sequence[Any],
        products: Sequence[_Product],
        found: Callable[[int, Tensor, Tensor, Tensor | None], Tensor | None],
        masks: Masks,
    ) -> Any:
        """Run the float graph. What found(i, y, y8, rows) returns, if not None, replaces y."""
        to_come = list(products)
        layer = tuple(id(args[self._inputs[root]]) for root in self._constants.roots)
        known: dict[Node, Any] = {}  # leaves, until their last product
        # y8 and the rows of tokens, until y is computed
        made: dict[Node, list[tuple[_Part, Tensor, Tensor | None]]] = {}
        tokens = TokenRows(masks)

        def after(node: Node, value: Any, env: Mapping[Node, Any]) -> Tensor | None:
            tokens.after(node, value, env)
            for product in [p for p in to_come if p.first is node]:
                y8 = self._local(product, known, layer)
                x = arguments(node).input
                rows = tokens.of(x, env[x])
                if rows is not None and rows.shape != y8.shape[:-1]:
                    rows = None
                for part in product.parts:
                    made.setdefault(part.value, []).append((part, y8[..., part.columns], rows))
                to_come.remove(product)
                for leaf in product.leaves:
                    if not any(leaf in p.leaves for p in to_come):
                        del known[leaf]
            instead = None
            for part, y8, rows in made.pop(node, ()):
                instead = found(self._parts.index(part), value, y8, rows)
            if any(node in p.leaves for p in to_come):
                known[node] = value if instead is None else instead
            return instead

        return ObservingInterpreter(self._float, after).run(*args)

    @exact_rows()
    def run_int8(self, args: Sequence[Any], found: Callable[[int, Tensor], None]) -> Any:
        """Run the int8 graph. Calls found(i, y8) for the i-th of `linears`."""
        products = {p.node: p for p in self._products}

        def after(node: Node, value: Any, env: Mapping[Node, Any]) -> None:
            if (product := products.get(node)) is not None:
                y8 = value
                if arguments(node).residual is not None:
                    y8 = _multiply(node, product.dtype, env.__getitem__)
                for part in product.parts:
                    found(self._parts.index(part), y8[..., part.columns])

        return ObservingInterpreter(self._int8, after).run(*args)


def _multiply(product: Node, dtype: torch.dtype, value: Callable[[Node], Any]) -> Tensor:
    """int8_linear without its residual, on values of its arguments, as `dtype`."""
    args = with_arguments(product, residual=None, dtype=dtype)
    y8: Tensor = int8_linear(*map_arg(args, value))
    return y8
