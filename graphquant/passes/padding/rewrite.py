"""Computes a graph for tokens only, in place.

A packed value keeps its rank: sentences become one, of all tokens. [B, S, H] is [1, T, H] then,
and [B, h, S, d] is [1, h, T, d], so that the dims of permute, cat and softmax stay as they are, and
only the sizes of views change, to -1 for T.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from graphquant._torch import FakeTensorMode, allow_unbacked_sizes
from graphquant.ir.aliases import same_layout
from graphquant.ir.captured import Captured
from graphquant.ir.contexts import regions, sets_state
from graphquant.ir.graph import (
    LINEAR,
    ancestors,
    aten,
    drop_dead_code,
    fake_result,
    set_hint,
    shape,
)
from graphquant.ir.rows import SIZED_VIEWS
from graphquant.ops import token_index, varlen_attention
from graphquant.passes.layout import EAGER
from graphquant.passes.padding.attention import Attention
from graphquant.passes.padding.layouts import (
    BATCH,
    LENGTH,
    Factors,
    Layout,
    dim_of,
    is_of_tokens,
    letters,
    packed_sizes,
)
from graphquant.passes.padding.masks import Form, PaddingMask
from graphquant.passes.padding.plan import Plan, letters_of, rows_dim

BOTH = BATCH + LENGTH  # one dim of all tokens
PACKED = "graphquant_packed"  # meta of a gather or an attention: the token_index
TOKENS = "graphquant_tokens"  # meta of a token_index: how many there were at compile time
SCATTERED = "graphquant_scattered"  # meta of the index that pads a value again
# Slow to trace. They return a new tensor, whose sizes and strides follow from those of their inputs
_TRACED_ONCE = frozenset({LINEAR, aten.layer_norm.default, varlen_attention.target})


def pack_tokens(captured: Captured, plan: Plan, tokens: int, *, front: bool) -> None:
    """Rewrite the graph as planned.

    tokens  how many there are at compile time
    front   keep B * S rows, tokens first; else there are T of them, a size that depends on data
    """
    with allow_unbacked_sizes(captured.fake_mode):
        _Rewrite(captured, plan, tokens, front=front).run()


class _Rewrite:
    def __init__(self, captured: Captured, plan: Plan, tokens: int, *, front: bool) -> None:
        self._captured, self._plan = captured, plan
        self._graph: Graph = captured.gm.graph
        self._now: dict[Node, Node] = {}  # packed node of the model -> that of the new graph
        self._gathered: dict[Any, Node] = {}
        self._infer = _FakeResults(captured.fake_mode)
        self._tokens = _Tokens(captured, self._infer, plan.mask, tokens, front=front)

    def run(self) -> None:
        old = {n: n.meta["val"] for n in self._plan.packed}
        autocast = {n: region.autocast for n, region in regions(self._graph)}
        for node in sorted(self._plan.packed):
            with self._graph.inserting_before(node), ExitStack() as entered:
                for args in autocast[node]:
                    entered.enter_context(torch.autocast(*args))
                self._pack(node)
        for node, readers in self._plan.exits.items():
            now = self._now[node]
            with self._graph.inserting_after(now):
                padded = self._tokens.scatter(now, self._plan.layouts[node])
            padded.meta |= {k: v for k, v in node.meta.items() if k not in ("val", PACKED)}
            if not same_layout(padded.meta["val"], old[node]):
                padded.meta[EAGER] = old[node]  # restored where it is visible
            for reader in readers:
                reader.replace_input_with(node, padded)
        drop_dead_code(self._graph)

    def _pack(self, node: Node) -> None:
        if node in self._plan.attentions:
            self._pack_attention(node, *self._plan.attentions[node])
            return
        layout = self._plan.layouts[node]
        inputs = {
            i: self._operand(i, given, layout) for i, given in self._plan.operands[node].items()
        }
        target = node.target
        first = node.args[0]
        assert isinstance(first, (Node, list, tuple))
        if target in SIZED_VIEWS or target is aten.unflatten.int:
            assert isinstance(first, Node)
            node.target = aten.reshape.default
            node.args, node.kwargs = (inputs[first], packed_sizes(layout)), {}
        elif target in (aten.expand.default, aten.expand_as.default):
            assert isinstance(first, Node)
            node.target = aten.expand.default
            node.args, node.kwargs = (inputs[first], _expanded_sizes(layout)), {}
        elif target is aten.slice.Tensor and letters([layout[_dim(node, layout)]]):
            assert isinstance(first, Node)  # a slice of all tokens
            node.target, node.args, node.kwargs = aten.alias.default, (inputs[first],), {}
        else:
            node.args, node.kwargs = map_arg(
                (node.args, node.kwargs), lambda i: inputs.get(i, self._now.get(i, i))
            )
        self._infer(node)
        self._now[node] = node

    def _pack_attention(self, node: Node, attention: Attention, form: Form) -> None:
        q, k, v = (
            self._operand(i, self._plan.layouts[i], self._plan.layouts[i])
            for i in (attention.q, attention.k, attention.v)
        )
        if attention.k_transposed:
            k = self._tokens.call(aten.transpose.int, k, -1, -2)
        bias = form.bias
        while bias is not None and len(shape(bias)) < 4:
            bias = self._tokens.call(aten.unsqueeze.default, bias, 0)
        if bias is not None and shape(bias)[0] != 1:  # the same for all sentences
            bias = self._tokens.call(aten.slice.Tensor, bias, 0, 0, 1)
        made = self._tokens.attention(q, k, v, form, bias)
        made.meta |= {k: v for k, v in node.meta.items() if k != "val"}
        made.meta[PACKED] = self._tokens.index
        value = made.meta["val"]
        if value.dtype != node.meta["val"].dtype:
            made = self._tokens.call(aten.to.dtype, made, node.meta["val"].dtype)
        self._now[node] = made

    def _operand(self, i: Node, given: Layout, layout: Layout) -> Node:
        """The input as a packed node reads it."""
        if i in self._now:
            return self._now[i]
        there = letters_of(given, self._plan.sizes)
        if not there and i not in self._plan.entries:
            return i
        rows = rows_dim(given, layout) if there == {BATCH} else None
        how: tuple[Any, ...]
        if is_of_tokens(given) and i in self._plan.entries:
            how = self._tokens.gather, i, given
        elif rows is not None:
            how = self._tokens.gather_rows, i, *rows
        else:
            how = self._tokens.gather_positions, i, dim_of(given, LENGTH)
        if how not in self._gathered:
            with self._graph.inserting_after(self._tokens.after(i)):
                self._gathered[how] = how[0](*how[1:])
        return self._gathered[how]


class _Tokens:
    """Adds the index of the tokens to a graph, and what reads it.

    Each node is added behind the one before: `call` inserts where the graph inserts.
    """

    def __init__(
        self,
        captured: Captured,
        infer: Callable[[Node], None],
        mask: PaddingMask,
        tokens: int,
        *,
        front: bool,
    ) -> None:
        self._infer = infer
        self._graph: Graph = captured.gm.graph
        with self._graph.inserting_after(self._hoist(mask.node)):
            compare = aten.eq.Scalar if mask.inverted else aten.ne.Scalar
            self._valid = self.call(compare, mask.node, 0)
            self.index = self.call(token_index.target, self._valid, front)
            self.index.meta[TOKENS] = max(tokens, 1)
            parts = [self.call(operator.getitem, self.index, i) for i in range(5)]
            self._index, slot, self._position, self._ends, self._tiles = parts
            if not front:
                set_hint(self._index.meta["val"].shape[0], max(tokens, 1))
            self._last = self._slot = self.call(aten.view_as.default, slot, self._valid)
            self._max_length: Any = shape(mask.node)[1]
            if isinstance(self._max_length, torch.SymInt):
                self._last = self._max_length = self.call(aten.sym_size.int, self._valid, 1)
        self._row: Node | None = None

    def _hoist(self, mask: Node) -> Node:
        """Compute the mask as early as possible: embeddings may come before. Returns it, or the
        last of the inputs."""
        first = next(n for n in self._graph.nodes if n.op == "call_function")
        for node in sorted(ancestors([mask])):
            if node.op == "call_function" and node > first and not sets_state(node):
                first.prepend(node)
        inputs = [n for n in self._graph.nodes if n.op == "placeholder"]
        return mask if mask > inputs[-1] else inputs[-1]

    def after(self, node: Node) -> Node:
        """Where a node can be inserted that reads this one and the index."""
        return max(node, self._last)

    def call(self, target: Any, *args: Any) -> Node:
        node = self._graph.call_function(target, args)
        self._infer(node)
        self._graph.inserting_after(node)
        return node

    def attention(self, q: Node, k: Node, v: Node, form: Form, bias: Node | None) -> Node:
        index = (self._ends, self._position, self._tiles)
        args = (q, k, v, *index, form.scale, self._max_length, form.causal, form.window, bias)
        return self.call(varlen_attention.target, *args)

    def gather(self, x: Node, layout: Layout) -> Node:
        """A padded value packed."""
        units, x = self._unfolded(x, layout)
        if BOTH in units:
            d = units.index(BOTH)
            made = self.call(aten.index_select.default, x, d, self._index)
        else:
            order = _tokens_first(units)
            x = self._permuted(x, order)
            x = self.call(aten.flatten.using_ints, x, 0, 1)
            x = self.call(aten.index_select.default, x, 0, self._index)
            x = self.call(aten.unsqueeze.default, x, 0)
            made = self._permuted(x, _inverse(order))
        made.meta[PACKED] = self.index
        return self._folded(made, layout)

    def gather_positions(self, x: Node, dim: int) -> Node:
        """A value for each position, for each token."""
        made = self.call(aten.index_select.default, x, dim, self._position)
        made.meta[PACKED] = self.index
        return made

    def gather_rows(self, x: Node, b: int, s: int) -> Node:
        """A value for each sentence, for each token."""
        if self._row is None:
            with self._graph.inserting_after(self._last):
                ones = self.call(aten.to.dtype, self._valid, torch.int64)
                ones = self.call(aten.ones_like.default, ones)
                row = self.call(aten.cumsum.default, ones, 0)
                row = self.call(aten.sub.Scalar, row, 1)
                row = self.call(aten.flatten.using_ints, row, 0, 1)
                self._row = self._last = self.call(aten.index_select.default, row, 0, self._index)
            self._graph.inserting_after(max(x, self._row))
        x = self.call(aten.index_select.default, x, b, self._row)
        made = self.call(aten.transpose.int, x, b, s)
        made.meta[PACKED] = self.index
        return made

    def scatter(self, x: Node, layout: Layout) -> Node:
        """A packed value padded again, zero at padding."""
        units, x = self._unfolded(x, layout, packed=True)
        if BOTH in units:
            d = units.index(BOTH)
            order = [d, *(i for i in range(len(units)) if i != d)]
            x = self._permuted(x, order)
        else:
            order = _tokens_first(units)
            x = self._permuted(x, order)
            x = self.call(aten.squeeze.dim, x, 0)
        x = self.call(aten.index.Tensor, x, [self._slot])  # [B, S, ...]
        x.meta[SCATTERED] = True
        valid = self._valid
        for _ in range(x.meta["val"].dim() - 2):
            valid = self.call(aten.unsqueeze.default, valid, -1)
        x = self.call(aten.where.ScalarOther, valid, x, 0.0)
        if BOTH in units:
            x = self.call(aten.flatten.using_ints, x, 0, 1)
        return self._folded(self._permuted(x, _inverse(order)), layout)

    def _permuted(self, x: Node, order: Sequence[int]) -> Node:
        if list(order) == sorted(order):
            return x
        return self.call(aten.permute.default, x, list(order))

    def _unfolded(self, x: Node, layout: Layout, *, packed: bool = False) -> tuple[list[Any], Node]:
        """(factors of its dims, the value with a dim for each). In reverse, so that dims before
        keep their numbers."""
        units: list[Any] = []
        for d in reversed(range(len(layout))):
            parts = _units(layout[d])
            if len(parts) > 1:
                sizes = [
                    1 if packed and p == BATCH else -1 if isinstance(p, str) else p for p in parts
                ]
                x = self.call(aten.unflatten.int, x, d, sizes)
            units = [*parts, *units]
        return units, x

    def _folded(self, x: Node, layout: Layout) -> Node:
        for d, factors in enumerate(layout):
            if (n := len(_units(factors))) > 1:
                x = self.call(aten.flatten.using_ints, x, d, d + n - 1)
        return x


class _FakeResults:
    """Gives nodes their fake values. The layers of an encoder call the same ops on values of the
    same sizes, so that most results are like earlier ones."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._first: dict[str, Tensor] = {}

    def __call__(self, node: Node) -> None:
        node.meta["val"] = (
            self._like_the_first(node) if node.target in _TRACED_ONCE else self._traced(node)
        )

    def _traced(self, node: Node) -> Any:
        return fake_result(self._mode, node.target, node.args, node.kwargs)

    def _like_the_first(self, node: Node) -> Tensor:
        """With memory of its own, by which aliases are found."""
        call = f"{node.target}{map_arg((node.args, node.kwargs), _fake_value)}"
        if call not in self._first:
            self._first[call] = self._traced(node)
            return self._first[call]
        first = self._first[call]
        with self._mode:
            return torch.empty_strided(
                first.shape, first.stride(), dtype=first.dtype, device=first.device
            )


def _fake_value(node: Node) -> str:
    """All of a fake value that the result of an op can depend on."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return str(value)
    device = value.device
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    layout = (*value.shape, value.stride(), value.storage_offset())
    return f"{value.dtype} {device} {layout} {autocast}"


def _units(factors: Factors) -> list[Any]:
    """Factors of a dim, B and S next to each other as one."""
    made: list[Any] = []
    for f in factors:
        if made and isinstance(f, str) and isinstance(made[-1], str):
            made[-1] = BOTH
        else:
            made.append(f)
    return made or [1]


def _tokens_first(units: Sequence[Any]) -> list[int]:
    b, s = units.index(BATCH), units.index(LENGTH)
    return [b, s, *(i for i in range(len(units)) if i not in (b, s))]


def _inverse(order: Sequence[int]) -> list[int]:
    return [list(order).index(i) for i in range(len(order))]


def _expanded_sizes(layout: Layout) -> list[int]:
    """For expand, in which -1 keeps a size. Dims of tokens are not expanded."""
    return [
        -1 if LENGTH in d else 1 if BATCH in d else size
        for d, size in zip(layout, packed_sizes(layout), strict=True)
    ]


def _dim(node: Node, layout: Layout) -> int:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim % len(layout)
