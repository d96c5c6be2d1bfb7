"""Attention of the sequences of a packed batch, each to itself.

    y_i = sum_j softmax_j(scale q_i k_j + bias[p_i, p_j]) v_j     i, j in one sequence; per head,
                                                          accumulators and softmax in float32

    q            [1, H, T, D]    float16 | bfloat16 | float32, any strides
    k, v         [1, Hkv, T, D]  like q; H is a multiple of Hkv (grouped heads)
    cu_seqlens   [B + 1] int32   sequence b is the rows cu_seqlens[b] <= i < cu_seqlens[b + 1]
    position     [T]     int32   p: the place of each row in its padded sequence; increases
                                 strictly within a sequence, with gaps where a mask has holes
    tiles        [n, 2]  int32   (sequence, first row in it) of each 64 rows of queries, in the
                                 order in which they are computed; -1: none (token_index has them)
    scale        of the scores, > 0
    max_length   no sequence is longer, and no position is higher than max_length - 1
    causal       a query sees the keys with p_j <= p_i
    window       a query sees the keys with |p_i - p_j| <= window; None: all
    bias         [1, H or 1, S, S]  float16 | bfloat16 | float32, any strides, S >= max_length
    -> y         [1, H, T, D]    like q, and [1, T, H, D] in memory, as the linear that follows
                                 reads it. Rows from cu_seqlens[B] on are not specified.

What is in rows from cu_seqlens[B] on, nan for instance, is in no other row's result. A row's result
is the same, bit for bit, in any batch that its sequence is in.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphquant.errors import UnsupportedInputError
from graphquant.ops import checks
from graphquant.ops.define import define


class Operands(NamedTuple):
    """The op's arguments, in order."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor
    position: Tensor
    tiles: Tensor
    scale: float
    max_length: int
    causal: bool = False
    window: int | None = None
    bias: Tensor | None = None


def _check(*args: Any) -> None:
    q, k, v, cu_seqlens, position, tiles, scale, max_length, _, window, bias = Operands(*args)
    op = "varlen_attention"
    if not (scale > 0 and math.isfinite(scale)):
        raise UnsupportedInputError(f"{op}: scale is {scale}, needs a finite number > 0")
    if window is not None and window < 0:
        raise UnsupportedInputError(f"{op}: window is {window}, needs >= 0")
    for name, t in (("q", q), ("k", k), ("v", v)):
        checks.rows(op, name, t, (q.dtype,) if q.dtype in checks.FLOATS else checks.FLOATS)
        if t.dim() != 4:
            raise UnsupportedInputError(f"{op}: {name} has {t.dim()} dims, needs [1, H, T, D]")
    _, H, T, D = q.shape
    Hkv = k.shape[1]
    checks.shape(op, "q", q, (1, H, T, D), "[1, H, T, D]")
    checks.nonempty(op, "k", k, 1, "Hkv >= 1")
    checks.shape(op, "k", k, (1, Hkv, T, D), "[1, Hkv, T, D] like q")
    checks.shape(op, "v", v, (1, Hkv, T, D), "[1, Hkv, T, D] like k")
    if H % Hkv:
        raise UnsupportedInputError(f"{op}: q has {H} heads, needs a multiple of k's, {Hkv}")
    for name, t in (("cu_seqlens", cu_seqlens), ("position", position), ("tiles", tiles)):
        if t.dtype != torch.int32:
            raise UnsupportedInputError(f"{op}: {name} is {t.dtype}, needs torch.int32")
    checks.shape(op, "cu_seqlens", cu_seqlens, cu_seqlens.shape[-1:], "[B + 1]")
    checks.at_least(op, "cu_seqlens", cu_seqlens, 0, 2, "[B + 1], B >= 1")
    checks.shape(op, "position", position, (T,), "[T] like q")
    checks.shape(op, "tiles", tiles, (*tiles.shape[:1], 2), "[n, 2]")
    checks.nonempty(op, "tiles", tiles, 0, "n >= 1")
    if bias is not None:
        S = bias.shape[-1]
        heads = H if bias.dim() > 1 and bias.shape[1] != 1 else 1
        checks.floating(op, "bias", bias)
        checks.shape(op, "bias", bias, (1, heads, S, S), "[1, H or 1, S, S]")
        checks.at_least(op, "bias", bias, -1, max_length, "S >= max_length")
    checks.one_device(
        op, q=q, k=k, v=v, cu_seqlens=cu_seqlens, position=position, tiles=tiles, bias=bias
    )


def _fake(q: Tensor, *rest: Any) -> Tensor:
    _, H, T, D = q.shape
    return q.new_empty((1, T, H, D)).transpose(1, 2)


def _float_form(*args: Any) -> Tensor:
    """With a mask of all pairs of rows; 0 in rows of no sequence."""
    q, k, v, cu_seqlens, position, _, scale, _, causal, window, bias = Operands(*args)
    row, p = torch.arange(q.shape[2], device=q.device), position.long()
    ends = cu_seqlens[1:].long()
    sequence = torch.bucketize(row, ends, right=True)
    seen = sequence[:, None] == sequence
    if causal:
        seen = seen & (p <= p[:, None])
    if window is not None:
        seen = seen & ((p - p[:, None]).abs() <= window)
    added = q.new_zeros(()) if bias is None else bias[:, :, p[:, None], p].to(q.dtype)
    mask = torch.where(seen, added, -torch.inf)
    is_token = (sequence < ends.shape[0])[:, None]
    q, k, v = (torch.where(is_token, t, 0) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


@define(
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor position, Tensor tiles, float scale,"
    " SymInt max_length, bool causal=False, int? window=None, Tensor? bias=None) -> Tensor y",
    float_form=_float_form,
    fake=_fake,
    check=_check,
    kernels=("hopper", "triton"),
    in_rows=False,
)
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    position: Tensor,
    tiles: Tensor,
    scale: float,
    max_length: int,
    causal: bool = False,
    window: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    y = _fake(q).zero_()
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        own = slice(start, end)
        one = (t[:, :, own].float() for t in (q, k, v))
        alone = cu_seqlens.new_tensor([0, end - start]), position[own], tiles
        rest = scale, max_length, causal, window, bias
        y[:, :, own] = varlen_attention.float_form(*one, *alone, *rest)
    return y
