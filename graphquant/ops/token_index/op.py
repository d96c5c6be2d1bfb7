"""Where the valid tokens of a padded batch are, and where they go when they are packed.

packed = x.flatten(0, 1)[index]        [B, S, ...] -> [T, ...], sequence after sequence
padded = packed[slot].unflatten(0, (B, S))             and back; pads hold any row

valid          [B, S]  bool, B S >= 1
front          False: T is the number of valid tokens, which a GPU must tell the host; on CUDA
               it is rounded up, so that there are few sizes (`rounded`). True: T is B S, valid
               tokens stand in front, and only the device knows how many there are; nothing
               waits for it, so CUDA graphs can record the op.
-> index       [T]     int64, b S + s of each valid token, in row-major order; then those of the
               first pads, up to T. T >= 1: where nothing is valid, there is a row of a pad.
-> slot        [B S]   int64, the packed row of each token; at pads, any row
-> position    [T]     int32, index % S
-> cu_seqlens  [B + 1] int32, the first packed row of each sequence, and the number of tokens
-> tiles       [B S // 64 + B, 2]  int32, (sequence, first row in it) of each 64 rows of queries,
               of the longest sequence first; -1 in entries that are left over, which are last
-> count       [1]     int32, the number of valid tokens
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from graphquant.errors import UnsupportedInputError
from graphquant.ops import checks
from graphquant.ops.define import define

_exact = threading.local()
TILE = 64  # rows of queries that are computed together
SIZES = 128  # different numbers of rows on CUDA, for one size of the mask
Index = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _check(valid: Tensor, front: bool = False) -> None:
    checks.rows("token_index", "valid", valid, (torch.bool,))
    if valid.dim() != 2:
        raise UnsupportedInputError(f"token_index: valid has {valid.dim()} dims, needs [B, S]")
    checks.nonempty("token_index", "valid", valid, 0, "B >= 1")


def _fake(valid: Tensor, front: bool = False) -> Index:
    T = valid.numel() if front else torch.library.get_ctx().new_dynamic_size(min=1)
    return _empty(valid, T)


def _sized(valid: Tensor, front: bool = False) -> Index:
    positions = valid.numel()
    return _empty(valid, positions if front else rounded(int(valid.sum()), positions, valid.device))


def rounded(tokens: int, positions: int, device: torch.device) -> int:
    """T for this many tokens of B S positions: at least 1, on CUDA one of SIZES at most. A kernel
    is launched for the first time for each size, which takes longer than later launches."""
    if device.type != "cuda" or getattr(_exact, "on", False):
        return max(tokens, 1)
    unit = max(TILE, -(-positions // SIZES))
    return min(max(-(-tokens // unit), 1) * unit, positions)


def _empty(valid: Tensor, T: int | torch.SymInt) -> Index:
    B, S = valid.shape

    def empty(dtype: torch.dtype, *shape: int | torch.SymInt) -> Tensor:
        return valid.new_empty(shape, dtype=dtype)

    return (
        empty(torch.int64, T),
        empty(torch.int64, B * S),
        empty(torch.int32, T),
        empty(torch.int32, B + 1),
        empty(torch.int32, B * S // TILE + B, 2),
        empty(torch.int32, 1),
    )


@contextmanager
def exact_rows() -> Iterator[None]:
    """Context in which there is a row for each token and no other, on CUDA as well: for callers
    that look at every row."""
    before, _exact.on = getattr(_exact, "on", False), True
    try:
        yield
    finally:
        _exact.on = before


@define(
    "(Tensor valid, bool front=False) -> (Tensor index, Tensor slot, Tensor position,"
    " Tensor cu_seqlens, Tensor tiles, Tensor count)",
    float_form=lambda valid, *_: valid,
    fake=_fake,
    check=_check,
    cpu=False,
    sized=_sized,
)
def token_index(valid: Tensor, front: bool = False) -> Index:
    S, flat = valid.shape[1], valid.flatten()
    lengths = valid.sum(1, dtype=torch.int32)
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    so_far = flat.cumsum(0)
    index = _valid_first(flat, so_far) if front else _valid_alone(flat)
    position = (index % S).to(torch.int32)
    slot = (so_far - 1).clamp(min=0)
    return index, slot, position, cu_seqlens, _tiles(lengths, flat.numel()), cu_seqlens[-1:].clone()


def _valid_alone(flat: Tensor) -> Tensor:
    first = flat[:1] | ~flat.any()  # a row for nothing, without a branch on data
    return torch.cat((first, flat[1:])).nonzero().squeeze(1)


def _valid_first(flat: Tensor, so_far: Tensor) -> Tensor:
    """The permutation of all positions that puts the valid ones first, each kind in its order."""
    at = torch.arange(flat.numel(), device=flat.device)
    row = torch.where(flat, so_far - 1, so_far[-1] + at - so_far)
    return torch.empty_like(at).scatter(0, row, at)


def _tiles(lengths: Tensor, positions: int) -> Tensor:
    lengths, sequence = lengths.sort(descending=True, stable=True)
    each = (lengths + TILE - 1) // TILE
    ends = each.cumsum(0)
    tile = torch.arange(positions // TILE + lengths.numel(), device=lengths.device)
    of = torch.searchsorted(ends, tile, right=True)
    used, of = of < lengths.numel(), of.clamp(max=lengths.numel() - 1)
    made = torch.stack((sequence[of], (tile - (ends - each)[of]) * TILE), 1)
    return torch.where(used[:, None], made, -1).to(torch.int32)
