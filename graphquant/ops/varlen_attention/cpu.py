"""CPU kernel of varlen_attention (cpu.cpp)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphquant.ops import cpu
from graphquant.ops.varlen_attention.op import varlen_attention


@varlen_attention.cpu_kernel(
    "varlen_attention", refuses=cpu.refuses, rows=(), strided=("q", "k", "v", "bias")
)
def arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    position: Tensor,
    tiles: Tensor,
    scale: float,
    max_length: int,
    causal: bool,
    window: int | None,
    bias: Tensor | None,
    out: tuple[Tensor, ...],
) -> tuple[Any, ...]:
    _, H, _, D = q.shape
    return (
        *(cpu.TYPES[q.dtype], H, k.shape[1], D, cu_seqlens.shape[0] - 1, tiles.shape[0]),
        *(*_heads(q), *_heads(k), *_heads(v)),
        *(cu_seqlens, position, tiles, scale, int(causal), -1 if window is None else window),
        0 if bias is None else cpu.TYPES[bias.dtype],
        *_heads(bias),
        out[0],
    )


def _heads(x: Tensor | None) -> tuple[Any, ...]:
    """x [1, heads, rows, columns] as `heads` in attention.h reads it. One head is that of all."""
    if x is None:
        return 0, 0, 0, None
    _, head, row, column = x.stride()
    return 0 if x.shape[1] == 1 else head, row, column, x
