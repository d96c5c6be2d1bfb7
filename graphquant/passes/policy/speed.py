"""Speed gate: an int8 rewrite is kept only if it was measured to be faster.

The replaced and the new subgraph are extracted, run alternately on random values of the sizes seen
at compile time, and timed (ops/timing.py). Results are cached by subgraph and sizes, also
across processes. Host time is not measured on CUDA. On a CPU our kernels are called as Inductor's
code calls them, and torch's ops as in eager mode.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from graphquant._torch import unset_fake_temporarily
from graphquant.ir.constants import Constants
from graphquant.ir.graph import arguments, has_hints, hint
from graphquant.ir.rows import keeps_rows
from graphquant.ops import OPS, cpu, int8_linear, pack_weight
from graphquant.ops.define import recorded
from graphquant.ops.int8_linear import onednn
from graphquant.ops.numerics import padded, row_stride
from graphquant.ops.timing import times
from graphquant.passes.pack_weights import is_packed_for
from graphquant.passes.policy.gate import Candidate, Verdict
from graphquant.passes.record import Times

MAX_NODES = 100  # of a region to measure
MEASURED = ("cuda", "cpu")  # device types to measure on
NO_KERNELS = "graphquant's CPU kernels cannot run on this machine"


class SpeedGate:
    """Refuses an int8 rewrite that is not faster than the float nodes on random inputs.

    shares  of rows that int8 will compute, of the nodes to be replaced; 1 for those not in it
    """

    def __init__(self, constants: Constants, shares: Mapping[Node, float] | None = None) -> None:
        self._constants = constants
        self._shares = shares or {}

    def __call__(self, candidate: Candidate) -> Verdict:
        site, rewrite, made = candidate
        is_int8 = any(n.target is int8_linear.target for n in made)
        if is_int8 and _device(site.outputs).type == "cpu" and (why := slow_on_cpu()):
            return Verdict(why, final=True)
        times = measure(site.outputs, rewrite.values, made, self._constants)
        if times is None:
            return Verdict()
        share = max(self._shares.get(n, 1.0) for n in site.outputs)
        times = times._replace(int8_us=share * times.int8_us)
        return Verdict(times.refusal, times)


def slow_on_cpu() -> str | None:
    """Why int8 need not be measured on this processor, or None."""
    if cpu.missing() is not None:
        return None if onednn.missing() is None else NO_KERNELS
    return cpu.without_dot()


def _device(nodes: Collection[Node]) -> torch.device:
    found: torch.device = next(iter(nodes)).meta["val"].device
    return found


def measure(
    old: Collection[Node], new: Collection[Node], made: Collection[Node], constants: Constants
) -> Times | None:
    """The times of the subgraphs that compute `old` and `new`; None if there is nothing to measure.

    old   nodes about to be replaced
    new   the nodes that will replace them
    made  all nodes that the rewrite made
    """
    device = _device(old)
    if device.type not in MEASURED or not any(n.target is int8_linear.target for n in made):
        return None  # a float fusion, with fewer launches
    after = _region(new, lambda n: n in made and n not in constants)
    before = _region(
        old,
        lambda n: n.op == "call_function" and n not in constants and n not in after.inputs,
    )
    if any(n.target is int8_linear.target for n in before.nodes):
        return None  # int8 before as well: only its epilogue grows
    if max(len(after.nodes), len(before.nodes)) > MAX_NODES:
        return None
    if not (after.is_sized and before.is_sized):
        return None  # sizes that depend on data
    with unset_fake_temporarily(), torch.inference_mode():
        both = {"float": before.bind(), "int8": after.bind()}
        found = times(f"{before.text}\n->\n{after.text}", device, both)
    if found is None or len(found) != len(both):
        return None
    return Times(found["float"], found["int8"])


class Region(NamedTuple):
    """A subgraph: nodes in graph order, inputs in the order in which they are read (which repeats
    across layers, unlike graph order), and outputs."""

    nodes: list[Node]
    inputs: list[Node]
    outputs: list[Node]

    @property
    def text(self) -> str:
        """A cache key: equal for regions that compute the same on equal sizes and layouts."""
        names = {n: f"%{i}" for i, n in enumerate((*self.inputs, *self.nodes))}
        lines = [f"{names[n]} = {_spec(n.meta['val'])}" for n in self.inputs]
        for n in self.nodes:
            args = torch.fx.node.map_aggregate((n.args, n.kwargs), lambda a: _text_of(a, names))
            lines.append(f"{names[n]} = {n.target}{args}")
        return "\n".join((*lines, ", ".join(names[n] for n in self.outputs)))

    @property
    def is_sized(self) -> bool:
        """Are the sizes of all its values known, at least for the inputs seen at compile time?"""
        return all(has_hints(n.meta["val"]) for n in (*self.inputs, *self.nodes))

    def bind(self) -> Callable[[], object]:
        """A function that runs it on random values, which its first call makes."""
        graph, made = Graph(), dict[Node, Node]()
        for n in self.inputs:
            made[n] = graph.placeholder(n.name)
        for n in self.nodes:
            made[n] = graph.node_copy(n, made.__getitem__)
        graph.output(tuple(made[n] for n in self.outputs))
        module = GraphModule({}, graph)
        values = functools.cache(lambda: [_value_of(n, self.nodes) for n in self.inputs])
        if self.is_ours_on_cpu:
            return functools.partial(replay, functools.cache(lambda: recorded(module, values())))
        return lambda: module(*values())

    @property
    def is_ours_on_cpu(self) -> bool:
        """Does it call nothing but our ops on the CPU, and views of their results?"""
        ours = {op.target for op in OPS.values() if op.has_cpu_kernel}
        return all(
            (n.target in ours and n.all_input_nodes[0].meta["val"].device.type == "cpu")
            or n.target is operator.getitem
            or keeps_rows(n)
            for n in self.nodes
        )


def replay(first: Callable[[], tuple[object, list[Callable[[], object]]]]) -> object:
    """Repeat the calls of our ops that `first`, which is cached, has `recorded`."""
    results, calls = first()
    for call in calls:
        call()
    return results


def _text_of(argument: Any, names: Mapping[Node, str]) -> Any:
    """An argument in a region's text. Floats, such as eps and ranges, do not change the time."""
    if isinstance(argument, Node):
        return names[argument]
    return float if isinstance(argument, float) else argument


