"""Accuracy gate: an int8 linear is kept only if its SQNR on calibration rows reaches min_sqnr.

    y     = x W^T + bias                              x: up to 64 calibration rows of the input
    y8    = dq(quantize(x / s)) dq(quantize_weight(W s))^T + bias
    SQNR  = 10 log10(sum y^2 / sum (y8 - y)^2)        dB, of each linear's columns (metrics.py)

with the smoothing s, ranges, clip and weight scales of the rewrite, in float32. This is the local
SQNR of `graphquant.compare`, on few rows and before a layer scale is folded in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from graphquant._torch import unset_fake_temporarily
from graphquant.config import Config
from graphquant.ir.constants import Constants
from graphquant.ir.graph import shape
from graphquant.metrics import Error
from graphquant.ops.numerics import quantize_rows
from graphquant.ops.qparams import QParams
from graphquant.passes.policy.gate import Candidate, Verdict
from graphquant.passes.policy.ranges import Range, input_qparams
from graphquant.passes.policy.smoothquant import sample
from graphquant.passes.prepack import packing_of
from graphquant.passes.record import Record
from graphquant.passes.rule import Int8Product
from graphquant.weights.released import is_released


@dataclass
class AccuracyGate:
    """Refuses, permanently, an int8 linear if a linear that it computes is below config.min_sqnr.

    unmeasured  names of nodes of linears without calibration rows
    """

    config: Config
    record: Record
    ranges: Mapping[str, Range]
    constants: Constants
    parameters: Mapping[Node, Tensor]
    unmeasured: set[str] = field(default_factory=set)

    def __call__(self, candidate: Candidate) -> Verdict:
        product, min_sqnr = candidate.rewrite.product, self.config.min_sqnr
        if product is None or min_sqnr is None:
            return Verdict()
        linears = [outcome for outcome, _ in self.record.linears_of(product.linear.node)]
        paths, names = [o.path for o in linears], [o.node for o in linears]
        found = sqnr(
            product,
            sample(self.config.calibration, paths),
            input_qparams(self.config, self.ranges, names, product.smoothing)._replace(factor=None),
            [o.N for o in linears],
            self.constants,
            self.parameters,
        )
        if found is None:
            self.unmeasured.update(names)
            return Verdict()
        return Verdict(below(paths, found, min_sqnr), final=True)


def sqnr(
    product: Int8Product,
    rows: Tensor | None,
    qparams: QParams,
    widths: Sequence[int],
    constants: Constants,
    parameters: Mapping[Node, Tensor],
) -> list[float] | None:
    """The SQNR in dB of each linear that an int8_linear computes.

    rows     [n, K] float32, samples of the input
    qparams  of the input, without factor: smoothing is taken from `product`
    widths   the number of columns of each linear

    None without rows, or if their width is not K. inf if free_weights has released the weights,
    which were accepted when they were packed.
    """
    linear, s = product.linear, product.smoothing.scale
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


def below(paths: Sequence[str], found: Sequence[float], min_sqnr: float) -> str:
    """Why linears of one product with these SQNRs (dB) stay in float; "" if all reach min_sqnr."""
    ranked = [-math.inf if math.isnan(sqnr) else sqnr for sqnr in found]
    worst = ranked.index(min(ranked))
    lowest = found[worst]
    if lowest >= min_sqnr:
        return ""
    # rounded down, so that the report never shows min_sqnr itself
    down = math.floor(10 * lowest) / 10 if math.isfinite(lowest) else lowest
    whose = "its SQNR" if len(found) == 1 else f"in one product with {paths[worst]}, whose SQNR"
    return f"{whose} would be {down:.1f} dB, less than min_sqnr={min_sqnr:g}"
