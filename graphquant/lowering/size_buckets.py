"""Pads dynamic sizes up to buckets, so that few CUDA graphs serve all batches.

A CUDA graph has fixed sizes, so one is recorded for every batch size and length that a model meets.
Where padding is removed and tokens stand in front, kernels skip what is behind the tokens, so more
padding costs little and changes no token. Then sizes are rounded up to 1, 2, 3, 4, 6, 8, 12, ...:

    inputs   padded with values that the padding mask takes for padding
    results  cut to the sizes of the inputs

That tokens do not change is proven by the pass that removes padding. What follows them is compared:
the first calls of a graph also run unpadded. If a result differs (a mean over the batch, a number
computed from a size), the sizes of that graph are not padded any more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import SymInt, Tensor
from torch.fx import Node

from graphquant._torch import (
    SizeGuards,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
    unset_fake_temporarily,
)
from graphquant.ir.captured import Captured
from graphquant.ir.graph import ancestors, hints
from graphquant.ops import token_index
from graphquant.passes.padding.evaluation import Evaluation, Kept, inputs_of, told

log = logging.getLogger(__name__)

DEVICES = ("cuda",)
SHORTEST = 16  # bucket of lengths
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 3e-2}  # relative, else 1e-3
Dims = dict[int, sympy.Symbol]  # dim -> the size that it has


def bucket(n: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, ... (2^k and 1.5 * 2^k) that is not below n."""
    power: int = 1 << max(n - 1, 0).bit_length()
    return power * 3 // 4 if power > 2 and n <= power * 3 // 4 else power


@dataclass(frozen=True)
class _Input:
    """How to pad a tensor input: with which value, and in which dims."""

    fill: float
    dims: Dims


