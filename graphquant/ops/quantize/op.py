"""Int8 with one scale and one shift per row (token) of an activation.

    xq, x_scale, x_shift = quantize_rows(x)          (numerics.py)

    x           [..., K]  float16 | bfloat16 | float32, any strides
    -> xq       [..., K]  int8 in [-127, 127], row stride padded(K) bytes
    -> x_scale  [..., 1]  float32 > 0
    -> x_shift  [..., 1]  float32

Rows don't see each other.
"""

from __future__ import annotations

from torch import Tensor

from graphquant.ops import checks
from graphquant.ops.define import define
from graphquant.ops.numerics import empty_triple, quantize_rows


def _check(x: Tensor) -> None:
    checks.rows("quantize", "x", x)


def _fake(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return empty_triple(x, x.shape)


@define("(Tensor x) -> (Tensor xq, Tensor x_scale, Tensor x_shift)", fake=_fake, check=_check)
def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_rows(x)
