"""Writes in place to what the graph made itself become values of their own.

    b = bias.clone()                     b = bias.clone()
    b[4:8].zero_()                 ->    b1 = slice_scatter(b, zero(b[4:8]), 0, 4, 8)
    y = linear(x, weight, b)             y = linear(x, weight, b1)

Then a value is what its node computes, wherever it is read: a bias like this one is computed from
parameters alone, and a norm behind a write is a norm. What aliases inputs, what a gradient flows
through, and what is written through a view that has no scatter here stays as it is.
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
from graphquant.ir.rows import SIZED_VIEWS


def make_functional(captured: Captured) -> None:
    graph = captured.gm.graph
    pending = list(calls(graph, lambda n: _plain(n) is not None))
    if not pending:
        return
    gradient = needs_gradient(graph, captured.differentiable, captured.grad_enabled)
    for node in pending:
        path = _path(node.args[0]) if writes(node) == [node.args[0]] else None
        if path is not None and gradient.isdisjoint(path):
            _Write(captured, node, path).replace()


def _plain(node: Node) -> Any:
    """mul for mul_: the op that returns what this one writes. None if torch has none."""
    op = node.target
    if not isinstance(op, OpOverload) or op.namespace != "aten":
        return None
    if {torch.Tag.inplace_view, torch.Tag.nondeterministic_seeded} & {*op.tags}:
        return None
    name = op._schema.name.removeprefix("aten::")
    if not name.endswith("_") or name.endswith("__") or not writes(node):
        return None
    plain = getattr(getattr(aten, name[:-1], None), op._overloadname, None)
    if plain is None or plain._schema.is_mutable:
        return None
    names = [[a.name for a in o._schema.arguments] for o in (op, plain)]
    return plain if names[0] == names[1] else None


def _path(target: Any) -> list[Node] | None:
    """From the value that was made, through views of it, to the one that is written.

    None if that memory is not the graph's own, or more than one value is behind a view.
    """
    if not isinstance(target, Node):
        return None
    path = [target]
    while parents := _sources(path[0]):
        if len(parents) != 1:
            return None
        path.insert(0, parents[0])
    made = path[0]
    return path if made.op == "call_function" and is_tensor(made) and memory(made) else None


def _sources(node: Node) -> list[Node]:
    """The inputs in whose memory this value lies."""
    return [i for i in node.all_input_nodes if not memory(node).isdisjoint(memory(i))]


class _Write:
    """One write, `node`, to the last value of `path`."""

    def __init__(self, captured: Captured, node: Node, path: list[Node]) -> None:
        self._graph: Graph = captured.gm.graph
        self._fake_mode = captured.fake_mode
        self._node, self._path = node, path
        self._made: list[Node] = []

    def replace(self) -> None:
        """Replace the write, unless a step has no plain form."""
        node, path = self._node, self._path
        members = _members(path[0])
        with self._graph.inserting_before(node), autocast_at(node):
            base = self._written_base()
            if base is None or not same_layout(base.meta["val"], path[0].meta["val"]):
                return self._undo()
            now = {path[0]: base}
            read_later = [m for m in members if m < node and any(u > node for u in m.users)]
            for member in (*read_later, path[-1]):
                if not self._derive(member, now):
                    return self._undo()
        for member in read_later:
            for user in [u for u in member.users if u > node]:
                user.replace_input_with(member, now[member])
        node.replace_all_uses_with(now[path[-1]])
        self._graph.erase_node(node)
        self._infer([m for m in members if m is not node and m > base])
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
        """Fake values, so that what was written lies in memory of its own from here on."""
        for node in sorted(nodes):
            if isinstance(node.target, HigherOrderOperator) or node.op == "output":
                continue
            args, kwargs = node.args, node.kwargs
            node.meta["val"] = fake_result(self._fake_mode, node.target, args, kwargs)

    def _written_base(self) -> Node | None:
        """The value that was made, as it is after the write."""
        target = self._path[-1]
        value = self._new(_plain(self._node), *self._node.args, **self._node.kwargs)
        if shape(value) != shape(target) or _sources(value):
            return None
        if dtype(value) != dtype(target):
            if torch.promote_types(dtype(value), dtype(target)) != dtype(value):
                return None  # autocast takes the plain op, and not the one in place
            value = self._new(aten.to.dtype, value, dtype(target))
        for view, parent in zip(self._path[:0:-1], self._path[-2::-1], strict=True):
            made = value if writes(view) else self._scattered(parent, view, value)
            if made is None:
                return None
            value = made
        return value

    def _scattered(self, parent: Node, view: Node, value: Node) -> Node | None:
        """`parent`, of which `view` is a view, with `value` where the view lies."""
        if view.target is operator.getitem:
            return value if _PIECES.get(parent.target) else None  # its own parent does it
        if (piece := _PIECES.get(view.target)) is not None:
            _, index = self._path[self._path.index(view) + 1].args
            assert isinstance(index, int)  # of the getitem behind it
            return self._new(*piece(view, parent, value, index))
        if view.target in _INVERTED:
            return self._new(*_INVERTED[view.target](full_args(view), value))
        if (scatter := _SCATTERS.get(view.target)) is not None:
            return self._new(scatter, parent, value, *full_args(view)[1:])
        if view.target in _RESHAPED:
            return self._new(aten.reshape.default, value, self._sizes(parent))
        return None

    def _sizes(self, node: Node) -> list[Any]:
        return [
            s if isinstance(s, int) else self._new(aten.sym_size.int, node, i)
            for i, s in enumerate(shape(node))
        ]

    def _derive(self, member: Node, now: dict[Node, Node]) -> bool:
        """The same view as `member`, of the value after the write."""
        if member in now:
            return True
        parents = _sources(member)
        if len(parents) != 1 or not self._derive(parents[0], now):
            return False
        (parent,) = parents
        if writes(member):
            now[member] = now[parent]
            return member.args[0] is parent
        args, kwargs = map_arg((member.args, member.kwargs), lambda n: now[n] if n is parent else n)
        now[member] = self._new(member.target, *args, **kwargs)
        return True


def _members(base: Node) -> list[Node]:
    """All values in the memory of this one, and itself."""
    found = {base: None}
    for node in (edge := [base]):
        for user in node.users:
            if user not in found and not memory(user).isdisjoint(memory(node)):
                found[user] = None
                edge.append(user)
    return list(found)


def _narrowed(parent: Node, value: Node, dim: int, start: Any) -> tuple[Any, ...]:
    stop = start + shape(value)[dim]
    return aten.slice_scatter.default, parent, value, dim, start, stop


def _split(view: Node, parent: Node, value: Node, index: int) -> tuple[Any, ...]:
    """The index-th of the pieces of split, split_with_sizes or chunk, which have a `dim` last."""
    dim = arguments(view).dim
    start = sum(piece.shape[dim] for piece in view.meta["val"][:index])
    return _narrowed(parent, value, dim, start)


def _unbound(view: Node, parent: Node, value: Node, index: int) -> tuple[Any, ...]:
    return aten.select_scatter.default, parent, value, arguments(view).dim, index


_PIECES: dict[Any, Callable[[Node, Node, Node, int], tuple[Any, ...]]] = {
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.unsafe_split.Tensor: _split,
    aten.unsafe_split_with_sizes.default: _split,
    aten.unsafe_chunk.default: _split,
    aten.unbind.int: _unbound,
}

_SCATTERS: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
}

_RESHAPED = SIZED_VIEWS | {
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.view_as.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
}


def _permuted_back(args: tuple[Any, ...], value: Node) -> tuple[Any, ...]:
    _, dims = args
    rank = len(dims)
    return aten.permute.default, value, [[d % rank for d in dims].index(i) for i in range(rank)]


_INVERTED: dict[Any, Callable[[tuple[Any, ...], Node], tuple[Any, ...]]] = {
    aten.t.default: lambda args, value: (aten.t.default, value),
    aten.transpose.int: lambda args, value: (aten.transpose.int, value, *args[1:]),
    aten.permute.default: _permuted_back,
    aten.numpy_T.default: lambda args, value: (
        aten.permute.default,
        value,
        list(range(len(shape(value))))[::-1],
    ),
}
