"""quantize_weight: symmetric int8 within half a step of float64, channel by channel, exact sums."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from graphquant.ops import quantize_weight
from graphquant.ops.define import Kernel, Op
from graphquant.ops.numerics import MIN_ABSMAX
from graphquant.ops.quantize_weight import op as op_module
from graphquant.ops.quantize_weight.op import METHODS, shares
from tests.ops.bounds import U, assert_weight, implementations, kernels
from tests.strategies import CONTENTS, FLOATS, HUGE, LAYOUTS, Rows

weights = st.builds(
    Rows,
    st.tuples(st.integers(0, 40)),
    st.integers(1, 150),
    st.sampled_from(FLOATS),
    st.sampled_from([1e-4, 0.02, 1.0, 1000.0]),
    st.sampled_from((*CONTENTS, HUGE)),
    st.sampled_from(LAYOUTS),
    st.integers(0, 99),
)


@implementations(quantize_weight)
@given(sample=weights)
@example(Rows((2,), 8, content="zero row"))
@example(Rows((3,), 257, content="ties"))
@example(Rows((2,), 40, content=HUGE))
@example(Rows((2,), 40, torch.bfloat16, 1e30, "outlier"))
def test_triple_is_within_half_a_step_of_w(
    op: Op, kernel: Kernel, device: str, sample: Rows
) -> None:
    w = sample.on(device)
    assert_weight(*kernel.fn(w), w)


@implementations(quantize_weight)
@given(sample=weights)
@example(Rows((2,), 8, content="zero row"))
@example(Rows((3,), 150, content="ties"))  # exact, with a scale of 1
@example(Rows((2,), 40, content=HUGE))
@example(Rows((2,), 40, content="below the floor"))
def test_mse_is_the_best_share_of_absmax(op: Op, kernel: Kernel, device: str, sample: Rows) -> None:
    """Each share's error in float64, against that of the one that was taken.

    The op measures v - round(v) with v = fl(w fl(127 / absmax)) for |v| <= 127 or so, off by 3 U
    |v| where it is not clipped, and the root of a sum of K squares, off by K U: of two shares it
    may take the one that is worse by twice as much. Absmax itself is one of them: never worse.
    """
    w = sample.on(device)
    triple = kernel.fn(w, "mse")
    exact = w.cpu().double()
    absmax = exact.abs().amax(-1).clamp(min=MIN_ABSMAX)
    assert_weight(*triple, w, absmax=triple[1].cpu().double() * 127)
    wq, w_scale, _ = (t.cpu().double() for t in triple)
    every, known = shares(sample.K), exact.isfinite().all(-1)
    share = w_scale * 127 / absmax
    assert (~known | (share <= max(every) * (1 + 4 * U))).all()
    assert (~known | (share >= min(every) * (1 - 4 * U))).all()
    error = (exact - wq * w_scale[:, None]).norm(dim=-1)
    for other in every:
        scale = (other * absmax / 127)[:, None]
        steps = (exact / scale).round().clamp(-127, 127)
        theirs = (exact - steps * scale).norm(dim=-1)
        slack = 2 * sample.K * U * theirs + 2 * 127 * 4 * U * sample.K**0.5 * scale[:, 0]
        possible = known & (other * absmax <= torch.finfo(torch.float32).max)
        assert (~possible | (error <= theirs + slack)).all()


@implementations(quantize_weight)
def test_mse_wins_what_chance_gives(op: Op, kernel: Kernel, device: str) -> None:
    """On gaussian weights the sum of squares is 2 % less at 1152 (0.1 dB), 4 % at 384."""
    for K, less in ((1152, 0.985), (384, 0.97)):
        w = torch.randn(300, K, generator=torch.Generator().manual_seed(0)).to(device)
        of = {
            method: float((w.double() - t[0].double() * t[1].double()[:, None]).square().sum())
            for method in METHODS
            for t in [kernel.fn(w, method)]
        }
        assert 0.93 * of["absmax"] < of["mse"] < less * of["absmax"]


def test_mse_clips_where_rows_are_so_long_that_it_pays() -> None:
    """One value of 100 among K of size 1: absmax / (1 + K / c), c = 12 * 127^2."""
    K = 100_000
    w = torch.randn(2, K, generator=torch.Generator().manual_seed(0))
    w[:, 7] = 100.0
    scale = quantize_weight(w, "mse")[1] * 127
    assert ((scale - 100 / (1 + K / (12 * 127**2))).abs() < 3).all()


@pytest.mark.parametrize("method", METHODS)
def test_how_many_rows_are_tried_together_changes_nothing(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = torch.randn(37, 100)
    want = quantize_weight(w, method)
    for together in (1, 250, 1000):
        monkeypatch.setattr(op_module, "CACHED", together)
        assert all(map(torch.equal, quantize_weight(w, method), want))


@kernels(quantize_weight)
@given(sample=weights)
def test_kernel_gives_the_reference_bit_for_bit(
    op: Op, kernel: Kernel, device: str, sample: Rows
) -> None:
    """Whether a weight is packed before or after it is moved to the GPU changes nothing."""
    w = sample.on(device)
    for got, want in zip(kernel.fn(w), op.reference(w.cpu()), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0, equal_nan=True)


@implementations(quantize_weight)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("K", [96, 100])
def test_stacked_weights_quantize_to_stacked_quantized_weights(
    op: Op, kernel: Kernel, device: str, dtype: torch.dtype, K: int, method: str
) -> None:
    q, k, v = (torch.randn(n, K, device=device).mul(n).to(dtype) for n in (24, 8, 9))
    stacked = kernel.fn(torch.cat([q, k, v]), method)
    apart = [kernel.fn(w, method) for w in (q, k, v)]
    for together, parts in zip(stacked, zip(*apart, strict=True), strict=True):
        assert torch.equal(together, torch.cat(parts))


@implementations(quantize_weight)
def test_ties_round_to_even(op: Op, kernel: Kernel, device: str) -> None:
    w = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.0]], device=device)
    wq, w_scale, w_sum = kernel.fn(w)
    assert wq.tolist() == [[0, 2, 2, 0, -2, -2, 126, 127]]
    assert w_scale.tolist() == [1.0] and w_sum.tolist() == [253.0]


@implementations(quantize_weight)
def test_a_one_sided_channel_is_not_shifted(op: Op, kernel: Kernel, device: str) -> None:
    """int8_linear has no product for a weight's shift."""
    wq, w_scale, w_sum = kernel.fn(torch.tensor([[0.0, 1.0, 127.0]], device=device))
    assert wq.tolist() == [[0, 1, 127]] and w_scale.tolist() == [1.0] and w_sum.tolist() == [128.0]


