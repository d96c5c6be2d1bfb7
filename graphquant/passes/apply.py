"""Run one rule over a graph. The only module in which rules change one.

It keeps the graph honest for them: fake values on new nodes, the same shape, dtype and device out
as before (strides: layout.py), what was replaced is gone afterwards, and every decision is on
record.
"""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from graphquant._torch import FakeTensorMode, unset_fake_temporarily
from graphquant.config import Config
from graphquant.errors import RuleError
from graphquant.ir.constants import Constants
from graphquant.ir.contexts import APART, are_apart
from graphquant.ir.graph import (
    LINEAR,
    LITERAL,
    MODULE,
    RESIDUAL,
    aten,
    autocast_at,
    described,
    dtype,
    fake_result,
    full_args,
    is_impure,
    shape,
)
from graphquant.ir.rows import SIZED_VIEWS
from graphquant.ops import int8_linear, quantize_weight
from graphquant.ops.define import Op
from graphquant.passes.layout import restore_layouts, stands_for
from graphquant.passes.policy.accuracy import Product, judge, too_rough
from graphquant.passes.policy.ranges import SMOOTHED, Range, union, within
from graphquant.passes.policy.smoothquant import sample, smooth
from graphquant.passes.policy.speed import compare
from graphquant.passes.recognize import Activation, Norm, Recognized
from graphquant.passes.record import Record
from graphquant.passes.rule import Linear, Refuse, Rule, Site, Smooth

log = logging.getLogger(__name__)

_CARRIERS = (LINEAR, int8_linear.target)  # a rewrite makes exactly one of these


@dataclass
class Workbench:
    """The graph under the rules, and what is known about it (the rules' View)."""

    gm: GraphModule
    fake_mode: FakeTensorMode
    constants: Constants
    recognized: Recognized
    needs_gradient: set[Node]
    written: set[Node]
    record: Record
    config: Config
    parameters: Mapping[Node, Tensor]
    names: Mapping[Node, str]  # of parameters
    select: bool = False  # keep only what was measured to be faster
    ranges: dict[str, Range] = field(default_factory=dict)  # static ones: ranges.static_ranges
    unjudged: set[str] = field(default_factory=set)  # nodes of which min_sqnr has no rows
    replaced: dict[Node, Node] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        return self.gm.graph

    def norm(self, out: Node) -> Norm | None:
        found = self.recognized.norms.get(out)
        if found is None:
            return None
        gamma, beta = (p and self._now(p) for p in (found.gamma, found.beta))
        return replace(found, x=self._now(found.x), gamma=gamma, beta=beta)

    def activation(self, out: Node) -> Activation | None:
        found = self.recognized.activations.get(out)
        return found and replace(found, x=self._now(found.x))

    def _now(self, node: Node) -> Node:
        """What stands for this node by now: norms and activations were found before any rewrite."""
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def open(self, linear: Node) -> bool:
        return self.record.open(linear)

    def told(self, linear: Linear, smooth: Smooth) -> list[Any]:
        """What a quantiser in front of this linear is told besides (ops/numerics.py): factor, low,
        high and clip, without the last ones that are None."""
        factor, clip = smooth.factor, self.config.clip_range
        carried = (outcome.node for outcome, _ in self.record.carried(linear.node))
        known = [self.ranges[name] for name in carried if name in self.ranges]
        if self.config.activation == "static" and smooth.scale is not None:
            known = [SMOOTHED]
        told = [factor, None, None, clip]
        if known:
            told = [factor, *within(union(known), clip), None]
        while told and told[-1] is None:
            told.pop()
        return told

    def why_rough(self, product: Product) -> str:
        """Why this int8 product is not exact enough for the options, or ""."""
        least, linear = self.config.min_sqnr, product.linear
        if least is None:
            return ""
        carried = [outcome for outcome, _ in self.record.carried(linear.node)]
        rows = sample(self.config.calibration, [outcome.path for outcome in carried])
        told = self.told(linear, product.smooth._replace(factor=None))[1:]
        widths = [outcome.N for outcome in carried]
        found = judge(product, rows, told, widths, self.constants, self.parameters)
        if found is None:
            self.unjudged.update(outcome.node for outcome in carried)
            return ""
        return too_rough([outcome.path for outcome in carried], found, least)


