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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import attrgetter
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
    mesh_of,
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
    numbers, sizes that vary of DTensors that are inputs or in which a result is sharded.
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
        self._deferred: set[Node] = set()  # recorded with what reads them
        self._constants: dict[str, Tensor] = {}
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
        made = GraphModule(dict(self._attributes()), self._graph)
        made.meta.update(self._gm.meta)
        sharded = frozenset(i for i, at in enumerate(kept) if _has_dtensor(self._inputs[at]))
        return Local(made, Shards(kept, sharded, wrapped, self._linears, self._groups()))

    def _groups(self) -> frozenset[str]:
        values = chain.from_iterable(tree_leaves(n.meta.get(_VALUE)) for n in self._gm.graph.nodes)
        meshes = {id(mesh_of(v)): mesh_of(v) for v in values if is_dtensor(v)}
        groups = chain.from_iterable(mesh.get_all_groups() for mesh in meshes.values())
        return frozenset(group.group_name for group in groups)

    def _attributes(self) -> Iterator[tuple[str, Any]]:
        """What the local graph reads by name."""
        for node in self._graph.nodes:
            if node.op in ("get_attr", "call_module"):
                name = str(node.target)
                of_model = name not in self._constants
                yield name, attrgetter(name)(self._gm) if of_model else self._constants[name]

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
        if node in self._objects or node in self._deferred:
            raise CaptureError(f"{node.name} is read by an operator on plain tensors, or a result")
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
        if _has_state(value):
            self._deferred.add(node)
            return None
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
        before, after = given.meta[_VALUE], value
        name = str(getattr(node.target, "__name__", node.target)).removeprefix("prim_")
        if name == "redistribute":
            same = is_dtensor(before) and is_dtensor(after) and _layout(before) == _layout(after)
            return given if same else None
        local = name == "to_local" or (name == "from_local" and not node.kwargs.get("run_check"))
        return given if local else None

    def _linear(self, node: Node) -> Node | None:
        """F.linear of local tensors, if the placements are known. Partial sums: see _bias."""
        x, weight, bias = _bound(node, ("input", "weight", "bias"))
        self._linears += is_dtensor(weight.meta[_VALUE]) and not _is_replicated(weight.meta[_VALUE])
        operands = [n.meta[_VALUE] for n in (x, weight, bias) if n is not None]
        if not all(map(is_dtensor, operands)):
            return None
        every = [v.placements for v in operands]
        if bias is None:
            every.append((None,) * len(every[0]))
        last = operands[0].dim() - 1
        results = [_linear_placement(*each, last=last) for each in zip(*every, strict=True)]
        value = node.meta[_VALUE]
        if None in results or tuple(results) != tuple(value.placements):
            return None
        if bias is not None:
            bias = self._bias(self._new[bias], value)
        return self._call(node, F.linear, (self._new[x], self._new[weight], bias))

    def _bias(self, bias: Node, result: Any) -> Node:
        """The bias, divided by the number of partial sums: each process adds its part, as with
        DTensor's own rule, so that it counts once in their sum."""
        mesh = mesh_of(result)
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

    def _constant(self, node: Node, value: Any) -> Node:
        """A tensor of numbers that DTensor's rules make themselves, such as a zero."""
        if isinstance(value, FakeTensor) or not isinstance(value, Tensor):
            raise CaptureError(f"{node.name}, on DTensors, was computed from no input")
        name = f"_of_dtensors{len(self._constants)}"
        self._constants[name] = value
        made = self._graph.create_node("get_attr", name)
        made.meta = {**node.meta, _VALUE: value}
        return made

    def _with_deferred(self, node: Node) -> list[Node]:
        """The deferred operators that this one reads, in order, and itself."""
        before = [self._with_deferred(n) for n in node.all_input_nodes if n in self._deferred]
        return [*dict.fromkeys(chain.from_iterable(before)), node]

    def _call(self, node: Node, target: Any, args: Any, kwargs: Any = None) -> Node:
        made = self._graph.call_function(target, args, kwargs)
        made.meta = {**node.meta, _VALUE: local_of(node.meta[_VALUE])}
        return made

    def _recorded(self, node: Node) -> Any:
        """What DTensor's own rules run on local tensors, recorded."""
        steps = self._with_deferred(node)
        read = dict.fromkeys(i for step in steps for i in step.all_input_nodes)
        inputs = [n for n in read if n not in self._objects and n not in self._deferred]
        examples = [n.meta[_VALUE] for n in inputs]

        def on_local(*local: Any) -> Any:
            wrapped = map(with_local, examples, local)
            values = dict(zip(inputs, wrapped, strict=True)) | self._objects
            for step in steps:
                args, kwargs = map_arg((step.args, step.kwargs), values.__getitem__)
                if step.op == "call_method":
                    method = getattr(args[0], str(step.target))
                    values[step] = method(*args[1:], **kwargs)
                else:
                    values[step] = step.target(*args, **kwargs)  # type: ignore[operator]
            return _locals(values[node])

        with self._fake_mode, torch.no_grad():
            recorded = make_fx(on_local)(*map(local_of, examples))
        places = recorded.graph.find_nodes(op="placeholder")
        new = {p: self._new[n] for p, n in zip(places, inputs, strict=True)}
        for step in recorded.graph.nodes:
            if step.op == "get_attr":
                new[step] = self._constant(node, getattr(recorded, str(step.target)))
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


