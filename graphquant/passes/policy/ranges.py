"""Quantization parameters of linears' inputs: static ranges of a calibration, clip, smoothing.

All linears that read one value, through views of its rows and casts as well, have one range: the
least that holds what the calibration knows of each. So q, k and v are quantised once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from torch.fx import Node

from graphquant.config import Config, Statistics
from graphquant.errors import OptionError
from graphquant.ir.graph import full_args
from graphquant.ir.rows import origin
from graphquant.passes.rule import Smoothing

Range = tuple[float, float]

SMOOTHED = (-1.0, 1.0)  # of x / s, whatever x's channels and the weights are (smoothing.py)


def static_ranges(linears: Mapping[Node, str], calibration: Statistics) -> dict[str, Range]:
    """The range of each linear's input, by the name of its node; none for inputs not known.

    linears  float linears and their module paths

    Raises OptionError for a range that is none.
    """
    groups: dict[Node, list[Node]] = defaultdict(list)
    for linear in linears:
        groups[origin(full_args(linear)[0], lambda n: False)[0]].append(linear)
    found: dict[str, Range] = {}
    for group in groups.values():
        known = [r for n in group if (r := _range(linears[n], calibration)) is not None]
        if known:
            found |= dict.fromkeys((n.name for n in group), union(known))
    return found


def input_qparams(
    config: Config, ranges: Mapping[str, Range], names: Iterable[str], smoothing: Smoothing
) -> list[Any]:
    """The last arguments of a quantizer (ops/numerics.py): factor, low, high and clip, without
    trailing Nones.

    ranges  static ranges by the names of linears' nodes
    names   of the linears' nodes that read the result, as one product
    """
    clip = config.clip_range
    known = [ranges[name] for name in names if name in ranges]
    if config.activation == "static" and smoothing.scale is not None:
        known = [SMOOTHED]
    qparams = [smoothing.factor, None, None, clip]
    if known:
        qparams = [smoothing.factor, *within(union(known), clip), None]
    while qparams and qparams[-1] is None:
        qparams.pop()
    return qparams


def union(ranges: list[Range]) -> Range:
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def within(span: Range, clip: float | None) -> Range:
    """What is left of a range in [-clip, clip]."""
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
