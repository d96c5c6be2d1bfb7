"""Triton helpers with more than one caller: rows on the host, numerics.py in the kernels."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphquant.ops.numerics import ALIGN, MIN_ABSMAX, QMAX, padded

WHOLE_ROW = 16_384  # float32 elements of one row that one program's registers can hold
CHUNK = 4096  # elements of a longer row looked at together

_QMAX = tl.constexpr(float(QMAX))
_MIN_ABSMAX = tl.constexpr(MIN_ABSMAX)
_FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
_TO_INT = tl.constexpr(
    12582912.0
)  # 1.5 * 2^23: added to |v| < 2^22, v's integer is in the low bits


@dataclass(frozen=True)
class Chip:
    """What a tile is chosen by."""

    sm: int  # compute capability times ten: 80, 90, 100
    processors: int  # streaming multiprocessors
    shared: int  # bytes of shared memory that one program may have


@functools.cache
def chip(device: torch.device) -> Chip:
    if device.type == "cpu":  # Triton's interpreter, in tests
        return Chip(90, 132, 232_448)
    of = torch.cuda.get_device_properties(device)
    shared = of.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Chip(of.major * 10 + of.minor, of.multi_processor_count, shared)


def row_stride(x: Tensor) -> int | None:
    """Elements from row to row when x [..., K] is [M, K] in memory, last stride 1; else None.

    Slices x[..., a:b] of a wider tensor have one. Where M is 1 any would do: an aligned one is
    given.
    """
    K = x.shape[-1]
    if x.stride(-1) != 1 and K > 1:
        return None
    row = span = 0
    rows = 1
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if rows == 1:
            row = stride
        elif stride != span:
            return None
        rows *= size
        span = size * stride
    return row if rows > 1 else padded(K)


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """(x or a contiguous copy, row stride): base pointer and stride of [M, K] rows."""
    row = row_stride(x)
    return (x.contiguous(), x.shape[-1]) if row is None else (x, row)


def unit_of(row: int) -> int:
    """The largest power of two up to ALIGN that divides a row stride.

    Kernels take strides as (row // unit, unit: constexpr): the compiler then knows the alignment
    of rows whose stride is no multiple of 16, and one stride more does not mean one compile more.
    """
    return min(row & -row, ALIGN) or ALIGN


def row_config(K: int) -> dict[str, int]:
    """ROWS a program holds, BLOCK columns at a time, num_warps: about 16 elements a thread."""
    block = max(triton.next_power_of_2(K), ALIGN)
    if block > WHOLE_ROW:
        return {"ROWS": 1, "BLOCK": CHUNK, "num_warps": 8}
    rows = max(1, 2048 // block)
    return {
        "ROWS": min(rows, 16),
        "BLOCK": block,
        "num_warps": min(max(rows * block // 512, 4), 16),
    }


@triton.jit
def higher(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def lower(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def shift_and_absmax(low, high):
    """The middle of each row's range and half its width, at least MIN_ABSMAX: [ROWS] each.

    low, high [ROWS, BLOCK] reach the ends of the range (or are the row itself); zero is added.
    Floats above zero sort as int32, those below as uint32 (the lowest last), and the sign of a nan
    decides which of the two it ends: either makes both results nan. Integers, because tl.max drops
    nan, and tl.reduce with a function of ours is a Python loop in Triton's interpreter.
    """
    low = tl.max(low.to(tl.uint32, bitcast=True), 1)
    low = tl.maximum(low, 0x80000000).to(tl.float32, bitcast=True)  # -0.0
    high = tl.max(high.to(tl.int32, bitcast=True), 1)
    high = tl.maximum(high, 0).to(tl.float32, bitcast=True)
    return 0.5 * high + 0.5 * low, higher(0.5 * high - 0.5 * low, _MIN_ABSMAX)


@triton.jit
def scale_of(absmax):
    return tl.div_rn(absmax, _QMAX)


@triton.jit
def to_int8(v, shift, absmax):
    """v [ROWS, BLOCK] - shift in steps of absmax / 127, half to even; 0 if absmax is not finite.

    |v - shift| <= absmax, so nothing needs a clamp, and float addition does the rounding.
    """
    steps = (v - shift[:, None]) * tl.div_rn(_QMAX, absmax)[:, None] + _TO_INT
    steps = steps.to(tl.int32, bitcast=True).to(tl.int8)
    return tl.where((absmax <= _FLOAT32_MAX)[:, None], steps, 0)


@triton.jit
def activate(x, ACT: tl.constexpr):
    """numerics.ACTIVATIONS in float32, each 0 at 0. exp(large) = inf is meant: x / inf = 0."""
    if ACT == "gelu":
        # relu(x) - |x| Q(|x|), Q(x) = 1 - Phi(x) = erfc(x / sqrt 2) / 2 by Abramowitz & Stegun
        # 7.1.26 with |error| <= 0.75e-7: less than libdevice's erf loses in 1 + erf(x), at half
        # its instructions
        z = tl.abs(x)
        t = 1.0 / (1.0 + 0.23164190 * z)  # 0.3275911 / sqrt 2
        p = 1.061405429 * t - 1.453152027
        p = p * t + 1.421413741
        p = p * t - 0.284496736
        p = (p * t + 0.254829592) * t
        y = tl.where(x < 0.0, 0.0, x) - 0.5 * z * p * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        # 1 + tanh(u) = 2 / (1 + exp(-2u)),  2u = 2 sqrt(2 / pi) (x + 0.044715 x^3)
        y = x / (1.0 + tl.exp(-x * (1.5957691216057308 + 0.07135481282553198 * x * x)))
    elif ACT == "quick_gelu":
        y = x / (1.0 + tl.exp(-1.702 * x))
    elif ACT == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACT == "relu":
        y = tl.where(x < 0.0, 0.0, x)  # nan stays
    elif ACT == "relu2":
        y = tl.where(x < 0.0, 0.0, x)
        y = y * y
    else:
        tl.static_assert(ACT == "none", "activate: unknown activation")
        y = x
    return y


@triton.jit
def _value(x_ptr, up_ptr, k, live, ACT: tl.constexpr):
    v = activate(tl.load(x_ptr + k, mask=live, other=0.0).to(tl.float32), ACT)
    if up_ptr is not None:
        v = v * tl.load(up_ptr + k, mask=live, other=0.0).to(tl.float32)
    return v


@triton.jit(do_not_specialize=["M"])
def quantize_rows_kernel(
    x_ptr, up_ptr, xq_ptr, scale_ptr, shift_ptr, M, x_row, up_row,
    K: tl.constexpr, K_PAD: tl.constexpr, X_UNIT: tl.constexpr, UP_UNIT: tl.constexpr,
    ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """xq, x_scale, x_shift = quantize_rows(act(x) [* up]), ROWS rows a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    here = row < M
    k = tl.arange(0, BLOCK)[None, :]
    x_ptr += (row * x_row * X_UNIT)[:, None]
    if up_ptr is not None:
        up_ptr += (row * up_row * UP_UNIT)[:, None]
    xq_ptr += (row * K_PAD)[:, None]
    if BLOCK >= K_PAD:
        v = _value(x_ptr, up_ptr, k, here[:, None] & (k < K), ACT)
        shift, absmax = shift_and_absmax(v, v)
        tl.store(xq_ptr + k, to_int8(v, shift, absmax), mask=here[:, None] & (k < K_PAD))
    else:
        low = tl.zeros((ROWS, BLOCK), tl.float32)
        high = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, K, BLOCK):
            at = start + k
            v = _value(x_ptr, up_ptr, at, here[:, None] & (at < K), ACT)
            low, high = lower(low, v), higher(high, v)
        shift, absmax = shift_and_absmax(low, high)
        for start in range(0, K_PAD, BLOCK):
            at = start + k
            v = _value(x_ptr, up_ptr, at, here[:, None] & (at < K), ACT)
            tl.store(xq_ptr + at, to_int8(v, shift, absmax), mask=here[:, None] & (at < K_PAD))
    tl.store(scale_ptr + row, scale_of(absmax), mask=here)
    tl.store(shift_ptr + row, shift, mask=here)


def launch_quantize_rows(
    x: Tensor, up: Tensor | None, act: str, xq: Tensor, x_scale: Tensor, x_shift: Tensor
) -> None:
    """Fill an empty_triple from x (and up), both [..., K]. `act` may be "none"."""
    K = x.shape[-1]
    M = x.numel() // K
    if M == 0:
        return
    x, x_row = as_rows(x)
    up_row = 0
    if up is not None:
        up, up_row = as_rows(up)
    x_unit, up_unit, config = unit_of(x_row), unit_of(up_row), row_config(K)
    quantize_rows_kernel[(triton.cdiv(M, config["ROWS"]),)](
        x, up, xq, x_scale, x_shift, M, x_row // x_unit, up_row // up_unit,
        K=K, K_PAD=padded(K), X_UNIT=x_unit, UP_UNIT=up_unit, ACT=act, **config,
    )  # fmt: skip


@triton.jit
def tile_of(pid, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(row, column) of a program's tile: GROUP tiles down, then one right, so that L2 serves."""
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
