"""quantize: the reference against float64, the kernels against the same bound and the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from graphquant.ops import quantize
from graphquant.ops.define import Kernel, Op
from graphquant.ops.numerics import MIN_ABSMAX, quantize_symmetric, vectors
from graphquant.ops.triton_rows import block_widths
from graphquant.ops.triton_util import as_rows
from tests.ops.bounds import (
    U,
    assert_layout,
    assert_means,
    assert_within_a_step,
    implementations,
    kernels,
    to_cpu,
)
from tests.ops.told import TOLD, Told, told
from tests.strategies import CONTENTS, FINITE, FLOATS, HUGE, Rows, rows

samples = rows(contents=(*CONTENTS, HUGE))


@implementations(quantize)
@given(sample=samples, told=told())
@example(Rows((2,), 8, content="zero row"), Told())
@example(Rows((3,), 257, content="ties"), Told())
@example(Rows((2,), 40, torch.bfloat16, 1e30, "outlier"), Told())
@example(Rows((2,), 40, content=HUGE), Told())
@example(Rows((2,), 40, content="below the floor"), Told())
@example(Rows((2,), 40), Told(low=1.0, high=1.0))
@example(Rows((2,), 40, content="inf and nan"), Told(low=-1.0, high=2.0))
@example(Rows((2,), 40, content="inf and nan"), Told(clip=1.0))
@example(Rows((2,), 40, content="inf and -inf"), Told(clip=1.0))
def test_triple_is_within_half_a_step_of_x(
    op: Op, kernel: Kernel, device: str, sample: Rows, told: Told
) -> None:
    x, arguments = sample.on(device), told.on(sample.K, device, sample.magnitude)
    assert_means(*kernel.fn(x, *arguments), x.double(), told=arguments)


@kernels(quantize)
@given(sample=samples, told=told())
@example(Rows((2,), 40, content=HUGE), Told())
@example(Rows((2,), 40), Told(low=0.3, high=0.7))
def test_kernel_gives_the_reference_scale_and_shift_bit_for_bit(
    op: Op, kernel: Kernel, device: str, sample: Rows, told: Told
) -> None:
    args = sample.on(device), *told.on(sample.K, device, sample.magnitude)
    triple, want = kernel.fn(*args), op.reference(*to_cpu(args))
    for column, wanted in zip(triple[1:], want[1:], strict=True):
        torch.testing.assert_close(column.cpu(), wanted, rtol=0, atol=0, equal_nan=True)
    assert_within_a_step(triple, want)


@implementations(quantize)
@given(sample=rows(contents=(*FINITE, HUGE)), clip=st.floats(2**-7, 4.0, width=32))
def test_a_clip_is_never_passed(
    op: Op, kernel: Kernel, device: str, sample: Rows, clip: float
) -> None:
    """127 steps end at an end of the row's range; below the floor they are longer, and half of one
    may be too much. Rows within the clip are quantised as without it."""
    x = sample.on(device)
    (_, _, _, clip) = Told(clip=clip).on(sample.K, device, sample.magnitude)
    triple, free = kernel.fn(x, None, None, None, clip), kernel.fn(x)
    xq, s, c = (t.cpu().double() for t in triple)
    assert ((xq * s + c).abs() <= clip * (1 + 4 * U) + MIN_ABSMAX / 254).all()
    within = (x.float().abs() <= clip).all(-1)
    for clipped, unclipped in zip(triple, free, strict=True):
        assert torch.equal(clipped[within], unclipped[within])


@implementations(quantize)
def test_in_a_static_range_rows_share_their_scale_whatever_is_in_them(
    op: Op, kernel: Kernel, device: str
) -> None:
    rows = [[-1.0, 3.0, 0.0], [9.0, -9.0, 1.0], [math.inf, -math.inf, math.nan]]
    xq, x_scale, x_shift = kernel.fn(torch.tensor(rows, device=device), None, -1.0, 3.0)
    assert xq.tolist() == [[-127, 127, -64], [127, -127, 0], [127, -127, -127]]  # -63.5 to even
    assert torch.equal(x_scale.cpu(), torch.full((3, 1), 2.0) / 127)
    assert x_shift.tolist() == [[1.0]] * 3


@implementations(quantize)
@pytest.mark.parametrize("sign", [1, -1])
def test_no_step_of_a_static_range_is_beyond_127(
    op: Op, kernel: Kernel, device: str, sign: int
) -> None:
    """The middle, 2^24 + 1, is no float32: x_shift is one end, and the other is 2 away, not 1."""
    ends = sorted((sign * 2.0**24, sign * (2.0**24 + 2)))
    arguments = (None, *ends, None)
    x = torch.tensor([[*ends, 0.0]], device=device)
    triple = kernel.fn(x, *arguments)
    assert_means(*triple, x.double(), told=arguments)
    assert triple[0].abs().max() == 127


@implementations(quantize)
def test_a_factor_equals_the_product_before(op: Op, kernel: Kernel, device: str) -> None:
    x, factor = torch.randn(5, 37, device=device), torch.rand(37, device=device)
    for got, want in zip(kernel.fn(x, factor), kernel.fn(x * factor), strict=True):
        assert torch.equal(got, want)


@implementations(quantize)
@pytest.mark.parametrize("name", TOLD)
@pytest.mark.parametrize("K", [16_384, 16_385])
def test_rows_too_long_for_registers_are_told_the_same(
    op: Op, kernel: Kernel, device: str, K: int, name: str
) -> None:
    x, arguments = torch.randn(3, K, device=device), TOLD[name].on(K, device)
    assert_means(*kernel.fn(x, *arguments), x.double(), told=arguments)


@implementations(quantize)
def test_ties_round_to_even(op: Op, kernel: Kernel, device: str) -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.0, -127.0]], device=device)
    xq, x_scale, x_shift = kernel.fn(x)
    assert xq.tolist() == [[0, 2, 2, 0, -2, -2, 126, 127, -127]]
    assert x_scale.item() == 1.0 and x_shift.item() == 0.0


@implementations(quantize)
def test_ties_round_to_even_around_a_shift(op: Op, kernel: Kernel, device: str) -> None:
    x = torch.tensor([[0.0, 126.5, 127.5, 128.5, 129.5, 253.5, 254.0]], device=device)
    xq, x_scale, x_shift = kernel.fn(x)
    assert xq.tolist() == [[-127, 0, 0, 2, 2, 126, 127]]
    assert x_scale.item() == 1.0 and x_shift.item() == 127.0


@implementations(quantize)
@pytest.mark.parametrize("K", [1, 15, 16, 17, 1000])
def test_a_row_of_zeros_gives_zeros_and_the_floor(
    op: Op, kernel: Kernel, device: str, K: int
) -> None:
    xq, x_scale, x_shift = kernel.fn(torch.zeros(2, K, device=device))
    assert not xq.any() and not x_shift.any()
    assert torch.equal(x_scale.cpu(), torch.full((2, 1), MIN_ABSMAX) / 127)


@implementations(quantize)
def test_rows_below_the_floor_are_their_shift(op: Op, kernel: Kernel, device: str) -> None:
    x = torch.tensor([[2e-23, 1e-23], [-2e-23, -2e-23], [1e-23, -1e-23]], device=device)
    xq, x_scale, x_shift = kernel.fn(x)  # a step is 7.9e-23
    assert not xq.any()
    assert torch.equal(x_scale.cpu(), torch.full((3, 1), MIN_ABSMAX) / 127)
    assert torch.equal(x_shift.cpu(), torch.tensor([[1e-23], [-1e-23], [0.0]]))


@implementations(quantize)
@pytest.mark.parametrize("value", [1.0, -1.0, 0.1, -7e-5, 3e38, -3e38])
@pytest.mark.parametrize("K", [1, 16, 37])
def test_a_constant_row_is_one_end_of_its_range(
    op: Op, kernel: Kernel, device: str, value: float, K: int
) -> None:
    """Zero is the other end, so every step is +-127, and the value comes back: x_scale is off by U,
    for the half of the value that is not the shift."""
    x = torch.full((2, K), value, device=device)
    xq, x_scale, x_shift = kernel.fn(x)
    assert (xq == math.copysign(127, value)).all()
    assert torch.equal(x_shift, x[:, :1] / 2)
    back = xq.double() * x_scale.double() + x_shift.double()
    assert ((back - x.double()).abs() <= U * abs(value)).all()


@implementations(quantize)
@given(
    sample=rows(contents=("normal", "outlier", "constant")),
    sign=st.sampled_from([1, -1]),
)
def test_one_sided_rows_get_half_the_symmetric_scale(
    op: Op, kernel: Kernel, device: str, sample: Rows, sign: int
) -> None:
    """Twice as many steps for the same values: shift and absmax are both half the far end, exactly
    (a row below the floor keeps the floor)."""
    x = sign * sample.on(device).abs()
    xq, x_scale, x_shift = kernel.fn(x)
    far = x.float().abs().amax(-1, keepdim=True)
    above = far >= 2 * MIN_ABSMAX
    assert torch.equal(x_shift, sign * far / 2)
    symmetric = quantize_symmetric(x.cpu())[1].to(device)
    assert torch.equal(x_scale[above], symmetric[above] / 2)
    ends = (x.float() == sign * far) & above
    assert (xq[ends] == 127 * sign).all()


@implementations(quantize)
@given(sample=rows(contents=(*FINITE, HUGE)))
def test_no_scale_is_above_the_symmetric_one(
    op: Op, kernel: Kernel, device: str, sample: Rows
) -> None:
    """(high - low) / 2 <= max |x|, and rounding is monotonous."""
    x = sample.on(device)
    assert (kernel.fn(x)[1].cpu() <= quantize_symmetric(x.cpu())[1]).all()


@implementations(quantize)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_widest_range_there_is_does_not_overflow(
    op: Op, kernel: Kernel, device: str, dtype: torch.dtype
) -> None:
    """high - low would: 6.8e38."""
    largest = torch.finfo(dtype).max
    rows = [[largest, -largest, 0.0], [largest, 0.0, 1.0], [0.0, -largest, -1.0]]
    x = torch.tensor(rows, dtype=dtype, device=device)
    xq, x_scale, x_shift = kernel.fn(x)
    assert_means(xq, x_scale, x_shift, x.double())
    assert xq.tolist() == [[127, -127, 0], [127, -127, -127], [127, -127, 127]]
    assert x_shift.flatten().tolist() == [0.0, largest / 2, -largest / 2]


BAD = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan, "nan with a sign": -math.nan}


@implementations(quantize)
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("K", [37, 16_400])  # in registers, and in chunks
def test_a_row_that_is_not_finite_leaves_the_others_alone(
    op: Op, kernel: Kernel, device: str, bad: float, K: int
) -> None:
    x = torch.randn(4, 5, K, device=device)
    clean = [t.clone() for t in kernel.fn(x)]
    x[2, 3, 11] = bad
    assert x[2, 3, 11].signbit() == (math.copysign(1, bad) < 0)
    triple = kernel.fn(x)
    spoiled = torch.zeros(4, 5, dtype=torch.bool, device=device)
    spoiled[2, 3] = True
    for got, before in zip(triple, clean, strict=True):
        assert torch.equal(got[~spoiled], before[~spoiled])
    xq, x_scale, x_shift = (t[2, 3] for t in triple)
    assert not xq.any()
    assert (xq * x_scale + x_shift).isnan().all()
    if math.isnan(bad):
        assert x_scale.isnan() and x_shift.isnan()
    else:
        assert x_scale.item() == torch.inf and x_shift.item() == bad


@implementations(quantize)
@pytest.mark.parametrize("nan", [math.nan, -math.nan])
@pytest.mark.parametrize("inf", [math.inf, -math.inf])
@pytest.mark.parametrize("K", [3, 16_400])
def test_inf_beside_nan_gives_nan(
    op: Op, kernel: Kernel, device: str, nan: float, inf: float, K: int
) -> None:
    x = torch.ones(2, K, device=device)
    x[0, 0], x[0, K - 1] = inf, nan
    x[1, 0], x[1, K - 1] = nan, inf
    xq, x_scale, x_shift = kernel.fn(x)
    assert x_scale.isnan().all() and x_shift.isnan().all() and not xq.any()


@implementations(quantize)
def test_both_infinities_have_no_middle(op: Op, kernel: Kernel, device: str) -> None:
    x = torch.tensor([[torch.inf, -torch.inf, 1.0]], device=device)
    xq, x_scale, x_shift = kernel.fn(x)
    assert x_scale.item() == torch.inf and x_shift.isnan().all() and not xq.any()


@implementations(quantize)
@pytest.mark.parametrize("K", [16_384, 16_385, 20_003])
@pytest.mark.parametrize("sign", [1, -1])
def test_rows_too_long_for_registers_mean_the_same(
    op: Op, kernel: Kernel, device: str, K: int, sign: int
) -> None:
    x = torch.randn(3, K, device=device)
    x[1, K - 1] = sign * 50.0  # that end of the range is in the last chunk
    x[2] = sign * x[2].abs()  # and this one is in none
    assert_means(*kernel.fn(x), x.double())


@implementations(quantize)
@pytest.mark.parametrize("shape", [(0, 7), (3, 0, 16), (0, 0, 1)])
def test_no_rows_give_no_rows(op: Op, kernel: Kernel, device: str, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=device)
    assert_layout(*kernel.fn(x), x.shape)


WIDTHS = (384, 512, 576, 640, 768, 896, 1024, 1152, 1280, 1536, 1792, 2048, 3072, 3420, 4096, 4304)


@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize("K", WIDTHS)
def test_rows_of_models_leave_no_lanes_idle(K: int, inputs: int) -> None:
    """One block of a power of two would leave 44 % of them idle at 1152, 47 % at 4304."""
    widths = block_widths(K, inputs)
    assert all(w & (w - 1) == 0 for w in widths)
    assert sum(widths) - K <= (0.05 * K if K % 64 else 0)


def test_rows_of_no_width_leave_more_than_a_fifth_of_their_lanes_idle() -> None:
    """At most half a block: rows have at least 2 1/2."""
    for inputs in (1, 2):
        for K in range(384, 4305):
            widths = block_widths(K, inputs)
            assert sum(widths) >= vectors(K) > sum(widths[:-1])
            assert sum(widths) <= 1.2 * K


@implementations(quantize)
@pytest.mark.parametrize("K", [*WIDTHS, 1408, 2600, 5000, 16_383])
def test_rows_in_blocks_are_whole(op: Op, kernel: Kernel, device: str, K: int) -> None:
    """Both ends of the range in each block once, and another row beside it."""
    ends = torch.tensor([0, *block_widths(K)]).cumsum(0)[:-1]
    x = torch.randn(2 * len(ends) + 1, K, device=device)
    for i, start in enumerate(ends.tolist()):
        x[2 * i, start], x[2 * i + 1, min(start + 2, K - 1)] = 9.0, -9.0
    x[-1, K - 1] = 9.0
    assert_means(*kernel.fn(x), x.double())


@pytest.mark.cuda
@pytest.mark.parametrize("D", [64, 72])
def test_what_attention_returns_is_quantised_without_a_copy(D: int) -> None:
    """[B, H, S, D] views of one fused result go in, and [B, S, H, D] in memory comes out."""
    B, S, H = 2, 197, 3
    qkv = torch.randn(B, S, 3 * H * D, device="cuda", dtype=torch.bfloat16)
    q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in qkv.chunk(3, -1))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    x = y.transpose(1, 2).reshape(B, S, H * D)
    assert as_rows(x)[0].data_ptr() == y.data_ptr()
    assert_means(*quantize(x), x.double())
