"""Tile order and epilogue of int8_linear's Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(pid, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(row, column) of a program's tile: GROUP tiles down, then one right, for L2 reuse."""
    down, right = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = pid // (GROUP * right)
    height = tl.minimum(down - group * GROUP, GROUP)
    inside = pid % (GROUP * right)
    return (group * GROUP + inside % height) * BM, inside // height * BN


@triton.jit
def dequantize(
    acc, m, n, x_scale_ptr, x_shift_ptr, w_scale_ptr, w_sum_ptr, bias_ptr, residual_ptr,
    M, N, residual_row, RESIDUAL_UNIT: tl.constexpr,
):  # fmt: skip
    """float32 acc * x_scale * w_scale + x_shift * w_sum + bias + residual of the tile at m, n."""
    m_in, n_in = m < M, n < N
    # in this order, and with a written fma, no tile of the tables spills (Triton 3.7.1)
    w_scale = tl.load(w_scale_ptr + n, mask=n_in, other=0.0)[None, :]
    x_scale = tl.load(x_scale_ptr + m, mask=m_in, other=0.0)[:, None]
    y = acc.to(tl.float32) * x_scale * w_scale
    x_shift = tl.load(x_shift_ptr + m, mask=m_in, other=0.0)[:, None]
    y = tl.fma(x_shift, tl.load(w_sum_ptr + n, mask=n_in, other=0.0)[None, :], y)
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + n, mask=n_in, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        at = (m.to(tl.int64) * residual_row * RESIDUAL_UNIT)[:, None] + n[None, :]
        here = m_in[:, None] & n_in[None, :]
        y = y + tl.load(residual_ptr + at, mask=here, other=0.0).to(tl.float32)
    return y
