"""Triton kernel of int8_linear with TMA loads: sm_90 and up, rows aligned to 16 bytes.

TMA reads zeros outside [M, K] and [N, K], so any M, N and K are correct; a K that is not a multiple
of 16 needs the padded rows that `quantize` writes. The contents of pads do not matter.
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
from graphquant.ops.numerics import ALIGN, row_stride
from graphquant.ops.runtime.device import gpu_properties
from graphquant.ops.runtime.launch import Blocks, launch_triton
from graphquant.ops.triton_util import as_rows, misaligned, unit_of

OLDEST = 90  # Hopper: the first with TMA


@triton.jit(do_not_specialize=["M"])
def int8_linear_tma_kernel(
    x_desc, x_scale_ptr, x_shift_ptr, w_desc, w_scale_ptr, w_sum_ptr, bias_ptr, residual_ptr,
    y_ptr, y_desc,
    M, N, K, residual_row, num_rows_ptr,
    RESIDUAL_UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile of y, stored through y_desc, or through y_ptr where y_desc is None."""
    m0, n0 = tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    if num_rows_ptr is not None:
        if m0 >= tl.load(num_rows_ptr):
            return
    acc = tl.zeros((BM, BN), tl.int32)
    for step in range(tl.cdiv(K, BK)):
        x = x_desc.load([m0, step * BK])
        w = w_desc.load([n0, step * BK])
        acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)
    m, n = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN)
    y = dequantize(
        acc, m, n, x_scale_ptr, x_shift_ptr, w_scale_ptr, w_sum_ptr, bias_ptr, residual_ptr,
        M, N, residual_row, RESIDUAL_UNIT,
    )  # fmt: skip
    y = y.to(y_ptr.dtype.element_ty)
    if y_desc is not None:
        y_desc.store([m0, n0], y)
    else:
        y_at = y_ptr + (m.to(tl.int64) * N)[:, None] + n[None, :]
        tl.store(y_at, y, mask=(m < M)[:, None] & (n < N)[None, :])


def _refuses(o: Operands, dtype: torch.dtype) -> str | None:
    sm = gpu_properties(o.xq.device).sm
    if sm < OLDEST:
        return f"the device is sm_{sm}, TMA needs sm_{OLDEST} or later"
    for name, q in (("xq", o.xq), ("wq", o.wq)):
        row = row_stride(q)
        if row is None:
            return f"{name} with strides {tuple(q.stride())} is not rows of consecutive bytes"
        if row % ALIGN or row < q.shape[-1]:
            return f"{name} has rows {row} bytes apart, TMA needs a multiple of {ALIGN}"
        if off := misaligned(q):
            return f"{name} starts {off} bytes after a multiple of {ALIGN}"
    return None


def _tiles(problem: Problem, device: torch.device) -> tuple[Tile, ...]:
    table = tiles.tma_table(problem.dtype.itemsize, _by_tma(problem.N, problem.dtype))
    best = tiles.choose(table, problem.M, problem.N, problem.K, gpu_properties(device))
    return (best, *tiles.fitting(table, gpu_properties(device)))


def _run(tile: Tile, o: Operands, y: Tensor) -> None:
    N, K = o.wq.shape
    M = o.xq.numel() // K
    residual, residual_row = (None, 0) if o.residual is None else as_rows(o.residual)
    unit = unit_of(residual_row)
    xq, x_row = as_rows(o.xq)
    wq, w_row = as_rows(o.wq)
    y_desc = Blocks(y, (M, N), N, (tile.m, tile.n), optional=True) if _by_tma(N, y.dtype) else None
    launch_triton(
        int8_linear_tma_kernel, (tile.count(M, N),),
        Blocks(xq, (M, K), x_row, (tile.m, tile.k)),
        o.x_scale.contiguous(), o.x_shift.contiguous(),
        Blocks(wq, (N, K), w_row, (tile.n, tile.k)),
        o.w_scale.contiguous(), o.w_sum.contiguous(),
        None if o.bias is None else o.bias.contiguous(), residual, y, y_desc,
        M, N, K, residual_row // unit, o.num_rows,
        RESIDUAL_UNIT=unit, BM=tile.m, BN=tile.n, BK=tile.k, GROUP=tiles.GROUP,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _by_tma(N: int, dtype: torch.dtype) -> bool:
    """Do the rows of y start at multiples of 16 bytes?"""
    return N * dtype.itemsize % ALIGN == 0


tiled("triton_tma", Tiled(_refuses, _tiles, _run))
