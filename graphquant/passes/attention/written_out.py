"""Makes attention that a model writes out one call of scaled_dot_product_attention.

    softmax(c q k^T + m1 + m2 ...) v    ->    SDPA(q, k, v, m1 + m2 ..., scale=c)

The scores of all pairs are then not stored, and the kernel is chosen like that of every other
attention. Results are the same up to rounding: SDPA rounds scores to float32, a model in bfloat16
to bfloat16. Attention whose probabilities are read by anything else, or that drops some of them,
stays as it is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from graphquant.ir.aliases import written_in_place
from graphquant.ir.captured import Captured
from graphquant.ir.contexts import are_apart, regions
from graphquant.ir.gradients import needs_gradient
from graphquant.ir.graph import (
    SDPA,
    aten,
    autocast_at,
    drop_dead_code,
    drops_nothing,
    dtype,
    fake_result,
    full_args,
    is_call,
    is_tensor,
    only_user,
    same_sizes,
    shape,
)
from graphquant.ir.rows import ROUND_FINELY
from graphquant.passes.attention.empty_masks import drop_empty_masks
from graphquant.passes.layout import inherit_layout
from graphquant.passes.padding.attention import COPIES, Attention, find_attentions

log = logging.getLogger(__name__)

# What replaces scores must be so large that it is also what their sum with it rounds to: a query
# whose keys are all masked has the mean of all values in both forms.
REPLACES_SCORES = -1e8

MULTIPLY = frozenset({aten.mul.Tensor, aten.mul.Scalar})
DIVIDE = frozenset({aten.div.Tensor, aten.div.Scalar})
KEEP = COPIES | {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default}
WHERE = frozenset({aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther})


class UnknownLogits(Exception):
    """Logits that are more than scaled scores and what is added to them."""


def fuse_written_out(captured: Captured) -> None:
    """Replace every attention that is written out, and needs no gradient, by SDPA."""
    graph = captured.gm.graph
    if all(a.score is None for a in find_attentions(graph)):
        return
    excluded = needs_gradient(graph, captured.differentiable, captured.grad_enabled)
    excluded |= written_in_place(graph)
    excluded |= {n for n, region in regions(graph) if region.sdpa is not None}
    made: dict[Any, Node] = {}
    for a in find_attentions(graph):
        read = {*a.operands, a.q, a.k, a.v, *a.inner}
        if a.score is None or read & excluded or not _fits(a):
            continue
        if are_apart(a.inner, autocast=True):
            continue
        try:
            with graph.inserting_before(a.out), autocast_at(a.out):
                _fuse(captured, a, made, excluded)
        except UnknownLogits as why:
            log.debug("%s stays written out: %s", a.out.name, why)
    drop_dead_code(graph)
    if made:
        drop_empty_masks(graph)


def _fits(a: Attention) -> bool:
    """Are there no values of other sizes or dtypes than SDPA has, none broadcast over heads?"""
    assert a.score is not None and a.logits is not None
    B, H, S, D = shape(a.q)
    T = shape(a.v)[2]
    if any(isinstance(n, torch.SymInt) and n.node.hint is None for n in (B, H, S, D, T)):
        return False  # the choice of SDPA's kernel would ask for sizes that depend on data
    k = (B, H, D, T) if a.k_transposed else (B, H, T, D)
    sizes = ((a.k, k), (a.v, (B, H, T, D)), (a.logits, shape(a.score)), (a.out, (B, H, S, D)))
    same = all(same_sizes(shape(node), wanted) for node, wanted in sizes)
    finely = all(dtype(node) in ROUND_FINELY for node in a.inner)
    return same and finely and dtype(a.score) == dtype(a.q)


def _fuse(
    captured: Captured, a: Attention, made: dict[Any, Node], excluded: Collection[Node]
) -> None:
    graph = captured.gm.graph
    logits = _Logits(captured, dtype(a.q), made)
    for node, before in _steps(a):
        logits.follow(node, before)
    q, of_q = _unscaled(a.q, a, excluded)
    k, of_k = _unscaled(a.k, a, excluded)
    logits.scale *= of_q * of_k
    if not (math.isfinite(logits.scale) and logits.scale > 0):
        raise UnknownLogits(f"scale {logits.scale}")
    bias = logits.bias
    while bias is not None and bias.meta["val"].dim() not in (2, 4):
        bias = logits.call(aten.unsqueeze.default, bias, 0)
    if a.k_transposed:
        k = logits.call(aten.transpose.int, k, 2, 3)
    args: tuple[Any, ...] = (q, k, a.v, bias, 0.0, False)
    kwargs: dict[str, Any] = {"scale": logits.scale}
    new = graph.call_function(SDPA, args, kwargs)
    value = fake_result(captured.fake_mode, SDPA, args, kwargs)
    new.meta.update(a.out.meta | {"val": value})
    inherit_layout(new, a.out)
    a.out.replace_all_uses_with(new)
    graph.erase_node(a.out)


def _steps(a: Attention) -> Iterator[tuple[Node, Node]]:
    """Each node between the score and the softmax, with the one before it, from the score on."""
    assert a.logits is not None
    chain = [a.logits]
    while chain[-1] is not a.score:
        chain.append(next(i for i in chain[-1].all_input_nodes if i is a.score or i in a.inner))
    chain.reverse()
    return zip(chain[1:], chain, strict=False)


def _unscaled(node: Node, a: Attention, excluded: Collection[Node]) -> tuple[Node, float]:
    """(x, c) for q or k = c x that nothing else reads; else the node itself and 1."""
    assert a.score is not None
    factor, reader = _factor(node), only_user(node)
    if reader is not None and reader in a.score.args:  # which transposes keys
        reader = only_user(reader)
    if factor is None or factor <= 0 or reader is not a.score:
        return node, 1.0
    source = node.args[0]
    assert isinstance(source, Node)
    same = dtype(source) == dtype(node) and same_sizes(shape(source), shape(node))
    return (source, factor) if same and source not in excluded else (node, 1.0)


def _factor(node: Node) -> float | None:
    """c of a node that is c x."""
    if not is_call(node, *MULTIPLY, *DIVIDE) or not isinstance(node.args[1], (int, float)):
        return None
    factor = float(node.args[1])
    if node.target in DIVIDE:
        return 1 / factor if factor else None
    return factor


def _number(value: Any) -> Any:
    """The number of a tensor that is made of one, else the value itself."""
    if is_call(value, aten.full.default):
        return full_args(value)[1]
    if is_call(value, aten.scalar_tensor.default):
        return full_args(value)[0]
    return value


@dataclass
class _Logits:
    """scale * score + bias, on the way from the score to the softmax.

    made  the calls that were made for other attentions, which share most masks
    bias  None: nothing was added yet
    """

    captured: Captured
    dtype: torch.dtype
    made: dict[Any, Node]
    scale: float = 1.0
    bias: Node | None = None

    def follow(self, node: Node, before: Node) -> None:
        """Raises UnknownLogits if what this node does to `before` is not known."""
        if is_call(node, *KEEP) or drops_nothing(node):
            return
        if (factor := _factor(node)) is not None:
            self.times(factor)
        elif is_call(node, aten.add.Tensor, aten.sub.Tensor):
            self.add(node, before)
        elif is_call(node, aten.masked_fill.Scalar):
            _, mask, value = full_args(node)
            self.replace(mask, value)
        elif is_call(node, *WHERE):
            mask, if_true, if_false = full_args(node)
            if if_true is before:
                self.replace(self.call(aten.logical_not.default, mask), _number(if_false))
            else:
                self.replace(mask, _number(if_true))
        else:
            raise UnknownLogits(f"{node.name} is computed from them")

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        key = (target, args, tuple(kwargs.items()))
        if key not in self.made:
            made = self.captured.gm.graph.call_function(target, args, kwargs)
            made.meta["val"] = fake_result(self.captured.fake_mode, target, args, kwargs)
            self.made[key] = made
        return self.made[key]

    def times(self, factor: float) -> None:
        self.scale *= factor
        if self.bias is not None and factor != 1:
            self.bias = self.call(aten.mul.Tensor, self.bias, factor)

    def add(self, node: Node, before: Node) -> None:
        first, second, alpha = full_args(node)
        sign = -1 if node.target is aten.sub.Tensor else 1
        if first is before:
            more, factor = second, sign * alpha
        elif sign * alpha == 1:
            more, factor = first, 1
        else:
            raise UnknownLogits(f"{node.name} changes their sign or scale")
        if more is before:
            raise UnknownLogits(f"{node.name} adds them to themselves")
        if isinstance(more, (int, float)):
            return  # to all of them: their softmax is the same
        if not isinstance(more, Node) or not is_tensor(more) or dtype(more) != self.dtype:
            raise UnknownLogits(f"{node.name} adds a value of another dtype")
        if factor != 1:
            more = self.call(aten.mul.Tensor, more, factor)
        self.bias = more if self.bias is None else self.call(aten.add.Tensor, self.bias, more)

    def replace(self, mask: Any, value: Any) -> None:
        """They become a number where the mask is true."""
        if not isinstance(value, (int, float)) or not value <= REPLACES_SCORES:
            raise UnknownLogits(f"{value} replaces scores")
        if not isinstance(mask, Node) or not is_tensor(mask) or dtype(mask) != torch.bool:
            raise UnknownLogits(f"{mask} replaces scores")
        before = self.bias
        if before is None:
            before = self.call(aten.zeros_like.default, mask, dtype=self.dtype)
        self.bias = self.call(aten.masked_fill.Scalar, before, mask, value)
