"""Int8 with one scale and one shift per row (token) of an activation.

    xq, x_scale, x_shift = quantize_rows(x, factor, low, high, clip)     (numerics.py)

    x           [..., K]  float16 | bfloat16 | float32, any strides
    factor      [K]       float32, or None for ones: x is multiplied by it
    low, high   float     the range of all rows, or None: each row has its own
    clip        float > 0, or None: rows go no further from zero; not beside low and high
    -> xq       [..., K]  int8 in [-127, 127], row stride padded(K) bytes
    -> x_scale  [..., 1]  float32 > 0
    -> x_shift  [..., 1]  float32

Rows don't see each other.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphquant.ops import checks
from graphquant.ops.define import QUANTISED, define
from graphquant.ops.numerics import empty_triple, quantize_rows


def _check(x: Tensor, *told: Any) -> None:
    checks.rows("quantize", "x", x)
    checks.quantised("quantize", x, *told)


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_triple(x, x.shape)


@define(
    f"(Tensor x, {QUANTISED}) -> (Tensor xq, Tensor x_scale, Tensor x_shift)",
    fake=_fake,
    check=_check,
)
def quantize(
    x: Tensor,
    factor: Tensor | None = None,
    low: float | None = None,
    high: float | None = None,
    clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_rows(x, factor, low, high, clip)
