"""Finds self-attention: `scaled_dot_product_attention`, or a softmax between two products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, Node

from graphquant._torch import OpOverload
from graphquant.ir.graph import (
    SDPA,
    arguments,
    aten,
    calls,
    hint,
    is_call,
    is_tensor,
    only_user,
    sdpa_scale,
)
from graphquant.ir.rows import CASTS
from graphquant.ops.checks import FLOATS

SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
MATMUL = frozenset({aten.matmul.default, aten.bmm.default})

COPIES = CASTS | {aten.contiguous.default, aten.clone.default}
# Pointwise, although torch does not tag them so, or their composites.
_POINTWISE = COPIES | {
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten.alias.default,
    aten.clamp_min.default,
    aten.detach.default,
    aten.dropout.default,
    aten.expand.default,
    aten.expand_as.default,
    aten.lift_fresh_copy.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.pow.Tensor_Scalar,
    aten.rsub.Scalar,
    aten.square.default,
    aten.where.Scalar,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
}
_COLLECTIVES = "_c10d_functional"  # the namespace
# Of tensor parallelism: combine, element by element, what processes have of the same tokens.
_BY_ELEMENT = (f"{_COLLECTIVES}::all_reduce", f"{_COLLECTIVES}::wait_tensor")


@dataclass(frozen=True)
class Attention:
    """One self-attention: out = softmax(logits) v, heads in dim 1.

    out      its result, [B, H, S, D]
    q, k, v  [B, H, S, D]; k [B, H, D, S] if k_transposed
    score    q k^T of a written-out attention, None for SDPA
    logits   what its softmax reads
    inner    the nodes from `score` to `out`
    """

    out: Node
    q: Node
    k: Node
    v: Node
    k_transposed: bool = False
    score: Node | None = None
    logits: Node | None = None
    inner: frozenset[Node] = field(default_factory=frozenset)

    @property
    def mask(self) -> Node | None:
        """The mask of an SDPA."""
        mask: Node | None = None if self.score is not None else arguments(self.out).attn_mask
        return mask

    @property
    def adds(self) -> bool:
        """Is its mask added to the logits? If not, it is one of bools."""
        return self.mask is None or self.mask.meta["val"].dtype != torch.bool

    @property
    def is_causal(self) -> bool:
        return self.score is None and bool(arguments(self.out).is_causal)

    @property
    def scale(self) -> float:
        """Of an SDPA."""
        return float(sdpa_scale(self.out))

    @property
    def operands(self) -> list[Node]:
        """What its logits are computed from besides q and k."""
        if self.score is None:
            return [] if self.mask is None else [self.mask]
        read = {i for n in self.inner if n is not self.score for i in n.all_input_nodes}
        return sorted(read - self.inner - {self.v})


def is_pointwise(node: Node) -> bool:
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload):
        return False
    return (
        torch.Tag.pointwise in target.tags
        or target in _POINTWISE
        or target._schema.name in _BY_ELEMENT
    )


def is_over_processes(node: Node) -> bool:
    """Does this node exchange values with other processes?"""
    return isinstance(node.target, OpOverload) and node.target.namespace == _COLLECTIVES


def find_attentions(graph: Graph) -> Iterator[Attention]:
    for node in calls(graph, lambda n: n.target is SDPA or n.target in SOFTMAX):
        found = _fused(node) if node.target is SDPA else _written_out(node)
        if found is not None and _is_self_attention(found):
            yield found


def _fused(node: Node) -> Attention | None:
    a = arguments(node)
    if a.dropout_p or any(n.meta["val"].dim() != 4 for n in (node, a.query, a.key, a.value)):
        return None
    return Attention(node, a.query, a.key, a.value, inner=frozenset({node}))


def _written_out(softmax: Node) -> Attention | None:
    """matmul(softmax(f(matmul(q, k^T))), v) with a pointwise f, which may read a mask.

    None if anything else reads a value in between, which is not computed any more then.
    """
    if softmax.meta["val"].dim() != 4 or softmax.args[1] not in (-1, 3):
        return None
    logits = softmax.args[0]
    inner = {softmax}
    probabilities = softmax
    while (user := only_user(probabilities)) is not None and is_call(user, *COPIES):
        probabilities = user
        inner.add(user)
    out = only_user(probabilities)
    if out is None or out.target not in MATMUL or out.args[0] is not probabilities:
        return None
    assert isinstance(logits, Node)
    score = _score(logits, inner)
    inner |= {out} if score is None else {out, score}
    if score is None or any(not inner.issuperset(n.users) for n in inner - {out}):
        return None
    q, k, v = score.args[0], score.args[1], out.args[1]
    assert isinstance(q, Node) and isinstance(k, Node) and isinstance(v, Node)
    swapped = is_call(k, aten.transpose.int) and {d % 4 for d in k.args[1:]} == {2, 3}  # type: ignore[operator]
    if swapped:
        k = k.all_input_nodes[0]
    return Attention(out, q, k, v, not swapped, score, logits, frozenset(inner))


def _score(node: Node, inner: set[Node]) -> Node | None:
    """The one product that this value is computed from by pointwise ops, which join `inner`."""
    if node.target in MATMUL:
        return node
    if not is_pointwise(node):
        return None
    found: list[tuple[Node, set[Node]]] = []
    for i in node.all_input_nodes:
        if is_tensor(i) and i.meta["val"].dim() == 4 and i.meta["val"].is_floating_point():
            between: set[Node] = set()
            if (score := _score(i, between)) is not None:
                found.append((score, between))
    if len(found) != 1:
        return None
    inner |= found[0][1] | {node}
    return found[0][0]


def _is_self_attention(a: Attention) -> bool:
    """Equal batches, lengths and dtypes; heads of q in groups of those of k and v."""
    q, k, v, out = (n.meta["val"] for n in (a.q, a.k, a.v, a.out))
    if any(t.dim() != 4 or t.dtype not in FLOATS or t.dtype != q.dtype for t in (q, k, v, out)):
        return False
    keys, width = (3, 2) if a.k_transposed else (2, 3)
    heads = [hint(t.shape[1]) for t in (q, k, v)]
    return (
        hint(q.shape[2]) == hint(k.shape[keys]) == hint(v.shape[2])
        and hint(q.shape[3]) == hint(k.shape[width]) == hint(v.shape[3])
        and heads[1] == heads[2]
        and heads[0] % max(heads[1], 1) == 0
    )
