"""Float attention without a mask, faster than torch's at the lengths of encoders.

    y = softmax(scale q k^T) v        per head, accumulators and softmax in float32

    q       [B, H, S, D]  float16 | bfloat16 | float32, any strides
    k, v    [B, H, T, D]  like q; T >= 1
    scale   of the scores, > 0, usually D ** -0.5
    tile    a name in TILES, queries x keys: the tile shape of the CUDA kernel; the result is the
            same up to rounding. None, where no CUDA kernel of ours is to run: a CPU has no tiles
    -> y    [B, H, S, D]  like q, and [B, S, H, D] in memory, as the linear that follows reads it

torch's fused kernels work on tiles of 64 to 128 tokens and head sizes of 64 or 128: for 257 image
tokens, or a head size of 72, they compute up to twice as much as needed. The CUDA kernel is for
Hopper, in fp16 and bf16. On other GPUs the rewrite does not call the op; a program that was
exported with it runs torch's attention there. The CPU kernel is that of varlen_attention, and gives
a sequence the same bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphquant.errors import UnsupportedInputError
from graphquant.ops import checks
from graphquant.ops.attention.hopper_tiles import TILES
from graphquant.ops.define import define


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float, tile: str | None = None) -> None:
    if tile is not None and tile not in TILES:
        raise UnsupportedInputError(f"attention: tile is {tile!r}, needs one of {', '.join(TILES)}")
    if not scale > 0:
        raise UnsupportedInputError(f"attention: scale is {scale}, needs > 0")
    for name, t in (("q", q), ("k", k), ("v", v)):
        checks.rows("attention", name, t, (q.dtype,) if q.dtype in checks.FLOATS else checks.FLOATS)
        if t.dim() != 4:
            raise UnsupportedInputError(f"attention: {name} has {t.dim()} dims, needs [B, H, _, D]")
    checks.one_device("attention", q=q, k=k, v=v)
    checks.nonempty("attention", "k", k, 2, "T >= 1")
    B, H, _, D = q.shape
    checks.shape("attention", "k", k, (B, H, k.shape[2], D), "[B, H, T, D] like q")
    checks.shape("attention", "v", v, (B, H, k.shape[2], D), "[B, H, T, D] like k")


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float, tile: str | None = None) -> Tensor:
    B, H, S, D = q.shape
    return torch.empty((B, S, H, D), dtype=q.dtype, device=q.device).transpose(1, 2)


def _float_form(q: Tensor, k: Tensor, v: Tensor, scale: float, tile: str | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


@define(
    "(Tensor q, Tensor k, Tensor v, float scale, str? tile=None) -> Tensor y",
    float_form=_float_form,
    fake=_fake,
    check=_check,
    kernels=("hopper", "sdpa"),
    in_rows=False,
)
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, tile: str | None = None) -> Tensor:
    y = _float_form(q.float(), k.float(), v.float(), scale, tile)
    y = y.to(q.dtype).transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return y.transpose(1, 2)  # [B, S, H, D] in memory
