"""Triton kernel of `quantize`, and the parts that it shares with norm_quantize (see numerics.py).

A row is held in registers as whole blocks and a smaller tail, so that no lanes are idle if its
width is not a power of two: 1152 = 4 * 256 + 128. Rows longer than WHOLE_ROW are read repeatedly.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from graphquant.ops.numerics import ALIGN, MIN_ABSMAX, QMAX, row_stride, vectors
from graphquant.ops.qparams import QParams
from graphquant.ops.runtime.device import gpu_properties
from graphquant.ops.runtime.launch import launch_triton
from graphquant.ops.triton_util import as_rows, overlap, unit_of, wait_for_inputs

WHOLE_ROW = 16_384  # float32 elements of one row that one program's registers can hold
CHUNK = 4096  # elements of a longer row that are processed together
THREADS = 2048  # that an SM runs at a time

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_WHOLE_ROW = tl.constexpr(WHOLE_ROW)
_QMAX = tl.constexpr(float(QMAX))
_MIN_ABSMAX = tl.constexpr(MIN_ABSMAX)
_FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
_TO_INT = tl.constexpr(12582912.0)  # 1.5 * 2^23: added to |v| < 2^22, v is in the low bits


def row_config(K: int, inputs: int = 1) -> dict[str, int]:
    """How programs hold rows of K elements of one or two inputs: ROWS rows, LANES threads for each.

    A row is whole blocks of BLOCK columns, eight values a lane, and what is left: a block of TAIL
    columns, or one more of BLOCK, masked (TAIL = 0). So a row of 1152 is 4 x 256 + 128 with no idle
    lanes, where one block of 2048 would leave 44 % of them idle. 20 to 40 elements per lane (30 to
    60 values of two inputs), and at least two warps: the GPU starts a CTA in 0.64 ns, so 46,656
    CTAs take 30 us, whatever they do.
    """
    if K > WHOLE_ROW:
        return {"ROWS": 1, "BLOCK": CHUNK, "TAIL": 0, "LANES": 256, "num_warps": 8}
    lanes = max(triton.next_power_of_2(triton.cdiv(K, 40 if inputs == 1 else 30)), 8)
    lanes = min(lanes, 512)
    block = min(8 // inputs * lanes, max(triton.next_power_of_2(K), ALIGN))
    tail = max(triton.next_power_of_2(vectors(K) % block), lanes)
    threads = max(lanes, 64)
    return {
        "ROWS": threads // lanes,
        "BLOCK": block,
        "TAIL": tail if vectors(K) % block and tail < block < K else 0,
        "LANES": lanes,
        "num_warps": threads // 32,
    }


def block_widths(K: int, inputs: int = 1) -> list[int]:
    """Columns of each block that a row of K elements is held in."""
    config = row_config(K, inputs)
    block, tail = config["BLOCK"], config["TAIL"]
    whole, rest = divmod(vectors(K), block)
    return [block] * whole + [tail or block] * (rest > 0)


@triton.jit
def higher(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def to_float32(x):
    """x.to(tl.float32). Two bfloat16 in a register take two instructions; cvt.f32.bf16, three."""
    if _INTERPRETED or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r",
            [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def rows_of(part, M, ROWS: tl.constexpr):
    """ROWS rows, number part. Beyond the last row it repeats the last: no mask, same result."""
    row = part * ROWS + tl.arange(0, ROWS)
    return tl.minimum(row, M - 1).to(tl.int64)


def programs(M: int, K: int, config: Mapping[str, int], num_rows: Tensor | None) -> int:
    """How many programs compute M rows, of which only the device may know how many count.

    Each computes its ROWS rows, or with `num_rows` every so many: a program for each of M rows
    would cost its start, 0.64 ns, also where there is nothing to do.
    """
    parts = triton.cdiv(M, config["ROWS"])
    if num_rows is None or K > WHOLE_ROW:
        return parts
    each = THREADS // (32 * config["num_warps"])
    return min(parts, gpu_properties(num_rows.device).num_sms * each)


@triton.jit
def from_last():
    """This program's number among all, the last one first: those start first.

    Of a large matrix only what the kernel before wrote last is still in L2, and what is written
    last here is what int8_linear begins with. On an H200, CLIP-L and InternViT-300M at batch 64
    take 1 % less.
    """
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def inside(k, K: tl.constexpr):
    """k < K, for a mask.

    LLVM in Triton 3.6 packs the comparisons of different masks into vectors of two and leaks bits
    of one lane into the other: in rows of 81 fp16 values, columns 71 and 79 were masked out. Seen
    only at odd widths, whose stores are single elements. There k passes through an instruction that
    is opaque to LLVM.
    """
    if K % 2 == 1 and not _INTERPRETED:
        k = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [k], dtype=tl.int32, is_pure=True, pack=1
        )
    return k < K


@triton.jit
def columns(i: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """The columns of a row's block i, [1, BLOCK or TAIL] (row_config)."""
    if TAIL != 0 and (i + 1) * BLOCK > K:
        return i * BLOCK + tl.arange(0, TAIL)[None, :]
    else:
        return i * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def load_block(
    ptr, i: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """Block i of the rows at ptr [ROWS, 1], float32, 0 beyond K."""
    k = columns(i, K, BLOCK, TAIL)
    if i * BLOCK + k.shape[1] <= K:
        return to_float32(tl.load(ptr + k, eviction_policy=EVICT))
    else:
        return to_float32(tl.load(ptr + k, mask=inside(k, K), other=0.0, eviction_policy=EVICT))


@triton.jit
def store_block(
    ptr, i: tl.constexpr, v, K: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    k = columns(i, K, BLOCK, TAIL)
    if i * BLOCK + k.shape[1] <= K:
        tl.store(ptr + k, v)
    else:
        tl.store(ptr + k, v, mask=inside(k, K))


@triton.jit
def store_of_rows(ptr, row, v, LANES: tl.constexpr):
    """Store v [ROWS] to ptr + row, each by the first lane of its row: a plain store would first
    gather v in one warp, with three barriers."""
    lane = tl.arange(0, LANES)[None, :]
    at = ptr + row[:, None] + lane  # `+ lane` sets the layout
    v = tl.broadcast_to(v[:, None], at.shape)
    tl.store(at, v, mask=tl.broadcast_to(lane == 0, at.shape))


@triton.jit
def _of_lanes(v, LANES: tl.constexpr):
    """The maximum of each lane's columns: int32 [ROWS, BLOCK] -> [ROWS, LANES]."""
    if v.shape[1] <= LANES:
        return v
    else:
        return tl.max(v.reshape(v.shape[0], LANES, v.shape[1] // LANES), 2)


@triton.jit
def range_bits(v):
    """The bits of v [ROWS, BLOCK] as (uint32 whose greatest is the row's lowest value, int32 whose
    greatest is its highest): floats above zero sort as int32, those below as uint32. The sign of a
    nan decides in which of the two it is the greatest."""
    return v.to(tl.uint32, bitcast=True), v.to(tl.int32, bitcast=True)


@triton.jit
def range_of_lanes(low, high, LANES: tl.constexpr):
    """range_bits, or the greatest of many, as int32 [ROWS, LANES]: those of -low, and of high."""
    low = _of_lanes(low, LANES) ^ 0x80000000
    return low.to(tl.int32, bitcast=True), _of_lanes(high, LANES)


@triton.jit
def with_block(v, block):
    """(*v, block), which Triton cannot parse."""
    return v + (block,)  # noqa: RUF005


@triton.jit
def widened(v, BLOCK: tl.constexpr):
    """A row's narrower last block [ROWS, TAIL] padded with zeros to [ROWS, BLOCK], within lanes."""
    if v.shape[1] < BLOCK:
        return widened(tl.join(v, tl.zeros_like(v)).reshape(v.shape[0], 2 * v.shape[1]), BLOCK)
    else:
        return v


@triton.jit
def range_of_blocks(v, LANES: tl.constexpr):
    """range_of_lanes of a row in blocks: a tuple of [ROWS, BLOCK], the last may be narrower."""
    low, high = range_bits(v[0])
    for i in tl.static_range(1, len(v)):
        next_low, next_high = range_bits(widened(v[i], v[0].shape[1]))
        low, high = tl.maximum(low, next_low), tl.maximum(high, next_high)
    return range_of_lanes(low, high, LANES)


@triton.jit
def shift_and_absmax(low, high):
    """The middle of each row's range and half its width, at least MIN_ABSMAX: [ROWS] each.

    low, high [ROWS, LANES] are from range_of_lanes; zero is added. A nan at either end makes both
    results nan. One reduction for both ends, so that warps synchronize once. On integers, because
    tl.max drops nan, and tl.reduce with a custom function is a Python loop in the interpreter.
    """
    ends = tl.maximum(tl.max(tl.join(low, high), 1), 0)
    low, high = tl.split(ends)
    low, high = -low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
    return 0.5 * high + 0.5 * low, higher(0.5 * high - 0.5 * low, _MIN_ABSMAX)


@triton.jit
def clamped(v, low, high, clip):
    """v clamped to the static range (nan becomes low), or to the clip (nan stays)."""
    if low is not None:
        low, high = (
            tl.cast(low, tl.float32),
            tl.cast(high, tl.float32),
        )  # Inductor passes float64
        # one instruction that drops nan; the interpreter's keeps it
        v = tl.where(v > low, v, low) if _INTERPRETED else tl.maximum(v, low)
        v = tl.minimum(v, high)
    if clip is not None:
        clip = tl.cast(clip, tl.float32)
        v = higher(v, -clip)
        v = tl.minimum(v, clip, propagate_nan=tl.PropagateNan.ALL)
    return v


@triton.jit
def static_shift_and_absmax(low, high, ROWS: tl.constexpr):
    """The same middle and half width for every row: [ROWS] each, in _in_range's arithmetic."""
    low, high = tl.cast(low, tl.float32), tl.cast(high, tl.float32)
    shift = 0.5 * high + 0.5 * low
    absmax = higher(higher(high - shift, shift - low), _MIN_ABSMAX)
    zeros = tl.zeros((ROWS,), tl.float32)
    return zeros + shift, zeros + absmax


@triton.jit
def scale_of(absmax):
    return tl.div_rn(absmax, _QMAX)


@triton.jit
def store_int8(ptr, k, v, shift, absmax, K_PAD: tl.constexpr, MASKED: tl.constexpr):
    """v [ROWS, BLOCK] - shift in steps of absmax / 127, half to even, to ptr [ROWS, 1] + k; 0 if
    absmax is not finite.

    |v - shift| <= absmax, so no clamp is needed, and float addition does the rounding. Rows that
    are not finite have their own store: a select would cost an instruction per element.
    """
    steps = (v - shift[:, None]) * tl.div_rn(_QMAX, absmax)[:, None] + _TO_INT
    steps = steps.to(tl.int32, bitcast=True).to(tl.int8)
    finite = (absmax <= _FLOAT32_MAX)[:, None]
    if MASKED:
        tl.store(ptr + k, steps, mask=finite & (k < K_PAD))
        tl.store(ptr + k, tl.zeros_like(steps), mask=(~finite) & (k < K_PAD))
    else:
        tl.store(ptr + k, steps, mask=finite)
        tl.store(ptr + k, tl.zeros_like(steps), mask=~finite)


@triton.jit
def store_blocks_int8(
    ptr, v, shift, absmax, K_PAD: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """store_int8 of rows in blocks and of their pads (K_PAD and K end in the same block)."""
    for i in tl.static_range(0, len(v)):
        k = columns(i, K_PAD, BLOCK, TAIL)
        store_int8(ptr, k, v[i], shift, absmax, K_PAD, i * BLOCK + k.shape[1] > K_PAD)


@triton.jit
def _by_tail(x, c0, c1, c2, c3, c4, c5):
    """x P(x), where P(-z) = 2^(c0 + c1 z + ... + c5 z^5) for z >= 0, and P(z) + P(-z) = 1.

    As relu(x) - z P(-z): c5 < 0, so for large z that is 0 and what is left of it is exact.
    """
    z = tl.abs(x)
    log2_tail = ((((c5 * z + c4) * z + c3) * z + c2) * z + c1) * z + c0
    return tl.maximum(x, 0.0) - z * tl.exp2(log2_tail)


@triton.jit
def _by_sigmoid(x, slope):
    """x / (1 + exp(-slope x)) as x r r, r = rsqrt(...), which is one instruction."""
    r = tl.rsqrt(1.0 + tl.exp2((-1.4426950408889634 * slope) * x))
    return x * r * r


@triton.jit
def activate(x, ACT: tl.constexpr):
    """numerics.ACTIVATIONS in float32, each 0 at 0.

    One polynomial, one exponential and no division, where erf takes 30 instructions: beyond about
    20 per element these kernels are no longer memory-bound. The coefficients are a weighted
    minimax fit over 0 <= z <= 6 and 4.5. Over all bfloat16 x, on an H200, they are off by

        gelu       4.1e-6 at most;  relatively 2.1e-4 for x >= -2, 6.7e-4 for x >= -4
        gelu_tanh  4.8e-6 at most;  relatively 2.6e-4 for x >= -2, 7.1e-4 for x >= -3

    Half a unit of bfloat16 is 2e-3 to 4e-3 relatively. The others are relatively within 1e-6 where
    |x| < 6.
    """
    if ACT == "gelu":
        y = _by_tail(x, -1.0002999, -1.148887, -0.4641194, -0.04820338, 0.005744368, -3.026679e-4)
    elif ACT == "gelu_tanh":
        y = _by_tail(x, -1.0003688, -1.1482524, -0.46547, -0.047282144, 0.008676481, -0.0019703405)
    elif ACT == "quick_gelu":
        y = _by_sigmoid(x, 1.702)
    elif ACT == "silu":
        y = _by_sigmoid(x, 1.0)
    elif ACT == "relu":
        y = tl.where(x < 0.0, 0.0, x)  # nan stays
    elif ACT == "relu2":
        y = tl.where(x < 0.0, 0.0, x)
        y = y * y
    else:
        tl.static_assert(ACT == "none", "activate: unknown activation")
        y = x
    return y


@triton.jit(do_not_specialize=["M"])
def quantize_rows_kernel(
    x_ptr, up_ptr, xq_ptr, scale_ptr, shift_ptr, M, x_row, up_row, factor_ptr, low, high, clip,
    num_rows_ptr,
    K: tl.constexpr, K_PAD: tl.constexpr, XQ_ROW: tl.constexpr,
    X_UNIT: tl.constexpr, UP_UNIT: tl.constexpr,
    ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
    LANES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """xq, x_scale, x_shift = quantize_rows(act(x) [* up], ...), see `programs`."""
    wait_for_inputs(OVERLAP)
    first = from_last()
    if K <= _WHOLE_ROW:
        if num_rows_ptr is None:
            _quantize_whole(
                x_ptr, up_ptr, xq_ptr, scale_ptr, shift_ptr, first, M,
                x_row, up_row, factor_ptr, low, high, clip,
                K, K_PAD, XQ_ROW, X_UNIT, UP_UNIT, ACT, ROWS, BLOCK, TAIL, LANES,
            )  # fmt: skip
        else:
            parts = tl.cdiv(tl.load(num_rows_ptr), ROWS)
            for part in range(first, parts, tl.num_programs(0)):
                _quantize_whole(
                    x_ptr, up_ptr, xq_ptr, scale_ptr, shift_ptr, part, M,
                    x_row, up_row, factor_ptr, low, high, clip,
                    K, K_PAD, XQ_ROW, X_UNIT, UP_UNIT, ACT, ROWS, BLOCK, TAIL, LANES,
                )  # fmt: skip
    else:
        if num_rows_ptr is not None:
            if first * ROWS >= tl.load(num_rows_ptr):
                return
        row = rows_of(first, M, ROWS)
        x_ptr += (row * x_row * X_UNIT)[:, None]
        if up_ptr is not None:
            up_ptr += (row * up_row * UP_UNIT)[:, None]
        xq_ptr += (row * XQ_ROW)[:, None]
        k = tl.arange(0, BLOCK)[None, :]
        if low is not None:
            shift, absmax = static_shift_and_absmax(low, high, ROWS)
        else:
            least, most = range_bits(tl.zeros((ROWS, BLOCK), tl.float32))
            for start in range(0, K, BLOCK):
                v = _chunk(x_ptr, up_ptr, factor_ptr, start + k, low, high, clip, K, ACT)
                next_least, next_most = range_bits(v)
                least, most = tl.maximum(least, next_least), tl.maximum(most, next_most)
            least, most = range_of_lanes(least, most, LANES)
            shift, absmax = shift_and_absmax(least, most)
        for start in range(0, K_PAD, BLOCK):
            v = _chunk(x_ptr, up_ptr, factor_ptr, start + k, low, high, clip, K, ACT)
            store_int8(xq_ptr, start + k, v, shift, absmax, K_PAD, True)
        store_of_rows(scale_ptr, row, scale_of(absmax), LANES)
        store_of_rows(shift_ptr, row, shift, LANES)


@triton.jit
def _quantize_whole(
    x_ptr, up_ptr, xq_ptr, scale_ptr, shift_ptr, part, M,
    x_row, up_row, factor_ptr, low, high, clip,
    K: tl.constexpr, K_PAD: tl.constexpr, XQ_ROW: tl.constexpr,
    X_UNIT: tl.constexpr, UP_UNIT: tl.constexpr,
    ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """quantize_rows_kernel for rows of at most WHOLE_ROW elements: ROWS of them, number part."""
    row = rows_of(part, M, ROWS)
    x_ptr += (row * x_row * X_UNIT)[:, None]
    if up_ptr is not None:
        up_ptr += (row * up_row * UP_UNIT)[:, None]
    xq_ptr += (row * XQ_ROW)[:, None]
    each = tl.zeros((ROWS, 1), tl.int32)
    v = ()
    for i in tl.static_range(0, (K + BLOCK - 1) // BLOCK):
        block = activate(load_block(x_ptr, i, K, BLOCK, TAIL, ""), ACT)
        if up_ptr is not None:
            block = block * load_block(up_ptr, i, K, BLOCK, TAIL, "")
        if factor_ptr is not None:
            block = block * load_block(factor_ptr + each, i, K, BLOCK, TAIL, "evict_last")
        v = with_block(v, clamped(block, low, high, clip))
    if low is not None:
        shift, absmax = static_shift_and_absmax(low, high, ROWS)
    else:
        least, most = range_of_blocks(v, LANES)
        shift, absmax = shift_and_absmax(least, most)
    store_blocks_int8(xq_ptr, v, shift, absmax, K_PAD, BLOCK, TAIL)
    store_of_rows(scale_ptr, row, scale_of(absmax), LANES)
    store_of_rows(shift_ptr, row, shift, LANES)


@triton.jit
def _chunk(
    x_ptr, up_ptr, factor_ptr, k, low, high, clip, K: tl.constexpr, ACT: tl.constexpr
):  # fmt: skip
    v = activate(to_float32(tl.load(x_ptr + k, mask=inside(k, K), other=0.0)), ACT)
    if up_ptr is not None:
        v = v * to_float32(tl.load(up_ptr + k, mask=inside(k, K), other=0.0))
    return quantized(v, factor_ptr, k, low, high, clip, K)


@triton.jit
def quantized(v, factor_ptr, k, low, high, clip, K: tl.constexpr):
    """factor, range and clip applied to v [ROWS, BLOCK] at the columns k."""
    if factor_ptr is not None:
        v = v * tl.load(factor_ptr + k, mask=inside(k, K), other=0.0)
    return clamped(v, low, high, clip)


def contiguous(qparams: QParams) -> QParams:
    """The QParams with a contiguous `factor`, as kernels read it."""
    factor = qparams.factor
    return qparams if factor is None else qparams._replace(factor=factor.contiguous())


def launch_quantize_rows(
    x: Tensor,
    up: Tensor | None,
    act: str | None,
    qparams: QParams,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Fill an empty_triple from x (and up), both [..., K].

    xq may be `overlay(x)` for widths in OVERLAID with dynamic ranges: a program then reads its
    whole row before it writes.
    """
    xq, x_scale, x_shift = out
    K = x.shape[-1]
    M = x.numel() // K
    if M == 0:
        return
    x, x_row = as_rows(x)
    up_row = 0
    if up is not None:
        up, up_row = as_rows(up)
    x_unit, up_unit = unit_of(x_row), unit_of(up_row)
    config = row_config(K, 1 if up is None else 2)
    launch_triton(
        quantize_rows_kernel, (programs(M, K, config, qparams.num_rows),),
        x, up, xq, x_scale, x_shift, M, x_row // x_unit, up_row // up_unit,
        *contiguous(qparams),
        K=K, K_PAD=vectors(K), XQ_ROW=row_stride(xq), X_UNIT=x_unit, UP_UNIT=up_unit,
        ACT="none" if act is None else act,
        **config,
        **overlap(x.device),
    )  # fmt: skip
