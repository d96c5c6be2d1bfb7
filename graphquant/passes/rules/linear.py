"""Quantizes the input of any linear that no other rule has taken.

    y = linear(x, W, bias)  ->  int8_linear(*quantize(x), *quantize_weight(W), bias)

Such as attention outputs, projections of embeddings, heads. Inexact: int8 on both operands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from graphquant.ops import quantize
from graphquant.passes.rule import Edit, Linear, Refuse, Rewrite, Site, View, linears


@dataclass(frozen=True)
class LinearSite(Site):
    linear: Linear


class AnyLinear:
    name = "linear"

    def sites(self, view: View) -> Iterator[LinearSite]:
        for linear in linears(view):
            yield LinearSite((linear.node,), (linear.node,), (), linear)

    def check(self, view: View, site: LinearSite) -> Refuse | None:
        return None

    def rewrite(self, edit: Edit, site: LinearSite) -> Rewrite:
        linear = site.linear
        smoothing = edit.smooth(linear)
        made = edit.quantized(quantize, linear.x, linear=linear, smoothing=smoothing)
        product = edit.int8_linear(made, linear, smoothing)
        return Rewrite((product.node,), product)
