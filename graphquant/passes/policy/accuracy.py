"""Accuracy gate: an int8 linear is kept only if its SQNR on calibration rows reaches min_sqnr.

    y     = x W^T + bias                              x: up to 64 rows of what the linear reads
    y8    = dq(quantize(x / s)) dq(quantize_weight(W s))^T + bias
    SQNR  = 10 log10(sum y^2 / sum (y8 - y)^2)        dB, of each linear's columns (metrics.py)

with s, ranges, clip and weight scales as the rewrite has them, in float32. It is what
`graphquant.compare` finds locally, but on few rows, and before a layer scale is folded in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from graphquant.config import Config
from graphquant.ir.constants import Constants
from graphquant.ir.graph import shape
from graphquant.metrics import Error
from graphquant.ops.numerics import quantize_rows
from graphquant.passes.policy.gate import Candidate, Verdict
from graphquant.passes.policy.ranges import Range, input_qparams
from graphquant.passes.policy.smoothquant import sample
from graphquant.passes.prepack import packing_of
from graphquant.passes.record import Record
from graphquant.passes.rule import Int8Product
from graphquant.weights.released import is_released


@dataclass
class AccuracyGate:
    """Refuses an int8 product of which any linear has less than config.min_sqnr, for good.

    unmeasured  the names of the nodes of linears for which the calibration has no rows
    """

    config: Config
    record: Record
    ranges: Mapping[str, Range]
    constants: Constants
    parameters: Mapping[Node, Tensor]
    unmeasured: set[str] = field(default_factory=set)

    def __call__(self, candidate: Candidate) -> Verdict:
        product, least = candidate.rewrite.product, self.config.min_sqnr
        if product is None or least is None:
            return Verdict()
        linears = [outcome for outcome, _ in self.record.carried(product.linear.node)]
        paths, names = [o.path for o in linears], [o.node for o in linears]
        found = sqnr(
            product,
            sample(self.config.calibration, paths),
            input_qparams(self.config, self.ranges, names, product.smoothing),
            [o.N for o in linears],
            self.constants,
            self.parameters,
        )
        if found is None:
            self.unmeasured.update(names)
            return Verdict()
        return Verdict(below(paths, found, least), final=True)


def sqnr(
    product: Int8Product,
    rows: Tensor | None,
    qparams: Sequence[Any],
    widths: Sequence[int],
    constants: Constants,
    parameters: Mapping[Node, Tensor],
) -> list[float] | None:
    """The SQNR in dB of each of the linears that one int8 product computes side by side.

    rows     [n, K] float32 of what they read
    qparams  of the quantizer in front: factor (not used), low, high, clip
    widths   the columns of each linear

    None without rows, or if they have another width. inf for weights that free_weights has
    released: they were accurate enough when they were packed.
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
            xq, x_scale, x_shift = quantize_rows(x / values[s] if s else x, None, *qparams[1:])
            x8, w8 = xq * x_scale + x_shift, wq * w_scale.unsqueeze(1)
            parts = zip(F.linear(x8, w8, bias).split(widths, 1), y.split(widths, 1), strict=True)
            return [Error.of(y8, part).sqnr for y8, part in parts]


def below(paths: Sequence[str], found: Sequence[float], least: float) -> str:
    """Why linears of one product with these SQNRs in dB stay in float; "" if all reach `least`."""
    ranked = [-math.inf if math.isnan(sqnr) else sqnr for sqnr in found]
    worst = ranked.index(min(ranked))
    lowest = found[worst]
    if lowest >= least:
        return ""
    # never rounded up to min_sqnr
    down = math.floor(10 * lowest) / 10 if math.isfinite(lowest) else lowest
    whose = "its SQNR" if len(found) == 1 else f"in one product with {paths[worst]}, whose SQNR"
    return f"{whose} would be {down:.1f} dB, less than min_sqnr={least:g}"
