"""CPU kernel of attention (cpu.cpp)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphquant.ops import cpu
from graphquant.ops.attention.op import attention


@attention.cpu_kernel("attention", refuses=cpu.refuses, rows=(), strided=("q", "k", "v"))
def arguments(
    q: Tensor, k: Tensor, v: Tensor, scale: float, tile: str | None, out: tuple[Tensor, ...]
) -> tuple[Any, ...]:
    B, H, S, D = q.shape
    return (
        *(cpu.TYPES[q.dtype], B, S, k.shape[2], H, D),
        *(*q.stride(), q, *k.stride(), k, *v.stride(), v),
        *(scale, out[0]),
    )
