"""Triton kernel of token_index: one program for each sequence, which counts all of them itself.

No functions of its own: Inductor would take an argument of one that has a loop to be written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from graphquant.ops.runtime.launch import launch_triton
from graphquant.ops.token_index.op import TILE, Index, token_index
from graphquant.ops.triton_util import as_rows, overlap, wait_for_inputs

READ = 4096  # elements of the mask that a program reads together
_TILE = tl.constexpr(TILE)


@triton.jit(do_not_specialize=["B", "S", "T", "row", "n_tiles"])
def token_index_kernel(
    valid_ptr, index_ptr, slot_ptr, position_ptr, cu_seqlens_ptr, tiles_ptr, count_ptr,
    B, S, T, row, n_tiles,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    b = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    own = 0
    for start in range(0, S, BLOCK):
        s = start + lane
        own += tl.sum(tl.load(valid_ptr + b.to(tl.int64) * row + s, s < S, other=0).to(tl.int32))
    begin = tl.zeros((ROWS,), tl.int32)  # of the sequence
    total, first, used = begin, begin, begin  # tokens; tiles before the sequence's, all tiles
    for start in range(0, B, ROWS):
        other = start + tl.arange(0, ROWS)
        n = tl.zeros((ROWS,), tl.int32)  # its valid tokens
        for column in range(0, S, BLOCK):
            s = column + lane[None, :]
            at = other.to(tl.int64)[:, None] * row + s
            mask = (other < B)[:, None] & (s < S)
            n += tl.sum(tl.load(valid_ptr + at, mask, other=0).to(tl.int32), 1)
        tiles = (n + _TILE - 1) // _TILE
        total += n
        used += tiles
        begin += tl.where(other < b, n, 0)
        first += tl.where((n > own) | ((n == own) & (other < b)), tiles, 0)
    so_far, total, first, used = tl.sum(begin), tl.sum(total), tl.sum(first), tl.sum(used)
    tl.store(cu_seqlens_ptr + b + 1, so_far + own)
    if b == 0:
        tl.store(cu_seqlens_ptr, 0)
        tl.store(count_ptr, total)

    tiles = (own + _TILE - 1) // _TILE
    for start in range(0, tiles, BLOCK):
        i = start + lane
        tl.store(tiles_ptr + 2 * (first + i), tl.zeros_like(i) + b, i < tiles)
        tl.store(tiles_ptr + 2 * (first + i) + 1, i * _TILE, i < tiles)
    for start in range(used + b * BLOCK, n_tiles, B * BLOCK):
        i = start + lane
        tl.store(tiles_ptr + 2 * i, tl.full((BLOCK,), -1, tl.int32), i < n_tiles)
        tl.store(tiles_ptr + 2 * i + 1, tl.full((BLOCK,), -1, tl.int32), i < n_tiles)

    for start in range(0, S, BLOCK):
        s = start + lane
        at = b.to(tl.int64) * S + s
        valid = tl.load(valid_ptr + b.to(tl.int64) * row + s, s < S, other=0).to(tl.int32)
        behind = so_far + tl.cumsum(valid, 0)
        so_far += tl.sum(valid)
        to = tl.where(valid != 0, behind - 1, total + at - behind)
        tl.store(slot_ptr + at, tl.maximum(behind - 1, 0).to(tl.int64), s < S)
        kept = (s < S) & (to < T)
        tl.store(index_ptr + to, at, kept)
        tl.store(position_ptr + to, s, kept)


@token_index.kernel("triton")
def token_index_triton(valid: Tensor, front: bool = False, *, out: Index) -> None:
    B, S = valid.shape
    valid, row = as_rows(valid)
    block = min(READ, triton.next_power_of_2(S)) if isinstance(S, int) else 512
    launch_triton(
        token_index_kernel, (B,), valid, *out, B, S, out[0].shape[0], row, out[4].shape[0],
        ROWS=READ // block, BLOCK=block, num_warps=8,
        **overlap(valid.device),
    )  # fmt: skip
