"""Decides which values of a graph are computed for tokens only.

From attentions whose masks are understood, layouts spread up and down through ops that compute each
token by itself. Where they end, values are gathered (entries) or scattered back (exits). Attention
that is not understood stays padded between the two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from graphquant.ir.aliases import written_in_place
from graphquant.ir.captured import Captured
from graphquant.ir.gradients import needs_gradient
from graphquant.ir.graph import (
    LINEAR,
    SDPA,
    ancestors,
    aten,
    draws_nothing,
    dtype,
    hints,
    is_random,
    is_tensor,
    shape,
)
from graphquant.passes.padding.attention import SOFTMAX, Attention
from graphquant.passes.padding.evaluation import Kept, is_input, told
from graphquant.passes.padding.layouts import (
    BATCH,
    LENGTH,
    Layout,
    Layouts,
    dim_of,
    factors,
    is_of_tokens,
    is_static,
    letters,
    normal,
)
from graphquant.passes.padding.masks import Form, PaddingMask
from graphquant.passes.padding.op_layouts import layout_after, layouts_before


@dataclass(frozen=True)
class Plan:
    """What becomes of a graph.

    mask        the padding mask
    attentions  attention over packed tokens instead, by their results
    layouts     of all values of tokens
    packed      those that are computed for tokens only
    entries     padded values that are gathered
    exits       packed values -> the nodes that read them padded
    operands    packed nodes -> the layouts of their inputs; the others are the same for all tokens
    sizes       B and S at compile time
    """

    mask: PaddingMask
    attentions: Mapping[Node, tuple[Attention, Form]]
    layouts: Mapping[Node, Layout]
    packed: frozenset[Node]
    entries: frozenset[Node]
    exits: Mapping[Node, Sequence[Node]]
    operands: Mapping[Node, Mapping[Node, Layout]]
    sizes: Layouts


def make_plan(
    captured: Captured, mask: PaddingMask, attentions: Sequence[tuple[Attention, Form]]
) -> Plan:
    """Raises Kept if the graph cannot be computed for the tokens of this mask only."""
    return _Spread(captured, mask, attentions).plan()


class _Spread:
    def __init__(
        self, captured: Captured, mask: PaddingMask, attentions: Sequence[tuple[Attention, Form]]
    ) -> None:
        self._captured, self._mask = captured, mask
        self._graph: Graph = captured.gm.graph
        B, S = hints(mask.node)
        self._sizes = Layouts(B, S)
        self._attentions = {a.out: (a, form) for a, form in attentions}
        self._inner = frozenset[Node]().union(*(a.inner for a, _ in attentions))
        self._layouts: dict[Node, Layout] = {}
        self._packed: set[Node] = set()
        self._entries: set[Node] = set()
        self._todo: list[Node] = []

    def plan(self) -> Plan:
        self._start()
        self._equate()
        self._spread()
        self._check()
        exits: dict[Node, list[Node]] = defaultdict(list)
        for node in sorted(self._packed):
            if not is_tensor(node):  # parts of a split
                if not self._packed.issuperset(node.users):
                    raise Kept(f"a part of {self._told(node)} is read padded")
                continue
            for reader in node.users:
                if reader not in self._packed and reader not in self._inner:
                    exits[node].append(reader)
        for node in (*exits, *self._entries):
            if not all(map(_is_foldable, self._layouts[node])):
                raise Kept(f"{self._told(node)} mixes tokens with other dims")
        operands = {n: self._operands(n) for n in sorted(self._packed)}
        for node, inputs in operands.items():
            self._check_operands(node, inputs)
        return Plan(
            self._mask,
            self._attentions,
            self._layouts,
            frozenset(self._packed),
            frozenset(self._entries),
            exits,
            operands,
            self._sizes,
        )

    def _start(self) -> None:
        for attention, _ in self._attentions.values():
            for node in (attention.q, attention.k, attention.v, attention.out):
                _, heads, rows, width = map(factors, node.meta["val"].shape)
                layout: Layout = ((BATCH,), heads, (LENGTH,), width)
                if node is attention.k and attention.k_transposed:
                    layout = ((BATCH,), heads, rows, (LENGTH,))
                self._give(node, layout)
        if not self._attentions:  # all attention stays padded: begin at the embeddings
            size = hints(self._mask.node)
            for node in self._graph.find_nodes(op="call_function", target=aten.embedding.default):
                index = node.args[1]
                if hints(node)[:2] == size and is_input(self._captured, index):
                    self._give(node, ((BATCH,), (LENGTH,), factors(node.meta["val"].shape[2])))

    def _equate(self) -> None:
        """Guard on equal sizes: those of the mask and of the token ids may be two symbols."""
        for node, layout in self._layouts.items():
            for d, letter in ((0, BATCH), (1, LENGTH)):
                ours, theirs = shape(self._mask.node)[d], shape(node)[dim_of(layout, letter)]
                if not ours == theirs:
                    raise Kept("the padding mask is not as large as the batch")

    def _give(self, node: Node, layout: Layout) -> None:
        layout = normal(layout)
        if self._layouts.setdefault(node, layout) != layout:
            raise Kept(f"{self._told(node)} is read with two layouts")
        if node not in self._packed and node not in self._entries and node not in self._todo:
            self._todo.append(node)

    def _spread(self) -> None:
        before_attention = self._before_attention()
        of_mask = self._of_mask()

        def reads_mask(node: Node) -> bool:
            return any(i in of_mask and i not in self._layouts for i in node.all_input_nodes)

        while self._todo:
            node = self._todo.pop()
            layout = self._layouts[node]
            if node not in self._attentions:
                inputs = layouts_before(self._sizes, node, layout)
                if inputs is None or node in self._inner or not _is_float(node):
                    self._entries.add(node)  # ids stay padded, they are small
                    continue
                for i, given in inputs.items():
                    if is_of_tokens(given):
                        self._give(i, given)
            self._packed.add(node)
            for reader in node.users:
                if reader.op == "output" or reader in self._layouts or reader in self._inner:
                    continue
                if reader not in before_attention and reads_mask(reader):
                    continue  # masked pooling: tokens have to be back in their places
                after = layout_after(self._sizes, reader, node, layout)
                if after is not None and is_of_tokens(after):
                    self._give(reader, after)

    def _before_attention(self) -> set[Node]:
        """Nodes whose values some attention still reads."""
        S = hints(self._mask.node)[1]
        found: set[Node] = set()
        for node in reversed(self._graph.nodes):
            is_core = node.target is SDPA or (node.target in SOFTMAX and hints(node)[-2:] == (S, S))
            if is_core or any(u in found for u in node.users):
                found.add(node)
        return found

    def _of_mask(self) -> set[Node]:
        """Values computed from the padding mask and parameters only."""
        found, others = {self._mask.node}, set[Node]()
        for node in self._graph.nodes:
            if node is self._mask.node:
                continue
            if is_input(self._captured, node) or any(i in others for i in node.all_input_nodes):
                others.add(node)
            elif any(i in found for i in node.all_input_nodes):
                found.add(node)
        return found

    def _check(self) -> None:
        packed = self._packed
        if not any(n.target is LINEAR for n in packed):
            raise Kept("no linear computes each token by itself")
        used = ancestors([self._mask.node])
        if mixed := used & packed:
            raise Kept(f"the padding mask is computed from {self._told(min(mixed))}")
        if written := written_in_place(self._graph) & (packed | used):
            raise Kept(f"{self._told(min(written))} is written in place")
        if random := [n for n in packed if is_random(n) and not draws_nothing(n)]:
            raise Kept(f"{self._told(min(random))} is random")
        captured = self._captured
        grad = needs_gradient(self._graph, captured.differentiable, captured.grad_enabled)
        if grad & packed:
            raise Kept(
                "it can need a gradient: for inference, call the model under "
                "torch.inference_mode() or torch.no_grad()"
            )
        for node in packed:
            if is_tensor(node) and not is_static(node, self._layouts[node]):
                raise Kept(f"{self._told(node)} has a dynamic size besides batch and length")

    def _operands(self, node: Node) -> dict[Node, Layout]:
        """The inputs of a packed node that have a layout in it."""
        if node in self._attentions:
            attention, _ = self._attentions[node]
            return {i: self._layouts[i] for i in (attention.q, attention.k, attention.v)}
        return layouts_before(self._sizes, node, self._layouts[node]) or {}

    def _check_operands(self, node: Node, inputs: Mapping[Node, Layout]) -> None:
        """Raises Kept for an input that is neither packed, gathered nor the same for all tokens."""
        layout = self._layouts[node]
        for i, given in inputs.items():
            if i in self._packed or i in self._entries:
                continue
            there = letters_of(given, self._sizes)
            if there == {LENGTH} and given[dim_of(given, LENGTH)] == (LENGTH,):
                continue
            if there == {BATCH} and rows_dim(given, layout) is not None:
                continue
            if there:
                raise Kept(f"{self._told(i)} has a layout of its own")

    def _told(self, node: Node) -> str:
        return told(self._captured, node)


def letters_of(layout: Layout, sizes: Layouts) -> set[str]:
    """BATCH and LENGTH, where they are not of size 1."""
    return {f for f in letters(layout) if sizes.size(f) != 1}


def rows_dim(given: Layout, layout: Layout) -> tuple[int, int] | None:
    """(dim of sentences, dim where positions would be) of a value for each sentence, as an input of
    a node with this layout; None if it has no such dims."""
    offset = len(layout) - len(given)
    b, s = dim_of(given, BATCH), dim_of(layout, LENGTH) - offset
    return (b, s) if s >= 0 and given[s] == () and given[b] == (BATCH,) else None


def guess_mask(captured: Captured) -> PaddingMask | None:
    """An input [B, S] that is as large as the token ids and not embedded; for graphs in which no
    attention is understood. What reads padding decides whether it is one (readers.py)."""
    graph = captured.gm.graph
    embedded = {
        hints(n)
        for e in graph.find_nodes(op="call_function", target=aten.embedding.default)
        if isinstance(n := e.args[1], Node) and is_input(captured, n)
    }
    for node in graph.find_nodes(op="placeholder"):
        if not is_input(captured, node) or hints(node) not in embedded or len(hints(node)) != 2:
            continue
        if not any(u.target is aten.embedding.default for u in node.users):
            return PaddingMask(node, inverted=False, exact=dtype(node) == torch.bool)
    return None


def _is_float(node: Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, (list, tuple)) or value.is_floating_point()


def _is_foldable(dim: tuple[int | str, ...]) -> bool:
    """At most one of B and S in a dim, or B and then S: rows are gathered in this order."""
    at = [i for i, f in enumerate(dim) if isinstance(f, str)]
    return len(at) < 2 or (at[1] - at[0] == 1 and dim[at[0]] == BATCH)
