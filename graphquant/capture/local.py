"""Tensor parallelism: a Dynamo graph on DTensors as a graph on this process's shards.

Dynamo traces `parallelize_module`'s hooks, so its graph has `from_local`, operators on DTensors,
`redistribute` and `to_local`. Here it becomes what each process computes: operators on local
tensors, and the collectives between them as operators of their own. Passes see plain tensors then:
each process quantizes and packs its shards alone.

Linears and norms of a known placement stay single operators, so that rules find them. Every other
operator is left to DTensor's own sharding rules, and what they run is recorded.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from graphquant._torch import (
    FakeTensor,
    HigherOrderOperator,
    is_dtensor,
    local_of,
    tree_leaves,
    with_local,
)
from graphquant._torch.dynamo import copy_source
from graphquant.errors import CaptureError
from graphquant.ir.graph import draws_nothing, is_random
from graphquant.ir.shards import Shards

_VALUE = "example_value"
_NORMS = (F.layer_norm, F.rms_norm, torch.rms_norm)


@dataclass(frozen=True)
class Local:
    """The local graph of a Dynamo graph with DTensors, with Dynamo's metadata."""

    gm: GraphModule
    shards: Shards


def localized(gm: GraphModule, example_inputs: Sequence[Any]) -> Local | None:
    """The local graph; None if there is no DTensor in this one, which is not changed.

    Raises CaptureError for what cannot be told from one process's shards: a gradient, random
    numbers, sizes of DTensors that vary and are inputs or results.
    """
    if not any(_has_dtensor(n) for n in gm.graph.nodes):
        return None
    return _Localizer(gm, example_inputs).local()


def _has_dtensor(node: Node) -> bool:
    return any(map(is_dtensor, tree_leaves(node.meta.get(_VALUE))))


