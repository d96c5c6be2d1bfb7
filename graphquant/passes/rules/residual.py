"""A residual behind an int8 linear is added in its epilogue.

    r + int8_linear(..., residual=None)  ->  int8_linear(..., residual=r)

The sum is made in float32 before the one rounding of the result, so this is more exact than the
model's own. A reshape between linear and sum moves onto the residual.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from graphquant.ir.graph import (
    RESIDUAL,
    aten,
    calls,
    dtype,
    full_args,
    is_call,
    is_tensor,
    only_user,
    shape,
)
from graphquant.ir.rows import SIZED_VIEWS, keeps_rows
from graphquant.ops import int8_linear
from graphquant.passes.rule import Edit, Refuse, Rewrite, Site, View


@dataclass(frozen=True)
class ResidualSite(Site):
    linear: Node
    views: tuple[Node, ...]
    residual: Node


class Residual:
    name = "residual"

    def sites(self, view: View) -> Iterator[ResidualSite]:
        for linear in calls(view.graph, lambda n: n.target is int8_linear.target):
            if full_args(linear)[RESIDUAL] is not None:
                continue
            views, end = [], linear
            while is_call(user := only_user(end), *SIZED_VIEWS) and keeps_rows(user):
                views.append(user)
                end = user
            if not is_call(user, aten.add.Tensor) or user.kwargs:
                continue
            other = user.args[1] if user.args[0] is end else user.args[0]
            if isinstance(other, Node) and is_tensor(other) and other is not end:
                yield ResidualSite((user,), (linear,), (), linear, tuple(views), other)

    def check(self, view: View, site: ResidualSite) -> Refuse | None:
        (total,) = site.outputs
        if total in view.needs_gradient:
            return Refuse("the residual needs a gradient", site.residual)
        end = site.views[-1] if site.views else site.linear
        if shape(end) != shape(total):
            return Refuse(f"the linear's result is broadcast from {shape(end)}", total)
        if shape(site.residual) != shape(total):
            return Refuse(f"what is added is broadcast from {shape(site.residual)}", site.residual)
        if not dtype(site.linear) == dtype(site.residual) == dtype(total):
            return Refuse(f"the sum mixes {dtype(site.linear)} and {dtype(site.residual)}", total)
        return None

    def rewrite(self, edit: Edit, site: ResidualSite) -> Rewrite:
        *arguments, _, out = full_args(site.linear)
        residual = site.residual
        if site.views:
            size = [*edit.sizes(arguments[0])[:-1], shape(site.linear)[-1]]
            residual = edit.call(aten.reshape.default, residual, size)
        y = edit.call(int8_linear, *arguments, residual, out)
        return Rewrite((edit.replay(site.views, y),))
