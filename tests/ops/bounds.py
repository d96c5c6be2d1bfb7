"""What (xq, x_scale) must mean, and helpers to run every implementation of an op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graphquant.ops.define import Kernel, Op, load_kernels
from graphquant.ops.numerics import MIN_ABSMAX, padded, with_pads

U = 2.0**-24  # float32 rounds to nearest with a relative error of at most U

load_kernels()


def implementations(*ops: Op) -> pytest.MarkDecorator:
    """Parametrise over (op, kernel): each op's reference, wrapped as a kernel, and its kernels."""
    cases = [
        pytest.param(op, kernel, id=f"{op.name}-{kernel.name}")
        for op in ops
        for kernel in (Kernel("reference", op.reference, lambda *_: None), *op.kernels)
    ]
    return pytest.mark.parametrize(("op", "kernel"), cases)


def kernels(*ops: Op) -> pytest.MarkDecorator:
    """Parametrise over (op, kernel) of the kernels alone."""
    cases = [pytest.param(op, k, id=f"{op.name}-{k.name}") for op in ops for k in op.kernels]
    return pytest.mark.parametrize(("op", "kernel"), cases)


def to_cpu(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.cpu() if isinstance(a, Tensor) else a for a in args)


def assert_layout(xq: Tensor, x_scale: Tensor, shape: torch.Size) -> None:
    """Dtypes, shapes, row stride padded to 16, pads zero, values in [-127, 127]."""
    K = shape[-1]
    assert xq.dtype == torch.int8 and xq.shape == shape
    assert x_scale.dtype == torch.float32 and x_scale.shape == (*shape[:-1], 1)
    assert x_scale.is_contiguous()
    wide = torch.empty((*shape[:-1], padded(K)), device="meta")
    assert xq.stride() == wide.stride()
    if xq.numel():
        assert int(xq.to(torch.int32).abs().max()) <= 127
        assert not with_pads(xq)[..., K:].any()


def assert_means(xq: Tensor, x_scale: Tensor, y: Tensor, noise: Tensor | float = 0.0) -> None:
    """The pair stands for y [..., K] float64, of which the op saw y + e with |e| <= noise.

    With s = x_scale and steps v = fl(fl(127 / absmax) * y):  |v - 127 y / absmax| <= 127 * 2.5 U,
    rounding v costs half a step, and s is within 1.5 U of absmax / 127. So
    |y - xq s| <= s / 2 + s * 127 * 5 U + noise, where 127 * 5 U = 3.8e-5.
    Rows that are not finite have a scale that is not finite, and zeros.
    """
    assert_layout(xq, x_scale, y.shape)
    xq, s, y = xq.cpu().double(), x_scale.cpu().double(), y.cpu()
    finite = y.isfinite().all(-1, keepdim=True)
    assert (s.isfinite() == finite).all()
    assert ((xq == 0) | finite).all()
    noise = torch.as_tensor(noise, dtype=torch.float64).expand_as(y)
    error = (y - xq * s).abs()
    assert (~finite | (error <= s * (0.5 + 127 * 5 * U) + noise)).all()
    want = y.abs().amax(-1, keepdim=True).clamp(min=MIN_ABSMAX) / 127
    slack = noise.amax(-1, keepdim=True) / 127 + 4 * U * want
    assert (~finite | ((s - want).abs() <= slack)).all()


def assert_within_a_step(pair: Any, reference: Any, noise: Tensor | float = 0.0) -> None:
    """Two pairs for one value: each is rounded by at most half a step, so they are a step apart."""
    (xq, s), (rq, rs) = ([t.cpu().double() for t in p] for p in (pair, reference))
    finite = s.isfinite() & rs.isfinite()
    assert (s.isfinite() == rs.isfinite()).all()
    step = torch.maximum(s, rs) * (1 + 127 * 10 * U)
    assert (~finite | ((xq * s - rq * rs).abs() <= step + 2 * noise)).all()
