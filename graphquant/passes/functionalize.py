"""Functionalization of in-place writes to intermediates.

    b = bias.clone()                     b = bias.clone()
    b[4:8].zero_()                 ->    b1 = slice_scatter(b, zero(b[4:8]), 0, 4, 8)
    y = linear(x, weight, b)             y = linear(x, weight, b1)

Then a node has one value wherever it is read: the bias above is computed from parameters alone, and
a norm behind a write is recognized. Writes to aliases of inputs, writes that a gradient flows
through, and writes through views without a scatter here stay.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from graphquant._torch import HigherOrderOperator, OpOverload
from graphquant.ir.aliases import memory, same_layout, writes
from graphquant.ir.captured import Captured
from graphquant.ir.gradients import needs_gradient
from graphquant.ir.graph import (
    arguments,
    aten,
    autocast_at,
    calls,
    dtype,
    fake_result,
    full_args,
    is_tensor,
    shape,
)
from graphquant.ir.rows import RESHAPES


def make_functional(captured: Captured) -> None:
    """Functionalize the in-place writes to intermediates, in place."""
    graph = captured.gm.graph
    pending = list(calls(graph, lambda n: _functional_op(n) is not None))
    if not pending:
        return
    gradient = needs_gradient(graph, captured.differentiable, captured.grad_enabled)
    for node in pending:
        chain = _view_chain(node.args[0]) if writes(node) == [node.args[0]] else None
        if chain is not None and gradient.isdisjoint(chain):
            _InplaceWrite(captured, node, chain).replace()


def _functional_op(node: Node) -> Any:
    """The out-of-place variant of an in-place op, mul for mul_, or None."""
    op = node.target
    if not isinstance(op, OpOverload) or op.namespace != "aten":
        return None
    if {torch.Tag.inplace_view, torch.Tag.nondeterministic_seeded} & {*op.tags}:
        return None
    name = op._schema.name.removeprefix("aten::")
    if not name.endswith("_") or name.endswith("__") or not writes(node):
        return None
    functional = getattr(getattr(aten, name[:-1], None), op._overloadname, None)
    if functional is None or functional._schema.is_mutable:
        return None
    names = [[a.name for a in o._schema.arguments] for o in (op, functional)]
    return functional if names[0] == names[1] else None


def _view_chain(target: Any) -> list[Node] | None:
    """[base, view, view of view, ..., target]: how the written value is a view of an intermediate.

    None if the memory belongs to an input, or if a value aliases several.
    """
    if not isinstance(target, Node):
        return None
    chain = [target]
    while parents := _aliased_inputs(chain[0]):
        if len(parents) != 1:
            return None
        chain.insert(0, parents[0])
    made = chain[0]
    return chain if made.op == "call_function" and is_tensor(made) and memory(made) else None


def _aliased_inputs(node: Node) -> list[Node]:
    """The inputs that share memory with this value."""
    return [i for i in node.all_input_nodes if not memory(node).isdisjoint(memory(i))]


class _InplaceWrite:
    """One in-place write, `node`, to the last value of `chain`."""

    def __init__(self, captured: Captured, node: Node, chain: list[Node]) -> None:
        self._graph: Graph = captured.gm.graph
        self._fake_mode = captured.fake_mode
        self._node, self._chain = node, chain
        self._made: list[Node] = []

    def replace(self) -> None:
        """Replace the write, unless a view of the chain has no functional form."""
        node, chain = self._node, self._chain
        aliases = _aliases_of(chain[0])
        with self._graph.inserting_before(node), autocast_at(node):
            base = self._base_after_write()
            if base is None or not same_layout(base.meta["val"], chain[0].meta["val"]):
                return self._undo()
            now = {chain[0]: base}
            read_later = [m for m in aliases if m < node and any(u > node for u in m.users)]
            for alias in (*read_later, chain[-1]):
                if not self._replay(alias, now):
                    return self._undo()
        for alias in read_later:
            for user in [u for u in alias.users if u > node]:
                user.replace_input_with(alias, now[alias])
        node.replace_all_uses_with(now[chain[-1]])
        self._graph.erase_node(node)
        self._infer([m for m in aliases if m is not node and m > base])
        return None

    def _undo(self) -> None:
        for made in reversed(self._made):
            self._graph.erase_node(made)

    def _new(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self._graph.call_function(target, args, kwargs)
        node.meta.update({k: v for k, v in self._node.meta.items() if k != "val"})
        self._infer([node])
        self._made.append(node)
        return node

    def _infer(self, nodes: list[Node]) -> None:
        """Recompute fake values, so that their storages show the new aliases."""
        for node in sorted(nodes):
            if isinstance(node.target, HigherOrderOperator) or node.op == "output":
                continue
            args, kwargs = node.args, node.kwargs
            node.meta["val"] = fake_result(self._fake_mode, node.target, args, kwargs)

    def _base_after_write(self) -> Node | None:
        """The base of the chain after the write; None if it has no functional form."""
        target = self._chain[-1]
        value = self._new(_functional_op(self._node), *self._node.args, **self._node.kwargs)
        if shape(value) != shape(target) or _aliased_inputs(value):
            return None
        if dtype(value) != dtype(target):
            if torch.promote_types(dtype(value), dtype(target)) != dtype(value):
                return None  # autocast casts for the functional op, but not for the in-place one
            value = self._new(aten.to.dtype, value, dtype(target))
        for view, parent in zip(self._chain[:0:-1], self._chain[-2::-1], strict=True):
            made = value if writes(view) else self._scatter(parent, view, value)
            if made is None:
                return None
            value = made
        return value

    def _scatter(self, parent: Node, view: Node, value: Node) -> Node | None:
        """`parent` with `value` scattered into its `view`."""
        if view.target is operator.getitem:
            return value if _SPLITS.get(parent.target) else None  # split itself scatters
        if (piece := _SPLITS.get(view.target)) is not None:
            _, index = self._chain[self._chain.index(view) + 1].args
            assert isinstance(index, int)  # of the getitem that follows
            return self._new(*piece(view, parent, value, index))
        if view.target in _INVERSES:
            return self._new(*_INVERSES[view.target](full_args(view), value))
        if (scatter := _SCATTERS.get(view.target)) is not None:
            return self._new(scatter, parent, value, *full_args(view)[1:])
        if view.target in _RESHAPES:
            return self._new(aten.reshape.default, value, self._sizes(parent))
        return None

    def _sizes(self, node: Node) -> list[Any]:
        return [
            s if isinstance(s, int) else self._new(aten.sym_size.int, node, i)
            for i, s in enumerate(shape(node))
        ]

    def _replay(self, alias: Node, now: dict[Node, Node]) -> bool:
        """Add to `now` the view `alias` of the value after the write."""
        if alias in now:
            return True
        parents = _aliased_inputs(alias)
        if len(parents) != 1 or not self._replay(parents[0], now):
            return False
        (parent,) = parents
        if writes(alias):
            now[alias] = now[parent]
            return alias.args[0] is parent
        args, kwargs = map_arg((alias.args, alias.kwargs), lambda n: now[n] if n is parent else n)
        now[alias] = self._new(alias.target, *args, **kwargs)
        return True


def _aliases_of(base: Node) -> list[Node]:
    """This value and all values that share its memory."""
    found = {base: None}
    for node in (edge := [base]):
        for user in node.users:
            if user not in found and not memory(user).isdisjoint(memory(node)):
                found[user] = None
                edge.append(user)
    return list(found)


def _slice_scatter(parent: Node, value: Node, dim: int, start: Any) -> tuple[Any, ...]:
    stop = start + shape(value)[dim]
    return aten.slice_scatter.default, parent, value, dim, start, stop


def _split_scatter(view: Node, parent: Node, value: Node, index: int) -> tuple[Any, ...]:
    """Scatter into the index-th result of split, split_with_sizes or chunk."""
    dim = arguments(view).dim
    start = sum(piece.shape[dim] for piece in view.meta["val"][:index])
    return _slice_scatter(parent, value, dim, start)


def _unbind_scatter(view: Node, parent: Node, value: Node, index: int) -> tuple[Any, ...]:
    return aten.select_scatter.default, parent, value, arguments(view).dim, index


_SPLITS: dict[Any, Callable[[Node, Node, Node, int], tuple[Any, ...]]] = {
    aten.split.Tensor: _split_scatter,
    aten.split_with_sizes.default: _split_scatter,
    aten.chunk.default: _split_scatter,
    aten.unsafe_split.Tensor: _split_scatter,
    aten.unsafe_split_with_sizes.default: _split_scatter,
    aten.unsafe_chunk.default: _split_scatter,
    aten.unbind.int: _unbind_scatter,
}

_SCATTERS: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
}

_RESHAPES = RESHAPES | {
    aten.squeeze.default,
    aten.view_as.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
}


def _inverse_permute(args: tuple[Any, ...], value: Node) -> tuple[Any, ...]:
    _, dims = args
    rank = len(dims)
    return aten.permute.default, value, [[d % rank for d in dims].index(i) for i in range(rank)]


_INVERSES: dict[Any, Callable[[tuple[Any, ...], Node], tuple[Any, ...]]] = {
    aten.t.default: lambda args, value: (aten.t.default, value),
    aten.transpose.int: lambda args, value: (aten.transpose.int, value, *args[1:]),
    aten.permute.default: _inverse_permute,
    aten.numpy_T.default: lambda args, value: (
        aten.permute.default,
        value,
        list(range(len(shape(value))))[::-1],
    ),
}
