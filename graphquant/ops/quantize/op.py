"""Int8 with one scale per row: activations [..., K] per token, weights [N, K] per output channel.

    xq, x_scale = quantize_rows(x)          (numerics.py)

    x           [..., K]  float16 | bfloat16 | float32, any strides
    -> xq       [..., K]  int8 in [-127, 127], row stride padded to 16 bytes, pads zero
    -> x_scale  [..., 1]  float32

Rows don't see each other: quantising stacked weights equals stacking quantised weights, bit for
bit.
"""

from __future__ import annotations

from torch import Tensor

from graphquant.ops import checks
from graphquant.ops.define import define
from graphquant.ops.numerics import empty_pair, quantize_rows


def _check(x: Tensor) -> None:
    checks.rows("quantize", "x", x)


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return empty_pair(x, x.shape)


@define("(Tensor x) -> (Tensor xq, Tensor x_scale)", fake=_fake, check=_check)
def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_rows(x)