@implementations(quantize_weight)
@pytest.mark.parametrize("value", [127, -127])
def test_the_largest_sum_is_exact(op: Op, kernel: Kernel, device: str, value: int) -> None:
    K = 132_104  # 127 K < 2^24; one more column and float32 would round
    w = torch.full((1, K), float(value), device=device)
    w[0, 0] -= math.copysign(1, value)
    assert kernel.fn(w)[2].tolist() == [value * K - math.copysign(1, value)]


@implementations(quantize_weight)
@pytest.mark.parametrize("method", METHODS)
def test_a_channel_of_zeros_gives_zeros_and_the_floor(
    op: Op, kernel: Kernel, device: str, method: str
) -> None:
    wq, w_scale, w_sum = kernel.fn(torch.zeros(2, 37, device=device), method)
    assert not wq.any() and not w_sum.any()
    assert torch.equal(w_scale.cpu(), torch.full((2,), MIN_ABSMAX) / 127)


@implementations(quantize_weight)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_channel_that_is_not_finite_leaves_the_others_alone(
    op: Op, kernel: Kernel, device: str, bad: float, method: str
) -> None:
    w = torch.randn(5, 37, device=device)
    clean = [t.clone() for t in kernel.fn(w, method)]
    w[3, 11] = bad
    triple = kernel.fn(w, method)
    others = torch.arange(5, device=device) != 3
    for got, before in zip(triple, clean, strict=True):
        assert torch.equal(got[others], before[others])
    wq, w_scale, w_sum = (t[3] for t in triple)
    assert not wq.any() and not w_scale.isfinite() and w_sum.isnan()


@implementations(quantize_weight)
@pytest.mark.parametrize("method", METHODS)
def test_no_channels_give_no_channels(op: Op, kernel: Kernel, device: str, method: str) -> None:
    w = torch.empty(0, 20, device=device)
    assert_weight(*kernel.fn(w, method), w)
