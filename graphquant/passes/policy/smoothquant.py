"""SmoothQuant: which linears are smoothed, and by which numbers (`Config.smooth`).

    linear(x, W)  ->  int8_linear(quantize(x / s), quantize_weight(W s)),  s = smoothing(W, absmax)

Nothing is inserted into the float model: where a rule turns a linear to int8, its weight becomes
W s, and the quantiser in front of it takes 1 / s, folded into gamma and beta where it is a norm.
So it does not matter who else reads x, and attention's values and gated activations need no rule
of their own. s is an expression of the weights and of statistics, packed with them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphquant.config import Config
from graphquant.ir.graph import aten, shape
from graphquant.passes.policy.smoothing import norm_smoothing, searched_smoothing, smoothing
from graphquant.passes.recognize import Norm
from graphquant.passes.rule import Edit, Linear, Smoothing

ALPHA = 0.5  # where nothing says another: what the paper takes, and the best one on MiniLM
NO_NORM = "there is no norm with parameters in front of it"


def smooth(
    edit: Edit, config: Config, paths: Sequence[str], linear: Linear, norm: Norm | None
) -> Smoothing:
    """The smoothing of a linear by config.smooth.

    paths  of the linears that it holds, which read one value
    norm   computes that value, from parameters and one activation
    """
    scale, how = _scale(edit, config, paths, linear, norm)
    if scale is None:
        return Smoothing(reason=how)
    return Smoothing(scale, edit.weigh(aten.reciprocal.default, scale), method=how)


def _scale(
    edit: Edit, config: Config, paths: Sequence[str], linear: Linear, norm: Norm | None
) -> tuple[Node | None, str]:
    """(s [K], how it was found), or (None, why there is none)."""
    if config.smooth == "norm":
        if norm is None:
            return None, NO_NORM
        s = edit.weigh(norm_smoothing, linear.weight, norm.gamma, norm.beta, ALPHA)
        return s, f"norm, alpha {ALPHA}"
    K, calibration = shape(linear.weight)[1], config.calibration
    assert calibration is not None  # Config sees to it
    found = [v for v in map(calibration.absmax, paths) if v is not None]
    if not found:
        return None, "the calibration has no statistics of it"
    if any(v.shape != (K,) for v in found):
        return None, f"the calibration saw {found[0].numel()} channels, it has {K}"
    absmax = edit.literal(functools.reduce(torch.maximum, found), linear.weight)
    if config.smooth == "auto" and (rows := sample(calibration, paths)) is not None:
        given = (linear.weight, absmax, edit.literal(rows, linear.weight))
        return edit.weigh(searched_smoothing, *given), "alpha searched"
    alpha, why = config.smooth, ""
    if alpha == "auto":
        alpha, why = ALPHA, ": the calibration has no rows to search on"
    return edit.weigh(smoothing, linear.weight, absmax, alpha), f"alpha {alpha}{why}"


def sample(calibration: Any, paths: Sequence[str]) -> Tensor | None:
    """Rows [n, K] that these linears, which read one value, have read, if the calibration keeps
    some."""
    known = getattr(calibration, "sample", lambda path: None)
    return next((rows for rows in map(known, paths) if rows is not None), None)
