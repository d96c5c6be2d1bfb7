"""Packs weights: expressions of parameters become inputs of the graph.

The rules leave weights as expressions, `quantize_weight(cat(Wq, Wk, Wv))`, so that the graph is
correct after every rule. Here those of each linear and of its quantizer are replaced by new inputs,
and a Recipe computes them from the parameters. So are other values that depend on parameters alone
(constant_values.py).
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphquant._torch import set_forward_grad, storage_id
from graphquant.ir.captured import Captured
from graphquant.ir.constants import FACTORIES, Constants
from graphquant.ir.gradients import needs_gradient
from graphquant.ir.graph import LINEAR, LITERAL, calls, drop_dead_code, dtype, is_call, operand
from graphquant.ir.rows import SIZED_VIEWS, keeps_rows
from graphquant.ops import int8_linear
from graphquant.passes.constant_values import constant_values
from graphquant.passes.verify import verifier


@dataclass(frozen=True)
class Root:
    """The i-th parameter of a recipe."""

    index: int


@dataclass(frozen=True)
class Literal:
    """A constant tensor, such as calibration statistics. Compared by value, so that a recompiled
    graph reuses packed weights."""

    shape: tuple[int, ...]
    kind: tuple[torch.dtype, torch.device]
    digest: bytes
    value: Tensor = field(compare=False, repr=False)

    @classmethod
    def of(cls, value: Tensor) -> Literal:
        memory = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest = hashlib.sha256(memory.numpy().tobytes()).digest()
        return cls(tuple(value.shape), (value.dtype, value.device), digest, value)


@dataclass(frozen=True)
class Result:
    """The result of the i-th call of a recipe."""

    index: int


@dataclass(frozen=True)
class OpCall:
    """target(*args, **kwargs). Arguments are Root, Literal, Result, tuples of them, or plain
    values."""

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Recipe:
    """Packed tensors as expressions of parameters. Equal for equal linears of different graphs.

    calls    in order: as a tree, a value with two readers would be hashed twice, and so on
    outputs  what is packed: Results, Roots or Literals
    """

    calls: tuple[OpCall, ...]
    outputs: tuple[Any, ...]

    @torch.no_grad()
    def compute(self, roots: Sequence[Tensor]) -> list[Tensor]:
        """The packed tensors, computed from the parameters `roots` with autocast off."""
        done: list[Any] = []

        def value(e: Any) -> Any:
            if isinstance(e, Root):
                return roots[e.index].detach()
            if isinstance(e, Literal):
                return e.value
            if isinstance(e, Result):
                return done[e.index]
            return tuple(map(value, e)) if isinstance(e, tuple) else e

        root_storages = {storage_id(r) for r in roots}
        with (
            torch.inference_mode(False),
            torch.autocast(roots[0].device.type, enabled=False),
            set_forward_grad(False),  # else dual tensors give tangents
        ):
            for call in self.calls:
                kwargs = {k: value(v) for k, v in call.kwargs}
                done.append(call.target(*map(value, call.args), **kwargs))
            made: list[Tensor] = [value(e) for e in self.outputs]
            # own memory: a slice would keep the parameter alive, which may be released
            return [t.clone() if storage_id(t) in root_storages else t for t in made]


@dataclass(frozen=True)
class Packing:
    """The packed inputs of one linear and its quantizer, or another value of parameters alone.

    recipe       computes them
    roots        the parameters that the recipe reads, weights first
    inputs       the graph's inputs that take the results
    for_linears  are these weights of linears?
    """

    recipe: Recipe
    roots: tuple[Node, ...]
    inputs: tuple[Node, ...] = ()
    for_linears: bool = True


def prepack(captured: Captured, new_input: Callable[[str], Node]) -> list[Packing]:
    """Replace the weight expressions of every rewritten linear by inputs, and then other values
    that are worth it.

    new_input  adds an input of that name to the graph; its fake value is set here
    """
    graph, constants = captured.gm.graph, Constants(captured.parameters)
    check = verifier(captured)
    gradient = needs_gradient(graph, captured.differentiable, captured.grad_enabled)
    packings: list[Packing] = []
    for linear in calls(graph, _is_rewritten):
        # a quantizer of a constant is itself packed
        readers = [r for r in _readers(linear) if r is linear or r not in constants]
        read = dict.fromkeys(a for reader in readers for a in reader.all_input_nodes)
        outputs = [a for a in read if a in constants and not _is_root(a, constants)]
        if not outputs:
            continue
        check("prepack", taken=outputs)
        packing = packing_of(outputs, constants)
        inputs = tuple(new_input(f"packed{len(packings)}_{_name(old, readers)}") for old in outputs)
        for old, new in zip(outputs, inputs, strict=True):
            new.meta["val"] = old.meta["val"]
            for reader in readers:
                reader.replace_input_with(old, new)
        packings.append(replace(packing, inputs=inputs))
    for old in constant_values(graph, constants, gradient):
        check("prepack", taken=[old])
        new = new_input(f"constant_{old.name}")
        new.meta["val"] = old.meta["val"]
        packing = packing_of([old], constants)
        old.replace_all_uses_with(new)
        packings.append(replace(packing, inputs=(new,), for_linears=False))
    literals = [n for n in graph.find_nodes(op="get_attr") if LITERAL in n.meta]
    drop_dead_code(graph)
    for node in literals:
        if node._erased and node.target not in {n.target for n in graph.find_nodes(op="get_attr")}:
            delattr(captured.gm, str(node.target))
    graph.lint()
    check("prepack")
    captured.gm.recompile()
    return packings


def packing_of(outputs: Sequence[Node], constants: Constants) -> Packing:
    """The Packing, without inputs, of nodes that depend on parameters alone."""
    roots = list(dict.fromkeys(r for o in outputs for r in constants.roots_of(o)))
    calls = _Calls(roots)
    results = tuple(map(calls.of, outputs))
    return Packing(Recipe(tuple(calls.made), results), tuple(roots))


def _name(value: Node, readers: Sequence[Node]) -> str:
    return operand(value, next(r for r in readers if value in r.all_input_nodes))


def _is_root(node: Node, constants: Constants) -> bool:
    """A parameter or a reshape of one: nothing to compute, so nothing to pack."""
    if is_call(node, *SIZED_VIEWS):
        return _is_root(node.all_input_nodes[0], constants)
    return node in constants.roots


def _readers(linear: Node) -> tuple[Node, ...]:
    """A rewritten linear, and the quantizer of its input."""
    if linear.target is LINEAR:
        return (linear,)
    x = linear.all_input_nodes[0]
    while is_call(x, operator.getitem) or keeps_rows(x):
        x = x.all_input_nodes[0]
    return linear, x


def _is_rewritten(node: Node) -> bool:
    return node.target is int8_linear.target or (
        node.target is LINEAR and node.meta.get("graphquant") is not None
    )


class _Calls:
    """Lists the calls that compute nodes from these roots."""

    def __init__(self, roots: Sequence[Node]) -> None:
        self.made: list[OpCall] = []
        self._values: dict[Node, Any] = {root: Root(i) for i, root in enumerate(roots)}

    def of(self, node: Node) -> Any:
        """The Root, Literal or Result that stands for the node."""
        pending = [node]
        while pending:  # not recursive: chains of in-place writes can be long
            value = pending[-1]
            missing = [i for i in value.all_input_nodes if i not in self._values]
            if value in self._values or not missing:
                pending.pop()
                if value not in self._values:
                    self._values[value] = self._value(value)
            else:
                pending += reversed(missing)
        return self._values[node]

    def _value(self, node: Node) -> Any:
        if LITERAL in node.meta:
            return Literal.of(node.meta[LITERAL])
        given = dict(node.kwargs)
        if node.target in FACTORIES:  # whatever torch's defaults are when weights change
            given |= {"dtype": dtype(node), "device": node.meta["val"].device}
        args = tuple(map(self._argument, node.args))
        kwargs = tuple((k, self._argument(v)) for k, v in sorted(given.items()))
        self.made.append(OpCall(node.target, args, kwargs))
        return Result(len(self.made) - 1)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Node):
            return self._values[value]
        if isinstance(value, (list, tuple)):
            return tuple(map(self._argument, value))
        return value
