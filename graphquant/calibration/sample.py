"""Bottom-k sample of rows: a small random sample that does not depend on the order of the data.

The ROWS distinct rows with the smallest hashes are kept. The smallest of a whole are among the
smallest of its parts, so samples of batches, runs and processes can be merged in any order. Hashes
are independent of what a row means, so the sample is unbiased over distinct rows (padding, the same
row a thousand times, counts once). Source: Cohen and Kaplan, "Summarizing data using bottom-k
sketches", PODC 2007.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

ROWS = 64
CHUNK = 2**20  # elements hashed at a time, in int64


def sample_rows(rows: Tensor) -> Tensor:
    """The sample of rows [n, K] float32: at most [ROWS, K], on the CPU, without inf and nan."""
    rows = rows[rows.isfinite().all(1)]
    hashes, order = _hashes(rows).sort(stable=True)
    first = torch.ones_like(hashes, dtype=torch.bool)
    first[1:] = hashes[1:] != hashes[:-1]
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
    """[K] odd int64, always the same for one K."""
    generator = torch.Generator("cpu").manual_seed(K)
    return torch.randint(-(2**62), 2**62, (K,), generator=generator) * 2 + 1


_MIX = -7046029254386353131  # 2^64 / golden ratio, odd: every bit of the sum changes the high bits
