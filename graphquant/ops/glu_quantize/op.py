"""A gated activation (SwiGLU, GeGLU, ReGLU) that writes int8 instead of floats.

    xq, x_scale, x_shift = quantize_rows(act(gate) * up, factor, low, high, clip)     in float32

    gate        [..., K]  float16 | bfloat16 | float32, any strides
    up          [..., K]  float16 | bfloat16 | float32, any strides
    act         a name in numerics.ACTIVATIONS
    factor, low, high, clip     of act(gate) * up, as in `quantize`
    -> xq       [..., K]  int8 in [-127, 127], row stride padded(K) bytes
    -> x_scale  [..., 1]  float32 > 0
    -> x_shift  [..., 1]  float32

gate and up are usually the two halves of one stacked linear's result: slices cost no copy.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphquant.ops import checks
from graphquant.ops.define import QUANTISED, define
from graphquant.ops.numerics import ACTIVATIONS, empty_triple, quantize_rows


def _check(gate: Tensor, up: Tensor, act: str, *told: Any) -> None:
    checks.rows("glu_quantize", "gate", gate)
    checks.rows("glu_quantize", "up", up)
    checks.shape("glu_quantize", "up", up, gate.shape, "the shape of gate")
    checks.activation("glu_quantize", act)
    checks.one_device("glu_quantize", gate=gate, up=up)
    checks.quantised("glu_quantize", gate, *told)


def _fake(gate: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_triple(gate, gate.shape)


@define(
    f"(Tensor gate, Tensor up, str act, {QUANTISED})"
    " -> (Tensor xq, Tensor x_scale, Tensor x_shift)",
    fake=_fake,
    check=_check,
)
def glu_quantize(
    gate: Tensor,
    up: Tensor,
    act: str,
    factor: Tensor | None = None,
    low: float | None = None,
    high: float | None = None,
    clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_rows(ACTIVATIONS[act](gate.float()) * up.float(), factor, low, high, clip)