def _has_state(value: Any) -> bool:
    """Is this a DTensor whose placement remembers something of the operator that made it? That of
    an embedding with a sharded vocabulary does: which tokens the shard has."""
    return is_dtensor(value) and any(hasattr(p, "mask_buffer") for p in value.placements)


def _is_shard(placement: Any) -> bool:
    """A plain shard: _StridedShard, of FSDP within tensor parallelism, is another type."""
    from torch.distributed.tensor import Shard

    return type(placement) is Shard


def _is_replicated(value: Any) -> bool:
    return all(p.is_replicate() for p in value.placements)


def _layout(value: Any) -> tuple[Any, ...]:
    return mesh_of(value), value.placements


def _linear_placement(x: Any, weight: Any, bias: Any, *, last: int) -> Any:
    """Placement of x @ weight.T + bias in one dim of the mesh, computed from local tensors without
    a collective; None if that is not known. `last` is the last dim of x."""
    from torch.distributed.tensor import Partial, Shard

    whole = bias is None or bias.is_replicate()
    if weight.is_replicate() and whole:
        fits = x.is_replicate() or (_is_shard(x) and x.dim % (last + 1) != last)
        return x if fits else None
    if not _is_shard(weight):
        return None
    if weight.dim == 0 and x.is_replicate():  # ColwiseParallel
        fits = bias is None or (_is_shard(bias) and bias.dim == 0)
        return Shard(last) if fits else None
    if weight.dim == 1 and _is_shard(x) and x.dim % (last + 1) == last:  # RowwiseParallel
        return Partial() if whole else None
    return None


def _locals(result: Any) -> Any:
    if isinstance(result, (tuple, list)):
        return type(result)(map(_locals, result))
    return local_of(result)


def _wrapping(node: Node) -> Callable[[Any], Any]:
    """What makes the DTensor of a result from its local tensor."""
    value = node.meta[_VALUE]
    mesh, placements = mesh_of(value), value.placements
    sizes = {"shape": value.shape, "stride": value.stride()}
    if any(isinstance(n, torch.SymInt) for n in value.shape):
        sizes = {}  # those of the local tensor, times the number of shards
        if not _is_evenly_sharded(value):
            raise CaptureError(f"the result {node.name} is a DTensor sharded in varying sizes")
    return partial(
        type(value).from_local, device_mesh=mesh, placements=placements, run_check=False, **sizes
    )


def _is_evenly_sharded(value: Any) -> bool:
    """Have all processes shards of the same sizes, whatever sizes vary?"""
    parts = Counter[int]()
    for dim, placement in enumerate(value.placements):
        if placement.is_shard():
            of = placement.dim % value.dim()
            parts[of] = max(parts[of], 1) * mesh_of(value).size(dim)
    return all(isinstance(n := value.shape[d], int) and n % k == 0 for d, k in parts.items())
