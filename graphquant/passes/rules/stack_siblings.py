"""Stacks linears with the same input into one linear.

    q, k, v = linear(x, Wq, bq), linear(x, Wk, bk), linear(x, Wv, bv)
 -> y = linear(x, [Wq; Wk; Wv], [bq; bk; bv]);  q, k, v = slices of y's last dim

Exact: each output column, and its int8 scale, depends only on its own weight row, so the stacked
int8 weight is bit-identical to the separate ones. Any group of two or more (q/k/v, k/v of
cross-attention, gate/up) of any widths; a missing bias becomes zeros.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from graphquant.ir.contexts import APART, are_apart
from graphquant.ir.graph import LINEAR, aten, dtype, full_args, shape
from graphquant.passes.rule import Edit, Linear, Refuse, Rewrite, Site, View, linears


@dataclass(frozen=True)
class Siblings(Site):
    linears: tuple[Linear, ...]


class StackSiblings:
    name = "stack_siblings"

    def sites(self, view: View) -> Iterator[Siblings]:
        groups: dict[object, list[Node]] = defaultdict(list)
        for linear in linears(view):
            groups[linear.x, dtype(linear.node), dtype(linear.weight)].append(linear.node)
        for nodes in groups.values():
            if len(nodes) > 1:
                # read again: their input may be a sibling of the previous group, now a slice
                group = tuple(Linear(n, *full_args(n)) for n in nodes)
                # `moved` includes the results: as slices they cannot be written as before
                yield Siblings(tuple(nodes), tuple(nodes), (group[0].x, *nodes), group)

    def check(self, view: View, site: Siblings) -> Refuse | None:
        # the new float linear's dtype depends on the autocast region
        return Refuse(APART, site.outputs[0]) if are_apart(site.outputs, autocast=True) else None

    def rewrite(self, edit: Edit, site: Siblings) -> Rewrite:
        weight = edit.fold(aten.cat.default, [n.weight for n in site.linears])
        bias = None
        if any(n.bias is not None for n in site.linears):
            bias = edit.fold(aten.cat.default, [_bias(edit, n) for n in site.linears])
        y = edit.call(LINEAR, site.linears[0].x, weight, bias)
        parts, start = [], 0
        for linear in site.linears:
            stop = start + shape(linear.weight)[0]
            parts.append(edit.call(aten.slice.Tensor, y, -1, start, stop))
            start = stop
        return Rewrite(tuple(parts))


def _bias(edit: Edit, linear: Linear) -> Node:
    if linear.bias is not None:
        return linear.bias
    return edit.fold(aten.new_zeros.default, linear.weight, [shape(linear.weight)[0]])
