"""Int8 with one scale and one shift per row (token) of an activation.

    xq, x_scale, x_shift = quantize_rows(act(x) * up, qparams)     in float32 (numerics.py)

    quantize(x)                     what a linear reads
    quantize(x, act="gelu")         an activation's result
    quantize(gate, up, "silu")      a gated activation's result: SwiGLU, GeGLU, ReGLU
    quantize(x, up)                 a product

    x           [..., K]  float16 | bfloat16 | float32, any strides
    up          [..., K]  float16 | bfloat16 | float32, any strides; None for ones
    act         a name in numerics.ACTIVATIONS; None: x as it is
    qparams     factor, low, high, clip, of act(x) * up; num_rows (qparams.py)
    -> xq       [..., K]  int8 in [-127, 127], row stride padded(K) bytes
    -> x_scale  [..., 1]  float32 > 0
    -> x_shift  [..., 1]  float32

Rows are independent of each other. x and up are usually slices of one stacked linear's result,
which are read without a copy.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphquant.ops import checks
from graphquant.ops.define import define
from graphquant.ops.numerics import ACTIVATIONS, empty_triple, quantize_rows
from graphquant.ops.qparams import SCHEMA, QParams


def _check(x: Tensor, up: Tensor | None = None, act: str | None = None, *qparams: Any) -> None:
    checks.rows("quantize", "x", x)
    if up is not None:
        checks.rows("quantize", "up", up)
        checks.shape("quantize", "up", up, x.shape, "the shape of x")
        checks.one_device("quantize", x=x, up=up)
    checks.activation("quantize", act)
    checks.qparams("quantize", x, QParams(*qparams))


def _float_form(
    x: Tensor, up: Tensor | None = None, act: str | None = None, *, exact: bool = False
) -> Tensor:
    if act is not None:
        x = ACTIVATIONS[act](x) if exact else ACTIVATIONS[act].fused(x)
    return x if up is None else x * up


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_triple(x, x.shape)


@define(
    f"(Tensor x, Tensor? up=None, str? act=None, {SCHEMA})"
    " -> (Tensor xq, Tensor x_scale, Tensor x_shift)",
    float_form=_float_form,
    fake=_fake,
    check=_check,
)
def quantize(
    x: Tensor, up: Tensor | None = None, act: str | None = None, *qparams: Any
) -> tuple[Tensor, Tensor, Tensor]:
    y = _float_form(x.float(), None if up is None else up.float(), act, exact=True)
    return quantize_rows(y, QParams(*qparams))