class _Localizer:
    def __init__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        self._gm = gm
        self._graph = Graph()
        self._new: dict[Node, Any] = {}  # node of Dynamo's graph -> of the local one
        inputs = gm.graph.find_nodes(op="placeholder")
        # such as device meshes
        self._objects = {
            n: value
            for n, value in zip(inputs, example_inputs, strict=True)
            if not isinstance(n.meta[_VALUE], (Tensor, int, float, torch.SymInt, torch.SymFloat))
        }
        self._inputs = inputs
        self._linears = 0
        values = (n.meta.get(_VALUE) for n in gm.graph.nodes)
        fakes = (local_of(v) for v in values if isinstance(v, Tensor))
        self._fake_mode = next(f.fake_mode for f in fakes if isinstance(f, FakeTensor))

    def local(self) -> Local:
        for node in self._gm.graph.nodes:
            if node in self._objects:
                continue
            if node.op == "output":
                wrapped = self._output(node)
            elif node.op == "placeholder" or not self._is_on_dtensors(node):
                self._new[node] = self._copy(node)
            else:
                self._new[node] = self._desugared(node)
        kept = tuple(i for i, n in enumerate(self._inputs) if n not in self._objects)
        self._graph.lint()
        made = GraphModule(self._gm, self._graph)
        made.meta.update(self._gm.meta)
        sharded = frozenset(i for i, at in enumerate(kept) if _has_dtensor(self._inputs[at]))
        return Local(made, Shards(kept, sharded, wrapped, self._linears))

    def _is_on_dtensors(self, node: Node) -> bool:
        return any(map(_has_dtensor, (node, *node.all_input_nodes)))

    def _copy(self, node: Node) -> Node:
        copy = self._graph.node_copy(node, self._local_node)
        copy_source(node, copy)
        if _has_dtensor(node):  # an input
            value = node.meta[_VALUE]
            if any(isinstance(n, torch.SymInt) for n in value.shape):
                raise CaptureError(f"{node.name} is a DTensor of varying sizes")
            copy.meta[_VALUE] = local_of(value)
        return copy

    def _local_node(self, node: Node) -> Any:
        if node in self._objects:
            raise CaptureError(f"{node.name} is read by an operator on plain tensors")
        return self._new[node]

    def _output(self, node: Node) -> dict[int, Callable[[Any], Any]]:
        """Add the output. Returns for each result that is a DTensor what makes it from its local
        tensor."""
        (results,) = node.args
        self._graph.output(map_arg(results, self._local_node))
        assert isinstance(results, (tuple, list))
        return {
            i: _wrapping(result)
            for i, result in enumerate(results)
            if isinstance(result, Node) and is_dtensor(result.meta.get(_VALUE))
        }

    def _desugared(self, node: Node) -> Any:
        """The local value of an operator that takes or returns DTensors."""
        value = node.meta.get(_VALUE)
        if isinstance(node.target, HigherOrderOperator):
            raise CaptureError(f"{node.name} is a higher-order op on DTensors")
        if any(isinstance(v, Tensor) and v.requires_grad for v in tree_leaves(value)):
            raise CaptureError(
                f"{node.name}, a DTensor or made from one, can need a gradient: for inference, "
                "call the model under torch.inference_mode() or torch.no_grad()"
            )
        if (same := self._unchanged(node, value)) is not None:
            return self._new[same]
        if node.target is F.linear and (new := self._linear(node)) is not None:
            return new
        if node.target in _NORMS and (new := self._norm(node)) is not None:
            return new
        return self._recorded(node)

    def _unchanged(self, node: Node, value: Any) -> Node | None:
        """The input of which this is another view of the same local tensor, or None."""
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get(_VALUE), Tensor)]
        if len(tensors) != 1 or not isinstance(value, Tensor):
            return None
        (given,) = tensors
        before = given.meta[_VALUE]
        name = getattr(node.target, "__name__", node.target)
        if node.op == "call_method" and name == "redistribute":
            same = is_dtensor(before) and before.placements == value.placements
            return given if same and before.device_mesh == value.device_mesh else None
        to_local = node.op == "call_method" and name == "to_local"
        from_local = name in ("from_local", "prim_from_local") and not _checks(node)
        return given if to_local or from_local else None

    def _linear(self, node: Node) -> Node | None:
        """F.linear of local tensors, if the placements are known. Partial sums: see _bias."""
        x, weight, bias = _bound(node, ("input", "weight", "bias"))
        self._linears += is_dtensor(weight.meta[_VALUE]) and not _is_replicated(weight.meta[_VALUE])
        operands = [None if n is None else n.meta[_VALUE] for n in (x, weight, bias)]
        if not all(v is None or is_dtensor(v) for v in operands):
            return None
        every = zip(*(_placements(v, operands[0]) for v in operands), strict=True)
        rank = operands[0].dim()
        results = [_linear_placement(*placements, rank) for placements in every]
        value = node.meta[_VALUE]
        if None in results or tuple(results) != tuple(value.placements):
            return None
        if bias is not None:
            bias = self._bias(self._new[bias], value)
        return self._call(node, F.linear, (self._new[x], self._new[weight], bias))

    def _bias(self, bias: Node, result: Any) -> Node:
        """The bias, divided by the number of partial sums: each process adds its part, as with
        DTensor's own rule, so that it counts once in their sum."""
        mesh = result.device_mesh
        parts = 1
        for dim, placement in enumerate(result.placements):
            parts *= mesh.size(dim) if placement.is_partial() else 1
        if parts == 1:
            return bias
        made = self._graph.call_function(operator.truediv, (bias, parts))
        with self._fake_mode, torch.no_grad():
            made.meta[_VALUE] = bias.meta[_VALUE] / parts
        return made

    def _norm(self, node: Node) -> Node | None:
        """A norm over dims that are not sharded, of local tensors."""
        x, dims, *_ = _bound(node, ("input", "normalized_shape"))
        others = [n.meta[_VALUE] for n in node.all_input_nodes if n is not x]
        value, result = x.meta[_VALUE], node.meta[_VALUE]
        if not all(is_dtensor(v) and _is_replicated(v) for v in others) or not is_dtensor(value):
            return None
        first = value.dim() - len(dims)
        whole = all(
            p.is_replicate() or (_is_shard(p) and p.dim % value.dim() < first)
            for p in value.placements
        )
        if not whole or value.placements != result.placements:
            return None
        args, kwargs = map_arg((node.args, node.kwargs), self._local_node)
        return self._call(node, node.target, args, kwargs)

    def _call(self, node: Node, target: Any, args: Any, kwargs: Any = None) -> Node:
        made = self._graph.call_function(target, args, kwargs)
        made.meta = {**node.meta, _VALUE: local_of(node.meta[_VALUE])}
        return made

    def _recorded(self, node: Node) -> Any:
        """What DTensor's own rules run on local tensors, recorded."""
        inputs = [n for n in node.all_input_nodes if n not in self._objects]
        examples = [n.meta[_VALUE] for n in inputs]

        def on_local(*local: Any) -> Any:
            wrapped = map(with_local, examples, local)
            values = dict(zip(inputs, wrapped, strict=True)) | self._objects
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "call_method":
                return _locals(getattr(args[0], str(node.target))(*args[1:], **kwargs))
            return _locals(node.target(*args, **kwargs))  # type: ignore[operator]

        with self._fake_mode, torch.no_grad():
            recorded = make_fx(on_local)(*map(local_of, examples))
        places = recorded.graph.find_nodes(op="placeholder")
        new = {p: self._new[n] for p, n in zip(places, inputs, strict=True)}
        for step in recorded.graph.nodes:
            if step.op == "get_attr":
                raise CaptureError(f"{node.name}, on DTensors, was computed from no input")
            if is_random(step) and not draws_nothing(step):
                raise CaptureError(f"{node.name}, on DTensors, draws random numbers")
            if step.op == "call_function":
                copy = new[step] = self._graph.node_copy(step, new.__getitem__)
                copy.meta = {**node.meta, _VALUE: step.meta.get("val")}
        (result,) = recorded.graph.output_node().args
        return map_arg(result, new.__getitem__)


