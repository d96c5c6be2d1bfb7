"""Triton kernel of token_index: a program for each few sequences, which counts all of them itself.

No functions of its own: Inductor would take an argument of one that has a loop to be written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from graphquant.ops.runtime.device import gpu_properties
from graphquant.ops.runtime.launch import launch_triton
from graphquant.ops.token_index.op import TILE, Index, token_index
from graphquant.ops.triton_util import as_rows, overlap, unit_of, wait_for_inputs

READ = 16_384  # elements of the mask that a program counts together
WRITE = 4096  # elements of its own sequences that it reads and writes together
_TILE = tl.constexpr(TILE)


@triton.jit(do_not_specialize=["B", "S", "T", "row", "n_tiles"])
def token_index_kernel(
    valid_ptr, index_ptr, slot_ptr, position_ptr, cu_seqlens_ptr, tiles_ptr, count_ptr,
    B, S, T, row, n_tiles,
    S_UNIT: tl.constexpr, ROW_UNIT: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """OWN sequences a program. Of all, it counts ROWS x COLUMNS elements of the mask at a time."""
    wait_for_inputs(OVERLAP)
    S, row = S * S_UNIT, row * ROW_UNIT
    b = tl.program_id(0) * OWN + tl.arange(0, OWN)
    own_ptr, is_own = valid_ptr + (b.to(tl.int64) * row)[:, None], (b < B)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    own = tl.zeros((OWN,), tl.int32)  # valid tokens of each of its sequences
    for start in range(0, S, BLOCK):
        s = start + lane
        own += tl.sum(tl.load(own_ptr + s, is_own & (s < S), other=0).to(tl.int32), 1)

    begin = tl.zeros((OWN, ROWS), tl.int32)  # tokens before each of its sequences
    first = tl.zeros((OWN, ROWS), tl.int32)  # tiles before the sequence's
    total, used = tl.zeros((ROWS,), tl.int32), tl.zeros((ROWS,), tl.int32)  # all tokens, all tiles
    for start in range(0, B, ROWS):
        other = start + tl.arange(0, ROWS)
        other_ptr, is_other = valid_ptr + (other.to(tl.int64) * row)[:, None], (other < B)[:, None]
        n = tl.zeros((ROWS,), tl.int32)
        for column in range(0, S, COLUMNS):
            s = column + tl.arange(0, COLUMNS)[None, :]
            n += tl.sum(tl.load(other_ptr + s, is_other & (s < S), other=0).to(tl.int32), 1)
        tiles = (n + _TILE - 1) // _TILE
        total += n
        used += tiles
        before = other[None, :] < b[:, None]
        longer = (n[None, :] > own[:, None]) | ((n[None, :] == own[:, None]) & before)
        begin += tl.where(before, n[None, :], 0)
        first += tl.where(longer, tiles[None, :], 0)
    total, used = tl.sum(total), tl.sum(used)
    so_far, first = tl.sum(begin, 1), tl.sum(first, 1)
    tl.store(cu_seqlens_ptr + b + 1, so_far + own, b < B)
    if tl.program_id(0) == 0:
        tl.store(cu_seqlens_ptr, 0)
        tl.store(count_ptr, total)

    tiles = (own + _TILE - 1) // _TILE
    for start in range(0, tl.max(tiles), BLOCK):
        i = start + lane
        at = tiles_ptr + 2 * (first[:, None] + i)
        tl.store(at, tl.zeros_like(i) + b[:, None], i < tiles[:, None])
        tl.store(at + 1, i * _TILE + tl.zeros_like(b)[:, None], i < tiles[:, None])
    for start in range(used + tl.program_id(0) * BLOCK, n_tiles, tl.num_programs(0) * BLOCK):
        i = start + lane
        tl.store(tiles_ptr + 2 * i, tl.full((1, BLOCK), -1, tl.int32), i < n_tiles)
        tl.store(tiles_ptr + 2 * i + 1, tl.full((1, BLOCK), -1, tl.int32), i < n_tiles)

    for start in range(0, S, BLOCK):
        s = start + lane
        inside = is_own & (s < S)
        at = (b.to(tl.int64) * S)[:, None] + s
        valid = tl.load(own_ptr + s, inside, other=0).to(tl.int32)
        behind = so_far[:, None] + tl.cumsum(valid, 1)
        so_far += tl.sum(valid, 1)
        to = tl.where(valid != 0, behind - 1, total + at - behind)
        tl.store(slot_ptr + at, tl.maximum(behind - 1, 0).to(tl.int64), inside)
        kept = inside & (to < T)
        tl.store(index_ptr + to, at, kept)
        tl.store(position_ptr + to, s + tl.zeros_like(at).to(tl.int32), kept)


def config(B: int, S: int, num_sms: int) -> dict[str, int]:
    """Settings of the kernel for a mask [B, S]: no more programs than streaming multiprocessors."""
    own = triton.next_power_of_2(triton.cdiv(B, num_sms))
    columns = min(WRITE, triton.next_power_of_2(S))
    return {
        "OWN": own,
        "BLOCK": min(max(WRITE // own, 1), columns),
        "ROWS": min(READ // columns, triton.next_power_of_2(B)),
        "COLUMNS": columns,
        "num_warps": 8,
    }


@token_index.kernel("triton")
def token_index_triton(valid: Tensor, front: bool = False, *, out: Index) -> None:
    B, S = valid.shape
    valid, row = as_rows(valid)
    settings = config(B, S, gpu_properties(valid.device).num_sms)
    launch_triton(
        token_index_kernel, (triton.cdiv(B, settings["OWN"]),), valid, *out,
        B, S // unit_of(S), out[0].shape[0], row // unit_of(row), out[4].shape[0],
        S_UNIT=unit_of(S), ROW_UNIT=unit_of(row), **settings,
        **overlap(valid.device),
    )  # fmt: skip
