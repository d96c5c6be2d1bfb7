"""Which dims of a value are sentences and positions.

A layout has a tuple of factors for each dim: BATCH, LENGTH, and numbers. [B, S, H] is
((BATCH,), (LENGTH,), (H,)), and B*h sequences [B*h, S, d] are ((BATCH, h), (LENGTH,), (d,)).
Dims of size 1 are ().
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from torch import Tensor
from torch.fx import Node

from graphquant.ir.graph import hint, is_tensor

BATCH: Final = "B"
LENGTH: Final = "S"
Factors = tuple[int | str, ...]
Layout = tuple[Factors, ...]


def factors(size: Any) -> Factors:
    n = hint(size)
    return (n,) if n != 1 else ()


def letters(dims: Sequence[Factors]) -> set[str]:
    return {f for d in dims for f in d if isinstance(f, str)}


def is_of_tokens(layout: Layout) -> bool:
    """Has it both dims, so that it can be packed?"""
    return letters(layout) == {BATCH, LENGTH}


def dim_of(layout: Layout, letter: str) -> int:
    return next(i for i, d in enumerate(layout) if letter in d)


def normal(dims: Sequence[Factors]) -> Layout:
    """With neighboring numbers multiplied."""

    def one(dim: Factors) -> Factors:
        made: list[int | str] = []
        for f in dim:
            if isinstance(f, int) and made and isinstance(made[-1], int):
                made[-1] *= f
            elif f != 1:
                made.append(f)
        return tuple(made)

    return tuple(map(one, dims))


def first(value: Any) -> Tensor:
    """The first of several results."""
    found: Tensor = value[0] if isinstance(value, (list, tuple)) else value
    return found


class Layouts:
    """Layouts of values whose batch and length have these sizes at compile time."""

    def __init__(self, B: int, S: int) -> None:
        self._sizes = {BATCH: B, LENGTH: S}

    def size(self, factor: int | str) -> int:
        return self._sizes[factor] if isinstance(factor, str) else factor

    def reshaped(self, layout: Layout, sizes: Sequence[int]) -> Layout | None:
        """The layout of a view with other sizes; None if it splits or merges across B or S."""
        left = [f for d in layout for f in d]
        made: list[Factors] = []
        at = 0
        for n in sizes:
            dim: list[int | str] = []
            done = 1
            while done < n:
                if at >= len(left):
                    return None
                factor, size = left[at], self.size(left[at])
                if n % (done * size) == 0:
                    dim.append(factor)
                    done *= size
                    at += 1
                else:
                    part = n // done
                    if isinstance(factor, str) or n % done or size % part:
                        return None
                    dim.append(part)
                    left[at] = size // part
                    done *= part
            while at < len(left) and self.size(left[at]) == 1:
                dim.append(left[at])
                at += 1
            made.append(tuple(dim))
        return normal(made) if at == len(left) else None


def packed_sizes(layout: Layout) -> list[int]:
    """Sizes of the packed value for a view: sentences become 1, positions -1."""
    return [-1 if LENGTH in d else math.prod(f for f in d if isinstance(f, int)) for d in layout]


def is_static(node: Node, layout: Layout) -> bool:
    """Are the sizes of all dims but those of tokens fixed numbers?"""
    pairs = zip(first(node.meta["val"]).shape, layout, strict=True)
    return all(isinstance(n, int) or letters([d]) for n, d in pairs) and is_tensor(node)
