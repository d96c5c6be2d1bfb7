"""torch's own attention, for GPUs other than Hopper: a program that was exported on one stays right
elsewhere."""

from __future__ import annotations

from torch import Tensor

from graphquant.ops.attention.op import attention


@attention.kernel("sdpa")
def attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, tile: str, out: tuple[Tensor]
) -> None:
    (y,) = out
    if y.numel() == 0:  # torch 2.11 returns None instead of an empty result
        return
    y.copy_(attention.float_form(q, k, v, scale, tile))
