"""QParams of linears' inputs, from the calibration's static ranges, the clip and smoothing.

All linears that read one value, also through row views and casts, share the union of their ranges,
so that q, k and v are quantized once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch.fx import Node

from graphquant.config import Config, Statistics
from graphquant.errors import OptionError
from graphquant.ir.graph import arguments
from graphquant.ir.rows import origin
from graphquant.ops.qparams import QParams
from graphquant.passes.rule import Smoothing

Range = tuple[float, float]

SMOOTHED = (-1.0, 1.0)  # range of x / s for any x and weights (smoothing.py)


def static_ranges(linears: Mapping[Node, str], calibration: Statistics) -> dict[str, Range]:
    """Names of linears' nodes -> the ranges of their inputs, where the calibration has one.

    linears  float linears -> their module paths

    Raises OptionError for a range that is not two finite, ordered numbers.
    """
    groups: dict[Node, list[Node]] = defaultdict(list)
    for linear in linears:
        groups[origin(arguments(linear).input, lambda n: False)[0]].append(linear)
    found: dict[str, Range] = {}
    for group in groups.values():
        known = [r for n in group if (r := _range(linears[n], calibration)) is not None]
        if known:
            found |= dict.fromkeys((n.name for n in group), union(known))
    return found


def input_qparams(
    config: Config, ranges: Mapping[str, Range], names: Iterable[str], smoothing: Smoothing
) -> QParams:
    """QParams of the input of linears.

    ranges  as `static_ranges` returns them
    names   of the nodes of the linears, which read this input
    """
    clip = config.clip_range
    known = [ranges[name] for name in names if name in ranges]
    if config.activation == "static" and smoothing.scale is not None:
        known = [SMOOTHED]
    if known:
        low, high = within(union(known), clip)
        return QParams(smoothing.factor, low, high)
    return QParams(smoothing.factor, clip=clip)


def union(ranges: list[Range]) -> Range:
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def within(span: Range, clip: float | None) -> Range:
    """The range clamped to [-clip, clip]."""
    if clip is None:
        return span
    low, high = (min(max(end, -clip), clip) for end in span)
    return low, high


def _range(path: str, calibration: Statistics) -> Range | None:
    said = calibration.range(path)
    if said is None:
        return None
    low, high = map(float, said)
    if not -math.inf < low <= high < math.inf:
        raise OptionError(
            f"calibration.range({path!r}) is ({low}, {high}), needs two finite numbers in order"
        )
    return low, high
