"""quantize: the reference against float64, the kernels against the same bound and the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from graphquant.ops import quantize
from graphquant.ops.define import Kernel, Op
from graphquant.ops.numerics import (
    ACTIVATIONS,
    MIN_ABSMAX,
    OVERLAID,
    overlay,
    padded,
    quantize_symmetric,
    vectors,
)
from graphquant.ops.qparams import QParams
from graphquant.ops.triton_rows import (
    WHOLE_ROW,
    activate,
    block_widths,
    row_config,
    to_float32,
)
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
from tests.ops.qparams import RECIPES, Recipe, meant, recipes
from tests.strategies import CONTENTS, FINITE, FLOATS, HUGE, Rows, rows

samples = rows(contents=(*CONTENTS, HUGE))


@implementations(quantize)
@given(sample=samples, recipe=recipes())
@example(Rows((2,), 8, content="zero row"), Recipe())
@example(Rows((3,), 257, content="ties"), Recipe())
@example(Rows((2,), 40, torch.bfloat16, 1e30, "outlier"), Recipe())
@example(Rows((2,), 40, content=HUGE), Recipe())
@example(Rows((2,), 40, content="below the floor"), Recipe())
@example(Rows((2,), 40), Recipe(low=1.0, high=1.0))
@example(Rows((2,), 40, content="inf and nan"), Recipe(low=-1.0, high=2.0))
@example(Rows((2,), 40, content="inf and nan"), Recipe(clip=1.0))
@example(Rows((2,), 40, content="inf and -inf"), Recipe(clip=1.0))
def test_triple_is_within_half_a_step_of_x(
    op: Op, kernel: Kernel, device: str, sample: Rows, recipe: Recipe
) -> None:
    x, qparams = sample.on(device), recipe.on(sample.K, device, sample.magnitude)
    assert_means(*kernel.fn(x, None, None, *qparams), x.double(), qparams=qparams)


@kernels(quantize)
@given(sample=samples, recipe=recipes())
@example(Rows((2,), 40, content=HUGE), Recipe())
@example(Rows((2,), 40), Recipe(low=0.3, high=0.7))
def test_kernel_gives_the_reference_scale_and_shift_bit_for_bit(
    op: Op, kernel: Kernel, device: str, sample: Rows, recipe: Recipe
) -> None:
    qparams = recipe.on(sample.K, device, sample.magnitude)
    args = sample.on(device), None, None, *qparams
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
    may be too much. Rows within the clip are quantized as without it."""
    x = sample.on(device)
    qparams = Recipe(clip=clip).on(sample.K, device, sample.magnitude)
    assert qparams.clip is not None
    clip = qparams.clip
    triple, free = kernel.fn(x, None, None, *qparams), kernel.fn(x)
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
    xq, x_scale, x_shift = kernel.fn(torch.tensor(rows, device=device), None, None, None, -1.0, 3.0)
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
    qparams = QParams(None, *ends)
    x = torch.tensor([[*ends, 0.0]], device=device)
    triple = kernel.fn(x, None, None, *qparams)
    assert_means(*triple, x.double(), qparams=qparams)
    assert triple[0].abs().max() == 127


@implementations(quantize)
def test_a_factor_equals_the_product_before(op: Op, kernel: Kernel, device: str) -> None:
    x, factor = torch.randn(5, 37, device=device), torch.rand(37, device=device)
    for got, want in zip(kernel.fn(x, None, None, factor), kernel.fn(x * factor), strict=True):
        assert torch.equal(got, want)


@implementations(quantize)
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("K", [16_384, 16_385])
def test_rows_too_long_for_registers_have_the_same_qparams(
    op: Op, kernel: Kernel, device: str, K: int, name: str
) -> None:
    x, qparams = torch.randn(3, K, device=device), RECIPES[name].on(K, device)
    assert_means(*kernel.fn(x, None, None, *qparams), x.double(), qparams=qparams)


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
def test_what_attention_returns_is_quantized_without_a_copy(D: int) -> None:
    """[B, H, S, D] views of one fused result go in, and [B, S, H, D] in memory comes out."""
    B, S, H = 2, 197, 3
    qkv = torch.randn(B, S, 3 * H * D, device="cuda", dtype=torch.bfloat16)
    q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in qkv.chunk(3, -1))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    x = y.transpose(1, 2).reshape(B, S, H * D)
    assert as_rows(x)[0].data_ptr() == y.data_ptr()
    assert_means(*quantize(x), x.double())


