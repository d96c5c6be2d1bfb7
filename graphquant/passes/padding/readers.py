"""Proves that what reads padded values after packing does not read padding.

Scattered values hold zeros at padding, where the model computed other numbers. All that reads them
(pooling, heads, attention that stays padded) is evaluated with zeros and with what the model would
hold there: for random numbers, results must not differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphquant.ir.aliases import written_in_place
from graphquant.ir.captured import Captured
from graphquant.ir.graph import ancestors, arguments, aten, dtype, hints, is_tensor, shape
from graphquant.ir.rows import RESHAPES
from graphquant.passes.padding.attention import is_pointwise
from graphquant.passes.padding.evaluation import Evaluation, Kept, inputs_of, told
from graphquant.passes.padding.layouts import (
    BATCH,
    LENGTH,
    Layout,
    Layouts,
    is_of_tokens,
)
from graphquant.passes.padding.op_layouts import layout_after
from graphquant.passes.padding.plan import Plan
from graphquant.report import Quiet

MAX_RANDOM = 2**22  # elements of a value that are drawn; larger ones repeat


def check_readers(captured: Captured, plan: Plan) -> tuple[str, ...]:
    """Notes on readers. Raises Kept for one that reads padding.

    To be used without fake mode and without gradients.
    """
    readers = _Readers(captured, plan)
    if written := readers.written():
        raise Kept(f"{told(captured, min(written))} is written in place")
    if not readers.results:
        return tuple(readers.first_position())
    for kind in ("right", "left"):
        for node in readers.different(kind):
            if kind == "right":
                raise Kept(f"{told(captured, node)} reads padding")
            return (*readers.first_position(), _left(captured, node))
    return tuple(readers.first_position())


def _left(captured: Captured, node: Node) -> str:
    return (
        f"{told(captured, node)} reads padding of sentences padded on the left: for those, results "
        "differ from the model's"
    )


@dataclass
class _Readers:
    """The nodes that compute from padded values, between exits and entries.

    results  those that leave the graph or are gathered again
    """

    captured: Captured
    plan: Plan

    def __post_init__(self) -> None:
        self._random = torch.Generator().manual_seed(3)
        self._below: set[Node] = set()
        self._first: set[Node] = set()  # they read position 0 only
        edge = [u for users in self.plan.exits.values() for u in users]
        while edge:
            node = edge.pop()
            if node in self._below or node in self.plan.packed or node.op == "output":
                continue
            if self._reads_first(node):
                self._first.add(node)
                continue
            self._below.add(node)
            if node not in self.plan.entries:
                edge += list(node.users)
        self.results = [n for n in sorted(self._below) if self._is_result(n) and is_tensor(n)]
        self._layouts = self._spread()

    def written(self) -> set[Node]:
        """Values that are written in place, which an evaluation does not see."""
        read = ancestors(self.results, self.plan.exits)
        return written_in_place(self.captured.gm.graph) & (read | self._below)

    def first_position(self) -> Iterator[str]:
        if self._first:
            yield Quiet(
                "position 0 of each sentence is read, which is zero where sentences are padded on "
                "the left"
            )

    def _reads_first(self, node: Node) -> bool:
        """x[:, 0] or x[:, :1]"""
        if node.target not in (aten.select.int, aten.slice.Tensor):
            return False
        a = arguments(node)
        layout = self.plan.layouts.get(a.self) if a.self in self.plan.exits else None
        if layout is None or layout[a.dim % len(layout)] != (LENGTH,):
            return False
        if node.target is aten.select.int:
            return bool(a.index == 0)
        return a.start in (None, 0) and a.end == 1

    def _is_result(self, node: Node) -> bool:
        return node in self.plan.entries or any(
            u.op == "output" or u in self.plan.packed for u in node.users
        )

    def _spread(self) -> dict[Node, Layout]:
        """Layouts of values that still have rows of tokens: their rows at padding are their own."""
        found = dict(self.plan.layouts)
        for node in sorted(self._below):
            for i in node.all_input_nodes:
                if node not in found and i in found:
                    after = layout_after(self.plan.sizes, node, i, found[i])
                    if after is not None:
                        found[node] = after
        return found

    def different(self, kind: str) -> Iterator[Node]:
        """Results that depend on what is at the padding, where it is on the right or left."""
        exits = list(self.plan.exits)
        for valid in self._paddings(kind):
            inputs = self._inputs(valid)
            model = self._model_values(exits, inputs, valid)
            zeroed = {n: self._with_zeros(n, v, valid) for n, v in model.items()}
            runs = [Evaluation(self.captured, {**inputs, **values}) for values in (zeroed, model)]
            for node in self.results:
                ours, theirs = (self._rows(node, self._value(run, node), valid) for run in runs)
                if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True):
                    yield node

    def _value(self, run: Evaluation, node: Node) -> Tensor:
        try:
            value: Tensor = run(node)
        except Kept as why:
            raise Kept(f"what reads padded values cannot be evaluated: {why}") from why
        return value

    def _rows(self, node: Node, value: Tensor, valid: Tensor) -> Tensor:
        """Its rows of valid tokens, or all of it."""
        layout = self._layouts.get(node)
        if layout is not None and is_of_tokens(layout):
            value = tokens_first(value, layout, self.plan.sizes)[0][valid]
        return value.double()

    def _paddings(self, kind: str) -> Iterator[Tensor]:
        """Valid tokens [B, S] of sentences of all lengths, and of such where the shorter ones are
        longer: one that reads by the mask of another reads padding in one of them."""
        B, S = hints(self.plan.mask.node)
        t = torch.arange(S)
        for _ in range(1 if B <= S else 2):  # some lengths are equal
            order = torch.randperm(B, generator=self._random)[:, None]
            lengths = 1 + order * (S - 1) // max(B - 1, 1)
            for n in (lengths, S + 1 - lengths):
                yield t < n if kind == "right" else t >= S - n

    def _inputs(self, valid: Tensor) -> dict[Node, Any]:
        """Random values of the model's inputs, with this padding."""
        mask = self.plan.mask
        found: dict[Node, Any] = {}
        for node in self.captured.gm.graph.find_nodes(op="placeholder"):
            if node in self.captured.parameters or not is_tensor(node) or not shape(node):
                continue
            value = self._like(node)
            if value.shape == valid.shape and not value.is_floating_point():
                value = value * valid  # token ids at padding are the lowest
            found[node] = value
        found[mask.node] = (~valid if mask.inverted else valid).to(dtype(mask.node))
        return found

    def _like(self, node: Node) -> Tensor:
        sizes = hints(node)
        kind = dtype(node)
        if kind == torch.bool:
            return torch.randint(0, 2, sizes, generator=self._random).bool()
        if not kind.is_floating_point:
            return torch.randint(1, 100, sizes, generator=self._random).to(kind)
        total = torch.Size(sizes).numel()
        if total <= MAX_RANDOM:
            return torch.randn(sizes, generator=self._random).to(kind)
        some = torch.randn(MAX_RANDOM - 1, generator=self._random)  # odd: rows differ
        return some.repeat(total // len(some) + 1)[:total].reshape(sizes).to(kind)

    def _model_values(
        self, exits: Sequence[Node], inputs: dict[Node, Any], valid: Tensor
    ) -> dict[Node, Tensor]:
        """What the model computes at exits from random tokens and random padding.

        Pointwise ops are computed: x * mask is zero at padding, whatever x is there.
        """
        sources: dict[Node, Tensor] = {}
        run: set[Node] = set()
        edge = list(exits)
        while edge:
            node = edge.pop()
            if node in run:
                continue
            run.add(node)
            if not inputs_of(self.captured, [node], cut={self.plan.mask.node}):
                continue  # the mask, or the same at every call
            if node in self._below or self._is_elementwise(node):
                edge += node.all_input_nodes
            elif node not in inputs:
                sources[node] = self._louder_at_padding(node, self._like(node), valid)
        at = Evaluation(self.captured, {**inputs, **sources})
        return {n: self._value(at, n) for n in exits}

    def _louder_at_padding(self, node: Node, value: Tensor, valid: Tensor) -> Tensor:
        """So that a maximum over all positions is one of padding."""
        if not value.is_floating_point() or node not in self.plan.layouts:
            return value
        rows, back = tokens_first(value, self.plan.layouts[node], self.plan.sizes)
        at = valid.reshape(*valid.shape, *(1,) * (rows.dim() - 2))
        return back(torch.where(at, rows, 8 * rows))

    def _is_elementwise(self, node: Node) -> bool:
        return node in self.plan.packed and (is_pointwise(node) or node.target in RESHAPES)

    def _with_zeros(self, node: Node, value: Tensor, valid: Tensor) -> Tensor:
        """With zeros at padding, as it is scattered."""
        rows, back = tokens_first(value, self.plan.layouts[node], self.plan.sizes)
        kept = valid.reshape(*valid.shape, *(1,) * (rows.dim() - 2))
        return back(rows.masked_fill(~kept, 0))


def tokens_first(
    value: Tensor, layout: Layout, sizes: Layouts
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """([B, S, ...] with the other dims in order, the way back)."""
    flat = [f for d in layout for f in (d or (1,))]
    apart = value.reshape([sizes.size(f) for f in flat])
    b, s = flat.index(BATCH), flat.index(LENGTH)
    return (
        apart.movedim((b, s), (0, 1)),
        lambda rows: rows.movedim((0, 1), (b, s)).reshape(value.shape),
    )
