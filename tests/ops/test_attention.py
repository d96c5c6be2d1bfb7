"""attention: softmax(scale q k^T) v against float64, for any lengths, widths, strides and tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphquant.ops import attention
from graphquant.ops.attention.op import TILES, WIDEST
from graphquant.ops.attention.triton import TILES as SIZES
from graphquant.ops.attention.triton import head_parts
from graphquant.ops.define import Kernel, Op
from tests.ops.bounds import U, implementations, kernels
from tests.strategies import FLOATS

LAYOUTS = ("heads", "tokens", "fused", "columns")


@dataclass(frozen=True)
class Heads:
    B: int = 1
    H: int = 2
    S: int = 5  # queries
    T: int = 5  # keys
    D: int = 16
    dtype: torch.dtype = torch.float32
    layout: str = "fused"
    spread: float = 1.0  # of the scores
    scale: float = 1.0  # times D ** -0.5
    seed: int = 0

    def on(self, device: str) -> tuple[Any, ...]:
        """q, k, v, scale: v has a mean of its own in each column."""
        g = torch.Generator().manual_seed(self.seed)
        wide = [
            torch.randn(self.B, n, self.H, self.D, generator=g) for n in (self.S, self.T, self.T)
        ]
        wide[0] *= self.spread
        wide[2] += torch.linspace(-2, 2, self.D)
        laid = [self._laid_out(t.to(self.dtype).to(device)) for t in wide]
        return *laid, self.scale * self.D**-0.5

    def _laid_out(self, t: Tensor) -> Tensor:
        if self.layout == "heads":
            return t.transpose(1, 2).contiguous()
        if self.layout == "columns":  # nothing reads these in place
            return t.transpose(1, 3).contiguous().permute(0, 2, 3, 1)
        if self.layout == "fused":
            t = torch.cat([t, torch.full_like(t, torch.nan)], 2)[:, :, : self.H]
        return t.transpose(1, 2)


def assert_right(y: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """y against float64.

    A score is a sum of D products, off by (D + 2) U of the sum of their sizes, e at most in a row;
    exp turns that into a factor within exp(+-e), as does the 2^-22 of the card's own exponential.
    Weights and their sum have those factors, so y is off by 2 (e + 2^-21) of sum p |v|, and by U
    for each of its T additions. Weights are then rounded to v's type, and so is y (eps each: half
    of it on the card; Triton's interpreter cuts to bfloat16).
    """
    assert y.shape == q.shape and y.dtype == q.dtype
    assert y.transpose(1, 2).is_contiguous()
    eps = 0.0 if y.dtype == torch.float32 else torch.finfo(y.dtype).eps
    q, k, v, y = (t.cpu().double() for t in (q, k, v, y))
    p = torch.softmax(scale * (q @ k.transpose(2, 3)), -1)
    want, seen = p @ v, p @ v.abs()
    e = (q.shape[3] + 4) * U * scale * (q.abs() @ k.abs().transpose(2, 3)).amax(-1, keepdim=True)
    bound = (2 * (e + 2**-21) + k.shape[2] * U) * seen + eps * (seen + want.abs())
    assert ((y - want).abs() <= bound + 1e-7).all()


heads = st.builds(
    Heads,
    B=st.sampled_from([0, 1, 3]),
    H=st.integers(1, 3),
    S=st.integers(0, 70) | st.sampled_from([64, 128, 130]),
    T=st.integers(1, 70) | st.sampled_from([64, 128, 130, 257]),
    D=st.integers(1, 40) | st.sampled_from([64, 72, 80, 96, 128]),
    dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(LAYOUTS),
    spread=st.sampled_from([0.0, 1.0, 20.0]),
    scale=st.sampled_from([0.5, 1.0]),
    seed=st.integers(0, 99),
)


@implementations(attention)
@given(heads=heads, tile=st.sampled_from(TILES))
def test_result_is_the_float64_result_up_to_rounding(
    op: Op, kernel: Kernel, device: str, heads: Heads, tile: str
) -> None:
    args = heads.on(device)
    if kernel.refuses(*args, tile) is not None:
        tile = "64x64"
    assert_right(kernel.fn(*args, tile), *args)


def test_a_tile_that_does_not_fit_the_card_is_refused() -> None:
    (kernel,) = attention.kernels
    wide = Heads(D=128).on("cpu")
    why = kernel.refuses(*wide, "128x128")
    assert why == "tile 128x128 of heads of 128 needs 327680 bytes of shared memory, not 232448"
    assert kernel.refuses(*wide, "64x64") is None
    assert kernel.refuses(*Heads(D=128, dtype=torch.bfloat16).on("cpu"), "128x128") is None
    assert "wider than 256" in str(kernel.refuses(*Heads(D=257).on("cpu"), "64x64"))


@kernels(attention)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("tokens", [1, 64, 197, 257])
def test_every_element_is_written(
    op: Op, kernel: Kernel, device: str, tile: str, tokens: int, poisoned: None
) -> None:
    args = Heads(S=tokens, T=tokens, D=72, dtype=torch.bfloat16).on(device)
    assert_right(kernel.fn(*args, tile), *args)


@implementations(attention)
@pytest.mark.parametrize("tile", TILES)
def test_a_query_that_is_not_finite_leaves_the_others_alone(
    op: Op, kernel: Kernel, device: str, tile: str
) -> None:
    q, k, v, scale = Heads(S=70, T=70, layout="heads").on(device)
    clean = kernel.fn(q, k, v, scale, tile)
    q[0, 1, 7, 3] = torch.nan
    y = kernel.fn(q, k, v, scale, tile)
    others = torch.ones(y.shape[:3], dtype=torch.bool)
    others[0, 1, 7] = False
    assert torch.equal(y.cpu()[others], clean.cpu()[others])
    assert y[0, 1, 7].isnan().all()


def test_tiles_have_sizes_as_they_are_called() -> None:
    assert {f"{t.BM}x{t.BN}": name for name, t in SIZES.items()} == {t: t for t in TILES}


def test_a_head_is_computed_little_wider_than_it_is() -> None:
    """In powers of two from 16 on, as products on tensor cores are."""
    for D in range(1, WIDEST + 1):
        whole, rest = head_parts(D)
        assert whole + rest >= D and whole & (whole - 1) == rest & (rest - 1) == 0
        assert whole >= 16 and (whole <= D or D < 16)
        assert rest == 0 or rest >= 16
    assert [head_parts(D) for D in (64, 72, 80, 96)] == [(64, 0), (64, 16), (64, 16), (64, 32)]
