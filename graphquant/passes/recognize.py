"""Recognizes norms and activations by evaluating them, not by matching patterns.

A decomposed form such as `w * (x * rsqrt(mean(x**2) + eps))` or `0.5 * x * (1 + erf(x / sqrt(2)))`
has many variants: operand orders, pow or mul, casts in between. The smallest region of arithmetic
with a single non-constant input `x` is evaluated in float64, on random parameters and on samples of
the whole range of `x` (equivalence.py), and compared with the norms and activations of the ops.
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from graphquant._torch import unset_fake_temporarily
from graphquant.ir.constants import Constants
from graphquant.ir.graph import (
    arguments,
    aten,
    calls,
    dtype,
    full_args,
    is_call,
    is_tensor,
    same_sizes,
    shape,
)
from graphquant.ir.rows import CASTS, is_float_cast, is_widening
from graphquant.ops.checks import FLOATS
from graphquant.ops.numerics import ACTIVATIONS
from graphquant.passes.equivalence import RELATIVE, Steps, elementwise, rowwise

HALF_MOST, FLOAT_MOST = 65504.0, 3.38e38  # largest float16; largest bfloat16, for float32 too
LONGEST = 24  # nodes of a decomposed form; layer norm with casts takes 14

WHOLE_ACTIVATIONS = frozenset(a.whole for a in ACTIVATIONS.values() if a.whole is not None)
WHOLE_NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default})

_SIGNS_OF_ACTIVATION = frozenset(
    {aten.erf.default, aten.tanh.default, aten.sigmoid.default, aten.relu.default}
)
_SIGNS_OF_NORM = frozenset({aten.mean.dim, aten.var.correction, aten.var.dim})
_ARITHMETIC = (
    _SIGNS_OF_ACTIVATION
    | _SIGNS_OF_NORM
    | CASTS
    | {
        getattr(getattr(aten, op), kind)
        for op in ("add", "sub", "mul", "div")
        for kind in ("Tensor", "Scalar")
    }
    | {aten.pow.Tensor_Scalar, aten.square.default, aten.neg.default, aten.exp.default}
    | {aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default, aten.rsub.Scalar}
)


@dataclass(frozen=True)
class Norm:
    """`out` = norm over the last dim of `x` [..., K], with `gamma` [K] and `beta` [K] or None."""

    out: Node
    x: Node
    gamma: Node | None
    beta: Node | None
    eps: float
    rms: bool


@dataclass(frozen=True)
class Activation:
    """`out` = act(`x`), elementwise; `act` is a key of ACTIVATIONS."""

    out: Node
    x: Node
    act: str


@dataclass(frozen=True)
class Recognized:
    """All norms and activations of one graph, by the node of their result.

    unusable  those that no op computes -> the reason
    """

    norms: dict[Node, Norm]
    activations: dict[Node, Activation]
    unusable: dict[Node, str]


def recognize(graph: Graph, constants: Constants) -> Recognized:
    """Find the norms and activations of a graph."""
    found = Recognized({}, {}, {})
    known: dict[str, Any] = {}  # results by region text, as layers repeat
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in calls(graph, lambda n: n.target in WHOLE_NORMS):
        norm = _whole_norm(node)
        if isinstance(norm, Norm):
            found.norms[node] = norm
        else:
            found.unusable[node] = norm
    for node in calls(graph, lambda n: n.target in _SIGNS_OF_NORM):
        for out in _downstream(node):
            if (norm_ := _spelled_norm(out, constants, order, known)) is not None:
                found.norms[out] = norm_
                break
    for node in calls(graph, lambda n: n.target in _SIGNS_OF_ACTIVATION):
        for out in _downstream(node):
            if (act := _spelled_activation(out, constants, order, known)) is not None:
                found.activations[out] = act
                break
    for node in calls(graph, lambda n: n.target in WHOLE_ACTIVATIONS):
        if (kind := _whole_activation(node)) is not None:
            found.activations[node] = Activation(node, _unwidened(node.all_input_nodes[0]), kind)
    return found


def _whole_activation(node: Node) -> str | None:
    given = vars(arguments(node))
    for name, act in ACTIVATIONS.items():
        if node.target is act.whole and act.keywords.items() <= given.items():
            return name
    return None


def _whole_norm(node: Node) -> Norm | str:
    x, dims, *rest = full_args(node)
    if len(dims) != 1:
        return f"normalizes over {len(dims)} dims; int8 scales are per row"
    if node.target is aten.rms_norm.default:
        gamma, eps = rest
        if eps is None:  # torch's default: that of the compute dtype, not of the input's
            eps = torch.finfo(torch.promote_types(dtype(x), torch.float32)).eps
        return Norm(node, _unwidened(x), gamma, None, eps, True)
    gamma, beta, eps, _ = rest
    return Norm(node, _unwidened(x), gamma, beta, eps, False)


def _downstream(node: Node) -> list[Node]:
    """The node and its arithmetic users up to nine levels down, furthest first: the outermost match
    is the whole norm with its affine part."""
    found, edge = [node], [node]
    for _ in range(9):
        edge = [u for n in edge for u in n.users if is_call(u, *_ARITHMETIC) and u not in found]
        found += dict.fromkeys(edge)
        if len(found) > 32:
            break
    return found[::-1]


@dataclass(frozen=True)
class _Region:
    """A subgraph of arithmetic from `x` to `out` that depends only on x and `parameters`."""

    out: Node
    x: Node
    nodes: tuple[Node, ...]  # in order, x excluded, out included
    parameters: tuple[Node, ...]

    def steps(self, x: Tensor, parameters: dict[Node, Tensor]) -> list[Tensor]:
        """The values of all nodes in the dtype of `x`. Casts overflow, but do not round."""
        values = {self.x: x, **parameters}
        for node in self.nodes:
            if node.target in CASTS:
                values[node] = _overflowed(values[node.all_input_nodes[0]], dtype(node))
            else:
                args, given = map_arg((node.args, node.kwargs), values.__getitem__)
                kwargs = {k: v for k, v in given.items() if k != "dtype"}
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return [values[node] for node in self.nodes]

    def __call__(self, x: Tensor, parameters: dict[Node, Tensor]) -> Tensor:
        return self.steps(x, parameters)[-1]

    @property
    def most(self) -> float:
        """The largest finite value of x's dtype, before widening casts."""
        return HALF_MOST if dtype(_unwidened(self.x)) == torch.float16 else FLOAT_MOST

    @property
    def text(self) -> str:
        """A cache key: equal for regions that compute the same."""
        names = {n: f"%{i}" for i, n in enumerate((self.x, *self.parameters, *self.nodes))}
        sizes = [(shape(p), p.meta["val"].dtype) for p in self.parameters]
        lines = [f"{self.most} {len(shape(self.x))} {shape(self.x)[-1:]} {sizes}"]
        for n in self.nodes:
            args = map_arg((n.args, n.kwargs), lambda a: names[a])
            lines.append(f"{n.target}{args} {dtype(n)}")
        return "\n".join(lines)


