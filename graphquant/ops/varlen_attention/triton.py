"""Triton kernel of varlen_attention: one program for each tile of 64 queries of a head.

Keys are in blocks from the sequence's first one on, whose size depends on the type and the width of
heads alone: so does the order in which a row's terms are added.
"""

from __future__ import annotations

import functools
import operator

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphquant.ops.runtime.launch import launch_triton
from graphquant.ops.token_index.op import TILE
from graphquant.ops.triton_util import overlap, unit_of, wait_for_inputs
from graphquant.ops.varlen_attention.op import varlen_attention

WIDEST = 128  # columns of a head that registers and shared memory have room for
FARTHEST = 2**30  # of windows: sums with it are int32
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_TILE = tl.constexpr(TILE)
_LOG2_E = tl.constexpr(1.4426950408889634)
_NOTHING = tl.constexpr(-1e38)  # a row max that is subtracted where no key has been seen yet


@triton.jit
def dot(a, b, c):
    if _INTERPRETED:  # it multiplies the bits of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit(do_not_specialize=["window"])
def varlen_attention_kernel(
    q_ptr, k_ptr, v_ptr, cu_seqlens_ptr, position_ptr, tiles_ptr, bias_ptr, y_ptr,
    q_head, q_row, k_head, k_row, v_head, v_row, bias_head, bias_row, bias_column, scale, window,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """y = softmax(scale q k^T + bias) v, of one tile and one head. Strides are in UNITs."""
    wait_for_inputs(OVERLAP)
    head, tile = tl.program_id(0) % H, tl.program_id(0) // H
    sequence = tl.load(tiles_ptr + 2 * tile)
    if sequence < 0:
        return
    first = tl.load(tiles_ptr + 2 * tile + 1)
    begin = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - begin
    scale = tl.cast(scale, tl.float32) * _LOG2_E  # Inductor passes float64
    position_ptr += begin
    q_ptr += (head.to(tl.int64) * q_head + begin.to(tl.int64) * q_row) * UNIT
    k_ptr += (head.to(tl.int64) // GROUP * k_head + begin.to(tl.int64) * k_row) * UNIT
    v_ptr += (head.to(tl.int64) // GROUP * v_head + begin.to(tl.int64) * v_row) * UNIT
    y_ptr += (begin.to(tl.int64) * H + head) * D

    i = first + tl.arange(0, _TILE)
    d = tl.arange(0, BLOCK_D)
    inside = (i < length)[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + i.to(tl.int64)[:, None] * q_row * UNIT + d[None, :], inside, other=0.0)
    p_i = tl.load(position_ptr + i, i < length, other=0)
    if bias_ptr is not None:
        bias_ptr += head.to(tl.int64) * bias_head + p_i.to(tl.int64)[:, None] * bias_row

    low, high = 0, length
    if CAUSAL:
        high = tl.minimum(high, first + _TILE)
    if window is not None:  # as far apart in position as in rows, or farther
        low = tl.maximum(first - window, 0) // BLOCK * BLOCK
        high = tl.minimum(high, first + _TILE + window)
    top = tl.full((_TILE,), _NOTHING, tl.float32)
    total = tl.zeros((_TILE,), tl.float32)
    y = tl.zeros((_TILE, BLOCK_D), tl.float32)
    for start in range(low, high, BLOCK):
        j = start + tl.arange(0, BLOCK)
        at = j.to(tl.int64)
        key = j < length
        k = tl.load(
            k_ptr + at[None, :] * k_row * UNIT + d[:, None], key[None, :] & (d < D)[:, None], 0.0
        )
        s = dot(q, k, tl.zeros((_TILE, BLOCK), tl.float32)) * scale
        seen = key[None, :]
        if CAUSAL:
            seen = seen & (j[None, :] <= i[:, None])
        if (window is not None) or (bias_ptr is not None):
            p_j = tl.load(position_ptr + j, key, other=0)
        if window is not None:
            seen = seen & (tl.abs(p_i[:, None] - p_j[None, :]) <= window)
        if bias_ptr is not None:
            of = bias_ptr + p_j.to(tl.int64)[None, :] * bias_column
            s += tl.load(of, key[None, :], other=0.0).to(tl.float32) * _LOG2_E
        s = tl.where(seen, s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        top = higher
        v = tl.load(
            v_ptr + at[:, None] * v_row * UNIT + d[None, :], key[:, None] & (d < D)[None, :], 0.0
        )
        y = dot(p.to(v.dtype), v, y * shrink[:, None])
    y = (y / total[:, None]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + i.to(tl.int64)[:, None] * (H * D) + d[None, :], y, inside)


def config(D: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of blocks, and how the kernel is compiled: by the type and the width of heads alone."""
    wide = dtype == torch.float32
    return {
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "BLOCK": 16 if wide else 64,
        "num_warps": (16 if D > 64 else 8) if wide else 4,
        "num_stages": 1 if wide else 2,
    }


def _refuses(q: Tensor, *_: object) -> str | None:
    D = q.shape[3]
    return f"heads have {D} columns, at most {WIDEST} are supported" if D > WIDEST else None


def _unit(strides: list[int]) -> int:
    """The largest power of two up to 16 that divides all strides; 1 if one is symbolic."""
    known = all(isinstance(n, int) for n in strides)
    return unit_of(functools.reduce(operator.or_, strides)) if known else 1


def _of_bias(bias: Tensor | None) -> tuple[int, ...]:
    """Strides from head to head, row to row, column to column. One head is that of all."""
    if bias is None:
        return 0, 0, 0
    _, head, row, column = bias.stride()
    return 0 if bias.shape[1] == 1 else head, row, column


@varlen_attention.kernel("triton", refuses=_refuses)
def varlen_attention_triton(
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
    *,
    out: tuple[Tensor],
) -> None:
    (y,) = out
    _, H, T, D = y.shape
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    strides = [n for t in (q, k, v) for n in t.stride()[1:3]]
    unit = _unit(strides)
    n = torch.sym_min(tiles.shape[0], T // TILE + cu_seqlens.shape[0] - 1)
    launch_triton(
        varlen_attention_kernel, (n * H,),
        q, k, v, cu_seqlens, position, tiles, bias, y,
        *(n // unit for n in strides), *_of_bias(bias), scale,
        None if window is None else min(window, FARTHEST),
        H=H, GROUP=H // k.shape[1], D=D, CAUSAL=causal, UNIT=unit,
        **config(D, q.dtype),
        **overlap(q.device),
    )  # fmt: skip
