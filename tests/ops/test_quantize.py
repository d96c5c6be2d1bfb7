"""quantize: the reference against float64, the kernels against the same bound and the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given

from graphquant.ops import quantize
from graphquant.ops.define import Kernel, Op
from graphquant.ops.numerics import MIN_ABSMAX
from tests.ops.bounds import (
    assert_layout,
    assert_means,
    assert_within_a_step,
    implementations,
    kernels,
)
from tests.strategies import Rows, rows


@implementations(quantize)
@given(sample=rows())
@example(Rows((2,), 8, content="zero row"))
@example(Rows((3,), 257, content="ties"))
@example(Rows((2,), 40, torch.bfloat16, 1e30, "outlier"))
def test_pair_is_within_half_a_step_of_x(op: Op, kernel: Kernel, device: str, sample: Rows) -> None:
    x = sample.on(device)
    assert_means(*kernel.fn(x), x.double())


@kernels(quantize)
@given(sample=rows())
def test_kernel_gives_the_reference_scale_bit_for_bit(
    op: Op, kernel: Kernel, device: str, sample: Rows
) -> None:
    x = sample.on(device)
    pair, want = kernel.fn(x), op.reference(x.cpu())
    assert torch.equal(pair[1].cpu().nan_to_num(nan=-1.0), want[1].nan_to_num(nan=-1.0))
    assert_within_a_step(pair, want)


@implementations(quantize)
def test_ties_round_to_even(op: Op, kernel: Kernel, device: str) -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.0]], device=device)
    xq, x_scale = kernel.fn(x)
    assert xq.tolist() == [[0, 2, 2, 0, -2, -2, 126, 127]]
    assert x_scale.item() == 1.0


@implementations(quantize)
@pytest.mark.parametrize("K", [1, 15, 16, 17, 1000])
def test_a_row_of_zeros_gives_zeros_and_the_floor(
    op: Op, kernel: Kernel, device: str, K: int
) -> None:
    xq, x_scale = kernel.fn(torch.zeros(2, K, device=device))
    assert not xq.any()
    assert torch.equal(x_scale.cpu(), torch.full((2, 1), MIN_ABSMAX) / 127)


@implementations(quantize)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_row_that_is_not_finite_leaves_the_others_alone(
    op: Op, kernel: Kernel, device: str, bad: float
) -> None:
    x = torch.randn(4, 5, 37, device=device)
    clean = [t.clone() for t in kernel.fn(x)]
    x[2, 3, 11] = bad
    xq, x_scale = kernel.fn(x)
    spoiled = torch.zeros(4, 5, dtype=torch.bool, device=device)
    spoiled[2, 3] = True
    assert torch.equal(xq[~spoiled], clean[0][~spoiled])
    assert torch.equal(x_scale[~spoiled], clean[1][~spoiled])
    assert not xq[2, 3].any()
    got = x_scale[2, 3].item()
    assert math.isnan(got) if math.isnan(bad) else got == torch.inf


@implementations(quantize)
def test_inf_beside_nan_gives_nan(op: Op, kernel: Kernel, device: str) -> None:
    x = torch.tensor([[torch.inf, torch.nan, 1.0]], device=device)
    assert kernel.fn(x)[1].isnan().all()


@implementations(quantize)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacked_weights_quantise_to_stacked_quantised_weights(
    op: Op, kernel: Kernel, device: str, dtype: torch.dtype
) -> None:
    q, k, v = (torch.randn(n, 100, device=device).mul(n).to(dtype) for n in (24, 8, 9))
    stacked = kernel.fn(torch.cat([q, k, v]))
    apart = [kernel.fn(w) for w in (q, k, v)]
    for together, parts in zip(stacked, zip(*apart, strict=True), strict=True):
        assert torch.equal(together, torch.cat(parts))


@implementations(quantize)
@pytest.mark.parametrize("K", [16_384, 16_385, 20_003])
def test_rows_too_long_for_registers_mean_the_same(
    op: Op, kernel: Kernel, device: str, K: int
) -> None:
    x = torch.randn(3, K, device=device)
    x[1, K - 1] = 50.0  # the absmax is in the last chunk
    assert_means(*kernel.fn(x), x.double())


@implementations(quantize)
@pytest.mark.parametrize("shape", [(0, 7), (3, 0, 16), (0, 0, 1)])
def test_no_rows_give_no_rows(op: Op, kernel: Kernel, device: str, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=device)
    assert_layout(*kernel.fn(x), x.shape)
