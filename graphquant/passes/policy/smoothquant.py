"""SmoothQuant's policy: which linears are smoothed, with which statistics and alpha.

    linear(x, W)  ->  int8_linear(quantize(x / s), quantize_weight(W s)),  s = smoothing(W, absmax)

The float model stays as it is: a rule that makes a linear int8 multiplies its weight by s, and its
quantizer multiplies x by 1 / s, folded into gamma and beta where it is a norm. So other readers of
x do not matter. s is an expression of weights and statistics (smoothing.py), and packed with them.
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

ALPHA = 0.5  # the default: as in the paper, and best on MiniLM
NO_NORM = "there is no norm with parameters in front of it"


def smooth_linear(
    edit: Edit, config: Config, paths: Sequence[str], linear: Linear, norm: Norm | None
) -> Smoothing:
    """The smoothing of a linear by config.smooth.

    paths  the module paths of the linears that it computes
    norm   the norm that computes its input, if gamma and beta are parameters
    """
    scale, how = _scale(edit, config, paths, linear, norm)
    if scale is None:
        return Smoothing(reason=how)
    return Smoothing(scale, edit.fold(aten.reciprocal.default, scale), method=how)


def _scale(
    edit: Edit, config: Config, paths: Sequence[str], linear: Linear, norm: Norm | None
) -> tuple[Node | None, str]:
    """(s [K], how it was found), or (None, why there is none)."""
    if config.smooth == "norm":
        if norm is None:
            return None, NO_NORM
        s = edit.fold(norm_smoothing, linear.weight, norm.gamma, norm.beta, ALPHA)
        return s, f"norm, alpha {ALPHA}"
    K, calibration = shape(linear.weight)[1], config.calibration
    assert calibration is not None  # checked by Config
    found = [v for v in map(calibration.absmax, paths) if v is not None]
    if not found:
        return None, "the calibration has no statistics of it"
    if any(v.shape != (K,) for v in found):
        return None, f"the calibration saw {found[0].numel()} channels, it has {K}"
    absmax = edit.literal(functools.reduce(torch.maximum, found), linear.weight)
    if config.smooth == "auto" and (rows := sample(calibration, paths)) is not None:
        given = (linear.weight, absmax, edit.literal(rows, linear.weight))
        return edit.fold(searched_smoothing, *given), "alpha searched"
    alpha, why = config.smooth, ""
    if alpha == "auto":
        alpha, why = ALPHA, ": the calibration has no rows to search on"
    return edit.fold(smoothing, linear.weight, absmax, alpha), f"alpha {alpha}{why}"


def sample(calibration: Any, paths: Sequence[str]) -> Tensor | None:
    """Calibration rows [n, K] float32 of the shared input of these linears, or None."""
    known = getattr(calibration, "sample", lambda path: None)
    return next((rows for rows in map(known, paths) if rows is not None), None)