def cut_out(nodes: Collection[Node]) -> Region:
    """The region of these nodes, with all of them as outputs."""
    return _region(nodes, lambda n: n in nodes)


def _region(outputs: Collection[Node], inside: Callable[[Node], bool]) -> Region:
    """The region that computes `outputs`, back to the first nodes that are not inside."""
    found: set[Node] = set()
    edge = list(outputs)
    while edge:
        n = edge.pop()
        if len(found) <= MAX_NODES and inside(n):
            edge += [i for i in n.all_input_nodes if i not in found]
            found.add(n)
    nodes = sorted(found)
    read = (*(i for n in nodes for i in n.all_input_nodes), *outputs)
    return Region(nodes, [n for n in dict.fromkeys(read) if n not in found], list(outputs))


def _spec(value: object) -> str:
    if not isinstance(value, Tensor):
        return str(_number(value))
    sizes, strides = _layout(value)
    return f"{value.dtype}{sizes}{strides}"


def _value_of(node: Node, readers: Collection[Node]) -> object:
    """A random value of an input, in the layout in which it is read: packed weights are packed."""
    value = _value(node.meta["val"])
    packed = (n for n in readers if n.target is int8_linear.target and is_packed_for(n))
    if isinstance(value, Tensor) and any(arguments(n).wq is node for n in packed):
        return pack_weight(value)
    return value


def _value(value: object) -> object:
    if not isinstance(value, Tensor):
        return _number(value)
    return random_like(value, *_layout(value))


def _layout(value: Tensor) -> tuple[list[int], list[int]]:
    """Sizes and strides at run time: Inductor makes inputs without contiguous rows contiguous."""
    sizes, strides = ([hint(s) for s in of] for of in (value.shape, value.stride()))
    if sizes and row_stride(torch.empty_strided(sizes, strides, device="meta")) is None:
        strides = list(torch.empty(sizes, device="meta").stride())
    return sizes, strides


def _number(value: object) -> object:
    return hint(value) if isinstance(value, torch.SymInt) else value


def random_like(
    value: Tensor, sizes: Sequence[int] | None = None, strides: Sequence[int] | None = None
) -> Tensor:
    """Random values in this tensor's layout; not zeros, which a GPU multiplies faster. No int32,
    with which kernels address memory (token_index)."""
    if sizes is None or strides is None:
        sizes, strides = ([hint(s) for s in of] for of in (value.shape, value.stride()))
    # filled as flat memory, since expanded tensors cannot be written
    extent = 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    extent = 0 if 0 in sizes else padded(extent)  # packed weights pad their last row
    memory = torch.empty(extent, dtype=value.dtype, device=value.device)
    random = torch.Generator(value.device).manual_seed(0)
    if value.dtype.is_floating_point:
        memory.normal_(generator=random)
    elif value.dtype == torch.bool:
        memory.bernoulli_(generator=random)
    elif value.dtype == torch.int32:  # where rows and sequences are: kernels find none
        memory.fill_(-1)
    else:
        memory.random_(-127, 128, generator=random)
    return memory.as_strided(sizes, strides)
