"""Float attention of padded batches, faster than torch's at the lengths of encoders.

    y_i = sum_j softmax_j(scale q_i k_j + bias_ij) v_j     per head, accumulators and softmax in
                                                          float32; 0 if i sees no key j

    q         [B, H, S, D]    float16 | bfloat16 | float32, any strides
    k, v      [B, Hkv, T, D]  like q; T >= 1; H is a multiple of Hkv (grouped heads)
    scale     of the scores, > 0, usually D ** -0.5
    tile      a name in TILES, queries x keys: the tile shape of the CUDA kernel; or MASKED, the one
              that takes what follows. The result is the same up to rounding. None, where no CUDA
              kernel of ours is to run: a CPU has no tiles
    key_mask  [B, T] bool: the keys that are seen; None: all. v must be finite at the others.
    causal    query i sees the keys with j <= i; needs S = T
    window    query i sees the keys with |i - j| <= window, and only those are computed; None: all;
              needs S = T
    bias      [B or 1, H or 1, S, T]  float16 | bfloat16 | float32, any strides
    -> y      [B, H, S, D]  like q, and [B, S, H, D] in memory, as the linear that follows reads it

torch's fused kernels work on tiles of 64 to 128 tokens and head sizes of 64 or 128: for 257 image
tokens, or a head size of 72, they compute up to twice as much as needed. With a mask they compute
all that it hides. The CUDA kernels are for Hopper, in fp16 and bf16, with |v| up to 2^85. On other
GPUs the rewrite does not call the op; a program that was exported with it runs torch's attention
there. The CPU kernel takes key_mask alone. It is that of varlen_attention, and gives a sequence the
same bits.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphquant.errors import UnsupportedInputError
from graphquant.ops import checks
from graphquant.ops.attention.hopper_tiles import MASKED, TILES
from graphquant.ops.define import define


class Operands(NamedTuple):
    """The op's arguments, in order."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    tile: str | None = None
    key_mask: Tensor | None = None
    causal: bool = False
    window: int | None = None
    bias: Tensor | None = None


def _check(*args: Any) -> None:
    q, k, v, scale, tile, key_mask, causal, window, bias = Operands(*args)
    if tile is not None and tile not in TILES and tile != MASKED:
        names = ", ".join((*TILES, MASKED))
        raise UnsupportedInputError(f"attention: tile is {tile!r}, needs one of {names}")
    if not scale > 0:
        raise UnsupportedInputError(f"attention: scale is {scale}, needs > 0")
    if window is not None and window < 0:
        raise UnsupportedInputError(f"attention: window is {window}, needs >= 0")
    for name, t in (("q", q), ("k", k), ("v", v)):
        checks.rows("attention", name, t, (q.dtype,) if q.dtype in checks.FLOATS else checks.FLOATS)
        if t.dim() != 4:
            raise UnsupportedInputError(f"attention: {name} has {t.dim()} dims, needs [B, H, _, D]")
    checks.one_device("attention", q=q, k=k, v=v, key_mask=key_mask, bias=bias)
    checks.nonempty("attention", "k", k, 2, "T >= 1")
    (B, H, S, D), (Hkv, T) = q.shape, k.shape[1:3]
    checks.shape("attention", "k", k, (B, Hkv, T, D), "[B, Hkv, T, D] like q")
    checks.shape("attention", "v", v, (B, Hkv, T, D), "[B, Hkv, T, D] like k")
    if Hkv != H and (Hkv == 0 or H % Hkv):
        raise UnsupportedInputError(f"attention: q has {H} heads, needs a multiple of k's, {Hkv}")
    if causal or window is not None:
        checks.shape("attention", "k", k, (B, Hkv, S, D), "as many keys as queries")
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise UnsupportedInputError(f"attention: key_mask is {key_mask.dtype}, needs bool")
        checks.shape("attention", "key_mask", key_mask, (B, T), "[B, T] like k")
    if bias is not None:
        checks.floating("attention", "bias", bias)
        lead = [
            size if bias.dim() == 4 and bias.shape[i] != 1 else 1 for i, size in enumerate((B, H))
        ]
        checks.shape("attention", "bias", bias, (*lead, S, T), "[B or 1, H or 1, S, T]")


def _fake(q: Tensor, *rest: object) -> Tensor:
    B, H, S, D = q.shape
    return torch.empty((B, S, H, D), dtype=q.dtype, device=q.device).transpose(1, 2)


def _float_form(*args: Any) -> Tensor:
    q, k, v, scale, _, key_mask, causal, window, bias = Operands(*args)
    seen = seen_keys(q, k, key_mask, causal, window)
    mask = seen
    if bias is not None:
        added = bias.to(q.dtype)
        mask = added if seen is None else torch.where(seen, added, -torch.inf)
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def seen_keys(
    q: Tensor, k: Tensor, key_mask: Tensor | None, causal: bool, window: int | None
) -> Tensor | None:
    """Which keys each query sees, as broadcasts to [B, 1, S, T]; None: all."""
    found = [] if key_mask is None else [key_mask.unsqueeze(1).unsqueeze(1)]
    if causal or window is not None:
        i = torch.arange(q.shape[2], device=q.device).unsqueeze(1)
        j = torch.arange(k.shape[2], device=q.device)
        if causal:
            found.append(j <= i)
        if window is not None:
            found.append((j - i).abs() <= window)
    return functools.reduce(operator.and_, found) if found else None


@define(
    "(Tensor q, Tensor k, Tensor v, float scale, str? tile=None, Tensor? key_mask=None,"
    " bool causal=False, int? window=None, Tensor? bias=None) -> Tensor y",
    float_form=_float_form,
    fake=_fake,
    check=_check,
    kernels=("hopper", "hopper_padded", "sdpa"),
    in_rows=False,
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    tile: str | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    rest = scale, tile, key_mask, causal, window, bias
    y = _float_form(q.float(), k.float(), v.float(), *rest)
    y = y.to(q.dtype).transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return y.transpose(1, 2)  # [B, S, H, D] in memory
