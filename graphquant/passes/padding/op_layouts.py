"""How ops carry layouts: ops that compute each token by itself."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from torch.fx import Node

from graphquant._torch import OpOverload
from graphquant.ir.graph import LINEAR, arguments, aten, hints, shape
from graphquant.ir.rows import CASTS, RESHAPES
from graphquant.passes.padding.attention import SOFTMAX, is_pointwise
from graphquant.passes.padding.layouts import Factors, Layout, Layouts, factors, first, letters


def layout_after(of: Layouts, node: Node, x: Node, layout: Layout) -> Layout | None:
    """The layout of a node's result, from that of one input; None if the op computes across
    tokens."""
    if node.target is operator.getitem:
        return layout if x.target in _SPLITS else None
    rule = _rule(node)
    return None if rule is None else rule.after(of, node, x, layout)


def layouts_before(of: Layouts, node: Node, layout: Layout) -> dict[Node, Layout] | None:
    """The layouts of a node's inputs, from that of its result; only inputs with both dims are
    values of tokens. None if the op computes across tokens."""
    if node.target is operator.getitem:
        source = node.all_input_nodes[0]
        return {source: layout} if source.target in _SPLITS else None
    rule = _rule(node)
    inputs = [
        i for i in node.all_input_nodes if isinstance(i.meta.get("val"), (Tensor, list, tuple))
    ]
    return None if rule is None or not inputs else rule.before(of, node, inputs, layout)


class _Rule(ABC):
    """How one kind of op carries layouts: from an input to its result, and back."""

    @abstractmethod
    def after(self, of: Layouts, node: Node, x: Node, layout: Layout) -> Layout | None: ...

    @abstractmethod
    def before(
        self, of: Layouts, node: Node, inputs: list[Node], layout: Layout
    ) -> dict[Node, Layout] | None: ...


class _Reshape(_Rule):
    def after(self, of: Layouts, node: Node, x: Node, layout: Layout) -> Layout | None:
        return of.reshaped(layout, hints(node))

    def before(
        self, of: Layouts, node: Node, inputs: list[Node], layout: Layout
    ) -> dict[Node, Layout] | None:
        found = of.reshaped(layout, hints(inputs[0]))
        return None if found is None else {inputs[0]: found}


class _Pointwise(_Rule):
    def after(self, of: Layouts, node: Node, x: Node, layout: Layout) -> Layout | None:
        result, given = hints(node), hints(x)
        offset = len(result) - len(given)
        made = [factors(n) for n in result]
        for i, dim in enumerate(layout):
            if given[i] == result[i + offset]:
                made[i + offset] = dim
            elif letters([dim]):
                return None
        return tuple(made)

    def before(
        self, of: Layouts, node: Node, inputs: list[Node], layout: Layout
    ) -> dict[Node, Layout] | None:
        result = hints(node)
        found: dict[Node, Layout] = {}
        for i in inputs:
            if node.target in _OF_FIRST and i is not node.args[0]:
                continue  # its dtype or its shape is read
            given = hints(i)
            offset = len(result) - len(given)
            pairs = ((n, k + offset) for k, n in enumerate(given))
            found[i] = tuple(layout[k] if n == result[k] else () for n, k in pairs)
        return found


class _Permute(_Rule):
    def after(self, of: Layouts, node: Node, x: Node, layout: Layout) -> Layout | None:
        return tuple(layout[d] for d in _permutation(node, len(layout)))

    def before(
        self, of: Layouts, node: Node, inputs: list[Node], layout: Layout
    ) -> dict[Node, Layout] | None:
        made: list[Factors] = [()] * len(layout)
        for new, old in enumerate(_permutation(node, len(layout))):
            made[old] = layout[new]
        return {inputs[0]: tuple(made)}


class _Part(_Rule):
    """Slices, splits, concatenations: one dim, which is not of tokens, has another size."""

    def after(self, of: Layouts, node: Node, x: Node, layout: Layout) -> Layout | None:
        d = arguments(node).dim % len(layout)
        if letters([layout[d]]):
            whole = node.target is aten.slice.Tensor and _is_whole(node)
            return layout if whole else None
        size = first(node.meta["val"]).shape[d]
        return (*layout[:d], factors(size), *layout[d + 1 :])

    def before(
        self, of: Layouts, node: Node, inputs: list[Node], layout: Layout
    ) -> dict[Node, Layout] | None:
        d = arguments(node).dim % len(layout)
        if letters([layout[d]]):
            whole = node.target is aten.slice.Tensor and _is_whole(node)
            return {inputs[0]: layout} if whole else None
        return {
            i: (*layout[:d], factors(first(i.meta["val"]).shape[d]), *layout[d + 1 :])
            for i in inputs
        }


class _Drop(_Rule):
    """select and unbind: without one dim, which is not of tokens."""

    def after(self, of: Layouts, node: Node, x: Node, layout: Layout) -> Layout | None:
        d = arguments(node).dim % len(layout)
        return None if letters([layout[d]]) else (*layout[:d], *layout[d + 1 :])

    def before(
        self, of: Layouts, node: Node, inputs: list[Node], layout: Layout
    ) -> dict[Node, Layout] | None:
        sizes = hints(inputs[0])
        d = arguments(node).dim % len(sizes)
        return {inputs[0]: (*layout[:d], factors(sizes[d]), *layout[d:])}


class _Stack(_Rule):
    """With a new dim."""

    def after(self, of: Layouts, node: Node, x: Node, layout: Layout) -> Layout | None:
        sizes = hints(node)
        d = arguments(node).dim % len(sizes)
        return (*layout[:d], factors(sizes[d]), *layout[d:])

    def before(
        self, of: Layouts, node: Node, inputs: list[Node], layout: Layout
    ) -> dict[Node, Layout] | None:
        d = arguments(node).dim % len(layout)
        if letters([layout[d]]):
            return None
        return dict.fromkeys(inputs, (*layout[:d], *layout[d + 1 :]))


class _Product(_Rule):
    """x [..., K] times a weight: rows of x stay rows."""

    def after(self, of: Layouts, node: Node, x: Node, layout: Layout) -> Layout | None:
        if x is not node.args[0] or letters(layout[-1:]):
            return None
        return (*layout[:-1], factors(shape(node)[-1]))

    def before(
        self, of: Layouts, node: Node, inputs: list[Node], layout: Layout
    ) -> dict[Node, Layout] | None:
        if letters(layout[-1:]):
            return None
        x = node.all_input_nodes[0]
        return {x: (*layout[:-1], factors(shape(x)[-1]))}


class _Norm(_Rule):
    """Over the last dims."""

    def after(self, of: Layouts, node: Node, x: Node, layout: Layout) -> Layout | None:
        n = len(arguments(node).normalized_shape)
        return None if x is not node.args[0] or letters(layout[-n:]) else layout

    def before(
        self, of: Layouts, node: Node, inputs: list[Node], layout: Layout
    ) -> dict[Node, Layout] | None:
        n = len(arguments(node).normalized_shape)
        return None if letters(layout[-n:]) else {node.all_input_nodes[0]: layout}


class _BatchNorm(_Rule):
    """With running statistics: each element by itself."""

    def after(self, of: Layouts, node: Node, x: Node, layout: Layout) -> Layout | None:
        fixed = not arguments(node).training and x is node.args[0]
        return layout if fixed and not letters(layout[1:2]) else None

    def before(
        self, of: Layouts, node: Node, inputs: list[Node], layout: Layout
    ) -> dict[Node, Layout] | None:
        fixed = not arguments(node).training and not letters(layout[1:2])
        return {node.all_input_nodes[0]: layout} if fixed else None


class _Embedding(_Rule):
    def after(self, of: Layouts, node: Node, x: Node, layout: Layout) -> Layout | None:
        return (*layout, factors(shape(node)[-1])) if x is node.args[1] else None

    def before(
        self, of: Layouts, node: Node, inputs: list[Node], layout: Layout
    ) -> dict[Node, Layout] | None:
        index = node.args[1]
        assert isinstance(index, Node)
        return None if letters(layout[-1:]) else {index: layout[:-1]}


class _Keep(_Rule):
    """Along one dim, which is not of tokens: softmax, cumsum, flip, glu."""

    def after(self, of: Layouts, node: Node, x: Node, layout: Layout) -> Layout | None:
        dims = _dims(node, len(layout))
        if dims is None or letters([layout[d] for d in dims]):
            return None
        sizes = shape(node)
        return tuple(factors(sizes[d]) if d in dims else f for d, f in enumerate(layout))

    def before(
        self, of: Layouts, node: Node, inputs: list[Node], layout: Layout
    ) -> dict[Node, Layout] | None:
        dims = _dims(node, len(layout))
        if dims is None or letters([layout[d] for d in dims]):
            return None
        sizes = shape(inputs[0])
        return {
            inputs[0]: tuple(factors(sizes[d]) if d in dims else f for d, f in enumerate(layout))
        }


class _Reduce(_Rule):
    """Over dims that are not of tokens: mean, sum, amax."""

    def after(self, of: Layouts, node: Node, x: Node, layout: Layout) -> Layout | None:
        dims = _dims(node, len(layout))
        if dims is None or letters([layout[d] for d in dims]):
            return None
        keep = arguments(node).keepdim
        return tuple(() if d in dims else f for d, f in enumerate(layout) if keep or d not in dims)

    def before(
        self, of: Layouts, node: Node, inputs: list[Node], layout: Layout
    ) -> dict[Node, Layout] | None:
        sizes = hints(inputs[0])
        dims = _dims(node, len(sizes))
        if dims is None:
            return None
        rest = iter(layout)
        keep = arguments(node).keepdim
        made: list[Factors] = []
        for d, n in enumerate(sizes):
            if d not in dims:
                made.append(next(rest))
                continue
            if keep:
                next(rest)
            made.append(factors(n))
        return {inputs[0]: tuple(made)}


_SPLITS = frozenset(
    {
        aten.chunk.default,
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        aten.tensor_split.sections,
        aten.unbind.int,
    }
)
_OF_FIRST = CASTS | {aten.expand_as.default}
_RULES: dict[Any, _Rule] = {
    **dict.fromkeys(RESHAPES, _Reshape()),
    **dict.fromkeys((aten.transpose.int, aten.permute.default), _Permute()),
    **dict.fromkeys(_SPLITS, _Part()),
    aten.slice.Tensor: _Part(),
    aten.cat.default: _Part(),
    aten.select.int: _Drop(),
    aten.unbind.int: _Drop(),
    aten.stack.default: _Stack(),
    LINEAR: _Product(),
    aten.layer_norm.default: _Norm(),
    aten.rms_norm.default: _Norm(),
    aten.batch_norm.default: _BatchNorm(),
    aten.embedding.default: _Embedding(),
    **dict.fromkeys(
        (
            *SOFTMAX,
            aten.log_softmax.int,
            aten.cumsum.default,
            aten.flip.default,
            aten.glu.default,
        ),
        _Keep(),
    ),
    **dict.fromkeys(
        (
            aten.amax.default,
            aten.amin.default,
            aten.any.dim,
            aten.argmax.default,
            aten.linalg_vector_norm.default,
            aten.mean.dim,
            aten.norm.ScalarOpt_dim,
            aten.sum.dim_IntList,
            aten.var.correction,
            aten.var.dim,
        ),
        _Reduce(),
    ),
}
_POINTWISE, _PRODUCT = _Pointwise(), _Product()


def _rule(node: Node) -> _Rule | None:
    if not isinstance(node.target, OpOverload) or not isinstance(
        node.meta.get("val"), (Tensor, list, tuple)
    ):
        return None
    if node.target in _RULES:
        return _RULES[node.target]
    if node.target is aten.matmul.default:
        x, w = node.args
        assert isinstance(x, Node) and isinstance(w, Node)
        return _PRODUCT if len(shape(w)) == 2 and len(shape(x)) >= 2 else None
    return _POINTWISE if is_pointwise(node) else None


def _is_whole(node: Node) -> bool:
    """A slice of all of its dim."""
    a = arguments(node)
    return hints(a.self) == hints(node) and a.step == 1


def _permutation(node: Node, rank: int) -> list[int]:
    if node.target is aten.permute.default:
        return [d % rank for d in arguments(node).dims]
    a = arguments(node)
    dims = list(range(rank))
    i, j = a.dim0 % rank, a.dim1 % rank
    dims[i], dims[j] = dims[j], dims[i]
    return dims


def _dims(node: Node, rank: int) -> list[int] | None:
    """The dims that an op computes along; None for all."""
    a = vars(arguments(node))
    dim = a["dim"] if "dim" in a else a["dims"]
    if dim is None or dim == []:
        return None
    return [d % rank for d in (dim if isinstance(dim, (list, tuple)) else [dim])]
