"""A norm in front of a linear quantises on its way out.

    y = linear(norm(x, gamma, beta), W, bias)
 -> xq, x_scale = norm_quantize(x, gamma, beta);  y = int8_linear(xq, x_scale, Wq, w_scale, bias)

LayerNorm or RMSNorm, written whole or spelled out. The normalised activation is never written to
memory, unless the model also reads it elsewhere (post-norm models add it to the residual): then
`norm_quantize_keep` returns it too. Row-keeping views in between move in front of the norm, which
works row by row, or onto its int8 result if the float one keeps its shape. Inexact: int8 on both
operands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from graphquant.ops import int8_linear, norm_quantize, norm_quantize_keep
from graphquant.passes.graph import dtype, leads_only_to, origin
from graphquant.passes.recognize import Norm
from graphquant.passes.rule import Edit, Linear, Refuse, Site, View, linears


@dataclass(frozen=True)
class NormSite(Site):
    norm: Norm
    views: tuple[Node, ...]
    linear: Linear
    keep: bool


class NormLinear:
    name = "norm_linear"

    def sites(self, view: View) -> Iterator[NormSite]:
        for linear in linears(view):
            out, views = origin(linear.x)
            if (norm := view.norm(out)) is None:
                continue
            keep = not leads_only_to(out, linear.node)
            outputs = (linear.node, out) if keep else (linear.node,)
            both = (linear.node, out)
            yield NormSite(outputs, both, (norm.x, out), norm, tuple(views), linear, keep)

    def check(self, view: View, site: NormSite) -> Refuse | None:
        return None

    def rewrite(self, edit: Edit, site: NormSite) -> tuple[Node, ...]:
        norm, linear = site.norm, site.linear
        parameters = (norm.gamma, norm.beta, norm.eps, norm.rms)
        kept: tuple[Node, ...] = ()
        if site.keep:
            made = edit.call(norm_quantize_keep, norm.x, *parameters, dtype(norm.out))
            y, xq, x_scale = edit.unpack(made)
            kept = (y,)
            xq, x_scale = edit.replay(site.views, xq), edit.replay(site.views, x_scale)
        else:
            x = edit.replay(site.views, norm.x)
            xq, x_scale = edit.unpack(edit.call(norm_quantize, x, *parameters))
        wq, w_scale = edit.quantize_weight(linear.weight)
        y = edit.call(int8_linear, xq, x_scale, wq, w_scale, linear.bias, None, dtype(linear.node))
        return (y, *kept)
