"""act_quantize and glu_quantize: every activation against its definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphquant.ops import act_quantize, glu_quantize
from graphquant.ops.define import Kernel, Op
from graphquant.ops.numerics import ACTIVATIONS, OVERLAID, overlay, padded, quantize_symmetric
from graphquant.ops.triton_rows import WHOLE_ROW, activate, row_config, to_float32
from tests.ops.bounds import (
    U,
    assert_layout,
    assert_means,
    assert_within_a_step,
    implementations,
    kernels,
    to_cpu,
)
from tests.ops.told import TOLD, Told, meant, told
from tests.strategies import FINITE, Rows, rows

# relu2 and a product of two must stay below float32's largest, 3.4e38
samples = rows(max_exponent=15)
finite_samples = rows(max_exponent=15, contents=FINITE)

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


# (act, lowest, off): from `lowest` upwards act(x) is relatively off by at most `off`
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


@implementations(act_quantize)
@given(sample=finite_samples, act=st.sampled_from(sorted(EXACT)), told=told())
def test_triple_is_within_half_a_step_of_the_activation(
    op: Op, kernel: Kernel, device: str, sample: Rows, act: str, told: Told
) -> None:
    x, arguments = sample.on(device), told.on(sample.K, device, sample.magnitude)
    assert_means(*kernel.fn(x, act, *arguments), *_exact(x, act), told=arguments)


@implementations(glu_quantize)
@given(gate=finite_samples, act=st.sampled_from(sorted(EXACT)), seed=st.integers(0, 9), told=told())
def test_triple_is_within_half_a_step_of_the_gated_value(
    op: Op, kernel: Kernel, device: str, gate: Rows, act: str, seed: int, told: Told
) -> None:
    arguments = told.on(gate.K, device, gate.magnitude)
    g = gate.on(device)
    up = Rows(gate.lead, gate.K, torch.bfloat16, 3.0, layout="slice", seed=seed).on(device)
    y, noise = _exact(g, act)
    u = up.cpu().double()
    noise = noise * u.abs() + 4 * U * (y * u).abs() + 2e-38
    assert_means(*kernel.fn(g, up, act, *arguments), y * u, noise, told=arguments)


@kernels(act_quantize)
@given(sample=samples, act=st.sampled_from(sorted(EXACT)), data=st.data())
def test_kernel_is_within_a_step_of_the_reference(
    op: Op, kernel: Kernel, device: str, sample: Rows, act: str, data: st.DataObject
) -> None:
    """Of an infinity both are not finite, one inf and the other nan: clamped, they differ."""
    told_of_it = data.draw(told(ranges=sample.finite))
    arguments = told_of_it.on(sample.K, device, sample.magnitude)
    args = sample.on(device), act, *arguments
    _, noise = meant(*_exact(args[0], act), *arguments)
    noise = noise.nan_to_num(nan=0.0, posinf=0.0)
    assert_within_a_step(kernel.fn(*args), op.reference(*to_cpu(args)), noise)


@kernels(glu_quantize)
@given(gate=samples, up=samples, act=st.sampled_from(sorted(EXACT)))
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


@kernels(act_quantize)
@pytest.mark.parametrize("low", [-1.0, -3.0, -5.0])
def test_gelu_of_rows_without_a_positive_value_keeps_its_steps(
    op: Op, kernel: Kernel, device: str, low: float
) -> None:
    """There gelu is tiny and the scale with it: a tail that is only absolutely right would fail.
    The row is one-sided, below zero: half the symmetric scale, and the noise is 1 % as before."""
    x = torch.linspace(low, low / 2, 100, device=device).expand(3, 100)
    y = EXACT["gelu"](x.double()).cpu()
    assert_means(*kernel.fn(x, "gelu"), y, noise=0.01 * y.abs().amax(-1, keepdim=True))


@implementations(act_quantize)
@pytest.mark.parametrize("act", sorted(EXACT))
@pytest.mark.parametrize("x", [1e-30, 0.0, -0.0, -1e30, -200.0, -87.5, 87.5, 200.0, 1e15])
def test_extreme_values_do_not_become_nan(
    op: Op, kernel: Kernel, device: str, act: str, x: float
) -> None:
    triple = kernel.fn(torch.tensor([[x, 1.0]], device=device), act)
    assert_means(*triple, *_exact(torch.tensor([[x, 1.0]]), act))


@implementations(act_quantize)
@pytest.mark.parametrize("act", sorted(EXACT))
def test_a_row_with_nan_leaves_the_others_alone(
    op: Op, kernel: Kernel, device: str, act: str
) -> None:
    x = torch.randn(6, 37, device=device)
    clean = [t.clone() for t in kernel.fn(x, act)]
    x[2, 11] = torch.nan
    triple = kernel.fn(x, act)
    others = torch.arange(6, device=device) != 2
    for got, before in zip(triple, clean, strict=True):
        assert torch.equal(got[others], before[others])
    xq, x_scale, x_shift = triple
    assert not xq[2].any() and x_scale[2].isnan().all() and x_shift[2].isnan().all()


@implementations(act_quantize)
@pytest.mark.parametrize("act", sorted(EXACT))
def test_an_activation_hardly_below_zero_gets_nearly_twice_the_steps(
    op: Op, kernel: Kernel, device: str, act: str
) -> None:
    """high >= 4, and the lowest value of any activation is silu's -0.279: (4 + 0.279) / 2 / 4."""
    x = torch.randn(6, 300, device=device)
    x[:, 7] = 4.01  # each of them is at least 3.9 there
    x_scale = kernel.fn(x, act)[1].cpu().double()
    symmetric = quantize_symmetric(EXACT[act](x.cpu().double()))[1].double()
    assert (x_scale <= 0.54 * symmetric).all()


