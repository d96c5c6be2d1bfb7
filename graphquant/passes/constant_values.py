"""Values that depend on parameters alone, such as relative position biases (Swin, BEiT, MPNet, T5),
rotary tables, interpolated position embeddings, and the weights of weight normalization.

    before  every call gathers a bias [H, S, S] from its table, once for each layer
    after   the bias is an input of the graph, computed when weights are packed (prepack.py)
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Graph, Node

from graphquant._torch import OpOverload
from graphquant.ir.aliases import leaving, memory
from graphquant.ir.constants import FACTORIES, Constants
from graphquant.ir.contexts import Region, regions
from graphquant.ir.graph import LINEAR, SDPA, aten
from graphquant.ir.rows import CASTS
from graphquant.ops.define import OPS

# Bytes. What is kept stays in memory, for each size that the model is compiled for.
LARGEST = 2**25  # of one value
MOST = 2**27  # of all values of a graph

# Inductor computes these where they are read, for nearly nothing.
CHEAP = FACTORIES | CASTS
CHEAP |= {
    *(aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.mul.Tensor, aten.div.Tensor),
    *(aten.neg.default, aten.where.self, aten.where.ScalarOther, aten.masked_fill.Scalar),
    *(aten.index.Tensor, aten.embedding.default, aten.index_select.default),
    *(aten.gather.default, aten.repeat.default),
    *(aten.clone.default, aten.contiguous.default, aten.cat.default, aten.stack.default),
    *(aten.slice_scatter.default, aten.select_scatter.default, aten.pad.default),
}

# They read it from memory, so it is written there at every call.
READ_MEMORY = frozenset(
    {
        *(LINEAR, SDPA, aten.matmul.default, aten.mm.default, aten.bmm.default),
        *(aten.addmm.default, aten.baddbmm.default, aten.conv1d.default, aten.conv2d.default),
        *(aten.conv3d.default, aten.convolution.default),
        *(op.target for op in OPS.values()),
    }
)


def constant_values(graph: Graph, constants: Constants, gradient: Collection[Node]) -> list[Node]:
    """Values of parameters alone that are worth keeping, in order, without views of them.

    gradient  values that can need a gradient
    """
    returned = leaving(graph)  # the caller may write to it
    under = dict(regions(graph))
    room = MOST
    found: dict[Node, bool] = {}  # values that are read -> kept?
    for reader in reversed(graph.nodes):
        if reader in constants and found.get(reader, True):
            continue  # not computed at a call; what is too large, or cheap, may read what is not
        for read in reader.all_input_nodes:
            if read not in constants or (value := _base(read)) in found or value in constants.roots:
                continue
            made = [n for n in constants.made_from(value) if n not in constants.roots]
            found[value] = (
                value not in returned
                and _can_be_kept(value, made, gradient, under)
                and _is_worth_it(value, made)
                and _bytes(value) <= min(room, LARGEST)
            )
            room -= _bytes(value) if found[value] else 0
    return sorted(value for value, kept in found.items() if kept)


def _base(value: Node) -> Node:
    """The value that this is a view of."""
    while value.op == "call_function":
        of = [i for i in value.all_input_nodes if not memory(i).isdisjoint(memory(value))]
        if len(of) != 1:
            break
        (value,) = of
    return value


def _can_be_kept(
    value: Node, made: Sequence[Node], gradient: Collection[Node], under: Mapping[Node, Region]
) -> bool:
    """made: the value and all that it is computed from, but for the parameters."""
    fake = value.meta.get("val")
    if not isinstance(fake, Tensor) or fake.layout != torch.strided:
        return False
    if any(isinstance(n, torch.SymInt) for n in (*fake.shape, *fake.stride())):
        return False
    return all(
        _is_plain(n) and n not in gradient and not _autocasts(under[n], fake.device.type)
        for n in made
    )


def _is_plain(node: Node) -> bool:
    """Does it compute tensors, and nothing else?"""
    if node.op == "get_attr":
        return True  # a literal
    if node.target is operator.getitem:
        return True
    known = isinstance(node.target, OpOverload) and node.target.namespace in ("aten", "prims")
    values = node.meta.get("val")
    values = values if isinstance(values, (tuple, list)) else [values]
    return known and all(isinstance(v, Tensor) for v in values)


def _autocasts(region: Region, device: str) -> bool:
    """May autocast change dtypes here?"""
    for kind, _, enabled, *_ in reversed(region.autocast):
        if kind == device:
            return bool(enabled)
    return torch.is_autocast_enabled(device)


def _bytes(value: Node) -> int:
    fake = value.meta["val"]
    return int(fake.numel() * fake.itemsize)


def _is_worth_it(value: Node, made: Sequence[Node]) -> bool:
    computed = [n for n in made if n.op == "call_function" and _base(n) is n]
    if all(n.target in CASTS for n in computed):
        return False  # a second copy of the parameter in memory would save little
    return any(n.target not in CHEAP for n in computed) or _is_read_from_memory(value)


def _is_read_from_memory(value: Node) -> bool:
    edge, seen = [value], {value}
    for source in edge:
        for reader in source.users:
            if reader.target in READ_MEMORY:
                return True
            if reader not in seen and _base(reader) is not reader:
                seen.add(reader)
                edge.append(reader)
    return False
