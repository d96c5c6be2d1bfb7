"""Quantization parameters of an activation, besides the scales and shifts of its rows."""

from __future__ import annotations

from typing import Any, NamedTuple


class QParams(NamedTuple):
    """The last arguments of every op that quantizes activations (equations: numerics.py).

    factor     float32 [K]: x * factor is quantized in place of x (SmoothQuant's 1 / s)
    low, high  static range of all rows, from a calibration, low <= high; None: each row has its own
    clip       > 0: clamp(x, -clip, clip) is quantized in place of x; not together with low and high
    num_rows   int32 [1], on x's device: only so many leading rows of x [M, K] have to be computed,
               those behind are unspecified in every result; None: all

    Among the arguments of a graph's node, `factor` and `num_rows` are nodes.
    """

    factor: Any = None
    low: float | None = None
    high: float | None = None
    clip: float | None = None
    num_rows: Any = None


SCHEMA = (
    "Tensor? factor=None, float? low=None, float? high=None, float? clip=None,"
    " Tensor? num_rows=None"
)
DYNAMIC = QParams()  # each row has its own range, nothing is scaled or clipped
