"""Triton kernel of norm_quantize and norm_quantize_keep, for LayerNorm and RMSNorm.

Rows are held in registers; longer ones are read four times (mean, variance, range, write).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphquant.ops.norm_quantize.op import norm_quantize, norm_quantize_keep
from graphquant.ops.numerics import padded, vectors
from graphquant.ops.qparams import QParams
from graphquant.ops.runtime.launch import launch_triton
from graphquant.ops.triton_rows import (
    WHOLE_ROW,
    clamped,
    columns,
    contiguous,
    from_last,
    inside,
    load_block,
    programs,
    quantized,
    range_bits,
    range_of_blocks,
    range_of_lanes,
    row_config,
    rows_of,
    scale_of,
    shift_and_absmax,
    static_shift_and_absmax,
    store_block,
    store_blocks_int8,
    store_int8,
    store_of_rows,
    to_float32,
    widened,
    with_block,
)
from graphquant.ops.triton_util import as_rows, overlap, unit_of, wait_for_inputs

_WHOLE_ROW = tl.constexpr(WHOLE_ROW)


@triton.jit
def _centered(x_ptr, mean, k, K: tl.constexpr):
    """x - mean, 0 beyond K. With mean = 0 this is x itself, exactly: RMSNorm."""
    x = to_float32(tl.load(x_ptr + k, mask=inside(k, K), other=0.0))
    return tl.where(inside(k, K), x - mean[:, None], 0.0)


@triton.jit
def _affine(y, gamma_ptr, beta_ptr, k, K: tl.constexpr):
    if gamma_ptr is not None:
        y = y * to_float32(tl.load(gamma_ptr + k, mask=inside(k, K), other=0.0))
    if beta_ptr is not None:
        y = y + to_float32(tl.load(beta_ptr + k, mask=inside(k, K), other=0.0))
    return y


@triton.jit
def _mean(v, K: tl.constexpr):
    """The sum over a row in blocks, divided by K: [ROWS, 1]."""
    total = v[0]
    for i in tl.static_range(1, len(v)):
        total += widened(v[i], total.shape[1])
    return (tl.sum(total, 1) / K)[:, None]


@triton.jit
def _deviations(x, K: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """x - mean(x) of rows in blocks, 0 beyond K."""
    mean = _mean(x, K)
    d = ()
    for i in tl.static_range(0, len(x)):
        k = columns(i, K, BLOCK, TAIL)
        if i * BLOCK + k.shape[1] <= K:
            d = with_block(d, x[i] - mean)
        else:
            d = with_block(d, tl.where(inside(k, K), x[i] - mean, 0.0))
    return d


@triton.jit(do_not_specialize=["M"])
def norm_quantize_kernel(
    x_ptr, gamma_ptr, beta_ptr, y_ptr, xq_ptr, scale_ptr, shift_ptr, M, x_row, eps,
    factor_ptr, low, high, clip, num_rows_ptr,
    K: tl.constexpr, K_PAD: tl.constexpr, XQ_ROW: tl.constexpr,
    X_UNIT: tl.constexpr, RMS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, LANES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """xq, x_scale, x_shift = quantize_rows(y, ...), y = norm(x), see `programs`."""
    wait_for_inputs(OVERLAP)
    eps = tl.cast(eps, tl.float32)  # Inductor passes float64
    first = from_last()
    if K <= _WHOLE_ROW:
        if num_rows_ptr is None:
            _norm_quantize_whole(
                x_ptr, gamma_ptr, beta_ptr, y_ptr, xq_ptr, scale_ptr, shift_ptr, first, M,
                x_row, eps, factor_ptr, low, high, clip,
                K, K_PAD, XQ_ROW, X_UNIT, RMS, ROWS, BLOCK, TAIL, LANES,
            )  # fmt: skip
        else:
            parts = tl.cdiv(tl.load(num_rows_ptr), ROWS)
            for part in range(first, parts, tl.num_programs(0)):
                _norm_quantize_whole(
                    x_ptr, gamma_ptr, beta_ptr, y_ptr, xq_ptr, scale_ptr, shift_ptr, part, M,
                    x_row, eps, factor_ptr, low, high, clip,
                    K, K_PAD, XQ_ROW, X_UNIT, RMS, ROWS, BLOCK, TAIL, LANES,
                )  # fmt: skip
    else:
        if num_rows_ptr is not None:
            if first * ROWS >= tl.load(num_rows_ptr):
                return
        row = rows_of(first, M, ROWS)
        x_ptr += (row * x_row * X_UNIT)[:, None]
        xq_ptr += (row * XQ_ROW)[:, None]
        if y_ptr is not None:
            y_ptr += (row * K)[:, None]
        k = tl.arange(0, BLOCK)[None, :]
        mean = tl.zeros((ROWS,), tl.float32)
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        if not RMS:
            for start in range(0, K, BLOCK):
                total += _centered(x_ptr, mean, start + k, K)
            mean = tl.sum(total, 1) / K
            total = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, K, BLOCK):
            d = _centered(x_ptr, mean, start + k, K)
            total += d * d
        rstd = tl.rsqrt(tl.sum(total, 1) / K + eps)
        least, most = range_bits(tl.zeros((ROWS, BLOCK), tl.float32))
        if low is None or y_ptr is not None:
            for start in range(0, K, BLOCK):
                at = start + k
                d = _centered(x_ptr, mean, at, K) * rstd[:, None]
                y = _affine(d, gamma_ptr, beta_ptr, at, K)
                next_least, next_most = range_bits(quantized(y, factor_ptr, at, low, high, clip, K))
                least, most = tl.maximum(least, next_least), tl.maximum(most, next_most)
                if y_ptr is not None:
                    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside(at, K))
        if low is not None:
            shift, absmax = static_shift_and_absmax(low, high, ROWS)
        else:
            least, most = range_of_lanes(least, most, LANES)
            shift, absmax = shift_and_absmax(least, most)
        for start in range(0, K_PAD, BLOCK):
            at = start + k
            y = _affine(_centered(x_ptr, mean, at, K) * rstd[:, None], gamma_ptr, beta_ptr, at, K)
            y = quantized(y, factor_ptr, at, low, high, clip, K)
            store_int8(xq_ptr, at, y, shift, absmax, K_PAD, True)
        store_of_rows(scale_ptr, row, scale_of(absmax), LANES)
        store_of_rows(shift_ptr, row, shift, LANES)


@triton.jit
def _norm_quantize_whole(
    x_ptr, gamma_ptr, beta_ptr, y_ptr, xq_ptr, scale_ptr, shift_ptr, part, M,
    x_row, eps, factor_ptr, low, high, clip,
    K: tl.constexpr, K_PAD: tl.constexpr, XQ_ROW: tl.constexpr,
    X_UNIT: tl.constexpr, RMS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """norm_quantize_kernel for rows of at most WHOLE_ROW elements: ROWS of them, number part."""
    row = rows_of(part, M, ROWS)
    x_ptr += (row * x_row * X_UNIT)[:, None]
    xq_ptr += (row * XQ_ROW)[:, None]
    if y_ptr is not None:
        y_ptr += (row * K)[:, None]
    d = ()
    for i in tl.static_range(0, (K + BLOCK - 1) // BLOCK):
        d = with_block(d, load_block(x_ptr, i, K, BLOCK, TAIL, ""))
    if not RMS:
        d = _deviations(d, K, BLOCK, TAIL)
    squares = ()
    for i in tl.static_range(0, len(d)):
        squares = with_block(squares, d[i] * d[i])
    rstd = tl.rsqrt(_mean(squares, K) + eps)
    # Each row reads gamma and beta itself, from L1, where evict_last keeps them (4 to 15 % of
    # the time). To share them, rows would have to synchronize at every block.
    each = tl.zeros((ROWS, 1), tl.int32)
    y = ()
    for i in tl.static_range(0, len(d)):
        block = d[i] * rstd
        if gamma_ptr is not None:
            block = block * load_block(gamma_ptr + each, i, K, BLOCK, TAIL, "evict_last")
        if beta_ptr is not None:
            block = block + load_block(beta_ptr + each, i, K, BLOCK, TAIL, "evict_last")
        if y_ptr is not None:
            store_block(y_ptr, i, block.to(y_ptr.dtype.element_ty), K, BLOCK, TAIL)
        if factor_ptr is not None:
            block = block * load_block(factor_ptr + each, i, K, BLOCK, TAIL, "evict_last")
        y = with_block(y, clamped(block, low, high, clip))
    if low is not None:
        shift, absmax = static_shift_and_absmax(low, high, ROWS)
    else:
        least, most = range_of_blocks(y, LANES)
        shift, absmax = shift_and_absmax(least, most)
    store_blocks_int8(xq_ptr, y, shift, absmax, K_PAD, BLOCK, TAIL)
    store_of_rows(scale_ptr, row, scale_of(absmax), LANES)
    store_of_rows(shift_ptr, row, shift, LANES)


def _launch(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    rms: bool,
    y: Tensor | None,
    qparams: QParams,
    triple: tuple[Tensor, ...],
) -> None:
    K = x.shape[-1]
    M = x.numel() // K
    if M == 0:
        return
    x, x_row = as_rows(x)
    unit, config = unit_of(x_row), row_config(K)
    launch_triton(
        norm_quantize_kernel, (programs(M, K, config, qparams.num_rows),),
        x, None if gamma is None else gamma.contiguous(),
        None if beta is None else beta.contiguous(), y, *triple, M, x_row // unit, eps,
        *contiguous(qparams),
        K=K, K_PAD=vectors(K), XQ_ROW=padded(K), X_UNIT=unit, RMS=rms, **config,
        **overlap(x.device),
    )  # fmt: skip


@norm_quantize.kernel("triton")
def norm_quantize_triton(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    rms: bool,
    *qparams: Any,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    _launch(x, gamma, beta, eps, rms, None, QParams(*qparams), out)


@norm_quantize_keep.kernel("triton")
def norm_quantize_keep_triton(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
    *qparams: Any,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    y, *triple = out
    _launch(x, gamma, beta, eps, rms, y, QParams(*qparams), tuple(triple))
