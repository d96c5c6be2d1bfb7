"""Tiles read through pointers: sm_80 and up, any M, N, K and strides.

Rows that do not start at multiples of 16 bytes (nothing that `quantize` made) are copied first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphquant.ops.int8_linear import tiles
from graphquant.ops.int8_linear.op import int8_linear
from graphquant.ops.numerics import ALIGN, empty_rows, padded
from graphquant.ops.triton_util import as_rows, chip, dequantize, row_stride, tile_of, unit_of

OLDEST = 80  # Ampere: int8 tensor cores with asynchronous copies


@triton.jit(do_not_specialize=["M"])
def int8_linear_kernel(
    xq_ptr, x_scale_ptr, x_shift_ptr, wq_ptr, w_scale_ptr, w_sum_ptr, bias_ptr, residual_ptr, y_ptr,
    M, N, K, K_pad, x_row, w_row, residual_row,
    RESIDUAL_UNIT: tl.constexpr, TAIL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile of y. TAIL: K is no multiple of BK.

    The tail is read up to K_pad, a multiple of 16 (wide loads), and xq is zeroed from K on: what
    the pads hold does not matter.
    """
    m0, n0 = tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    m, n, k = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN), tl.arange(0, BK)
    # rows past the end read row 0 and are never stored: no mask in the main loop
    x_at = xq_ptr + (tl.where(m < M, m, 0).to(tl.int64) * x_row)[:, None] + k[None, :]
    w_at = wq_ptr + (tl.where(n < N, n, 0).to(tl.int64) * w_row)[:, None] + k[None, :]
    acc = tl.zeros((BM, BN), tl.int32)
    for _ in range(K // BK):
        acc = tl.dot(tl.load(x_at), tl.load(w_at).T, acc, out_dtype=tl.int32)
        x_at += BK
        w_at += BK
    if TAIL:
        live = (k < K_pad - K // BK * BK)[None, :]
        x, w = tl.load(x_at, mask=live, other=0), tl.load(w_at, mask=live, other=0)
        x = tl.where((k < K % BK)[None, :], x, 0)
        acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)
    y = dequantize(
        acc, m, n, x_scale_ptr, x_shift_ptr, w_scale_ptr, w_sum_ptr, bias_ptr, residual_ptr,
        M, N, residual_row, RESIDUAL_UNIT,
    )  # fmt: skip
    y_at = y_ptr + (m.to(tl.int64) * N)[:, None] + n[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def _aligned_rows(q: Tensor) -> tuple[Tensor, int]:
    """(q or a copy, row stride): rows of padded(K) readable bytes, each at a multiple of 16."""
    K = q.shape[-1]
    row = row_stride(q)
    if row is not None and row % ALIGN == 0 and q.data_ptr() % ALIGN == 0:
        end = q.storage_offset() + (q.numel() // K - 1) * row + padded(K)
        if end <= q.untyped_storage().nbytes():
            return q, row
    return empty_rows(q, q.shape).copy_(q), padded(K)


def _refuses(
    xq: Tensor,
    x_scale: Tensor,
    x_shift: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> str | None:
    sm = chip(xq.device).sm
    return None if sm >= OLDEST else f"the device is sm_{sm}, needs sm_{OLDEST} or later"


@int8_linear.kernel("triton", refuses=_refuses)
def int8_linear_triton(
    xq: Tensor,
    x_scale: Tensor,
    x_shift: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    N, K = wq.shape
    M = xq.numel() // K
    y = xq.new_empty((*xq.shape[:-1], N), dtype=dtype)
    if y.numel() == 0:
        return y
    xq, x_row = _aligned_rows(xq)
    wq, w_row = _aligned_rows(wq)
    residual_row = 0
    if residual is not None:
        residual, residual_row = as_rows(residual)
    unit = unit_of(residual_row)
    tile = tiles.choose(tiles.POINTER, M, N, K, chip(xq.device))
    int8_linear_kernel[(tile.count(M, N),)](
        xq, x_scale.contiguous(), x_shift.contiguous(),
        wq, w_scale.contiguous(), w_sum.contiguous(),
        None if bias is None else bias.contiguous(), residual, y,
        M, N, K, padded(K), x_row, w_row, residual_row // unit,
        RESIDUAL_UNIT=unit, TAIL=K % tile.k != 0,
        BM=tile.m, BN=tile.n, BK=tile.k, GROUP=tiles.GROUP,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y
