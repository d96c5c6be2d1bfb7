"""LayerNorm or RMSNorm over the last dim, quantized to int8.

    d = x - mean(x)                                 (rms: d = x)
    y = d / sqrt(mean(d^2) + eps) * gamma + beta    in float32, two passes: no E[x^2] - E[x]^2
    xq, x_scale, x_shift = quantize_rows(y, qparams)

    x           [..., K]  float16 | bfloat16 | float32, any strides
    gamma       [K]       float16 | bfloat16 | float32, or None for ones
    beta        [K]       float16 | bfloat16 | float32, or None for zeros
    eps         float     in units of x squared
    qparams     factor, low, high, clip, of y; num_rows (qparams.py)
    -> xq       [..., K]  int8 in [-127, 127], row stride padded(K) bytes
    -> x_scale  [..., 1]  float32 > 0
    -> x_shift  [..., 1]  float32

`norm_quantize_keep` also returns y [..., K] rounded to `dtype`, contiguous, for post-norm models
whose residual is the norm's result. xq comes from the float32 y, not from the rounded one; no
QParams change the y that is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphquant.ops import checks
from graphquant.ops.define import define
from graphquant.ops.numerics import empty_triple, quantize_rows
from graphquant.ops.qparams import SCHEMA, QParams


def _check(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, rms: bool, *qparams: Any
) -> None:
    _check_named("norm_quantize", x, gamma, beta, *qparams)


def _check_keep(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
    *qparams: Any,
) -> None:
    _check_named("norm_quantize_keep", x, gamma, beta, *qparams)
    checks.result_dtype("norm_quantize_keep", dtype)


def _check_named(
    op: str, x: Tensor, gamma: Tensor | None, beta: Tensor | None, *qparams: Any
) -> None:
    checks.rows(op, "x", x)
    checks.vector(op, "gamma", gamma, x.shape[-1], "[K] like x [..., K]")
    checks.vector(op, "beta", beta, x.shape[-1], "[K] like x [..., K]")
    checks.one_device(op, x=x, gamma=gamma, beta=beta)
    checks.qparams(op, x, QParams(*qparams))


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_triple(x, x.shape)


def _fake_keep(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), *empty_triple(x, x.shape)


def _float_form(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype | None = None,  # norm_quantize_keep's, unused here
    *,
    exact: bool = False,
) -> Tensor:
    """The norm in the dtype of x. exact: in two passes, as kernels compute it."""
    gamma, beta = (None if t is None else t.to(x.dtype) for t in (gamma, beta))
    if exact:
        d = x if rms else x - x.mean(-1, keepdim=True)
        y = d * torch.rsqrt(d.square().mean(-1, keepdim=True) + eps)
        y = y if gamma is None else y * gamma
    elif rms:
        y = F.rms_norm(x, x.shape[-1:], gamma, eps)
    else:
        return F.layer_norm(x, x.shape[-1:], gamma, beta, eps)
    return y if beta is None else y + beta


@define(
    f"(Tensor x, Tensor? gamma, Tensor? beta, float eps, bool rms, {SCHEMA})"
    " -> (Tensor xq, Tensor x_scale, Tensor x_shift)",
    float_form=_float_form,
    fake=_fake,
    check=_check,
)
def norm_quantize(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    rms: bool,
    *qparams: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    y = _float_form(x.float(), gamma, beta, eps, rms, exact=True)
    return quantize_rows(y, QParams(*qparams))


@define(
    f"(Tensor x, Tensor? gamma, Tensor? beta, float eps, bool rms, ScalarType dtype, {SCHEMA})"
    " -> (Tensor y, Tensor xq, Tensor x_scale, Tensor x_shift)",
    float_form=_float_form,
    fake=_fake_keep,
    check=_check_keep,
)
def norm_quantize_keep(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
    *qparams: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = _float_form(x.float(), gamma, beta, eps, rms, exact=True)
    return y.to(dtype).contiguous(), *quantize_rows(y, QParams(*qparams))
