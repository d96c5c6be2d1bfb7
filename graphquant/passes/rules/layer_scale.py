"""Folds a layer scale behind an int8 linear into its packed scales and bias.

    gamma * int8_linear(..., wq, w_scale, w_sum, bias)
 -> int8_linear(..., wq, w_scale * gamma, w_sum * gamma, bias * gamma)

Exact in real arithmetic, for any sign of gamma [N], and free: it runs when the weight is packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from graphquant.ir.graph import (
    arguments,
    aten,
    calls,
    dtype,
    is_call,
    only_user,
    shape,
    with_arguments,
)
from graphquant.ops import int8_linear
from graphquant.passes.rule import Edit, Refuse, Rewrite, Site, View


@dataclass(frozen=True)
class LayerScaleSite(Site):
    linear: Node
    gamma: Node


class LayerScale:
    name = "layer_scale"

    def sites(self, view: View) -> Iterator[LayerScaleSite]:
        seen: set[Node] = set()
        while fresh := [n for n in calls(view.graph, _is_int8) if n not in seen]:
            for linear in fresh:  # a fold adds a linear, which may be scaled again
                seen.add(linear)
                product = only_user(linear)
                if not is_call(product, aten.mul.Tensor):
                    continue
                if arguments(linear).residual is not None:
                    continue
                gamma = product.args[1] if product.args[0] is linear else product.args[0]
                if not isinstance(gamma, Node):
                    continue
                if gamma in view.constants and _is_per_channel(gamma, shape(linear)[-1]):
                    yield LayerScaleSite((product,), (linear,), (), linear, gamma)

    def check(self, view: View, site: LayerScaleSite) -> Refuse | None:
        (product,) = site.outputs
        if product in view.needs_gradient:
            return Refuse("the layer scale needs a gradient", site.gamma)
        if len(shape(product)) != len(shape(site.linear)):
            return Refuse(f"the product has the {len(shape(product))} dims of the scale", product)
        if dtype(product) != dtype(site.linear):
            return Refuse(f"the product is {dtype(product)}, not the linear's type", product)
        return None

    def rewrite(self, edit: Edit, site: LayerScaleSite) -> Rewrite:
        gamma = site.gamma
        if len(shape(gamma)) > 1:
            gamma = edit.call(aten.reshape.default, gamma, [-1])
        if dtype(gamma) != torch.float32:
            gamma = edit.call(aten.to.dtype, gamma, torch.float32)
        linear = arguments(site.linear)
        scaled = {
            name: edit.call(aten.mul.Tensor, value, gamma)
            for name in ("w_scale", "w_sum", "bias")
            if (value := getattr(linear, name)) is not None
        }
        y = edit.call(int8_linear, *with_arguments(site.linear, **scaled))
        return Rewrite((y,))


def _is_int8(node: Node) -> bool:
    return node.target is int8_linear.target


def _is_per_channel(gamma: Node, N: int) -> bool:
    size = shape(gamma)
    return bool(size) and size[-1] == N and gamma.meta["val"].numel() == N
