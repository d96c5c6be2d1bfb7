"""An activation that writes int8 instead of floats.

xq, x_scale, x_shift = quantize_rows(act(x))     in float32

x           [..., K]  float16 | bfloat16 | float32, any strides
act         a name in numerics.ACTIVATIONS
-> xq       [..., K]  int8 in [-127, 127], row stride padded(K) bytes
-> x_scale  [..., 1]  float32 > 0
-> x_shift  [..., 1]  float32
"""

from __future__ import annotations

from torch import Tensor

from graphquant.ops import checks
from graphquant.ops.define import define
from graphquant.ops.numerics import ACTIVATIONS, empty_triple, quantize_rows


def _check(x: Tensor, act: str) -> None:
    checks.rows("act_quantize", "x", x)
    checks.activation("act_quantize", act)


def _fake(x: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    return empty_triple(x, x.shape)


@define(
    "(Tensor x, str act) -> (Tensor xq, Tensor x_scale, Tensor x_shift)", fake=_fake, check=_check
)
def act_quantize(x: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_rows(ACTIVATIONS[act](x.float()))
