"""Turns products with a parameter into `aten.linear`.

    einsum("bsd,dhk->bshk", x, W), tensordot, inner, x @ W with W [H, K, N] and one x for all H
    addmm(b, x, W, beta=, alpha=)
    a 1x1 convolution of a channels-last value, such as transposed tokens

A product stays if W differs by batch or head, if the contracted dim of x does not have stride 1, or
if a further sum remains. The result keeps the model's memory layout.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from graphquant._torch import FakeTensorMode, statically_known_true
from graphquant.ir.constants import Constants
from graphquant.ir.graph import (
    LINEAR,
    aten,
    calls,
    dtype,
    fake_result,
    full_args,
    hint,
    is_call,
    shape,
)

Labels = Sequence[object]  # one for each dim, as in einsum

CONVOLUTIONS = {
    getattr(getattr(aten, f"conv{n}d"), kind) for n in (1, 2, 3) for kind in ("default", "padding")
}


def to_linears(
    graph: Graph, fake_mode: FakeTensorMode, constants: Constants, needs_grad: Collection[Node]
) -> None:
    """needs_grad: nodes whose result can need a gradient; convolutions among them stay."""
    for node in calls(graph, lambda n: n.target in (aten.mm.default, aten.matmul.default)):
        _matmul(graph, fake_mode, constants, node)
    for node in calls(graph, lambda n: n.target is aten.addmm.default):
        _addmm(graph, fake_mode, constants, node)
    for node in calls(graph, lambda n: n.target is aten.einsum.default):
        _einsum(graph, fake_mode, constants, node)
    for node in calls(graph, lambda n: n.target in (aten.tensordot.default, aten.inner.default)):
        _tensordot(graph, fake_mode, constants, node)
    for node in calls(graph, lambda n: n.target in CONVOLUTIONS and n not in needs_grad):
        _convolution(graph, fake_mode, constants, node)


class _Builder:
    """Adds calls with fake values in front of a node, and replaces it."""

    def __init__(self, graph: Graph, fake_mode: FakeTensorMode, node: Node) -> None:
        self._graph, self._fake_mode, self._node = graph, fake_mode, node
        self._made: list[Node] = []

    def __call__(self, target: Any, *args: Any) -> Node:
        with self._graph.inserting_before(self._node):
            made = self._graph.call_function(target, args)
        value = fake_result(self._fake_mode, target, args, {})
        if target is LINEAR:  # the model's dtype, also under autocast
            value = value.to(dtype(self._node))
        made.meta = {**self._node.meta, "val": value}
        self._made.append(made)
        return made

    def sizes(self, node: Node, dims: Sequence[int]) -> list[Any]:
        """The sizes of these dims: ints, or sym_size nodes where dynamic."""
        size = shape(node)
        return [
            size[d] if isinstance(size[d], int) else self(aten.sym_size.int, node, d) for d in dims
        ]

    def replace(self, new: Node) -> None:
        """Replace the node by `new`, permuted to its layout; give up if no permutation matches."""
        if not _same_layout(new, self._node):
            strides = [hint(s) for s in self._node.meta["val"].stride()]
            order = sorted(range(len(strides)), key=lambda d: -strides[d])
            new = self(aten.contiguous.default, self(aten.permute.default, new, order))
            new = self(aten.permute.default, new, [order.index(d) for d in range(len(order))])
        if not _same_layout(new, self._node):
            return self.give_up()
        self._node.replace_all_uses_with(new)
        self._graph.erase_node(self._node)

    def give_up(self) -> None:
        for node in reversed(self._made):
            self._graph.erase_node(node)


def _same_layout(a: Node, b: Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return (x.dtype, x.dim()) == (y.dtype, y.dim()) and all(
        statically_known_true(n == m)
        and (statically_known_true(n == 1) or statically_known_true(s == t))
        for n, m, s, t in zip(x.shape, y.shape, x.stride(), y.stride(), strict=True)
    )


def _matmul(graph: Graph, fake_mode: FakeTensorMode, constants: Constants, node: Node) -> None:
    x, weight = full_args(node)
    if not _has_weight(constants, node, x, weight) or not shape(x)[:-1] or len(shape(weight)) < 2:
        return
    if len(shape(weight)) == 2:
        _to_linear(graph, node, x, weight, None)
        return
    make, size = _Builder(graph, fake_mode, node), shape(x)
    heads = len(shape(weight)) - 2
    beside = size[:-2][-heads:]  # the dims of x that broadcast against the heads
    if not all(statically_known_true(n == 1) for n in beside):
        return  # each batch has a matrix of its own
    first = len(size) - 2 - len(beside)
    for _ in beside:
        x = make(aten.squeeze.dim, x, first)
    names, own = [f"b{i}" for i in range(first)], [f"h{i}" for i in range(heads)]
    _contract(make, x, weight, [*names, "m", "k"], [*own, "k", "n"], [*names, *own, "m", "n"])


def _addmm(graph: Graph, fake_mode: FakeTensorMode, constants: Constants, node: Node) -> None:
    bias, x, weight, beta, alpha = full_args(node)
    if not _has_weight(constants, node, x, weight) or not _is_exact(dtype(weight), alpha, beta):
        return
    if beta != 0 and (not constants.is_fixed(bias) or shape(bias) != shape(weight)[1:]):
        return
    make = _Builder(graph, fake_mode, node)
    if alpha != 1:
        weight = make(aten.mul.Tensor, weight, alpha)
    if beta not in (0, 1):
        bias = make(aten.mul.Tensor, bias, beta)
    _to_linear(graph, node, x, weight, None if beta == 0 else bias)


def _is_exact(kind: torch.dtype, *factors: Any) -> bool:
    """May these factors move from the product onto a weight of this dtype without more rounding?"""
    if not all(isinstance(f, (int, float)) for f in factors):
        return False
    return kind in (torch.float32, torch.float64) or all(
        f == 0 or abs(math.frexp(f)[0]) == 0.5 for f in factors
    )


def _einsum(graph: Graph, fake_mode: FakeTensorMode, constants: Constants, node: Node) -> None:
    equation, operands, *_ = full_args(node)
    if len(operands) != 2:
        return
    left, arrow, right = equation.replace(" ", "").replace("...", ".").partition("->")
    terms = left.split(",")
    given = [_labels(t, len(shape(v))) for t, v in zip(terms, operands, strict=True)]
    rest = [n for labels in given for n in labels if isinstance(n, int)]
    if not arrow:  # labels that occur once, in alphabetical order
        right = "." + "".join(sorted(c for c in {*left} - {*".,"} if left.count(c) == 1))
    result = [n for c in right for n in (rest if c == "." else c)]
    pairs = zip(operands, given, strict=True)
    (x, names), (weight, own) = sorted(pairs, key=lambda p: p[0] in constants)
    if any(isinstance(n, int) for n in own) or not _has_weight(constants, node, x, weight):
        return
    _contract(_Builder(graph, fake_mode, node), x, weight, names, own, result)


def _labels(text: str, dims: int) -> Labels:
    """A label for each dim: letters, and ints for the dims of an ellipsis."""
    rest = range(dims - len(text.replace(".", "")))
    return [n for c in text for n in (rest if c == "." else c)]


def _tensordot(graph: Graph, fake_mode: FakeTensorMode, constants: Constants, node: Node) -> None:
    operands: list[Node] = list(full_args(node)[:2])
    counts = [len(shape(v)) for v in operands]
    dims = [[-1], [-1]] if node.target is aten.inner.default else full_args(node)[2:4]
    if 0 in counts or len(dims[0]) != len(dims[1]) or len(dims[0]) == 0:
        return
    names: list[list[object]] = [[f"{i} {d}" for d in range(n)] for i, n in enumerate(counts)]
    for i, pair in enumerate(zip(*dims, strict=True)):
        for own, d in zip(names, pair, strict=True):
            own[d] = i
    result = [n for own in names for n in own if not isinstance(n, int)]
    pairs = zip(operands, names, strict=True)
    (x, labels), (weight, own) = sorted(pairs, key=lambda p: p[0] in constants)
    if _has_weight(constants, node, x, weight):
        _contract(_Builder(graph, fake_mode, node), x, weight, labels, own, result)


def _convolution(graph: Graph, fake_mode: FakeTensorMode, constants: Constants, node: Node) -> None:
    x, weight, bias, stride, padding, _, groups = full_args(node)
    if (
        not _has_weight(constants, node, x, weight)
        or not (bias is None or constants.is_fixed(bias))
        or len(shape(x)) != len(shape(weight))  # no batch
        or any(n != 1 for n in (*shape(weight)[2:], *stride, groups))
        or not (isinstance(padding, str) or not any(padding))
    ):
        return
    pixels = [f"p{i}" for i in range(len(shape(x)) - 2)]
    make = _Builder(graph, fake_mode, node)
    weight = make(aten.reshape.default, weight, list(shape(weight)[:2]))
    _contract(make, x, weight, ["b", "k", *pixels], ["n", "k"], ["b", "n", *pixels], bias)


def _has_weight(constants: Constants, node: Node, x: Node, weight: Node) -> bool:
    return (
        weight in constants
        and not constants.is_fixed(x)
        and dtype(node).is_floating_point
        and dtype(x).is_floating_point
    )


def _contract(
    make: _Builder,
    x: Node,
    weight: Node,
    names: Labels,
    own: Labels,
    result: Labels,
    bias: Node | None = None,
) -> None:
    """Replace the einsum x[names], weight[own] -> result by a linear, if it is one."""
    summed = [n for n in names if n in own]
    rows, columns = ([n for n in result if n in of and n not in summed] for of in (names, own))
    plain = all(len(set(of)) == len(of) for of in (names, own, result))
    whole = {*names, *own} - {*summed} == {*result}
    if not (plain and whole and summed and rows and columns):
        return make.give_up()
    last = names.index(summed[-1])
    if not statically_known_true(x.meta["val"].stride()[last] == 1):
        return make.give_up()  # the int8 linear reads rows with stride 1
    if not all(isinstance(n, int) for n in shape(weight)):
        return make.give_up()
    sizes = dict(zip(own, shape(weight), strict=True))
    if any(
        not statically_known_true(size == sizes[n])
        for n, size in zip(names, shape(x), strict=True)
        if n in sizes
    ):
        return make.give_up()  # a size of 1 is broadcast
    K, N = (math.prod(sizes[n] for n in labels) for labels in (summed, columns))
    lead = make.sizes(x, [names.index(n) for n in rows])
    x = _permuted(make, x, names, [*rows, *summed])
    if len(summed) > 1:
        x = make(aten.reshape.default, x, [*lead, K])
    weight = _permuted(make, weight, own, [*columns, *summed])
    if len(columns) > 1 or len(summed) > 1:
        weight = make(aten.reshape.default, weight, [N, K])
    y = make(LINEAR, x, weight, bias)
    if len(columns) > 1:
        y = make(aten.reshape.default, y, [*lead, *(sizes[n] for n in columns)])
    make.replace(_permuted(make, y, [*rows, *columns], result))


def _permuted(make: _Builder, value: Node, names: Labels, order: Labels) -> Node:
    if list(names) == list(order):
        return value
    return make(aten.permute.default, value, [list(names).index(n) for n in order])


def _to_linear(graph: Graph, node: Node, x: Node, weight: Node, bias: Node | None) -> None:
    with graph.inserting_before(node):
        if is_call(weight, aten.t.default):
            transposed = weight.all_input_nodes[0]
        else:
            transposed = graph.call_function(aten.t.default, (weight,))
            transposed.meta["val"] = weight.meta["val"].t()
        linear = graph.call_function(LINEAR, (x, transposed, bias))
    linear.meta.update(node.meta)
    node.replace_all_uses_with(linear)
    graph.erase_node(node)