# Activations and products --------------------------------------------------------------------

# relu2 and a product of two must stay below float32's largest, 3.4e38
moderate = rows(max_exponent=15)
finite_moderate = rows(max_exponent=15, contents=FINITE)

EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: 0.5 * x * torch.erfc(-x / 2**0.5),
    "gelu_tanh": lambda x: x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": lambda x: x * torch.sigmoid(x),
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0).square(),
}


# How far a float32 activation x g(x), 0 <= g <= 1, may be off: at most |x| times the first number
# (of g) and at most the second. Below 1e-6 are the float32 exp and division of both devices and
# 1 + tanh's cancellation; the GELUs' are those of the polynomials that the kernels take.
OFF = {
    "gelu": (1.1e-4, 4.2e-6),
    "gelu_tanh": (1.4e-4, 5.0e-6),
    "quick_gelu": (1e-6, torch.inf),
    "silu": (1e-6, torch.inf),
    "relu": (0.0, 0.0),
    "relu2": (0.0, 0.0),
}


def _exact(x: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """(act(x), noise) in float64.

    Noise is OFF, relative 4 U for the products, and denormals count as zero. Subtracting the shift
    leaves this as it is, absolute, however small the difference (see assert_means).
    """
    x = x.cpu().double()
    y = EXACT[act](x)
    of_x, most = OFF[act]
    return y, (of_x * x.abs()).clamp(max=most) + 4 * U * y.abs() + 2e-38


def test_every_activation_is_tested() -> None:
    assert EXACT.keys() == ACTIVATIONS.keys() == OFF.keys()


@pytest.mark.parametrize("act", sorted(EXACT))
def test_both_forms_of_an_activation_are_its_definition(act: str) -> None:
    x = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    for form in (ACTIVATIONS[act], ACTIVATIONS[act].fused):
        torch.testing.assert_close(form(x), EXACT[act](x), rtol=1e-9, atol=1e-14)


@triton.jit
def _activate_kernel(x_ptr, y_ptr, ACT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, activate(to_float32(tl.load(x_ptr + at)), ACT))


def _activated(x: Tensor, act: str) -> Tensor:
    y = torch.empty_like(x, dtype=torch.float32)
    _activate_kernel[(x.numel() // 4096,)](x, y, ACT=act, BLOCK=4096)
    return y


def _every_bfloat16(device: str) -> Tensor:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    return bits.view(torch.bfloat16).to(device)


def test_every_bfloat16_becomes_itself_in_float32(device: str) -> None:
    x = _every_bfloat16(device)
    smallest = torch.finfo(torch.float32).smallest_normal  # Triton's interpreter flushes denormals
    torch.testing.assert_close(
        _activated(x, "none"), x.float(), rtol=0, atol=smallest, equal_nan=True
    )


# (act, lowest, off): from `lowest` upward act(x) is relatively off by at most `off`
EXACT_TO_BFLOAT16 = [
    ("gelu", -4.0, 7e-4),
    ("gelu_tanh", -3.0, 7.5e-4),
    ("quick_gelu", -40.0, 1e-5),
    ("silu", -80.0, 1e-5),
]


@pytest.mark.parametrize(("act", "lowest", "off"), EXACT_TO_BFLOAT16)
def test_activations_of_every_bfloat16_are_exact_to_bfloat16(
    act: str, lowest: float, off: float, device: str
) -> None:
    """Half a unit of bfloat16 is 2^-9 = 1.95e-3 of a value, or up to twice that: `off` is less.
    Below `lowest` the values are smaller than 1.3e-4 (gelu) and 4.1e-3 (gelu_tanh), and OFF holds:
    a 3000th of a step of a row that reaches 4."""
    x = _every_bfloat16(device)
    x = x.where(x.isfinite(), 0.0)
    got = _activated(x, act).cpu().double()
    want, noise = _exact(x, act)
    assert ((got - want).abs() <= noise).all()
    assert (got[x.cpu() == 0] == 0).all()
    x = x.cpu().double()
    assert off < 2**-9
    assert ((got - want).abs() <= off * want.abs() + 2e-38)[x >= lowest].all()
    steep = (x.abs() > 100) & (x < 0)  # x g(x) with g = 0: no nan, no -inf
    assert (got[steep].abs() <= 1e-30).all()


@pytest.mark.parametrize("act", sorted(EXACT))
def test_activations_of_what_is_not_finite_are_not_finite(act: str, device: str) -> None:
    x = torch.full((4096,), torch.nan, dtype=torch.bfloat16, device=device)
    x[::2] = torch.inf
    assert not _activated(x, act).isfinite().any()


@implementations(quantize)
@given(sample=finite_moderate, act=st.sampled_from(sorted(EXACT)), recipe=recipes())
def test_triple_is_within_half_a_step_of_the_activation(
    op: Op, kernel: Kernel, device: str, sample: Rows, act: str, recipe: Recipe
) -> None:
    x, qparams = sample.on(device), recipe.on(sample.K, device, sample.magnitude)
    assert_means(*kernel.fn(x, None, act, *qparams), *_exact(x, act), qparams)


@implementations(quantize)
@given(
    gate=finite_moderate,
    act=st.sampled_from(sorted(EXACT)),
    seed=st.integers(0, 9),
    recipe=recipes(),
)
def test_triple_is_within_half_a_step_of_the_gated_value(
    op: Op, kernel: Kernel, device: str, gate: Rows, act: str, seed: int, recipe: Recipe
) -> None:
    qparams = recipe.on(gate.K, device, gate.magnitude)
    g = gate.on(device)
    up = Rows(gate.lead, gate.K, torch.bfloat16, 3.0, layout="slice", seed=seed).on(device)
    y, noise = _exact(g, act)
    u = up.cpu().double()
    noise = noise * u.abs() + 4 * U * (y * u).abs() + 2e-38
    assert_means(*kernel.fn(g, up, act, *qparams), y * u, noise, qparams)


@kernels(quantize)
@given(sample=moderate, act=st.sampled_from(sorted(EXACT)), data=st.data())
def test_kernel_of_an_activation_is_within_a_step_of_the_reference(
    op: Op, kernel: Kernel, device: str, sample: Rows, act: str, data: st.DataObject
) -> None:
    """Of an infinity both are not finite, one inf and the other nan: clamped, they differ."""
    recipe = data.draw(recipes(ranges=sample.finite))
    qparams = recipe.on(sample.K, device, sample.magnitude)
    args = sample.on(device), None, act, *qparams
    _, noise = meant(*_exact(args[0], act), qparams)
    noise = noise.nan_to_num(nan=0.0, posinf=0.0)
    assert_within_a_step(kernel.fn(*args), op.reference(*to_cpu(args)), noise)


@kernels(quantize)
@given(gate=moderate, up=moderate, act=st.sampled_from(sorted(EXACT)))
def test_gated_kernel_is_within_a_step_of_the_reference(
    op: Op, kernel: Kernel, device: str, gate: Rows, up: Rows, act: str
) -> None:
    up = replace(up, lead=gate.lead, K=gate.K)
    if act == "relu2":  # 1e15^2 * 1e15 is more than float32 holds
        gate = replace(gate, magnitude=min(gate.magnitude, 1e6))
    args = gate.on(device), up.on(device), act
    noise = (_exact(args[0], act)[1] * args[1].cpu().double().abs()) + 4e-38
    noise = noise.nan_to_num(nan=0.0, posinf=0.0)
    assert_within_a_step(kernel.fn(*args), op.reference(*to_cpu(args)), noise)


@kernels(quantize)
@pytest.mark.parametrize("low", [-1.0, -3.0, -5.0])
def test_gelu_of_rows_without_a_positive_value_keeps_its_steps(
    op: Op, kernel: Kernel, device: str, low: float
) -> None:
    """There gelu is tiny and the scale with it: a tail that is only absolutely right would fail.
    The row is one-sided, below zero: half the symmetric scale, and the noise is 1 % as before."""
    x = torch.linspace(low, low / 2, 100, device=device).expand(3, 100)
    y = EXACT["gelu"](x.double()).cpu()
    assert_means(*kernel.fn(x, None, "gelu"), y, noise=0.01 * y.abs().amax(-1, keepdim=True))


@implementations(quantize)
@pytest.mark.parametrize("act", sorted(EXACT))
@pytest.mark.parametrize("x", [1e-30, 0.0, -0.0, -1e30, -200.0, -87.5, 87.5, 200.0, 1e15])
def test_extreme_values_do_not_become_nan(
    op: Op, kernel: Kernel, device: str, act: str, x: float
) -> None:
    triple = kernel.fn(torch.tensor([[x, 1.0]], device=device), None, act)
    assert_means(*triple, *_exact(torch.tensor([[x, 1.0]]), act))


@implementations(quantize)
@pytest.mark.parametrize("act", sorted(EXACT))
def test_a_row_with_nan_leaves_the_others_alone(
    op: Op, kernel: Kernel, device: str, act: str
) -> None:
    x = torch.randn(6, 37, device=device)
    clean = [t.clone() for t in kernel.fn(x, None, act)]
    x[2, 11] = torch.nan
    triple = kernel.fn(x, None, act)
    others = torch.arange(6, device=device) != 2
    for got, before in zip(triple, clean, strict=True):
        assert torch.equal(got[others], before[others])
    xq, x_scale, x_shift = triple
    assert not xq[2].any() and x_scale[2].isnan().all() and x_shift[2].isnan().all()


@implementations(quantize)
@pytest.mark.parametrize("act", sorted(EXACT))
def test_an_activation_hardly_below_zero_gets_nearly_twice_the_steps(
    op: Op, kernel: Kernel, device: str, act: str
) -> None:
    """high >= 4, and the lowest value of any activation is silu's -0.279: (4 + 0.279) / 2 / 4."""
    x = torch.randn(6, 300, device=device)
    x[:, 7] = 4.01  # each of them is at least 3.9 there
    x_scale = kernel.fn(x, None, act)[1].cpu().double()
    symmetric = quantize_symmetric(EXACT[act](x.cpu().double()))[1].double()
    assert (x_scale <= 0.54 * symmetric).all()


@implementations(quantize)
def test_a_product_without_an_activation_is_quantized(op: Op, kernel: Kernel, device: str) -> None:
    x, up = torch.randn(2, 5, 70, device=device)
    for got, want in zip(kernel.fn(x, up), kernel.fn(x * up), strict=True):
        assert torch.equal(got, want)


@implementations(quantize)
def test_halves_of_one_stacked_result_mean_the_same(op: Op, kernel: Kernel, device: str) -> None:
    both = torch.randn(3, 5, 2 * 70, device=device, dtype=torch.bfloat16)
    gate, up = both[..., :70], both[..., 70:]
    for sliced, copied in zip(
        kernel.fn(gate, up, "silu"),
        kernel.fn(gate.contiguous(), up.contiguous(), "silu"),
        strict=True,
    ):
        assert torch.equal(sliced, copied)


@implementations(quantize)
def test_gated_rows_too_long_for_registers_mean_the_same(
    op: Op, kernel: Kernel, device: str
) -> None:
    gate, up = torch.randn(2, 20_003, device=device), torch.randn(2, 20_003, device=device)
    y, noise = _exact(gate, "silu")
    u = up.cpu().double()
    noise = (noise + 4 * U * y.abs()) * u.abs()
    assert_means(*kernel.fn(gate, up, "silu"), y * u, noise)
    for recipe in RECIPES.values():
        qparams = recipe.on(20_003, device)
        assert_means(*kernel.fn(gate, up, "silu", *qparams), y * u, noise, qparams)


@implementations(quantize)
def test_no_rows_of_an_activation_give_no_rows(op: Op, kernel: Kernel, device: str) -> None:
    x = torch.empty(0, 20, device=device)
    assert_layout(*kernel.fn(x, None, "gelu"), x.shape)


@kernels(quantize, named="triton")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("K", [OVERLAID[0], 4096, OVERLAID[-1]])
def test_int8_rows_may_be_written_over_the_floats_that_they_come_from(
    op: Op, kernel: Kernel, device: str, K: int, dtype: torch.dtype
) -> None:
    x = torch.randn(3, 5, K, device=device).to(dtype)
    factor = torch.rand(K, device=device)
    want = kernel.fn(x, None, "gelu", factor, None, None, 1.0)
    xq, x_scale, x_shift = overlay(x), *map(torch.empty_like, want[1:])
    assert kernel.fill is not None
    kernel.fill(x, None, "gelu", factor, None, None, 1.0, out=(xq, x_scale, x_shift))
    assert all(map(torch.equal, (xq, x_scale, x_shift), want))


def test_a_program_holds_one_whole_row_that_may_be_written_over() -> None:
    for K in OVERLAID:
        assert row_config(K)["ROWS"] == 1 and K <= WHOLE_ROW
        assert padded(K) == K  # no pads: they would reach into the next row
