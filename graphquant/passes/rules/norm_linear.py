"""Fuses a norm with the quantization of the linear behind it.

    y = linear(norm(x, gamma, beta), W, bias)
 -> y = int8_linear(*norm_quantize(x, gamma, beta), *quantize_weight(W), bias)

LayerNorm or RMSNorm, as one op or decomposed. The normalized value is not written to memory, unless
the model reads it elsewhere (post-norm models add it to the residual): then `norm_quantize_keep`
returns it too. Row-preserving views in between move in front of the norm, or, if the float result
is kept, onto the int8 one. Inexact: int8 on both operands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from graphquant.ir.graph import aten, between, dtype, shape
from graphquant.ir.rows import leads_only_to, origin, overflowing
from graphquant.ops import norm_quantize, norm_quantize_keep
from graphquant.passes.recognize import Norm
from graphquant.passes.rule import Edit, Linear, Refuse, Rewrite, Site, View, linears, refuse_dtype


@dataclass(frozen=True)
class NormSite(Site):
    norm: Norm
    views: tuple[Node, ...]
    linear: Linear
    keep: bool
    fixed: bool  # gamma and beta are computed from parameters alone


class NormLinear:
    name = "norm_linear"

    def sites(self, view: View) -> Iterator[NormSite]:
        for linear in linears(view):
            out, views = origin(linear.x, view.norm)
            if (norm := view.norm(out)) is None:
                continue
            keep = not leads_only_to(out, linear.node)
            outputs = (linear.node, out) if keep else (linear.node,)
            both = (linear.node, out)
            parameters = [p for p in (norm.gamma, norm.beta) if p is not None]
            fixed = all(p in view.constants for p in parameters)
            made_from = view.constants.made_from  # folded parameters are read at packing
            parameters = [n for p in parameters for n in (made_from(p) if fixed else [p])]
            read = (norm.x, out, *between(linear.node, out), *parameters)
            yield NormSite(outputs, both, read, norm, tuple(views), linear, keep, fixed)

    def check(self, view: View, site: NormSite) -> Refuse | None:
        norm = site.norm
        if (no := refuse_dtype(norm.x, norm.gamma, norm.beta)) is not None:
            return no
        if (cast := overflowing(site.linear.x, norm.out, dtype(norm.x))) is not None:
            return Refuse(f"between them is a cast to {dtype(cast)}, which may overflow", cast)
        return None

    def rewrite(self, edit: Edit, site: NormSite) -> Rewrite:
        linear = site.linear
        gamma, beta = (_vector(edit, p) for p in (site.norm.gamma, site.norm.beta))
        norm = replace(site.norm, gamma=gamma, beta=beta)
        smoothing = edit.smooth(linear, norm if site.fixed else None)
        if smoothing.factor is not None and site.fixed and not site.keep:
            # free at run time
            gamma = (
                edit.fold(aten.mul.Tensor, gamma, smoothing.factor) if gamma else smoothing.factor
            )
            beta = beta and edit.fold(aten.mul.Tensor, beta, smoothing.factor)
            smoothing = smoothing._replace(factor=None)
        parameters: tuple[Any, ...] = (gamma, beta, norm.eps, norm.rms)
        if not site.keep:
            x = edit.replay(site.views, norm.x)
            made = edit.quantized(norm_quantize, x, *parameters, linear=linear, smoothing=smoothing)
            product = edit.int8_linear(made, linear, smoothing)
            return Rewrite((product.node,), product)
        parameters = (*parameters, dtype(norm.out))
        made = edit.quantized(
            norm_quantize_keep, norm.x, *parameters, linear=linear, smoothing=smoothing
        )
        product = edit.int8_linear(made, linear, smoothing, site.views)
        return Rewrite((product.node, edit.unpack(made)[0]), product)


def _vector(edit: Edit, parameter: Node | None) -> Node | None:
    """A parameter such as [1, 1, K] as [K]."""
    if parameter is None or len(shape(parameter)) == 1:
        return parameter
    return edit.call(aten.reshape.default, parameter, [-1])