class Editor:
    """What a rule may do to the graph (the rules' Edit)."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self.made: list[Node] = []
        self.product: Product | None = None
        self.smoothed = self.not_smoothed = ""

    def call(self, target: Any, *args: Any) -> Node:
        """target(*args), where the site stands."""
        fn = target.target if isinstance(target, Op) else target
        return self._new(fn, args, {})

    def quantized(self, op: Op, *args: Any, linear: Linear, smooth: Smooth) -> Node:
        """A quantiser of what `linear` reads, told what the options say of it."""
        return self.call(op, *args, *self._bench.told(linear, smooth))

    def weigh(self, target: Any, *args: Any) -> Node:
        """target(*args) on weights alone: it stands as early as its inputs allow."""
        node = self.call(target, *args)
        last = max(node.all_input_nodes)
        first = next(n for n in self._bench.graph.nodes if n.op == "call_function")
        if last < first:
            first.prepend(node)  # where normalize puts it as well
        else:
            last.append(node)
        return node

    def literal(self, value: Tensor, like: Node) -> Node:
        """A tensor of this value, float32, on the device of `like`: for weights to be computed
        with."""
        gm, graph, device = self._bench.gm, self._bench.graph, like.meta["val"].device
        names = (f"graphquant_literal_{i}" for i in itertools.count())
        name = next(n for n in names if not hasattr(gm, n))
        with unset_fake_temporarily():
            value = value.detach().to(device, torch.float32, copy=True)
        gm.register_buffer(name, value, persistent=False)
        first = next(n for n in graph.nodes if n.op == "call_function")
        with graph.inserting_before(first):
            node = graph.get_attr(name)
        node.meta["val"] = self._bench.fake_mode.from_tensor(value, static_shapes=True)
        node.meta[LITERAL] = value
        self.made.append(node)
        return node

    def smooth(
        self, linear: Linear, norm: Norm | None = None, *, one_sided: bool = False
    ) -> Smooth:
        """How the options have this linear smoothed.

        norm       what computes the value that it reads, with parameters alone
        one_sided  that value hardly goes below zero, which SMOOTHED does not know
        """
        config = self._bench.config
        if config.smooth is None:
            return Smooth()
        if one_sided and config.activation == "static":
            self.not_smoothed = f"static, an activation would be spread over all of {SMOOTHED}"
            return Smooth()
        carried = self._bench.record.carried(linear.node)
        found = smooth(self, config, [outcome.path for outcome, _ in carried], linear, norm)
        if isinstance(found, str):
            self.not_smoothed = found
            return Smooth()
        scale, self.smoothed = found
        return Smooth(scale, self.weigh(aten.reciprocal.default, scale))

    def _new(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        node = self._bench.graph.call_function(target, args, kwargs)
        if (last := max(node.all_input_nodes, default=node)) > node:
            last.append(node)  # such as a view of a size that is computed after the site begins
        node.meta["val"] = fake_result(self._bench.fake_mode, target, node.args, node.kwargs)
        self.made.append(node)
        return node

    def unpack(self, node: Node) -> tuple[Node, ...]:
        return tuple(self.call(operator.getitem, node, i) for i in range(len(node.meta["val"])))

    def sizes(self, node: Node) -> list[Any]:
        """The dims of a value: numbers, or nodes that hold them where they are dynamic."""
        return [
            s if isinstance(s, int) else self.call(aten.sym_size.int, node, i)
            for i, s in enumerate(shape(node))
        ]

    def replay(self, views: Sequence[Node], x: Node) -> Node:
        """The same row-keeping views, on another value. Its rows may have another width."""
        width = shape(x)[-1]
        for view in views:
            target, args = view.target, view.args[1:]
            if target in SIZED_VIEWS:
                # reshape copies where view would fail: what was contiguous may now be a slice
                target, args = aten.reshape.default, ([*args[0][:-1], width],)  # type: ignore[index, misc]
            x = self._new(target, (x, *args), dict(view.kwargs))
        return x

    def int8_linear(
        self, quantized: Node, linear: Linear, smooth: Smooth, views: Sequence[Node] = ()
    ) -> Node:
        """The linear on a quantiser's result: its last three values are xq, x_scale, x_shift."""
        x = (self.replay(views, v) for v in self.unpack(quantized)[-3:])
        weight, method = linear.weight, self._bench.config.weight_scale
        if smooth.scale is not None:
            weight = self.weigh(aten.mul.Tensor, weight, smooth.scale)
        methods = [] if method == "absmax" else [method]
        packed = self.weigh(quantize_weight, weight, *methods)  # once, when it is packed
        wq, *w = (self.weigh(operator.getitem, packed, i) for i in range(3))
        self.product = Product(linear, smooth, wq, w[0])
        return self.call(int8_linear, *x, wq, *w, linear.bias, None, dtype(linear.node))


