"""An activation that writes int8 instead of floats.

xq, x_scale, x_shift = quantize_rows(act(x), factor, low, high, clip)     in float32

x           [..., K]  float16 | bfloat16 | float32, any strides
act         a name in numerics.ACTIVATIONS
factor, low, high, clip     of act(x), as in `quantize`
-> xq       [..., K]  int8 in [-127, 127], row stride padded(K) bytes
-> x_scale  [..., 1]  float32 > 0
-> x_shift  [..., 1]  float32
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphquant.ops import checks
from graphquant.ops.define import QUANTISED, define
from graphquant.ops.numerics import ACTIVATIONS, empty_triple, quantize_rows


def _check(x: Tensor, act: str, *told: Any) -> None:
    checks.rows("act_quantize", "x", x)
    checks.activation("act_quantize", act)
    checks.quantised("act_quantize", x, *told)


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_triple(x, x.shape)


@define(
    f"(Tensor x, str act, {QUANTISED}) -> (Tensor xq, Tensor x_scale, Tensor x_shift)",
    fake=_fake,
    check=_check,
)
def act_quantize(
    x: Tensor,
    act: str,
    factor: Tensor | None = None,
    low: float | None = None,
    high: float | None = None,
    clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_rows(ACTIVATIONS[act](x.float()), factor, low, high, clip)