@implementations(glu_quantize)
def test_halves_of_one_stacked_result_mean_the_same(op: Op, kernel: Kernel, device: str) -> None:
    both = torch.randn(3, 5, 2 * 70, device=device, dtype=torch.bfloat16)
    gate, up = both[..., :70], both[..., 70:]
    for sliced, copied in zip(
        kernel.fn(gate, up, "silu"),
        kernel.fn(gate.contiguous(), up.contiguous(), "silu"),
        strict=True,
    ):
        assert torch.equal(sliced, copied)


@implementations(glu_quantize)
def test_rows_too_long_for_registers_mean_the_same(op: Op, kernel: Kernel, device: str) -> None:
    gate, up = torch.randn(2, 20_003, device=device), torch.randn(2, 20_003, device=device)
    y, noise = _exact(gate, "silu")
    u = up.cpu().double()
    noise = (noise + 4 * U * y.abs()) * u.abs()
    assert_means(*kernel.fn(gate, up, "silu"), y * u, noise)
    for told_of_it in TOLD.values():
        arguments = told_of_it.on(20_003, device)
        assert_means(*kernel.fn(gate, up, "silu", *arguments), y * u, noise, told=arguments)


@implementations(act_quantize)
def test_no_rows_give_no_rows(op: Op, kernel: Kernel, device: str) -> None:
    x = torch.empty(0, 20, device=device)
    assert_layout(*kernel.fn(x, "gelu"), x.shape)


@kernels(act_quantize)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("K", [OVERLAID[0], 4096, OVERLAID[-1]])
def test_int8_rows_may_be_written_over_the_floats_that_they_come_from(
    op: Op, kernel: Kernel, device: str, K: int, dtype: torch.dtype
) -> None:
    x = torch.randn(3, 5, K, device=device).to(dtype)
    factor = torch.rand(K, device=device)
    want = kernel.fn(x, "gelu", factor, None, None, 1.0)
    xq, x_scale, x_shift = overlay(x), *map(torch.empty_like, want[1:])
    assert kernel.fill is not None
    kernel.fill(x, "gelu", factor, None, None, 1.0, out=(xq, x_scale, x_shift))
    assert all(map(torch.equal, (xq, x_scale, x_shift), want))


def test_a_program_holds_one_whole_row_that_may_be_written_over() -> None:
    for K in OVERLAID:
        assert row_config(K)["ROWS"] == 1 and K <= WHOLE_ROW
        assert padded(K) == K  # no pads: they would reach into the next row
