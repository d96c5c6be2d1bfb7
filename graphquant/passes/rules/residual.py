"""Fuses the residual addition into the epilogue of an int8 linear.

    r + int8_linear(..., residual=None)  ->  int8_linear(..., residual=r)

The sum is in float32 and rounded once, so it is more accurate than the model's. A reshape between
linear and sum moves onto the residual.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from graphquant.ir.graph import (
    arguments,
    aten,
    calls,
    dtype,
    is_call,
    is_tensor,
    only_user,
    same_sizes,
    shape,
    with_arguments,
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
            if arguments(linear).residual is not None:
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
        if not same_sizes(shape(end), shape(total)):
            return Refuse(f"the linear's result is broadcast from {shape(end)}", total)
        if not same_sizes(shape(site.residual), shape(total)):
            return Refuse(f"the residual is broadcast from {shape(site.residual)}", site.residual)
        if not dtype(site.linear) == dtype(site.residual) == dtype(total):
            return Refuse(f"the sum mixes {dtype(site.linear)} and {dtype(site.residual)}", total)
        return None

    def rewrite(self, edit: Edit, site: ResidualSite) -> Rewrite:
        residual = site.residual
        if site.views:
            xq = arguments(site.linear).xq
            size = [*edit.sizes(xq)[:-1], shape(site.linear)[-1]]
            residual = edit.call(aten.reshape.default, residual, size)
        y = edit.call(int8_linear, *with_arguments(site.linear, residual=residual))
        return Rewrite((edit.replay(site.views, y),))
