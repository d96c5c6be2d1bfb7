"""Fuses an activation with the quantization of the linear behind it.

    y = linear(act(x), W, bias)          -> int8_linear(*quantize(x, None, act), ...)
    y = linear(act(gate) * up, W, bias)  -> int8_linear(*quantize(gate, up, act), ...)

The activation's result, the widest value of a transformer block, is not written to memory.
Row-preserving views in between move in front of the activation. Inexact: int8 on both operands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from graphquant.ir.graph import aten, dtype, is_call, is_tensor, readers, same_sizes, shape
from graphquant.ir.rows import leads_only_to, origin, overflowing
from graphquant.ops import quantize
from graphquant.ops.numerics import ACTIVATIONS
from graphquant.passes.recognize import Activation
from graphquant.passes.rule import Edit, Linear, Refuse, Rewrite, Site, View, linears, refuse_dtype


@dataclass(frozen=True)
class ActSite(Site):
    act: Activation
    gate: Node  # its result, after casts
    up: Node | None  # the factor of a gated activation
    out: Node
    views: tuple[Node, ...]
    linear: Linear


class ActLinear:
    name = "act_linear"

    def sites(self, view: View) -> Iterator[ActSite]:
        for linear in linears(view):
            out, views = origin(linear.x, view.activation)
            if (found := _activation(view, out)) is None:
                continue
            act, gate, up = found
            gate = linear.x if up is None else gate
            moved = (act.x,) if up is None else (act.x, up)
            subjects = (linear.node, act.out)
            yield ActSite((linear.node,), subjects, moved, act, gate, up, out, tuple(views), linear)

    def check(self, view: View, site: ActSite) -> Refuse | None:
        for value, goal in ((site.out, site.linear.node), (site.act.out, site.out)):
            if value is not goal and not leads_only_to(value, goal):
                return Refuse(
                    f"its result is read by {readers(value)}; fusing would compute it twice", value
                )
        if (no := refuse_dtype(site.act.x, site.up)) is not None:
            return no
        if (cast := _overflowing(site)) is not None:
            return Refuse(f"between them is a cast to {dtype(cast)}, which may overflow", cast)
        return None

    def rewrite(self, edit: Edit, site: ActSite) -> Rewrite:
        linear, x = site.linear, edit.replay(site.views, site.act.x)
        smoothing = edit.smooth(linear, one_sided=site.up is None)
        up = site.up and edit.replay(site.views, site.up)
        made = edit.quantized(quantize, x, up, site.act.act, linear=linear, smoothing=smoothing)
        product = edit.int8_linear(made, linear, smoothing)
        return Rewrite((product.node,), product)


def _overflowing(site: ActSite) -> Node | None:
    """A cast of the result that may overflow. Only squares and products exceed their inputs."""
    act = site.act
    grows = ACTIVATIONS[act.act].grows
    cast = overflowing(site.gate, act.out, torch.float32 if grows else dtype(act.x))
    if cast is not None or site.up is None:
        return cast
    return overflowing(site.linear.x, site.out, torch.float32)


def _activation(view: View, out: Node) -> tuple[Activation, Node, Node | None] | None:
    """(activation, out, None), or (activation of the gate, gate, up) if `out` is their product."""
    if (act := view.activation(out)) is not None:
        return act, out, None
    if is_call(out, aten.mul.Tensor):
        for gate, up in (out.args, out.args[::-1]):
            if not (isinstance(gate, Node) and isinstance(up, Node) and is_tensor(up)):
                continue
            result, views = origin(gate, view.activation)
            act = view.activation(result)
            if (
                act is not None
                and not views
                and all(same_sizes(shape(n), shape(out)) for n in (gate, up))
            ):
                return act, gate, up
    return None