def _overflowed(value: Tensor, kind: torch.dtype) -> Tensor:
    """The value cast to this dtype: overflow without rounding."""
    if torch.finfo(kind).max > HALF_MOST:
        return value  # the range of float32
    return torch.where(value.abs() > HALF_MOST, value.sign() * math.inf, value)


def _regions(out: Node, constants: Constants, order: dict[Node, int]) -> list[_Region]:
    """Regions that end in `out` and have one non-constant input, smallest first.

    The heap, in graph order, holds a cut of the graph: whenever it has one node left, everything
    below depends on that node alone.
    """
    found: list[_Region] = []
    inside: list[Node] = []
    parameters: dict[Node, None] = {}
    heap, seen = [(-order[out], out)], {out}
    while heap and len(inside) < LONGEST:
        if len(heap) == 1 and inside and is_tensor(heap[0][1]):
            found.append(_Region(out, heap[0][1], tuple(inside[::-1]), tuple(parameters)))
        _, node = heapq.heappop(heap)
        if not is_call(node, *_ARITHMETIC) or not is_tensor(node):
            break
        if node.target in CASTS and not is_float_cast(node):
            break  # a cast to integers rounds
        inside.append(node)
        for i in node.all_input_nodes:
            if i in constants:
                parameters[i] = None
            elif i not in seen and i in order:
                seen.add(i)
                heapq.heappush(heap, (-order[i], i))
    return found


def _spelled_activation(
    out: Node, constants: Constants, order: dict[Node, int], known: dict[str, Any]
) -> Activation | None:
    for region in _regions(out, constants, order):
        if region.parameters or not any(n.target in _SIGNS_OF_ACTIVATION for n in region.nodes):
            continue
        if any(n.target in _SIGNS_OF_NORM for n in region.nodes):
            return None
        if (text := region.text) not in known:
            with unset_fake_temporarily(), torch.no_grad():
                known[text] = _which_activation(region)
        if (name := known[text]) is not None:
            return Activation(out, _unwidened(region.x), name)
    return None