def _bound(node: Node, names: Sequence[str]) -> list[Any]:
    """The arguments of these names, given by position or by name; None if left out."""
    return [
        node.args[i] if i < len(node.args) else node.kwargs.get(name)
        for i, name in enumerate(names)
    ]


def _checks(node: Node) -> bool:
    """Does this from_local exchange its values first?"""
    return bool(node.kwargs.get("run_check", False))


def _is_shard(placement: Any) -> bool:
    """A plain shard: _StridedShard, of FSDP within tensor parallelism, is another type."""
    from torch.distributed.tensor import Shard

    return type(placement) is Shard


def _is_replicated(value: Any) -> bool:
    return all(p.is_replicate() for p in value.placements)


def _placements(value: Any, like: Any) -> Iterable[Any]:
    """Of an operand in each dim of the mesh; None for a missing bias."""
    return [None] * len(like.placements) if value is None else value.placements


def _linear_placement(x: Any, weight: Any, bias: Any, rank: int) -> Any:
    """Placement of x @ weight.T + bias in one dim of the mesh, computed from local tensors without
    a collective; None if that is not known. `rank` is that of x."""
    from torch.distributed.tensor import Partial, Shard

    whole = bias is None or bias.is_replicate()
    last = rank - 1
    if weight.is_replicate() and whole:
        fits = x.is_replicate() or (_is_shard(x) and x.dim % rank != last)
        return x if fits else None
    if not _is_shard(weight):
        return None
    if weight.dim == 0 and x.is_replicate():  # ColwiseParallel
        fits = bias is None or (_is_shard(bias) and bias.dim == 0)
        return Shard(last) if fits else None
    if weight.dim == 1 and _is_shard(x) and x.dim % rank == last:  # RowwiseParallel
        return Partial() if whole else None
    return None


def _locals(result: Any) -> Any:
    if isinstance(result, (tuple, list)):
        return type(result)(map(_locals, result))
    return local_of(result)


def _wrapping(node: Node) -> Callable[[Any], Any]:
    """What makes the DTensor of a result from its local tensor."""
    value = node.meta[_VALUE]
    if any(isinstance(n, torch.SymInt) for n in value.shape):
        raise CaptureError(f"the result {node.name} is a DTensor of varying sizes")
    mesh, placements = value.device_mesh, value.placements
    shape, stride = value.shape, value.stride()

    def wrap(local: Any) -> Any:
        return type(value).from_local(
            local, mesh, placements, run_check=False, shape=shape, stride=stride
        )

    return wrap
