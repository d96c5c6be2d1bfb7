"""The scale that moves size from activations to weights: its equation, its edges, the search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphquant.ops.numerics import quantize_rows, quantize_symmetric
from graphquant.passes.policy.smoothing import ALPHAS, FLOOR, searched_smoothing, smoothing

U = 2.0**-24
LARGEST = torch.finfo(torch.float32).max


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def spread(*size: int) -> Tensor:
    """Positive numbers of 0.05 to 20, most of them."""
    return torch.randn(*size).exp()


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_s_is_the_equation(alpha: float, dtype: torch.dtype) -> None:
    w, absmax = (torch.randn(9, 14) * spread(14)).to(dtype), spread(14)
    s = smoothing(w, absmax, alpha)
    lengths = [sum(v**2 for v in row) ** 0.5 for row in w.tolist()]
    sizes = [
        max(abs(v) / length for v, length in zip(column, lengths, strict=True))
        for column in zip(*w.tolist(), strict=True)
    ]
    want = [a**alpha / b ** (1 - alpha) for a, b in zip(absmax.tolist(), sizes, strict=True)]
    c = max(a / v for a, v in zip(absmax.tolist(), want, strict=True))
    torch.testing.assert_close(s, torch.tensor([c * v for v in want]), rtol=1e-5, atol=0)
    torch.testing.assert_close((absmax / s).amax(), torch.tensor(1.0), rtol=1e-5, atol=0)


def test_the_size_of_an_output_channel_means_nothing() -> None:
    w, absmax = torch.randn(9, 14) * spread(14), spread(14)
    loud = w * spread(9, 1) * 10
    torch.testing.assert_close(smoothing(loud, absmax, 0.5), smoothing(w, absmax, 0.5))


def test_a_channel_that_is_scaled_in_x_and_back_in_w_is_scaled_back() -> None:
    """But for c, and for the length of w's rows."""
    w, absmax, f = torch.randn(9, 200), spread(200), torch.ones(200)
    f[3] = 50.0
    plain, moved = smoothing(w, absmax, 0.5), smoothing(w / f, absmax * f, 0.5)
    ratio = moved / plain / f
    torch.testing.assert_close(ratio / ratio[0], torch.ones(200), rtol=0.1, atol=0)


_edges = st.sampled_from([0.0, 1e-40, 1e-20, 1e-3, 1.0, 3.0, 1e20, 3e38, torch.inf, torch.nan])


@given(data=st.data(), N=st.integers(1, 4), K=st.integers(1, 6), alpha=st.floats(0.01, 0.99))
def test_s_and_its_reciprocal_are_positive_and_finite(
    data: st.DataObject, N: int, K: int, alpha: float
) -> None:
    def drawn(count: int) -> Tensor:
        return torch.tensor(data.draw(st.lists(_edges, min_size=count, max_size=count)))

    w, absmax, rows = drawn(N * K).view(N, K), drawn(K), drawn(2 * K).view(2, K)
    for s in (smoothing(w, absmax, alpha), searched_smoothing(w, absmax, rows)):
        assert s.shape == (K,) and s.dtype == torch.float32
        assert bool((s > 0).all() and (s <= LARGEST).all() and (1 / s <= LARGEST).all())


@pytest.mark.parametrize("silent", [0.0, 1e-30])
def test_a_silent_channel_may_wake_up(silent: float) -> None:
    """Amplified by (1 / FLOOR)^alpha at most, against a channel of mean size."""
    w, absmax = torch.ones(4, 50), torch.ones(50)
    absmax[7] = silent
    s = smoothing(w, absmax, 0.5)
    assert s[7] == s[0].mul((FLOOR * absmax.mean()) ** 0.5)


def test_what_is_not_finite_counts_as_the_mean() -> None:
    w, absmax = torch.ones(4, 3), torch.tensor([1.0, 3.0, torch.inf])
    want = smoothing(w, torch.tensor([1.0, 3.0, 2.0]), 0.5)
    assert torch.equal(smoothing(w, absmax, 0.5), want)
    absmax[2] = torch.nan
    assert torch.equal(smoothing(w, absmax, 0.5), want)


def int8_error(x: Tensor, w: Tensor, s: Tensor) -> float:
    """|error|^2 of (x / s) (w s)^T in int8, in float64."""
    xq, x_scale, x_shift = (t.double() for t in quantize_rows(x / s))
    wq, w_scale = (t.double() for t in quantize_symmetric(w * s))
    got = (xq * x_scale + x_shift) @ (wq * w_scale).T
    return float((got - x.double() @ w.double().T).square().sum())


def scales(w: Tensor, absmax: Tensor) -> list[Tensor]:
    return [torch.ones_like(absmax), *(smoothing(w, absmax, alpha) for alpha in ALPHAS)]


SPREADS = {
    "even": lambda: (torch.ones(96), torch.ones(96)),
    "outliers in x": lambda: (
        torch.ones(96).index_fill(0, torch.tensor([5]), 40.0),
        torch.ones(96),
    ),
    "spread in x": lambda: (spread(96), torch.ones(96)),
    "spread in w": lambda: (torch.ones(96), spread(96)),
    "spread in both": lambda: (spread(96), spread(96)),
    "moved": lambda: (f := spread(96) * 3, 1 / f),
}


@pytest.mark.parametrize("name", SPREADS)
@pytest.mark.parametrize("one_sided", [False, True])
def test_the_search_finds_what_int8_likes_best(name: str, one_sided: bool) -> None:
    """On other rows than those that it searched on, within a dB of the best."""
    of_x, of_w = SPREADS[name]()
    w, x = torch.randn(80, 96) * of_w, torch.randn(600, 96)
    x = (x.relu() if one_sided else x) * of_x
    absmax = x.abs().amax(0)
    found = searched_smoothing(w, absmax, x[:200])
    errors = [int8_error(x[200:], w, s) for s in scales(w, absmax)]
    assert int8_error(x[200:], w, found) <= 1.25 * min(errors)
    if "x" in name:
        assert min(errors) < 0.8 * errors[0], "there is nothing to find"


def test_rows_that_tell_nothing_smooth_nothing() -> None:
    w, absmax = torch.randn(8, 6), spread(6)
    for rows in (torch.full((3, 6), torch.nan), torch.zeros(0, 6)):
        s = searched_smoothing(w, absmax, rows)
        assert torch.equal(s, absmax.amax().expand(6))
