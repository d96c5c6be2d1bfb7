"""Sample padding, at which attention masks are evaluated, and the sizes for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from graphquant._torch import tree_leaves
from graphquant.ir.graph import ancestors, hint, hints, is_tensor, shape
from graphquant.passes.padding.attention import Attention
from graphquant.passes.padding.evaluation import Evaluation, Sizes

FEW = 4  # sentences with padding of their own: one of each kind. Others repeat theirs


@dataclass(frozen=True)
class Setting:
    """Sizes at which a mask is evaluated."""

    B: int
    S: int
    sizes: Sizes | None = None


@dataclass(frozen=True)
class Sample:
    """Sample padding of B sentences, and what a mask makes of it.

    valid  [B, S] bool
    like   of each sentence, the first with its padding
    at     values of the graph for it
    """

    valid: Tensor
    like: Sequence[int]
    at: Evaluation

    @property
    def full(self) -> int:
        """A sentence without padding, in the first of several samples."""
        return int(self.valid.all(1).nonzero()[0])

    def compared(self, attention: Attention) -> Iterator[int]:
        """The sentences whose mask has to be looked at: not those for which it is computed from the
        same numbers as for another one."""
        operands = [n for n in attention.operands if is_tensor(n) and len(hints(n)) == 4]
        for b, c in enumerate(self.like):
            if b == c or not all(self.at.equal_rows(n, b, c) for n in operands):
                yield b


def setting_of(attention: Attention, rows: int, length: int) -> Setting:
    """So many rows of this length, as values of the symbols of batch and length."""
    B, _, S, _ = shape(attention.q)
    values = [n.meta["val"] for n in read_by(attention) if is_tensor(n)]
    sizes = {
        s: rows if hint(n) == hint(B) else length
        for value in (*values, attention.q.meta["val"])
        for n in value.shape
        if isinstance(n, torch.SymInt) and hint(n) in (hint(B), hint(S))
        for s in n.node.expr.free_symbols
    }
    for n, value in ((B, rows), (S, length)):
        if isinstance(n, torch.SymInt):
            sizes |= dict.fromkeys(n.node.expr.free_symbols, value)
    return Setting(rows, length, sizes)


def read_by(attention: Attention) -> set[Node]:
    """What its logits are computed by, besides q and k."""
    return ancestors(attention.operands) | attention.inner


def named_by(attention: Attention) -> set[int]:
    """The numbers that a mask's nodes name."""
    leaves = tree_leaves([(n.args, n.kwargs) for n in read_by(attention)])
    return {a for a in leaves if isinstance(a, int)}


def paddings(B: int, S: int) -> Iterator[tuple[Tensor, list[int]]]:
    """(valid tokens [B, S], of each sentence the first with its padding), in samples: in each,
    sentences without padding, padded on the right, on the left, and with holes; in one, none
    without padding. In the last two, as many tokens as can be, and few besides a sentence's."""
    random = torch.Generator().manual_seed(0)
    t = torch.arange(S)

    def sentence(kind: int) -> Tensor:
        if kind == 0:
            return torch.ones(S, dtype=torch.bool)
        n = int(torch.randint(1, S, (1,), generator=random))
        if kind == 3:
            holes = torch.rand(S, generator=random) < 0.6
            holes[n] = True
            return holes
        return t < n if kind == 1 else t >= S - n

    few = min(B, FEW)
    kinds = [[(b + shift) % 4 for b in range(few)] for shift in range(2 if B >= 4 else 4)]
    for sample in (*kinds, [1 + b % 3 for b in range(few)]):
        valid = torch.stack([sentence(kind) for kind in sample])
        repeated = torch.randint(few, (B - few,), generator=random)
        like = [*range(few), *repeated.tolist()]
        yield valid[like], like
    full, short = t >= 0, t == 0
    yield full.expand(B, S), [0] * B
    yield torch.stack([full] + [short] * (B - 1)), [min(b, 1) for b in range(B)]


def other_numbers(like: Tensor, numbers: str) -> Tensor:
    if numbers == "one number":
        return torch.full_like(like, 2)
    random = torch.Generator().manual_seed(0)
    found = torch.randint(2, 10, like.shape, generator=random).to(like.dtype)
    found = -found if numbers == "negative" else found
    return found / 4 if like.is_floating_point() else found


def one_sentence(node: Node, at: Evaluation, b: int) -> Tensor:
    """[h, S, S] of a value [B, h, S, S], which may have sizes of 1, or fewer dims."""
    value = at.row(node, b) if len(hints(node)) == 4 else at(node)
    found: Tensor = value.reshape(*(1,) * (4 - value.dim()), *value.shape)[0]
    return found
