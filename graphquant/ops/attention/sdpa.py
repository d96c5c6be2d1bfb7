"""torch's SDPA as a kernel of attention, for programs that were exported on Hopper and run on other
GPUs."""

from __future__ import annotations

from torch import Tensor

from graphquant.ops.attention.op import attention, seen_keys


@attention.kernel("sdpa")
def attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    tile: str | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    bias: Tensor | None = None,
    *,
    out: tuple[Tensor],
) -> None:
    (y,) = out
    if y.numel() == 0:  # torch 2.11 returns None instead of an empty result
        return
    y.copy_(attention.float_form(q, k, v, scale, tile, key_mask, causal, window, bias))
    seen = seen_keys(q, k, key_mask, causal, window)
    if seen is not None:  # some of torch's kernels return nan for a query that sees no key
        y.masked_fill_(~seen.any(-1, keepdim=True), 0.0)
