"""attention whose scores rise from block to block or are not finite, against float64.

Kernels that keep the first block's maxima compute such a block twice.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from graphquant.ops import attention
from graphquant.ops.attention.hopper_tiles import MASKED, TILES
from graphquant.ops.define import Kernel, Op
from tests.ops.bounds import kernels
from tests.ops.test_attention import Heads, assert_right

BF16, FP16 = torch.bfloat16, torch.float16
LIMIT = 33  # log2: what a score may rise by before a block is computed twice, and a little more
BLOCK = 64  # keys, of the kernels that keep maxima
LENGTHS = (1, 63, 64, 65, 200, 729, 730)  # less and more than a block, a tile and its last rows
ours = kernels(attention, named=("hopper", "cpu"))


def tiles_of(kernel: Kernel, D: int) -> list[str]:
    """The tiles with which the kernel is to be tested; CPU kernels have none, and take any."""
    if kernel.name == "hopper":
        return [name for name, tile in TILES.items() if tile.refuses(D) is None]
    return [MASKED if kernel.name == "hopper_padded" else "128x128"]


def rising(heads: Heads, device: str) -> tuple[Tensor, Tensor, Tensor, float]:
    """Small scores in what is read first: the last keys, and before others the first ones."""
    q, k, v, scale = replace(heads, spread=8.0).on(device)
    T = k.shape[2]
    size = torch.linspace(6.0, 0.1, T, device=device)
    size[: T // 3] *= 0.3
    k *= size.to(k.dtype)[:, None]
    if T > BLOCK:
        some, keys = (t[:1].cpu().double() for t in (q, k))
        scores = scale / math.log(2) * (some @ keys.transpose(2, 3))
        first = (T - 1) % BLOCK + 1
        rise = scores.amax(-1) - scores[..., -first:].amax(-1)
        assert (rise > LIMIT).float().mean() > 0.5
    return q, k, v, scale


@ours
@pytest.mark.parametrize("D", [64, 72])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_scores_may_rise(
    op: Op, kernel: Kernel, device: str, tokens: int, dtype: torch.dtype, D: int, poisoned: None
) -> None:
    args = rising(Heads(B=2, H=3, S=tokens, T=tokens, D=D, dtype=dtype), device)
    for tile in tiles_of(kernel, D):
        assert_right(kernel.fn(*args, tile), *args)


@ours
@pytest.mark.parametrize("layout", ["heads", "tokens", "fused"])
@pytest.mark.parametrize(("S", "T"), [(200, 729), (300, 129)])
def test_scores_may_rise_in_any_layout(
    op: Op, kernel: Kernel, device: str, S: int, T: int, layout: str
) -> None:
    args = rising(Heads(S=S, T=T, D=64, dtype=BF16, layout=layout), device)
    for tile in tiles_of(kernel, 64):
        assert_right(kernel.fn(*args, tile), *args)


@ours
@pytest.mark.parametrize(("dtype", "size"), [(BF16, 2.0**84), (FP16, 2.0**12)])
def test_values_may_be_large(
    op: Op, kernel: Kernel, device: str, dtype: torch.dtype, size: float
) -> None:
    q, k, v, scale = rising(Heads(S=200, T=729, D=64, dtype=dtype), device)
    v *= size
    for tile in tiles_of(kernel, 64):
        y = kernel.fn(q, k, v, scale, tile)
        assert y.isfinite().all()
        assert_right(y, q, k, v, scale)


@ours
@pytest.mark.parametrize("D", [64, 72])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("factor", [torch.nan, torch.inf, 1000.0])
def test_a_query_with_other_maxima_leaves_the_others_alone(
    op: Op, kernel: Kernel, device: str, factor: float, dtype: torch.dtype, D: int
) -> None:
    """Bit for bit: what is computed twice for it changes no other row."""
    q, k, v, scale = Heads(S=200, T=200, D=D, dtype=dtype).on(device)
    odd = q.clone()
    odd[0, 1, 7] *= factor
    others = torch.ones(q.shape[:3], dtype=torch.bool, device=device)
    others[0, 1, 7] = False
    for tile in tiles_of(kernel, D):
        y = kernel.fn(odd, k, v, scale, tile)
        assert torch.equal(y[others], kernel.fn(q, k, v, scale, tile)[others])
        if math.isfinite(factor):
            assert_right(y, odd, k, v, scale)
        else:
            assert y[0, 1, 7].isnan().all()


@ours
@pytest.mark.parametrize("D", [64, 72])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("key", [5, 100, 199])
def test_a_key_that_is_not_finite(
    op: Op, kernel: Kernel, device: str, key: int, dtype: torch.dtype, D: int
) -> None:
    """Its scores are inf, and y NaN, or -inf, and y that of the other keys."""
    q, k, v, scale = Heads(H=1, S=200, T=200, D=D, dtype=dtype).on(device)
    k[0, 0, key, 3] = torch.inf
    finite = q[0, 0, :, 3] < 0
    rest = torch.arange(200, device=device) != key
    for tile in tiles_of(kernel, D):
        y = kernel.fn(q, k, v, scale, tile)
        assert y[:, :, ~finite].isnan().all()
        assert_right(y[:, :, finite], q[:, :, finite], k[:, :, rest], v[:, :, rest], scale)


@pytest.mark.cuda
@pytest.mark.parametrize("tile", [*TILES, MASKED])
@pytest.mark.parametrize("tokens", [150, 420])
def test_many_tiles_of_each_cta(tile: str, tokens: int, poisoned: None) -> None:
    """Some consumers have no queries in a tile."""
    D = 72 if tile in TILES and TILES[tile].refuses(72) is None else 64
    args = rising(Heads(B=64, H=16, S=tokens, T=tokens, D=D, dtype=BF16), "cuda")
    kernel = attention.kernels[tile == MASKED]
    if (why := kernel.refuses(*args, tile)) is not None:
        pytest.skip(why)
    y = kernel.fn(*args, tile)
    q, k, v, scale = args
    for b in (0, 31, 63):
        assert_right(y[b : b + 1], *(t[b : b + 1] for t in (q, k, v)), scale)
    assert y.isfinite().all()
