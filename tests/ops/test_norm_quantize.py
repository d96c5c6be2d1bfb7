"""norm_quantize and norm_quantize_keep: LayerNorm and RMSNorm against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from graphquant.ops import norm_quantize, norm_quantize_keep
from graphquant.ops.define import Kernel, Op
from tests.ops.bounds import (
    U,
    assert_layout,
    assert_means,
    assert_within_a_step,
    implementations,
    kernels,
    runnable,
    to_cpu,
)
from tests.ops.qparams import RECIPES, Recipe, meant, recipes
from tests.strategies import FLOATS, Rows, rows

# float32 squares must neither overflow nor vanish beside eps: |x|^2 < 1e36
samples = rows(max_exponent=12)


def _exact(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    """(y, noise) in float64: the norm and a bound on what float32 can be off by.

    The mean of K values is off by at most m = (K + 2) U max|x| (any order of summation), so each
    d by m + U max|x|, which is r = (m + U max|x|) / sqrt(var + eps) in units of y. It moves the
    variance by at most 2 r + r^2 relatively, so for r <= 1/4 the result by
    r (2 + 2 |y|); sums of squares, rsqrt (2^-22) and products add (K + 16) U |y|.
    RMSNorm takes no mean: r = 0. For larger r (a row almost constant) nothing is left of the
    result but |y| <= sqrt(K), before and after.
    """
    K, x = x.shape[-1], x.cpu().double()
    d = x if rms else x - x.mean(-1, keepdim=True)
    std = (d.square().mean(-1, keepdim=True) + eps).sqrt()
    y = d / std
    r = 0.0 if rms else (K + 3) * U * x.abs().amax(-1, keepdim=True) / std
    noise = r * (2 + 2 * y.abs()) + (K + 16) * U * y.abs()
    noise = noise.where(torch.as_tensor(r) <= 0.25, 2.1 * K**0.5)
    if gamma is not None:
        y, noise = y * gamma.cpu().double(), noise * gamma.cpu().double().abs()
    if beta is not None:
        noise = noise + 2 * U * (y.abs() + beta.cpu().double().abs())
        y = y + beta.cpu().double()
    return y, noise


def _vector(K: int, kind: str, device: str) -> Tensor | None:
    if kind == "none":
        return None
    v = torch.linspace(-2.0, 2.0, 2 * K, device=device)[::2]  # strided
    return v.to(torch.bfloat16) if kind == "bfloat16" else v


kinds = st.sampled_from(["none", "float32", "bfloat16"])
epsilons = st.sampled_from([1e-12, 1e-6, 1e-5])


@implementations(norm_quantize)
@given(sample=samples, gamma=kinds, beta=kinds, eps=epsilons, rms=st.booleans(), recipe=recipes())
@example(Rows((2,), 8, content="zero row"), "none", "none", 1e-12, False, Recipe())
@example(Rows((2,), 1), "float32", "float32", 1e-5, False, Recipe())
def test_triple_is_within_half_a_step_of_the_norm(
    op: Op,
    kernel: Kernel,
    device: str,
    sample: Rows,
    gamma: str,
    beta: str,
    eps: float,
    rms: bool,
    recipe: Recipe,
) -> None:
    x, qparams = sample.on(device), recipe.on(sample.K, device)
    args = x, _vector(sample.K, gamma, device), _vector(sample.K, beta, device), eps, rms
    y, noise = _exact(*args)
    assert_means(*kernel.fn(*args, *qparams), y, noise, qparams)


@kernels(norm_quantize)
@given(sample=samples, gamma=kinds, beta=kinds, eps=epsilons, rms=st.booleans(), recipe=recipes())
def test_kernel_is_within_a_step_of_the_reference(
    op: Op,
    kernel: Kernel,
    device: str,
    sample: Rows,
    gamma: str,
    beta: str,
    eps: float,
    rms: bool,
    recipe: Recipe,
) -> None:
    x, qparams = sample.on(device), recipe.on(sample.K, device)
    norm = x, _vector(sample.K, gamma, device), _vector(sample.K, beta, device), eps, rms
    noise = meant(*_exact(*norm), qparams)[1].nan_to_num(nan=0.0, posinf=0.0)
    args = (*norm, *qparams)
    assert_within_a_step(kernel.fn(*args), op.reference(*to_cpu(args)), noise)


@implementations(norm_quantize_keep)
@pytest.mark.parametrize("K", [33, 81, 83, 1153])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_column_of_an_odd_width_is_normed(
    op: Op, kernel: Kernel, device: str, K: int, dtype: torch.dtype
) -> None:
    """Of every row that a program holds, with parameters of the input's own type: compilers have
    got the masks of single columns wrong."""
    g = torch.Generator().manual_seed(K)
    x, gamma, beta = (torch.randn(n, K, generator=g).to(dtype).to(device) for n in (9, 1, 1))
    args = x, gamma[0], beta[0], 1e-6, False
    want, noise = _exact(*args)
    y, *triple = kernel.fn(*args, dtype)
    unit = torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).smallest_normal
    assert ((y.cpu().double() - want).abs() <= unit + noise).all()
    assert_means(*triple, want, noise)


@implementations(norm_quantize_keep)
@given(
    sample=samples, gamma=kinds, rms=st.booleans(), dtype=st.sampled_from(FLOATS), recipe=recipes()
)
def test_kept_value_is_the_norm_rounded_to_dtype(
    op: Op,
    kernel: Kernel,
    device: str,
    sample: Rows,
    gamma: str,
    rms: bool,
    dtype: torch.dtype,
    recipe: Recipe,
) -> None:
    """Whatever the qparams."""
    x, qparams = sample.on(device), recipe.on(sample.K, device)
    args = x, _vector(sample.K, gamma, device), None, 1e-6, rms
    want, noise = _exact(*args)
    y, *triple = kernel.fn(*args, dtype, *qparams)
    assert y.dtype == dtype and y.shape == x.shape and y.is_contiguous()
    # Triton's interpreter cuts float32 to bfloat16 where the GPU rounds: a whole unit, not half
    unit = torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).smallest_normal
    finite = want.isfinite().all(-1, keepdim=True)
    assert (~finite | ((y.cpu().double() - want).abs() <= unit + noise)).all()
    assert_means(*triple, want, noise, qparams)


@implementations(norm_quantize)
def test_keeping_the_value_does_not_change_the_triple(op: Op, kernel: Kernel, device: str) -> None:
    keep: Any = {"reference": norm_quantize_keep.reference} | {
        k.name: k.fn for k in runnable(norm_quantize_keep)
    }
    args = torch.randn(9, 100, device=device), torch.randn(100, device=device), None, 1e-5, False
    for alone, kept in zip(
        kernel.fn(*args), keep[kernel.name](*args, torch.bfloat16)[1:], strict=True
    ):
        assert torch.equal(alone, kept)


@implementations(norm_quantize)
def test_a_large_mean_does_not_eat_the_variance(op: Op, kernel: Kernel, device: str) -> None:
    x = 4000 + torch.randn(4, 300, device=device)  # E[x^2] - E[x]^2 in float32 would be off by 1
    y, _ = _exact(x, None, None, 1e-6, False)
    assert_means(*kernel.fn(x, None, None, 1e-6, False), y, noise=2e-3)


@implementations(norm_quantize_keep)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("K", [16_400, 20_003])
def test_rows_too_long_for_registers_mean_the_same(
    op: Op, kernel: Kernel, device: str, K: int, rms: bool
) -> None:
    x, gamma = torch.randn(2, K, device=device) + 0.5, torch.randn(K, device=device)
    want, _ = _exact(x, gamma, None, 1e-5, rms)
    y, *triple = kernel.fn(x, gamma, None, 1e-5, rms, torch.float32)
    noise = 1e-5 * (1 + want.abs())  # sums in trees: far below the worst order of _exact
    assert ((y.cpu().double() - want).abs() <= noise).all()
    assert_means(*triple, want, noise)
    for recipe in RECIPES.values():
        qparams = recipe.on(K, device)
        kept, *triple = kernel.fn(x, gamma, None, 1e-5, rms, torch.float32, *qparams)
        assert torch.equal(kept, y)
        assert_means(*triple, want, noise, qparams)


@implementations(norm_quantize)
@pytest.mark.parametrize("K", [37, 16_400])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_beta_that_makes_a_row_one_sided_becomes_the_shift(
    op: Op, kernel: Kernel, device: str, sign: int, K: int
) -> None:
    """Lanes beyond K must not take part: beta is 0 there, and so is what they add to the range."""
    x = torch.randn(3, K, device=device)
    beta = torch.full((K,), sign * 20.0, device=device)
    want, noise = _exact(x, None, beta, 1e-5, False)
    assert (want * sign > 0).all()
    assert_means(*kernel.fn(x, None, beta, 1e-5, False), want, noise.clamp(max=1e-4))


@implementations(norm_quantize)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, -torch.nan])
def test_a_row_that_is_not_finite_leaves_the_others_alone(
    op: Op, kernel: Kernel, device: str, rms: bool, bad: float
) -> None:
    x = torch.randn(6, 37, device=device)
    clean = [t.clone() for t in kernel.fn(x, None, None, 1e-5, rms)]
    x[2, 11] = bad
    triple = kernel.fn(x, None, None, 1e-5, rms)
    others = torch.arange(6, device=device) != 2
    for got, before in zip(triple, clean, strict=True):
        assert torch.equal(got[others], before[others])
    xq, x_scale, x_shift = (t[2] for t in triple)
    assert not xq.any() and not x_scale.isfinite().any()
    assert (xq * x_scale + x_shift).isnan().all()


@implementations(norm_quantize)
def test_no_rows_give_no_rows(op: Op, kernel: Kernel, device: str) -> None:
    x = torch.empty(3, 0, 20, device=device)
    assert_layout(*kernel.fn(x, None, None, 1e-5, False), x.shape)
