"""Histograms add up exactly, and their ranges are those that the values themselves would give."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphquant.calibration.histogram import BINS, MIN_EXPONENT, Histogram

SIZES = [0.0, 1e-45, 1e-30, 1e-3, 0.5, 1.0, 1.5, 300.0, 1e30, 3.4e38]
magnitudes = st.lists(st.sampled_from(SIZES), min_size=1, max_size=4)


def hist(x: Tensor) -> Histogram:
    return Histogram.of(x, float(x.abs().max()) if x.numel() else 0.0)


def values(seed: int, sizes: list[float]) -> Tensor:
    """float32 values of very unlike sizes, signs mixed, the sizes themselves among them."""
    draw = torch.Generator().manual_seed(seed)
    uniform = [s * (2 * torch.rand(50, generator=draw) - 1) for s in sizes]
    ends = torch.tensor([sign * s for s in sizes for sign in (1, -1)])
    return torch.cat([*uniform, ends])


def equal(a: Histogram, b: Histogram) -> None:
    assert a.exponent == b.exponent
    assert torch.equal(a.counts, b.counts)


@given(st.integers(0, 2**16), st.lists(magnitudes, min_size=1, max_size=5), st.randoms())
def test_the_sum_of_parts_is_the_whole_in_any_order(
    seed: int, parts: list[list[float]], random: object
) -> None:
    drawn = [values(seed + i, sizes) for i, sizes in enumerate(parts)]
    whole = hist(torch.cat(drawn))
    random.shuffle(drawn)  # type: ignore[attr-defined]
    equal(sum(map(hist, drawn), Histogram.empty()), whole)
    nested = Histogram.empty()
    for part in reversed(drawn):
        nested = hist(part) + nested
    equal(nested, whole)


@given(st.integers(0, 2**16), magnitudes)
def test_every_value_is_in_its_bin(seed: int, sizes: list[float]) -> None:
    x = values(seed, sizes)
    h = hist(x)
    assert int(h.counts.sum()) == x.numel()
    edges = (torch.arange(BINS + 1, dtype=torch.float64) - BINS // 2) * h.width
    want = torch.bucketize(x.double(), edges, right=True) - 1
    assert torch.equal(h.counts, torch.bincount(want, minlength=BINS))
    assert edges[0] <= x.min() and x.max() < edges[-1]
    if (most := float(x.abs().max())) > 2.0**MIN_EXPONENT:
        assert most >= -edges[0] / 2  # the range is no wider than it must be


def test_values_are_binned_in_parts_when_they_are_many() -> None:
    x = torch.randn(2**20 + 3)
    equal(hist(x), hist(x[:1000]) + hist(x[1000:]))
    assert int(hist(x).counts.sum()) == 2**20 + 3


@given(st.integers(0, 2**16), st.floats(0.1, 100.0))
def test_a_percentile_is_the_order_statistic_to_a_bin(seed: int, percent: float) -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(seed)) ** 3
    h = hist(x)
    order = x.abs().double().sort().values
    at = math.ceil(percent / 100 * 500) - 1  # so many values do not exceed it
    assert h.percentile(percent) == pytest.approx(float(order[at]), abs=h.width * 1.001)


def test_percentiles_of_evenly_spread_values() -> None:
    x = torch.linspace(-1, 1, 100_001)
    for percent in (1.0, 50.0, 99.0, 99.99):
        assert hist(x).percentile(percent) == pytest.approx(percent / 100, abs=1e-4)
    assert Histogram.empty().percentile(99.0) == 0.0


def rounded(x: Tensor, low: float, high: float) -> Tensor:
    """x on the 255 levels of a static range, in float64: ops/numerics.py with one scale for all."""
    shift, step = (low + high) / 2, (high - low) / 2 / 127
    return ((x.double() - shift) / step).round().clamp(-127, 127) * step + shift


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 1.0), (-5.0, 5.0), (-0.5, 3.0), (0.0, 2.0), (-4.0, 0.1), (-9.0, 30.0)]
)
def test_the_expected_error_is_the_error(low: float, high: float) -> None:
    """The difference is that of values within their bins: w^2 / 12 for each would be all of it."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    want = float((rounded(x, low, high) - x.double()).square().sum())
    assert hist(x).error(low, high) == pytest.approx(want, rel=0.01)


def test_of_a_single_step_the_error_is_a_twelfth() -> None:
    """All values within one bin far wider than a step: uniform, so step^2 / 12 each."""
    x = torch.full((1000,), 0.3)
    h = hist(x)
    step = h.width / 64
    error = h.error(0.3 - 127 * step, 0.3 + 127 * step)
    assert error == pytest.approx(1000 * step**2 / 12, rel=1e-3)


def brute(x: Tensor) -> tuple[float, float, float]:
    """(error, low, high) of the best of a fine grid, by rounding the values themselves."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    grid = [0.97**k for k in range(0, 110, 2)]
    found = []
    for a in grid if low else [1.0]:
        for b in grid if high else [1.0]:
            error = (rounded(x, low * a, high * b) - x.double()).square().sum()
            found.append((float(error), low * a, high * b))
    return min(found)


@pytest.mark.parametrize("shape", ["gaussian", "relu", "one-sided", "negative"])
def test_the_best_range_is_as_good_as_the_best_of_a_grid(shape: str) -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    x = {
        "gaussian": x,
        "relu": x.relu(),
        "one-sided": torch.cat([x * 0.1, x.abs() * 3]),
        "negative": -x.square(),
    }[shape]
    full = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    low, high = hist(x).best_range(*full)
    assert full[0] <= low <= 0 <= high <= full[1]
    ours = float((rounded(x, low, high) - x.double()).square().sum())
    assert ours <= 1.03 * brute(x)[0]


def test_a_lone_outlier_is_clipped_where_that_costs_less_than_it_brings() -> None:
    """To clip 12 to 4 costs 64; the steps of a million values get from 16 / 254 to 8 / 254."""
    x = torch.cat([torch.randn(1_000_000), torch.tensor([12.0])])
    h = hist(x)
    low, high = h.best_range(float(x.min()), 12.0)
    assert -5.5 < low < -3.5 and 3.5 < high < 6
    assert h.error(low, high) < h.error(float(x.min()), 12.0) / 2
    few = hist(x[-1000:])
    assert few.best_range(float(x[-1000:].min()), 12.0)[1] > 11


def test_neither_end_of_the_best_range_is_better_a_little_further_in_or_out() -> None:
    """The best ends are between the powers of two that are tried first, and beyond the best one."""
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, torch.tensor([9.0])])
    h, least = hist(x), float(x.min())
    low, high = h.best_range(least, 9.0)
    assert least < 1.1 * low and 1.1 * high < 9.0
    for a, b in ((0.9, 1.0), (1.1, 1.0), (1.0, 0.9), (1.0, 1.1)):
        assert h.error(low * a, high * b) > 1.01 * h.error(low, high)


def test_what_is_constant_has_a_range() -> None:
    assert hist(torch.zeros(5)).best_range(0.0, 0.0) == (0.0, 0.0)
    low, high = hist(torch.full((5,), 2.5)).best_range(0.0, 2.5)
    assert low == 0.0 and 0 < high <= 2.5
    assert abs(float(rounded(torch.tensor(2.5), low, high)) - 2.5) < 0.01
