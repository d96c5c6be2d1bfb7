"""torch's SDPA as a kernel of attention, for programs that were exported on Hopper and run on other
GPUs."""

from __future__ import annotations

from torch import Tensor

from graphquant.ops.attention.op import attention


@attention.kernel("sdpa")
def attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, tile: str | None, out: tuple[Tensor]
) -> None:
    (y,) = out
    if y.numel() == 0:  # torch 2.11 returns None instead of an empty result
        return
    y.copy_(attention.float_form(q, k, v, scale, tile))
