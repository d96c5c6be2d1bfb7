"""A few rows of all that were seen, the same ones in whatever order they came.

Kept are the ROWS distinct rows with the smallest hashes of their values. The smallest of a whole
are among the smallest of its parts, so samples of batches, runs and processes can be joined in any
order; and as a hash tells nothing of what a row holds, they are a fair choice of distinct rows
(padding, the same row a thousand times, counts once). Source: bottom-k sketches, Cohen and Kaplan,
"Summarizing data using bottom-k sketches", PODC 2007.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

ROWS = 64
CHUNK = 2**20  # elements that are hashed at a time: in int64


def smallest(rows: Tensor) -> Tensor:
    """At most ROWS of these rows [n, K] float32, by their hashes, on the CPU. Rows that hold inf or
    nan are left out."""
    rows = rows[rows.isfinite().all(1)]
    found, order = _hashes(rows).sort(stable=True)
    first = torch.ones_like(found, dtype=torch.bool)
    first[1:] = found[1:] != found[:-1]
    return rows[order[first][:ROWS]].cpu()


def _hashes(rows: Tensor) -> Tensor:
    """[n] int64: a random linear function of each row's bits, modulo 2^64, then mixed."""
    K = rows.shape[1]
    factors = _factors(K).to(rows.device)
    bits = rows.contiguous().view(torch.int32)
    parts = bits.split(max(1, CHUNK // max(1, K)))
    sums = torch.cat([(part.long() * factors).sum(1) for part in parts])
    return (sums ^ (sums >> 32)) * _MIX


@cache
def _factors(K: int) -> Tensor:
    """[K] odd int64, the same wherever K is."""
    draw = torch.Generator("cpu").manual_seed(K)
    return torch.randint(-(2**62), 2**62, (K,), generator=draw) * 2 + 1


_MIX = -7046029254386353131  # 2^64 / golden ratio, odd: every bit of the sum moves the high ones
