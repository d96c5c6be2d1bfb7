"""FLOPs of products that are no linears: attention, convolutions and other matmuls.

They stay in float, and the report counts them next to the linears. torch.utils.flop_counter counts,
on meta tensors with the sizes seen at compile time; ops that it does not know are decomposed as
torch decomposes them (einsum is a bmm).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from graphquant._torch import DispatchKey, OpOverload, tree_leaves, tree_map_only
from graphquant.ir.constants import Constants
from graphquant.ir.graph import LINEAR, SDPA, aten, hint, is_call, is_tensor
from graphquant.ops import varlen_attention

log = logging.getLogger(__name__)


def _matrix_flops(_: Any, matrix: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * int(math.prod(matrix))


def _first_arg_flops(value: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * int(math.prod(value))


_VECTOR_FLOPS = dict.fromkeys((aten.mv, aten.dot, aten.vdot), _first_arg_flops) | {
    aten.addmv: _matrix_flops
}
"""Ops unknown to the counter, in which each element of one argument is multiplied once."""


class OtherProduct(NamedTuple):
    """kind: "attention", "convolution" or "matmul"; why: the reason to stay in float; its FLOPs."""

    kind: str
    why: str
    flops: int


def other_products(graph: Graph, constants: Constants) -> Iterator[tuple[Node, OtherProduct]]:
    """Every product that is no linear, except products of weights alone."""
    known: dict[Any, int] = {}  # layers repeat
    for node in graph.nodes:
        if node.op != "call_function" or node.target is LINEAR or node in constants:
            continue
        if flops := _flops(node, known):
            yield node, OtherProduct(kind := _kind(node), _why(node, kind, constants), flops)


def _flops(node: Node, known: dict[Any, int]) -> int:
    if is_call(node, SDPA) or _name(node) == "flex_attention":
        return _attention_flops(*(v.meta["val"] for v in node.args[:3]))  # type: ignore[union-attr]
    if is_call(node, varlen_attention.target):
        return _varlen_flops(*(v.meta["val"] for v in node.args[:4]))  # type: ignore[union-attr]
    if not isinstance(node.target, OpOverload) or not is_tensor(node):
        return 0
    if not _may_multiply(node):
        return 0
    args, kwargs = tree_map_only(Node, _to_meta, (node.args, node.kwargs))
    key = repr((node.target, args, kwargs))
    if key not in known:
        known[key] = _count(node.target, args, kwargs)
    return known[key]


def _may_multiply(node: Node) -> bool:
    """The counter knows it, or it is composite and takes at least two tensors."""
    op: Any = node.target
    if op.overloadpacket in flop_registry or op.overloadpacket in _VECTOR_FLOPS:
        return True
    tensors = [v for v in tree_leaves((node.args, node.kwargs)) if isinstance(v, Node)]
    composite = op.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)
    return composite and sum(map(is_tensor, tensors)) > 1


def _count(op: Any, args: Any, kwargs: Any) -> int:
    counter = FlopCounterMode(display=False, custom_mapping=_VECTOR_FLOPS)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), counter:
            op(*args, **kwargs)
    except (RuntimeError, NotImplementedError) as no:
        log.debug("the FLOPs of %s are not counted: %s", op, no)
        return 0
    return int(counter.get_total_flops())


def _to_meta(node: Node) -> Any:
    value = node.meta["val"]
    if isinstance(value, Tensor):
        sizes, strides = map(hint, value.shape), map(hint, value.stride())
        return torch.empty_strided([*sizes], [*strides], dtype=value.dtype, device="meta")
    return hint(value) if isinstance(value, torch.SymInt) else value


def _attention_flops(q: Tensor, k: Tensor, v: Tensor) -> int:
    """FLOPs of q k^T and of the probabilities times v. GQA saves none."""
    scores = math.prod(map(hint, q.shape[:-1])) * hint(k.shape[-2])
    return 2 * scores * (hint(q.shape[-1]) + hint(v.shape[-1]))


def _varlen_flops(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> int:
    """As for sequences of equal lengths."""
    sequences = max(hint(cu_seqlens.shape[0]) - 1, 1)
    scores = math.prod(map(hint, q.shape[:-1])) * hint(k.shape[-2]) // sequences
    return 2 * scores * (hint(q.shape[-1]) + hint(v.shape[-1]))


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]


def _kind(node: Node) -> str:
    name = _name(node)
    kinds = ("attention", "conv")
    found = next((kind for kind in kinds if kind in name), "matmul")
    return {"conv": "convolution"}.get(found, found)


def _why(node: Node, kind: str, constants: Constants) -> str:
    if kind == "attention":
        return "attention is computed in float"
    if kind == "convolution":
        return "convolutions stay in float"
    weights = [v for v in node.all_input_nodes if v in constants]
    if not weights:
        return "it multiplies two values that the model computes"
    dims: Sequence[Any] = max((v.meta["val"].shape for v in weights if is_tensor(v)), key=len)
    return f"{_name(node)} with a weight of {len(dims)} dims is not computed as a linear"