def _which_activation(region: _Region) -> str | None:
    x = torch.linspace(-6, 6, 97, dtype=torch.float64, device="cpu")
    value = region(x, {})
    for name, act in ACTIVATIONS.items():
        if _similar(value, act(x)):
            return name if elementwise(lambda x: region.steps(x, {}), act, region.most) else None
    return None


def _spelled_norm(
    out: Node, constants: Constants, order: dict[Node, int], known: dict[str, Any]
) -> Norm | None:
    rms: Norm | None = None
    for region in _regions(out, constants, order):
        if len(region.parameters) > 2 or not any(n.target in _SIGNS_OF_NORM for n in region.nodes):
            continue
        size = shape(region.x)
        width = size[-1:]
        if not size or not isinstance(size[-1], int) or not same_sizes(shape(out)[-1:], width):
            continue
        if any(
            p.meta["val"].numel() != size[-1] or shape(p)[-1:] != width for p in region.parameters
        ):
            continue
        if (text := region.text) not in known:
            with unset_fake_temporarily(), torch.no_grad():
                known[text] = _which_norm(region, size[-1], len(size))
        if known[text] is None:
            continue
        *roles, eps, is_rms = known[text]
        gamma, beta = (None if i is None else region.parameters[i] for i in roles)
        norm = Norm(out, _unwidened(region.x), gamma, beta, eps, is_rms)
        if not norm.rms:
            return norm  # the deviations inside a layer norm match as an RMS norm
        rms = rms or norm
    return rms


def _which_norm(
    region: _Region, K: int, rank: int
) -> tuple[int | None, int | None, float, bool] | None:
    """(gamma, beta, eps, is RMS) if the region is a norm; gamma, beta: indices of parameters."""
    random = torch.Generator("cpu").manual_seed(K)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64, device="cpu")

    parameters = {p: draw(*shape(p)) for p in region.parameters}
    x = draw(*[2] * (rank - 1), K)  # 2, not 1: so that a norm over several dims differs
    value = region(x, parameters)
    numbers = [a for n in region.nodes for a in (*n.args, *n.kwargs.values())]
    epsilons = {float(a) for a in numbers if isinstance(a, float) and 0 < a < 0.1}
    count = len(parameters)
    slots = [*range(count), *[None] * (2 - count)]
    for roles in dict.fromkeys(itertools.permutations(slots, 2)):
        g, b = (None if i is None else parameters[region.parameters[i]].reshape(K) for i in roles)
        kinds = (True, False) if b is None else (False,)
        for rms, eps in itertools.product(kinds, [*sorted(epsilons), 0.0]):

            def norm(x: Tensor) -> Tensor:
                if rms:  # noqa: B023
                    return F.rms_norm(x, (K,), g, eps)  # noqa: B023
                return F.layer_norm(x, (K,), g, b, eps)  # noqa: B023

            if not _similar(value, norm(x)):
                continue
            if rowwise(_by_rows(region, parameters, rank), norm, b, K, region.most):
                return *roles, eps, rms
    return None


def _by_rows(region: _Region, parameters: dict[Node, Tensor], rank: int) -> Steps:
    """The region's steps as a function of rows [M, K]; each step is [M, 1] or [M, K]."""

    def steps(x: Tensor) -> list[Tensor]:
        if rank == 1:
            each = zip(*(region.steps(row, parameters) for row in x), strict=True)
            return [torch.stack(values) for values in each]
        values = region.steps(x.reshape(*[1] * (rank - 2), *x.shape), parameters)
        rows = [v for v in values if v.dim() == rank and v.shape[-2] == len(x)]
        return [v.reshape(len(x), -1) for v in rows]

    return steps


def _similar(value: Tensor, want: Tensor) -> bool:
    """Are these close enough for the full comparison?"""
    return value.shape == want.shape and bool(
        ((value - want).abs() <= RELATIVE * (1 + want.abs())).all()
    )


def _unwidened(x: Node) -> Node:
    """The value before widening casts, which the ops do themselves."""
    while is_widening(x) and dtype(x.all_input_nodes[0]) in FLOATS:
        x = x.all_input_nodes[0]
    return x
