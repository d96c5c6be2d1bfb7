"""One program for a block of queries of one head: keys and values in blocks, softmax as they come.

What torch's kernels compute in vain is left out: the last keys get a narrower block of their own,
and a head is a power of two and a narrower rest (72 = 64 + 8, computed as 64 + 16).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from graphquant.ops.attention.op import WIDEST, attention
from graphquant.ops.chip import chip
from graphquant.ops.launch import launch_triton
from graphquant.ops.triton_util import overlap, wait_for_inputs

NARROWEST = 16  # dimension of a product on tensor cores
LOG2_E = 1.4426950408889634

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_NARROWEST = tl.constexpr(NARROWEST)


class Tile(NamedTuple):
    BM: int  # queries
    BN: int  # keys
    num_warps: int
    num_stages: int


TILES = {  # on Hopper one, two, two to three and three to four programs a processor
    "128x128": Tile(128, 128, 8, 2),
    "128x64": Tile(128, 64, 8, 3),
    "64x128": Tile(64, 128, 4, 2),
    "64x64": Tile(64, 64, 4, 2),
}


def _power(n: int) -> int:
    return max(NARROWEST, triton.next_power_of_2(n))


def head_parts(D: int) -> tuple[int, int]:
    """Widths that a head is computed in: a power of two and, for the rest, another or 0."""
    whole = _power(D // 2 + 1)  # the largest that is at most D
    rest = max(0, D - whole)
    return whole, _power(rest) if rest else 0


def last_width(T: int, BN: int) -> int:
    """Of the block for the keys that fill none of BN, or 0."""
    return _power(T % BN) if T % BN else 0


@triton.jit
def _product(a, b, c):
    """a b + c in float32. Triton's interpreter has no product of bfloat16."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    else:
        return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def _part(ptr, row, rows, FROM: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, STRIDE,
          ALL: tl.constexpr):  # fmt: skip
    """Columns FROM to FROM + WIDTH of rows `row` [N], zeros outside of [rows, D]: [N, WIDTH]."""
    d = FROM + tl.arange(0, WIDTH)
    at = ptr + row[:, None] * STRIDE + d[None, :]
    if ALL and FROM + WIDTH <= D:
        return tl.load(at)
    elif ALL:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)
    elif FROM + WIDTH <= D:
        return tl.load(at, mask=(row < rows)[:, None], other=0.0)
    else:
        return tl.load(at, mask=(row < rows)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _step(
    state, q, q_rest, k_ptr, v_ptr, first, scale, T,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr,
    REST: tl.constexpr, BN: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """One block of keys. state: the greatest score so far, the sum of exponentials, y's two parts
    times that sum. scale: of the scores, times log2(e). ALL: no key of the block is beyond T."""
    highest, total, y, y_rest = state
    n = first + tl.arange(0, BN)
    k = _part(k_ptr, n, T, 0, WHOLE, D, K_ROW, ALL)
    scores = _product(q, k.T, tl.zeros((q.shape[0], BN), tl.float32))
    if REST > 0:
        k_rest = _part(k_ptr, n, T, WHOLE, REST, D, K_ROW, ALL)
        scores = _product(q_rest, k_rest.T, scores)
    if not ALL:
        scores = tl.where((n < T)[None, :], scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - higher[:, None])  # one instruction before the exponential
    shrink = tl.exp2(highest - higher)
    total = total * shrink + tl.sum(p, 1)
    p = p.to(q.dtype)
    v = _part(v_ptr, n, T, 0, WHOLE, D, V_ROW, ALL)
    y = _product(p, v, y * shrink[:, None])
    if REST > 0:
        v_rest = _part(v_ptr, n, T, WHOLE, REST, D, V_ROW, ALL)
        y_rest = _product(p, v_rest, y_rest * shrink[:, None])
    return higher, total, y, y_rest


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, scale,
    S: tl.constexpr, T: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    Q_BATCH: tl.constexpr, Q_HEAD: tl.constexpr, Q_ROW: tl.constexpr,
    K_BATCH: tl.constexpr, K_HEAD: tl.constexpr, K_ROW: tl.constexpr,
    V_BATCH: tl.constexpr, V_HEAD: tl.constexpr, V_ROW: tl.constexpr,
    WHOLE: tl.constexpr, REST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    LAST: tl.constexpr, num_stages: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """LAST: width of the block that the keys beyond the last multiple of BN get, or 0."""
    wait_for_inputs(OVERLAP)
    blocks: tl.constexpr = (S + BM - 1) // BM
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks) % H
    batch = (tl.program_id(0) // (blocks * H)).to(tl.int64)
    q_ptr += batch * Q_BATCH + head * Q_HEAD
    k_ptr += batch * K_BATCH + head * K_HEAD
    v_ptr += batch * V_BATCH + head * V_HEAD
    y_ptr += (batch * S * H + head) * D
    m = block * BM + tl.arange(0, BM)
    q = _part(q_ptr, m, S, 0, WHOLE, D, Q_ROW, S % BM == 0)
    q_rest = q
    y_rest = tl.zeros((BM, REST if REST > 0 else _NARROWEST), tl.float32)
    if REST > 0:
        q_rest = _part(q_ptr, m, S, WHOLE, REST, D, Q_ROW, S % BM == 0)
    state = (
        tl.full((BM,), float("-inf"), tl.float32),
        tl.zeros((BM,), tl.float32),
        tl.zeros((BM, WHOLE), tl.float32),
        y_rest,
    )
    for first in tl.range(0, T - T % BN, BN, num_stages=num_stages):
        state = _step(state, q, q_rest, k_ptr, v_ptr, first, scale, T,
                      K_ROW, V_ROW, D, WHOLE, REST, BN, True)  # fmt: skip
    if LAST > 0:
        state = _step(state, q, q_rest, k_ptr, v_ptr, T - T % BN, scale, T,
                      K_ROW, V_ROW, D, WHOLE, REST, LAST, LAST == T % BN)  # fmt: skip
    _, total, y, y_rest = state
    d = tl.arange(0, WHOLE)
    inside = (m < S)[:, None]
    at = y_ptr + m[:, None] * (H * D)
    tl.store(at + d[None, :], (y / total[:, None]).to(q.dtype), mask=inside & (d < D)[None, :])
    if REST > 0:
        d = WHOLE + tl.arange(0, REST)
        y_rest = (y_rest / total[:, None]).to(q.dtype)
        tl.store(at + d[None, :], y_rest, mask=inside & (d < D)[None, :])


def _refuses(q: Tensor, k: Tensor, v: Tensor, scale: float, tile: str) -> str | None:
    D = q.shape[3]
    if D > WIDEST:
        return f"heads of {D} are wider than {WIDEST}"
    BM, BN, _, stages = TILES[tile]
    need, there = (BM + 2 * stages * BN) * sum(head_parts(D)) * q.itemsize, chip(q.device).shared
    if need > there:
        return f"tile {tile} of heads of {D} needs {need} bytes of shared memory, not {there}"
    return None


@attention.kernel("triton", refuses=_refuses)
def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, scale: float, tile: str, out: tuple[Tensor]
) -> None:
    (y,) = out
    if not y.numel():
        return
    B, H, S, D = q.shape
    T = k.shape[2]
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    BM, BN, num_warps, num_stages = TILES[tile]
    whole, rest = head_parts(D)
    strides = {
        f"{name}_{dim}": t.stride(i)
        for name, t in (("Q", q), ("K", k), ("V", v))
        for i, dim in enumerate(("BATCH", "HEAD", "ROW"))
    }
    launch_triton(
        attention_kernel, (triton.cdiv(S, BM) * B * H,),
        q, k, v, y, scale * LOG2_E,
        S=S, T=T, H=H, D=D, **strides,
        WHOLE=whole, REST=rest, BM=BM, BN=BN, LAST=last_width(T, BN),
        num_warps=num_warps, num_stages=num_stages, **overlap(q.device),
    )  # fmt: skip
