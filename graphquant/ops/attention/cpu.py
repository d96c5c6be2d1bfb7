"""CPU kernel of attention (cpu.cpp)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphquant.ops import cpu
from graphquant.ops.attention.op import Operands, attention


def _refuses(*args: Any) -> str | None:
    q, k, *_, causal, window, bias = Operands(*args)
    if causal or window is not None or bias is not None:
        return "of masks it takes key_mask alone"
    if k.shape[1] != q.shape[1]:
        return f"q has {q.shape[1]} heads, k has {k.shape[1]}"
    return cpu.refuses(q)


@attention.cpu_kernel("attention", refuses=_refuses, rows=(), strided=("q", "k", "v"))
def arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    tile: str | None,
    key_mask: Tensor | None,
    causal: bool,
    window: int | None,
    bias: Tensor | None,
    out: tuple[Tensor, ...],
) -> tuple[Any, ...]:
    B, H, S, D = q.shape
    return (
        *(cpu.TYPES[q.dtype], B, S, k.shape[2], H, D),
        *(*q.stride(), q, *k.stride(), k, *v.stride(), v),
        *(scale, key_mask, out[0]),
    )
