"""What the masks of a graph's attentions mean, in the words of graphquant::attention."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.fx import Node

from graphquant._torch import unset_fake_temporarily
from graphquant.config import strict
from graphquant.ir.captured import Captured
from graphquant.ir.graph import aten, new_call
from graphquant.ops.checks import FLOATS
from graphquant.passes.padding.attention import Attention, find_attentions
from graphquant.passes.padding.evaluation import Kept
from graphquant.passes.padding.masks import Masks, PaddingMask
from graphquant.passes.policy.speed import random_like

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Masked:
    """What graphquant::attention takes in place of a mask.

    keys  which keys are valid; None: all
    bias  [B or 1, H or 1, S, T], or with fewer dims
    """

    keys: PaddingMask | None = None
    causal: bool = False
    window: int | None = None
    bias: Node | None = None


class MaskForms:
    """The forms of a graph's masks, and their key masks as nodes."""

    def __init__(self, captured: Captured) -> None:
        self._captured = captured
        self._masks = Masks(captured, every_query=True)
        self._valid: dict[PaddingMask, Node] = {}

    @cached_property  # many graphs have no mask
    def _found(self) -> dict[Node, Attention]:
        return {a.out: a for a in find_attentions(self._captured.gm.graph) if a.score is None}

    def of(self, node: Node) -> Masked | None:
        """The form of this attention's mask; None if it is not understood."""
        found = self._found.get(node)
        if found is None:
            return None
        try:
            with unset_fake_temporarily(), torch.no_grad():
                keys, form = self._masks.understand(found)
        except Kept as why:
            log.debug("%s: %s", node.name, why)
            return None
        except Exception as error:  # of the model's ops, which were run on samples
            if strict():
                raise
            log.debug("%s: %r", node.name, error)
            return None
        if not keys.exact or (form.bias is not None and not is_bias(form.bias)):
            return None
        return Masked(keys, form.causal, form.window, form.bias)

    def valid(self, keys: PaddingMask) -> Node:
        """A node behind the mask's own: which keys are valid, [B, T] bool."""
        if keys in self._valid:
            return self._valid[keys]
        graph = self._captured.gm.graph
        after = keys.node
        while after.op == "placeholder":
            after = after.next
        before = after if after is not keys.node else after.next
        compare = aten.eq.Scalar if keys.inverted else aten.ne.Scalar
        with graph.inserting_before(before):
            made = new_call(graph, self._captured.fake_mode, compare, keys.node, 0)
        self._valid[keys] = made
        return made


def is_bias(node: Node) -> bool:
    """Can graphquant::attention add it?"""
    value = node.meta["val"]
    static = all(isinstance(n, int) for n in (*value.shape, *value.stride()))
    return value.dtype in FLOATS and value.dim() <= 4 and static


def like(mask: Tensor) -> Tensor:
    """A mask in this layout that hides nothing: random numbers, or True."""
    made = random_like(mask)
    if made.dtype != torch.bool:
        return made
    memory = made.new_ones(made.untyped_storage().nbytes())
    return memory.as_strided(made.shape, made.stride())
