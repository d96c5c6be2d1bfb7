"""int8_linear: exact sums, an epilogue within float32's rounding, any M, N, K and strides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from graphquant.ops import int8_linear, quantize
from graphquant.ops.define import Kernel, Op
from graphquant.ops.int8_linear import tiles, triton_tma
from graphquant.ops.numerics import empty_rows, with_pads
from graphquant.ops.triton_util import Chip
from tests.ops.bounds import U, implementations, kernels
from tests.strategies import FLOATS


@dataclass(frozen=True)
class Linear:
    lead: tuple[int, ...]
    K: int
    N: int
    dtype: torch.dtype = torch.float32
    bias: torch.dtype | None = None
    residual: torch.dtype | None = None
    residual_layout: str = "contiguous"
    rows: str = "padded"  # of xq: padded, packed (stride K), swapped
    seed: int = 0

    def on(self, device: str) -> tuple[Any, ...]:
        g = torch.Generator().manual_seed(self.seed)
        xq, x_scale = quantize.reference(torch.randn(*self.lead, self.K, generator=g))
        wq, w_scale = quantize.reference(torch.randn(self.N, self.K, generator=g))
        bias = None if self.bias is None else torch.randn(self.N, generator=g).to(self.bias)
        residual = None
        if self.residual is not None:
            residual = torch.randn(*self.lead, self.N + 3, generator=g).to(self.residual)
            residual = residual[..., 3:]
            if self.residual_layout == "contiguous":
                residual = residual.contiguous()
            elif self.residual_layout == "every other":
                residual = residual.repeat_interleave(2, -1).to(device)[..., ::2]
        if self.residual_layout != "every other" and residual is not None:
            residual = _moved(residual, device)
        return (
            self._laid_out(xq, device),
            x_scale.to(device),
            _padded(wq, device),
            w_scale[:, 0].to(device),
            None if bias is None else bias.to(device),
            residual,
            self.dtype,
        )

    def _laid_out(self, xq: Tensor, device: str) -> Tensor:
        if self.rows == "packed":
            return xq.contiguous().to(device)
        if self.rows == "swapped" and len(self.lead) > 1:
            return xq.transpose(0, 1).contiguous().to(device).transpose(0, 1)
        return _padded(xq, device)


def _moved(x: Tensor, device: str) -> Tensor:
    """x on `device` with its strides."""
    y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return y.copy_(x)


def _padded(q: Tensor, device: str) -> Tensor:
    moved = empty_rows(torch.empty(0, device=device), q.shape)
    with_pads(moved)[..., q.shape[-1] :] = 0
    return moved.copy_(q)


optional = st.none() | st.sampled_from(FLOATS)
linears = st.builds(
    Linear,
    lead=st.sampled_from([(), (1,), (0,), (2, 3), (4, 0)]) | st.tuples(st.integers(1, 150)),
    K=st.integers(1, 300) | st.sampled_from([16, 128, 256, 1040]),
    N=st.integers(1, 150) | st.sampled_from([8, 64, 128]),
    dtype=st.sampled_from(FLOATS),
    bias=optional,
    residual=optional,
    residual_layout=st.sampled_from(["contiguous", "slice", "every other"]),
    rows=st.sampled_from(["padded", "packed", "swapped"]),
    seed=st.integers(0, 99),
)


def _assert_right(y: Tensor, args: tuple[Any, ...]) -> None:
    """y against float64.

    float(acc), two products and two sums in float32, each within U of what it saw: 8 U of the
    magnitudes that went in. Then one rounding to dtype, of at most eps |y| (half of it on the card;
    Triton's interpreter cuts to bfloat16), or its smallest number where that is denormal.
    """
    xq, x_scale, wq, w_scale, bias, residual, dtype = args
    xq, x_scale, wq, w_scale = (t.cpu() for t in (xq, x_scale, wq, w_scale))
    product = xq.double() @ wq.double().T * x_scale.double() * w_scale.double()  # exact sums
    bias = 0.0 if bias is None else bias.cpu().double()
    residual = 0.0 if residual is None else residual.cpu().double()
    want = product + bias + residual
    seen = product.abs() + abs(bias) + abs(residual)
    assert y.dtype == dtype and y.shape == want.shape and y.is_contiguous()
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    error = (y.cpu().double() - want).abs()
    assert (error <= 8 * U * seen + eps * want.abs() + tiny).all()


@implementations(int8_linear)
@given(linear=linears)
def test_result_is_the_float64_result_up_to_rounding(
    op: Op, kernel: Kernel, device: str, linear: Linear
) -> None:
    args = linear.on(device)
    assume(kernel.refuses(*args) is None)
    _assert_right(kernel.fn(*args), args)


TILES = [("triton", t) for t in tiles.POINTER] + [
    ("triton_tma", t) for t in (*tiles.TMA, *tiles.TMA_FLOAT32)
]


@pytest.mark.parametrize(("name", "tile"), TILES, ids=str)
@pytest.mark.parametrize("K", [256, 300])
def test_every_tile_of_the_tables_gives_the_result(
    name: str, tile: tiles.Tile, K: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kernel,) = (k for k in int8_linear.kernels if k.name == name)
    args = Linear((300,), K, 136, torch.bfloat16, torch.float32, torch.bfloat16).on(device)
    if (why := kernel.refuses(*args)) is not None:
        pytest.skip(why)
    monkeypatch.setattr(tiles, "choose", lambda *_: tile)
    _assert_right(kernel.fn(*args), args)


@implementations(int8_linear)
@pytest.mark.parametrize("K", [1024, 1025, 4304])
def test_sums_are_exact_where_products_are_large(
    op: Op, kernel: Kernel, device: str, K: int
) -> None:
    """Partial sums pass 2^24, where float32 loses the last bit; the whole is small and keeps it."""
    g = torch.Generator().manual_seed(K)
    x, w = (torch.randint(120, 128, (n, K), generator=g, dtype=torch.int8) for n in (3, 5))
    w[:, K // 2 :] *= -1
    w[4] = 127  # and one that stays at the largest sum there is
    x[2] = 127
    ones = torch.ones(5, 1, device=device)
    args = _padded(x, device), ones[:3], _padded(w, device), ones[:, 0], None, None, torch.float32
    if (why := kernel.refuses(*args)) is not None:
        pytest.skip(why)
    want = x.long() @ w.long().T
    assert torch.equal(kernel.fn(*args).cpu(), want.float())


def test_cpu_sums_are_exact_under_autocast() -> None:
    args = Linear((7,), 300, 20).on("cpu")
    want = int8_linear(*args)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(int8_linear(*args), want)


@kernels(int8_linear)
def test_what_the_pads_hold_does_not_matter(op: Op, kernel: Kernel, device: str) -> None:
    args = Linear((40,), 100, 24).on(device)
    want = kernel.fn(*args)
    for q in (args[0], args[2]):
        with_pads(q)[..., 100:] = 99
    assert torch.equal(kernel.fn(*args), want)


@implementations(int8_linear)
def test_a_row_that_is_not_finite_leaves_the_others_alone(
    op: Op, kernel: Kernel, device: str
) -> None:
    xq, x_scale, *rest = Linear((40,), 96, 24).on(device)
    clean = kernel.fn(xq, x_scale, *rest)
    x_scale, xq = x_scale.clone(), xq.clone()
    x_scale[7], xq[7] = torch.inf, 0  # what quantize gives for a row with inf
    y = kernel.fn(xq, x_scale, *rest)
    others = torch.arange(40, device=device) != 7
    assert torch.equal(y[others], clean[others])
    assert y[7].isnan().all()


def _kernel(name: str) -> Kernel:
    (kernel,) = (k for k in int8_linear.kernels if k.name == name)
    return kernel


def _refusal(*args: Any) -> str:
    why = _kernel("triton_tma").refuses(*args)
    assert why is not None
    return why


def test_tma_refuses_what_it_cannot_read_and_says_why(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_tma, "chip", lambda _: CHIPS["H200"])
    padded = Linear((5,), 100, 24).on(device)
    assert _kernel("triton_tma").refuses(*padded) is None
    packed = Linear((5,), 100, 24, rows="packed").on(device)
    assert "xq has rows 100 bytes apart, TMA needs a multiple of 16" in _refusal(*packed)
    swapped = Linear((2, 3), 96, 24, rows="swapped").on(device)
    assert "xq with strides (96, 192, 1) is not rows of consecutive bytes" in _refusal(*swapped)
    wide = torch.zeros(5, 128, dtype=torch.int8, device=device)
    shifted = wide[:, 3:99], padded[1], wide[:, 3:99], padded[1][:, 0], None, None, torch.float32
    assert "xq starts 3 bytes after a multiple of 16" in _refusal(*shifted)
    monkeypatch.setattr(triton_tma, "chip", lambda _: CHIPS["L40"])
    assert "the device is sm_89, TMA needs sm_90 or later" in _refusal(*padded)
    assert int8_linear.choose(*padded).name == "triton"


CHIPS = {
    "A100": Chip(80, 108, 166_912),
    "A10": Chip(86, 72, 101_376),
    "L40": Chip(89, 142, 101_376),
    "H200": Chip(90, 132, 232_448),
    "B200": Chip(100, 148, 232_448),
    "5090": Chip(120, 170, 101_376),
}


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS.keys())
@given(M=st.integers(1, 10**6), N=st.integers(1, 20_000), K=st.integers(1, 20_000))
def test_the_chosen_tile_fits_the_chip(chip: Chip, M: int, N: int, K: int) -> None:
    for table in (tiles.POINTER, tiles.TMA, tiles.TMA_FLOAT32, tiles.TMA_ODD_N):
        assert tiles.choose(table, M, N, K, chip).shared + tiles.SPARE <= chip.shared


def test_the_measured_shapes_get_the_measured_tiles() -> None:
    h200 = CHIPS["H200"]
    shallow, deep = tiles.Tile(128, 128, 128, 4, 3), tiles.Tile(256, 128, 128, 8, 4)
    assert tiles.choose(tiles.TMA, 46656, 3456, 1152, h200) == shallow
    assert tiles.choose(tiles.TMA, 46656, 4304, 1152, h200) == shallow
    assert tiles.choose(tiles.TMA, 46656, 1152, 4304, h200) == deep
    assert tiles.choose(tiles.TMA, 1, 1024, 1024, h200) == tiles.TMA[-1]