@dataclass
class SizeBuckets:
    """Where the sizes of padding masks are in a graph's inputs and results.

    least    the smallest bucket of each size
    sizes    input -> the size that it is
    inputs   input -> how to pad it
    results  for each result, flattened: its dims to cut, or the size that it is, or None
    symbols  the graph's symbolic inputs, in order
    guards   what the graph needs of their values
    """

    least: Mapping[sympy.Symbol, int]
    sizes: Mapping[int, sympy.Symbol]
    inputs: Mapping[int, _Input]
    results: Sequence[Dims | sympy.Symbol | None]
    symbols: Sequence[int]
    guards: SizeGuards
    _compared: set[sympy.Symbol] = field(default_factory=set)
    _allowed: dict[tuple[Any, ...], bool] = field(default_factory=dict)
    _off: bool = False

    def around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run` with padded inputs and cut results."""

        def padded(*args: Any) -> Any:
            if self._off:
                return run(*args)
            old = {s: args[i] for i, s in self.sizes.items()}
            new = {s: bucket(max(n, self.least[s])) for s, n in old.items()}
            changed = {s for s in old if new[s] != old[s]}
            if not changed or not self._holds(args, new):
                return run(*args)
            given = self._padded(args, new)
            if changed <= self._compared:
                return self._cut(run(*given), old)
            # the memory of a CUDA graph's results is used again by the next run
            want = [t.clone() if isinstance(t, Tensor) else t for t in tree_leaves(run(*args))]
            result = self._cut(run(*given), old)
            if all(map(_alike, tree_leaves(result), want)):
                self._compared |= changed
                return result
            self._off = True
            log.warning(
                "results depend on the batch size or the length beyond the padding mask, so sizes "
                "are not padded to buckets, and a CUDA graph is recorded for each"
            )
            return run(*args)

        return padded

    def _holds(self, args: Sequence[Any], new: Mapping[sympy.Symbol, int]) -> bool:
        """Is the graph valid for the new sizes?"""
        values = tuple(new[self.sizes[i]] if i in self.sizes else args[i] for i in self.symbols)
        if values not in self._allowed:
            self._allowed[values] = self.guards.hold(values)
        return self._allowed[values]

    def _padded(self, args: Sequence[Any], new: Mapping[sympy.Symbol, int]) -> list[Any]:
        given = list(args)
        for i, size in self.sizes.items():
            given[i] = new[size]
        for i, how in self.inputs.items():
            x: Tensor = args[i]
            more = [new[how.dims[d]] - n if d in how.dims else 0 for d, n in enumerate(x.shape)]
            if any(more):
                given[i] = F.pad(x, [n for m in reversed(more) for n in (0, m)], value=how.fill)
        return given

    def _cut(self, result: Any, old: Mapping[sympy.Symbol, int]) -> Any:
        values, spec = tree_flatten(result)
        for i, (value, dims) in enumerate(zip(values, self.results, strict=True)):
            if isinstance(dims, sympy.Symbol):
                values[i] = old[dims]
            elif dims:
                for d, size in dims.items():
                    value = value.narrow(d, 0, old[size])
                # dense, as the model's result is
                values[i] = value if value.is_contiguous() else value.clone()
        return tree_unflatten(values, spec)


def _alike(ours: Any, theirs: Any) -> bool:
    if not isinstance(theirs, Tensor):
        return bool(ours == theirs)
    if ours.shape != theirs.shape:
        return False
    if not theirs.is_floating_point():
        return torch.equal(ours, theirs)
    a, b = (t.double().nan_to_num() for t in (ours, theirs))
    return bool((a - b).norm() <= TOLERANCE.get(theirs.dtype, 1e-3) * b.norm())


def find_size_buckets(captured: Captured) -> tuple[SizeBuckets | None, str]:
    """(where a graph's dynamic sizes can be padded, a note on why not if it needs one)."""
    graph = captured.gm.graph
    inputs = graph.find_nodes(op="placeholder")
    masks = [
        n.args[0]
        for n in graph.find_nodes(op="call_function", target=token_index.target)
        if n.args[1:] == (True,)
    ]
    least = dict(_sizes_of(masks))
    if not least or not any(_device(n) in DEVICES for n in inputs):
        return None, ""
    try:
        return _find(captured, inputs, masks, least), ""
    except Kept as why:
        return None, f"a CUDA graph is recorded for every batch size and length: {why}"


def _find(
    captured: Captured, inputs: Sequence[Node], masks: Sequence[Node], least: dict[Any, int]
) -> SizeBuckets:
    fills = _fills(captured, masks)
    index = {node: i for i, node in enumerate(inputs)}
    sizes: dict[int, sympy.Symbol] = {}
    tensors: dict[int, _Input] = {}
    symbols: dict[int, SymInt] = {}
    for node, i in index.items():
        value = node.meta.get("val")
        if isinstance(value, SymInt):
            symbols[i] = value
            if (size := _size(captured, node, value, least)) is not None:
                sizes[i] = size
        elif isinstance(value, Tensor) and (dims := _dims(captured, node, value, least)):
            tensors[i] = _Input(fills.get(node, 0), dims)
    if not least.keys() <= set(sizes.values()):
        raise Kept("a size of the padding mask is not an input of the graph")
    (output,) = captured.gm.graph.find_nodes(op="output")
    results = [_result(captured, n, least) for n in tree_leaves(output.args[0])]
    return SizeBuckets(
        least, sizes, tensors, results, tuple(symbols), SizeGuards(list(symbols.values()))
    )


def _sizes_of(masks: Iterable[Node]) -> Iterator[tuple[sympy.Symbol, int]]:
    """The dynamic sizes of padding masks [B, S], with the smallest bucket of each."""
    for mask in masks:
        for n, least in zip(mask.meta["val"].shape, (1, SHORTEST), strict=True):
            if isinstance(n, SymInt) and isinstance(n.node.expr, sympy.Symbol):
                yield n.node.expr, least


def _fills(captured: Captured, masks: Sequence[Node]) -> dict[Node, int]:
    """Values of inputs with which every position is padding."""
    found: dict[Node, int] = {}
    for mask in masks:
        read = inputs_of(captured, [mask])
        named = [a for n in sorted(ancestors([mask])) for a in n.args if type(a) is int]
        fill = next((v for v in (0, 1, *named) if _is_padding(captured, mask, read, v)), None)
        if fill is None:
            raise Kept(f"no value of {', '.join(told(captured, n) for n in read)} is padding")
        if any(found.setdefault(n, fill) != fill for n in read):
            raise Kept("two padding masks disagree on what padding is")
    return found


def _is_padding(captured: Captured, mask: Node, read: Sequence[Node], fill: int) -> bool:
    with unset_fake_temporarily(), torch.no_grad():
        given = {
            n: torch.full(hints(n), fill, dtype=n.meta["val"].dtype, device="cpu") for n in read
        }
        return not Evaluation(captured, given)(mask).any()


def _size(
    captured: Captured, node: Node, value: Any, least: Mapping[sympy.Symbol, int]
) -> sympy.Symbol | None:
    """The size that a number is, if any. Raises Kept if it is computed from one."""
    expr = value.node.expr if isinstance(value, SymInt) else sympy.Integer(value)
    if isinstance(expr, sympy.Symbol) and expr in least:
        return expr
    if not least.keys().isdisjoint(expr.free_symbols):
        raise Kept(f"{told(captured, node)} has a size that is computed from others")
    return None


def _dims(captured: Captured, node: Node, value: Tensor, least: Mapping[sympy.Symbol, int]) -> Dims:
    found = {d: _size(captured, node, n, least) for d, n in enumerate(value.shape)}
    return {d: size for d, size in found.items() if size is not None}


def _result(
    captured: Captured, node: Any, least: Mapping[sympy.Symbol, int]
) -> Dims | sympy.Symbol | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    if isinstance(value, Tensor):
        return _dims(captured, node, value, least)
    return _size(captured, node, value, least) if isinstance(value, SymInt) else None


def _device(node: Node) -> str:
    value = node.meta.get("val")
    return value.device.type if isinstance(value, Tensor) else ""
