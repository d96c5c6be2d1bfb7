"""Triton kernel of int8_linear with pointer loads: sm_80 and up, any M, N, K and strides.

Rows that do not start at multiples of 16 bytes, as those of `quantize` do, are copied first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphquant.ops.int8_linear import tiles
from graphquant.ops.int8_linear.tiled import Operands, Problem, Tiled, tiled
from graphquant.ops.int8_linear.tiles import Tile
from graphquant.ops.int8_linear.triton_tile import dequantize, tile_of
from graphquant.ops.numerics import ALIGN, empty_rows, padded, row_stride, vectors
from graphquant.ops.runtime.chips import OLDEST
from graphquant.ops.runtime.device import gpu_properties
from graphquant.ops.runtime.launch import launch_triton
from graphquant.ops.triton_util import as_rows, misaligned, unit_of


@triton.jit(do_not_specialize=["M"])
def int8_linear_kernel(
    xq_ptr, x_scale_ptr, x_shift_ptr, wq_ptr, w_scale_ptr, w_sum_ptr, bias_ptr, residual_ptr, y_ptr,
    M, N, K, K_pad, x_row, w_row, residual_row, num_rows_ptr,
    RESIDUAL_UNIT: tl.constexpr, TAIL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile of y. TAIL: K is no multiple of BK.

    The tail is read up to K_pad, a multiple of 16 (wide loads), and xq is zeroed from K on: what
    the pads hold does not matter.
    """
    m0, n0 = tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    if num_rows_ptr is not None:
        if m0 >= tl.load(num_rows_ptr):
            return
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
    """(q or a copy, row stride): rows of vectors(K) readable bytes, each at a multiple of 16."""
    K = q.shape[-1]
    row = row_stride(q)
    if row is not None and row % ALIGN == 0 and misaligned(q) == 0:
        end = q.storage_offset() + (q.numel() // K - 1) * row + vectors(K)
        if end <= q.untyped_storage().nbytes():
            return q, row
    return empty_rows(q, q.shape).copy_(q), padded(K)


def _refuses(o: Operands, dtype: torch.dtype) -> str | None:
    sm = gpu_properties(o.xq.device).sm
    return None if sm >= OLDEST else f"the device is sm_{sm}, needs sm_{OLDEST} or later"


def _tiles(problem: Problem, device: torch.device) -> tuple[Tile, ...]:
    table = tiles.POINTER
    best = tiles.choose(table, problem.M, problem.N, problem.K, gpu_properties(device))
    return (best, *tiles.fitting(table, gpu_properties(device)))


def _run(tile: Tile, o: Operands, y: Tensor) -> None:
    N, K = o.wq.shape
    M = o.xq.numel() // K
    xq, x_row = _aligned_rows(o.xq)
    wq, w_row = _aligned_rows(o.wq)
    residual, residual_row = (None, 0) if o.residual is None else as_rows(o.residual)
    unit = unit_of(residual_row)
    launch_triton(
        int8_linear_kernel, (tile.count(M, N),),
        xq, o.x_scale.contiguous(), o.x_shift.contiguous(),
        wq, o.w_scale.contiguous(), o.w_sum.contiguous(),
        None if o.bias is None else o.bias.contiguous(), residual, y,
        M, N, K, vectors(K), x_row, w_row, residual_row // unit, o.num_rows,
        RESIDUAL_UNIT=unit, TAIL=K % tile.k != 0,
        BM=tile.m, BN=tile.n, BK=tile.k, GROUP=tiles.GROUP,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


tiled("triton", Tiled(_refuses, _tiles, _run))
