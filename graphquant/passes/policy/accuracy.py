"""Exact enough: a rewrite to int8 is kept only if its product is, on rows that a calibration kept.

    y     = x W^T + bias                              x: up to 64 rows of what the linear reads
    y8    = dq(quantize(x / s)) dq(quantize_weight(W s))^T + bias
    SQNR  = 10 log10(sum y^2 / sum (y8 - y)^2)        dB, of each linear's columns (accuracy.py)

with s, ranges, clip and weight scales as the rewrite has them, in float32. It is what
`graphquant.compare` finds locally, but on few rows, and before a layer scale is folded in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from graphquant.ir.constants import Constants
from graphquant.ir.graph import shape
from graphquant.metrics import Error
from graphquant.ops.numerics import quantize_rows
from graphquant.ops.qparams import QParams
from graphquant.passes.prepack import packing_of
from graphquant.passes.rule import Linear, Smooth
from graphquant.weights.released import is_released


class Product(NamedTuple):
    """An int8_linear that a rewrite has made of a float linear: its smoothing and packed weight."""

    linear: Linear
    smooth: Smooth
    wq: Node
    w_scale: Node


def judge(
    product: Product,
    rows: Tensor | None,
    qparams: QParams,
    widths: Sequence[int],
    constants: Constants,
    parameters: Mapping[Node, Tensor],
) -> list[float] | None:
    """The SQNR in dB of each of the linears that the product computes side by side.

    rows     [n, K] float32 of what they read; None is not judged
    qparams  of what they read, without the factor: that is in the product's smoothing
    widths   the columns of each linear

    None as well for rows of another width. inf for weights that free_weights has released: they
    were exact enough when they were packed.
    """
    linear, s = product.linear, product.smooth.scale
    if rows is None or rows.shape[1] != shape(linear.weight)[1]:
        return None
    read = [n for n in (linear.weight, product.wq, product.w_scale, linear.bias, s) if n]
    packing = packing_of(read, constants)
    roots = [parameters[root] for root in packing.roots]
    if any(map(is_released, roots)):
        return [math.inf for _ in widths]
    with unset_fake_temporarily(), torch.no_grad():
        values = dict(zip(read, packing.recipe.compute(roots), strict=True))
        w, wq, w_scale = (values[n] for n in read[:3])
        with torch.autocast(w.device.type, enabled=False):
            bias = values[linear.bias].float() if linear.bias else None
            x = rows.to(w.device)
            y = F.linear(x, w.float(), bias)
            xq, x_scale, x_shift = quantize_rows(x / values[s] if s else x, qparams)
            x8, w8 = xq * x_scale + x_shift, wq * w_scale.unsqueeze(1)
            parts = zip(F.linear(x8, w8, bias).split(widths, 1), y.split(widths, 1), strict=True)
            return [Error.of(y8, part).sqnr for y8, part in parts]


def too_rough(paths: Sequence[str], found: Sequence[float], least: float) -> str:
    """Why the linears at these paths, which are one product and have these SQNRs, stay in float; ""
    if all are exact enough."""
    ranked = [-math.inf if math.isnan(sqnr) else sqnr for sqnr in found]
    worst = ranked.index(min(ranked))
    sqnr = found[worst]
    if sqnr >= least:
        return ""
    down = math.floor(10 * sqnr) / 10 if math.isfinite(sqnr) else sqnr  # never rounded up to least
    whose = "its SQNR" if len(found) == 1 else f"in one product with {paths[worst]}, whose SQNR"
    return f"{whose} would be {down:.1f} dB, less than min_sqnr={least:g}"