def apply(bench: Workbench, rule: Rule[Any]) -> None:
    """Rewrite every site of one rule, in graph order."""
    for site in rule.sites(bench):
        if (no := _refusal(bench, rule, site)) is not None:
            log.debug("%s refused %s: %s", rule.name, site.outputs[0].name, no.reason)
            bench.record.decline(rule.name, site.subjects, no.reason)
            continue
        editor = Editor(bench)
        first = min(site.outputs)  # in graph order
        with bench.graph.inserting_before(first), autocast_at(first):
            new = rule.rewrite(editor, site)
            rough = bench.why_rough(editor.product) if editor.product else ""
            measured = bench.select and not rough
            times = compare(site.outputs, new, editor.made, bench.constants) if measured else None
        for old, now in zip(site.outputs, new, strict=True):
            if (want := _spec(old)) != (got := _spec(now)):
                raise RuleError(f"{rule.name} turned {old.name} {want} into {got}")
        carriers = [n for n in editor.made if n.target in _CARRIERS]
        if len(carriers) != 1:
            raise RuleError(f"{rule.name} made {len(carriers)} linears of one site, not one")
        late = _late(dict(zip(site.outputs, new, strict=True)))
        if why_not := rough or late or (times.why_not if times is not None else ""):
            log.debug("%s left %s: %s", rule.name, site.outputs[0].name, why_not)
            bench.record.decline(rule.name, site.subjects, why_not, times)
            if rough and editor.product:
                bench.record.bar(editor.product.linear.node, rough)
            for node in reversed(editor.made):
                bench.graph.erase_node(node)
                if LITERAL in node.meta:
                    delattr(bench.gm, str(node.target))
            continue
        for node in editor.made:
            node.meta.setdefault("graphquant", rule.name)
            for key in (MODULE, "nn_module_stack", "stack_trace", "custom"):
                if key in site.outputs[0].meta:
                    node.meta.setdefault(key, site.outputs[0].meta[key])
        value = _takes_over(carriers[0], dict(zip(new, site.outputs, strict=True)))
        bench.record.smooth(site.subjects, editor.smoothed, editor.not_smoothed)
        bench.record.apply(rule.name, site.subjects, carriers[0], times, value)
        log.debug("%s applied to %s", rule.name, site.outputs[0].name)
        for old, now in zip(site.outputs, new, strict=True):
            stands_for(now, old)
            old.replace_all_uses_with(now)
            bench.replaced[old] = now
            if old in bench.written:
                bench.written.add(now)
        for old in site.outputs:
            _erase(bench.graph, old)
        if alive := [n.name for n in site.outputs if not n._erased]:
            raise RuleError(f"{rule.name} left what it replaced alive: {', '.join(alive)}")
    restore_layouts(bench.graph, bench.fake_mode)


def _late(replacing: dict[Node, Node]) -> str:
    """Why these new nodes cannot stand for the old ones, or "": a reader stands in front of them,
    because they wait for a value that the model computes later."""
    for old, new in replacing.items():
        for user in old.users:
            if user < new and user not in replacing:
                return f"{user.name} reads {old.name} before all is known that its rewrite reads"
    return ""


def _takes_over(carrier: Node, replaced: dict[Node, Node]) -> str:
    """The model's own node whose value the carrier computes, "" if there is none: with a residual
    inside, or siblings beside each other, it computes what the model never had as one value."""
    old = replaced.get(carrier)
    if old is None or "graphquant" in old.meta:
        return ""
    if carrier.target is int8_linear.target and full_args(carrier)[RESIDUAL] is not None:
        return ""
    return old.name


def _refusal(bench: Workbench, rule: Rule[Any], site: Site) -> Refuse | None:
    no = rule.check(bench, site)
    if no is not None and not isinstance(no, Refuse):
        raise RuleError(f"{rule.name}.check returned {no!r}; it must return None or a Refuse")
    if no is None and (hit := next((x for x in site.moved if x in bench.written), None)):
        return Refuse(f"{described(hit, bench.names)} is written in place", hit)
    if no is None and are_apart(site.outputs, autocast=False):
        return Refuse(APART, site.outputs[0])
    return no


def _spec(node: Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    return tuple(value.shape), value.dtype, value.device


def _erase(graph: Graph, node: Node) -> None:
    """Erase a node without users, and what was computed for it alone."""
    if node._erased or node.users or node.op != "call_function" or is_impure(node):
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for i in inputs:
        _erase(graph, i)
