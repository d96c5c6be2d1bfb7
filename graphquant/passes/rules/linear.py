"""Any linear that is left quantises its input first.

    y = linear(x, W, bias)  ->  int8_linear(*quantize(x), Wq, w_scale, bias)

Attention outputs, embeddings' projections, heads. Inexact: int8 on both operands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from graphquant.ops import int8_linear, quantize
from graphquant.passes.graph import dtype
from graphquant.passes.rule import Edit, Linear, Refuse, Site, View, linears


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

    def rewrite(self, edit: Edit, site: LinearSite) -> tuple[Node, ...]:
        linear = site.linear
        xq, x_scale = edit.unpack(edit.call(quantize, linear.x))
        wq, w_scale = edit.quantize_weight(linear.weight)
        return (
            edit.call(int8_linear, xq, x_scale, wq, w_scale, linear.bias, None, dtype(linear.node)),
        )
