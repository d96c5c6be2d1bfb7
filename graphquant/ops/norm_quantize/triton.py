"""One kernel for LayerNorm and RMSNorm, with and without the float result.

Rows are held in registers; one that is too long is read four times (mean, variance, range, write).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphquant.ops.norm_quantize.op import norm_quantize, norm_quantize_keep
from graphquant.ops.numerics import empty_triple, padded
from graphquant.ops.triton_util import (
    as_rows,
    higher,
    lower,
    row_config,
    scale_of,
    shift_and_absmax,
    to_int8,
    unit_of,
)


@triton.jit
def _affine(y, gamma_ptr, beta_ptr, k, K: tl.constexpr):
    if gamma_ptr is not None:
        y = y * tl.load(gamma_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if beta_ptr is not None:
        y = y + tl.load(beta_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    return y


@triton.jit
def _centred(x_ptr, mean, k, live):
    """x - mean, 0 on dead lanes. With mean = 0 this is x itself, exactly: RMSNorm."""
    x = tl.load(x_ptr + k, mask=live, other=0.0).to(tl.float32)
    return tl.where(live, x - mean[:, None], 0.0)


@triton.jit(do_not_specialize=["M"])
def norm_quantize_kernel(
    x_ptr, gamma_ptr, beta_ptr, y_ptr, xq_ptr, scale_ptr, shift_ptr, M, x_row, eps,
    K: tl.constexpr, K_PAD: tl.constexpr, X_UNIT: tl.constexpr, RMS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """xq, x_scale, x_shift = quantize_rows(y), y = norm(x), ROWS rows a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    here = row < M
    k = tl.arange(0, BLOCK)[None, :]
    x_ptr += (row * x_row * X_UNIT)[:, None]
    xq_ptr += (row * K_PAD)[:, None]
    if y_ptr is not None:
        y_ptr += (row * K)[:, None]
    mean = tl.zeros((ROWS,), tl.float32)
    if BLOCK >= K_PAD:
        live = here[:, None] & (k < K)
        d = _centred(x_ptr, mean, k, live)
        if not RMS:
            d = tl.where(live, d - (tl.sum(d, 1) / K)[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(d * d, 1) / K + eps)
        y = _affine(d * rstd[:, None], gamma_ptr, beta_ptr, k, K)
        shift, absmax = shift_and_absmax(y, y)
        tl.store(xq_ptr + k, to_int8(y, shift, absmax), mask=here[:, None] & (k < K_PAD))
        if y_ptr is not None:
            tl.store(y_ptr + k, y.to(y_ptr.dtype.element_ty), mask=live)
    else:
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        if not RMS:
            for start in range(0, K, BLOCK):
                at = start + k
                total += _centred(x_ptr, mean, at, here[:, None] & (at < K))
            mean = tl.sum(total, 1) / K
            total = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, K, BLOCK):
            at = start + k
            d = _centred(x_ptr, mean, at, here[:, None] & (at < K))
            total += d * d
        rstd = tl.rsqrt(tl.sum(total, 1) / K + eps)
        low = tl.zeros((ROWS, BLOCK), tl.float32)
        high = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, K, BLOCK):
            at = start + k
            live = here[:, None] & (at < K)
            y = _affine(_centred(x_ptr, mean, at, live) * rstd[:, None], gamma_ptr, beta_ptr, at, K)
            low, high = lower(low, y), higher(high, y)
            if y_ptr is not None:
                tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=live)
        shift, absmax = shift_and_absmax(low, high)
        for start in range(0, K_PAD, BLOCK):
            at = start + k
            live = here[:, None] & (at < K)
            y = _affine(_centred(x_ptr, mean, at, live) * rstd[:, None], gamma_ptr, beta_ptr, at, K)
            tl.store(xq_ptr + at, to_int8(y, shift, absmax), mask=here[:, None] & (at < K_PAD))
    tl.store(scale_ptr + row, scale_of(absmax), mask=here)
    tl.store(shift_ptr + row, shift, mask=here)


def _launch(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    rms: bool,
    y: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    K = x.shape[-1]
    M = x.numel() // K
    xq, x_scale, x_shift = empty_triple(x, x.shape)
    if M == 0:
        return xq, x_scale, x_shift
    x, x_row = as_rows(x)
    unit, config = unit_of(x_row), row_config(K)
    norm_quantize_kernel[(triton.cdiv(M, config["ROWS"]),)](
        x, None if gamma is None else gamma.contiguous(),
        None if beta is None else beta.contiguous(), y, xq, x_scale, x_shift, M, x_row // unit, eps,
        K=K, K_PAD=padded(K), X_UNIT=unit, RMS=rms, **config,
    )  # fmt: skip
    return xq, x_scale, x_shift


@norm_quantize.kernel("triton")
def norm_quantize_triton(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch(x, gamma, beta, eps, rms, None)


@norm_quantize_keep.kernel("triton")
def norm_quantize_keep_triton(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=dtype)
    return y, *_launch(x, gamma, beta, eps, rms, y)
