"""Editor: adds nodes with fake values, weight expressions and smoothing to the graph for a rule."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphquant._torch import unset_fake_temporarily
from graphquant.ir.graph import LITERAL, aten, dtype, fake_result, shape
from graphquant.ir.rows import SIZED_VIEWS
from graphquant.ops import int8_linear, quantize_weight
from graphquant.ops.define import Op
from graphquant.passes.policy.ranges import SMOOTHED, input_qparams
from graphquant.passes.policy.smoothquant import smooth_linear
from graphquant.passes.recognize import Norm
from graphquant.passes.rule import Int8Product, Linear, Smoothing
from graphquant.passes.state import RewriteState


class Editor:
    """Adds the nodes of one rewrite to a graph; implements rule.Edit.

    made  all added nodes, in order
    """

    def __init__(self, state: RewriteState) -> None:
        self._state = state
        self.made: list[Node] = []

    def call(self, target: Any, *args: Any) -> Node:
        """Add target(*args) at the site."""
        fn = target.target if isinstance(target, Op) else target
        return self._new(fn, args, {})

    def quantized(self, op: Op, *args: Any, linear: Linear, smoothing: Smoothing) -> Node:
        """Add a call of `op`, which quantizes the input of `linear`, with that linear's QParams."""
        state = self._state
        names = [outcome.node for outcome, _ in state.record.linears_of(linear.node)]
        qparams = input_qparams(state.config, state.ranges, names, smoothing)
        return self.call(op, *op.quantizing(args, qparams))

    def fold(self, target: Any, *args: Any) -> Node:
        """Add target(*args) on weights, as early as its inputs allow; it runs at packing."""
        node = self.call(target, *args)
        last = max(node.all_input_nodes)
        first = next(n for n in self._state.graph.nodes if n.op == "call_function")
        if last < first:
            first.prepend(node)  # as in normalize
        else:
            last.append(node)
        return node

    def literal(self, value: Tensor, like: Node) -> Node:
        """Add a constant for `fold`: `value` in float32 on the device of `like`."""
        gm, graph, device = self._state.gm, self._state.graph, like.meta["val"].device
        names = (f"graphquant_literal_{i}" for i in itertools.count())
        name = next(n for n in names if not hasattr(gm, n))
        with unset_fake_temporarily():
            value = value.detach().to(device, torch.float32, copy=True)
        gm.register_buffer(name, value, persistent=False)
        first = next(n for n in graph.nodes if n.op == "call_function")
        with graph.inserting_before(first):
            node = graph.get_attr(name)
        node.meta["val"] = self._state.fake_mode.from_tensor(value, static_shapes=True)
        node.meta[LITERAL] = value
        self.made.append(node)
        return node

    def smooth(
        self, linear: Linear, norm: Norm | None = None, *, one_sided: bool = False
    ) -> Smoothing:
        """The linear's smoothing under the options.

        norm       the norm that computes the linear's input, if its gamma and beta are parameters
        one_sided  the input is hardly ever negative, and would use half of the range SMOOTHED
        """
        config = self._state.config
        if config.smooth is None:
            return Smoothing()
        if one_sided and config.activation == "static":
            return Smoothing(reason=f"static, an activation would use half of the range {SMOOTHED}")
        linears = self._state.record.linears_of(linear.node)
        return smooth_linear(self, config, [outcome.path for outcome, _ in linears], linear, norm)

    def _new(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        node = self._state.graph.call_function(target, args, kwargs)
        if (last := max(node.all_input_nodes, default=node)) > node:
            last.append(node)  # it may read a size that is computed later
        node.meta["val"] = fake_result(self._state.fake_mode, target, node.args, node.kwargs)
        self.made.append(node)
        return node

    def unpack(self, node: Node) -> tuple[Node, ...]:
        return tuple(self.call(operator.getitem, node, i) for i in range(len(node.meta["val"])))

    def sizes(self, node: Node) -> list[Any]:
        """The sizes of a value: ints, or sym_size nodes where dynamic."""
        return [
            s if isinstance(s, int) else self.call(aten.sym_size.int, node, i)
            for i, s in enumerate(shape(node))
        ]

    def replay(self, views: Sequence[Node], x: Node) -> Node:
        """Apply these row-preserving views to `x`, whose last dim may have another size."""
        width = shape(x)[-1]
        for view in views:
            target, args = view.target, view.args[1:]
            if target in SIZED_VIEWS:
                # reshape, not view: x may be a slice of what the model had contiguous
                target, args = aten.reshape.default, ([*args[0][:-1], width],)  # type: ignore[index, misc]
            x = self._new(target, (x, *args), dict(view.kwargs))
        return x

    def int8_linear(
        self, quantized: Node, linear: Linear, smoothing: Smoothing, views: Sequence[Node] = ()
    ) -> Int8Product:
        """Add the int8_linear on a quantizer's xq, x_scale and x_shift, its last results."""
        x = (self.replay(views, v) for v in self.unpack(quantized)[-3:])
        weight, method = linear.weight, self._state.config.weight_scale
        if smoothing.scale is not None:
            weight = self.fold(aten.mul.Tensor, weight, smoothing.scale)
        methods = [] if method == "absmax" else [method]
        packed = self.fold(quantize_weight, weight, *methods)
        wq, *w = (self.fold(operator.getitem, packed, i) for i in range(3))
        y = self.call(int8_linear, *x, wq, *w, linear.bias, None, dtype(linear.node))
        return Int8Product(y, linear, smoothing, wq, w[0])
