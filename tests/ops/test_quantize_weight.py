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
from tests.ops.bounds import assert_weight, implementations, kernels
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


@kernels(quantize_weight)
@given(sample=weights)
def test_kernel_gives_the_reference_bit_for_bit(
    op: Op, kernel: Kernel, device: str, sample: Rows
) -> None:
    """Whether a weight is packed before or after it is moved to the card changes nothing."""
    w = sample.on(device)
    for got, want in zip(kernel.fn(w), op.reference(w.cpu()), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0, equal_nan=True)


@implementations(quantize_weight)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("K", [96, 100])
def test_stacked_weights_quantise_to_stacked_quantised_weights(
    op: Op, kernel: Kernel, device: str, dtype: torch.dtype, K: int
) -> None:
    q, k, v = (torch.randn(n, K, device=device).mul(n).to(dtype) for n in (24, 8, 9))
    stacked = kernel.fn(torch.cat([q, k, v]))
    apart = [kernel.fn(w) for w in (q, k, v)]
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
def test_a_channel_of_zeros_gives_zeros_and_the_floor(op: Op, kernel: Kernel, device: str) -> None:
    wq, w_scale, w_sum = kernel.fn(torch.zeros(2, 37, device=device))
    assert not wq.any() and not w_sum.any()
    assert torch.equal(w_scale.cpu(), torch.full((2,), MIN_ABSMAX) / 127)


@implementations(quantize_weight)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_channel_that_is_not_finite_leaves_the_others_alone(
    op: Op, kernel: Kernel, device: str, bad: float
) -> None:
    w = torch.randn(5, 37, device=device)
    clean = [t.clone() for t in kernel.fn(w)]
    w[3, 11] = bad
    triple = kernel.fn(w)
    others = torch.arange(5, device=device) != 3
    for got, before in zip(triple, clean, strict=True):
        assert torch.equal(got[others], before[others])
    wq, w_scale, w_sum = (t[3] for t in triple)
    assert not wq.any() and not w_scale.isfinite() and w_sum.isnan()


@implementations(quantize_weight)
def test_no_channels_give_no_channels(op: Op, kernel: Kernel, device: str) -> None:
    w = torch.empty(0, 20, device=device)
    assert_weight(*kernel.fn(w), w)
