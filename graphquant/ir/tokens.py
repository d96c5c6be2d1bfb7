"""Which rows of a model's values are tokens and which are padding, by the masks of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphquant.ir.graph import aten, is_call
from graphquant.ir.rows import CASTS, ROW_VIEWS


@dataclass(frozen=True)
class Mask:
    """A padding mask among the inputs of a call.

    name    of the input
    tokens  [B, S] bool, True for a token
    """

    name: str
    tokens: Tensor


class Masks:
    """The padding masks of one call; without any, every row counts.

    matched  has any value had rows that one of them describes?
    """

    def __init__(self, masks: Sequence[Mask] = ()) -> None:
        self.masks = tuple(masks)
        self.matched = False

    def spread(self, value: Tensor) -> Tensor | None:
        """Bools of the value's shape, True in the rows of tokens.

        None if its shape does not tell where the tokens are, or two masks contradict each other.
        """
        found = [s for m in self.masks if (s := _spread(m.tokens, value.shape)) is not None]
        if not found or not all(torch.equal(found[0], other) for other in found[1:]):
            return None
        return found[0]

    def rows(self, value: Tensor) -> Tensor | None:
        """[...] bool, True for the rows of value [..., D] that are tokens; None if all count."""
        return self.rows_of(self.spread(value))

    def rows_of(self, spread: Tensor | None) -> Tensor | None:
        """The same from what `spread` returned, after any views."""
        if spread is None or not spread.numel() or not spread.dim():
            return None
        rows = spread[..., 0]
        if spread.stride(-1) and not torch.equal(spread, rows[..., None].expand_as(spread)):
            return None
        self.matched = True
        return None if bool(rows.all()) else rows


def counted(value: Tensor, rows: Tensor | None) -> Tensor:
    """[n, D], the rows of value [..., D] that count; the value itself if all do."""
    return value if rows is None else value[rows.to(value.device)]


def _spread(tokens: Tensor, shape: Sequence[int]) -> Tensor | None:
    """tokens [B, S] in a value of this shape: [B, S, ...], [S, B, ...], [B * S, D] or
    [B, H, S, D]; None for others, and where H == S hides which dim is which."""
    B, S = tokens.shape
    sizes = tuple(shape)
    if len(sizes) == 2:
        return tokens.reshape(-1, 1).expand(sizes) if sizes[0] == B * S else None
    if len(sizes) == 4 and sizes[0] == B and sizes[2] == S:
        return tokens[:, None, :, None].expand(sizes) if sizes[1] != S else None
    if sizes[:2] == (S, B) and B != S:
        tokens = tokens.T
    elif sizes[:2] != (B, S) or len(sizes) < 3:
        return None
    return tokens.view_as(tokens)[(...,) + (None,) * (len(sizes) - 2)].expand(sizes)


class TokenRows:
    """Follows tokens through the views of a graph while it runs.

    A shape does not always tell: torch's MultiheadAttention computes with [S, B, D] and [S * B, D]
    of a model with [B, S, D]. There the views are repeated on the mask of the value that they view.
    """

    def __init__(self, masks: Masks) -> None:
        self._masks = masks
        self._views: dict[Node, Tensor | None] = {}

    def after(self, node: Node, value: Any, env: Mapping[Node, Any]) -> None:
        """Call this after every node, while the values of its arguments are in env."""
        if not self._masks.masks or not is_call(node, *ROW_VIEWS, *CASTS):
            return
        source = node.all_input_nodes[0]
        spread = self._views[source] if source in self._views else self._masks.spread(env[source])
        if spread is not None and node.target in (aten.transpose.int, aten.permute.default):
            spread = node.target(spread, *node.args[1:])
        elif spread is not None:
            spread = spread.reshape(value.shape)
        self._views[node] = spread

    def of(self, node: Node, value: Tensor) -> Tensor | None:
        """[...] bool, True for the rows of this node's value [..., D] that are tokens; None if all
        count."""
        rows = self._masks.rows_of(self._views.get(node))
        by_shape = node not in self._views or value.dim() > 2
        return self._masks.rows(value) if rows is None and by_shape else rows
