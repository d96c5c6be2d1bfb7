"""Graph invariants, checked after every pass if GRAPHQUANT_VERIFY=1 and in the tests.

`verifier` records what a captured graph returns, and gives a check for passes to call:

    order       every value is computed before it is read
    values      every fake value has the shape, dtype and device that its node computes
    outputs     number, shapes, dtypes, devices, memory layout and aliases are as captured
    writes      the same inputs are written in place as captured, and no assumed constant is
    linears     every linear in the graph is recorded, and every recorded one is in the graph

A violation raises VerifyError, which names the pass and the node.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg

from graphquant._torch import (
    OpOverload,
    enable_python_dispatcher,
    storage_id,
    tree_leaves,
    tree_map_only,
)
from graphquant.config import verifying
from graphquant.errors import VerifyError
from graphquant.ir.aliases import writes
from graphquant.ir.captured import Captured
from graphquant.ir.contexts import regions
from graphquant.ir.graph import LINEAR, ancestors, arguments, drops_nothing
from graphquant.ops import int8_linear
from graphquant.passes.layout import EAGER
from graphquant.passes.record import Record

Check = Callable[..., None]
"""check(pass name, record=None, taken=()); `taken` are values about to be packed."""
Known = dict[Node, tuple[Any, Any, Any]]
"""Node -> (the key of its inputs, its fake value, the metadata that it was checked against)."""

# a second run would make new unbacked symbols
_UNREPEATABLE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


def verifier(captured: Captured) -> Check:
    """A check of this graph against its present outputs."""
    if not verifying():
        return lambda name, record=None, taken=(): None
    graph = captured.gm.graph
    values, _ = _infer(captured, "capture")
    outputs = _outputs(captured, values)
    written_inputs = _written_inputs(captured, values, _written(graph, values))
    seen = list(graph.nodes)  # of the last graph that was found to be right

    def check(name: str, record: Record | None = None, taken: Collection[Node] = ()) -> None:
        nonlocal seen
        nodes = list(graph.nodes)
        _check_order(graph, name)
        if record is not None:
            _check_linears(graph, record, name)
        values, changed = _infer(captured, name)
        if not changed and nodes == seen and not taken:
            return
        _check_outputs(outputs, _outputs(captured, values), name)
        written = _written(graph, values)
        _check_constants(graph, taken, values, written, name)
        if now := _written_inputs(captured, values, written) ^ written_inputs:
            told = ", ".join(sorted(now))
            raise VerifyError(f"after {name}: a write in place to {told} was lost or added")
        seen = nodes

    return check


def _check_order(graph: Graph, name: str) -> None:
    defined: set[Node] = set()
    for node in graph.nodes:
        for value in node.all_input_nodes:
            if value not in defined:
                raise VerifyError(f"after {name}: {node.name} reads {value.name} before it is made")
        defined.add(node)


# --- values --------------------------------------------------------------------------------------


def _infer(captured: Captured, name: str) -> tuple[dict[Node, Any], bool]:
    """(the fake value of every node, recomputed from the graph's inputs; has anything changed since
    the last call). Raises VerifyError for a value that differs from the node's metadata.

    Unchanged nodes are not computed again (`Captured.inferred`).
    """
    known: Known = captured.inferred
    values: dict[Node, Any] = {}
    changed = computing = False
    with ExitStack() as quiet:
        for node, region in regions(captured.gm.graph, captured.grad_enabled):
            inputs = [values[i] for i in node.all_input_nodes]
            eager, said = node.meta.get(EAGER), node.meta.get("val")
            made_of = (node.target, node.args, node.kwargs, *map(id, inputs), region, id(eager))
            before, value, held_to = known.get(node, (None, None, None))
            if before != made_of:
                if not computing:  # entering costs more than all else if nothing has changed
                    quiet.enter_context(_quietly(captured))
                changed = computing = True
                with ExitStack() as entered:
                    for args in region.autocast:
                        entered.enter_context(torch.autocast(*args))
                    value = _as_before(_computed(captured, node, values, name), inputs, value)
                _check_value(node, value, name)
                if eager is not None:  # the layout that restore_layouts will give it
                    value = eager
            if before != made_of or held_to is not said:
                changed = True
                _check_value(node, value, name)
                known[node] = made_of, value, said
            values[node] = value
    return values, changed


def _as_before(value: Any, inputs: list[Any], before: Any) -> Any:
    """`before` if it equals `value` in layout and neither aliases an input, so that nodes that read
    it stay cached."""
    if not isinstance(value, Tensor) or not isinstance(before, Tensor):
        return value
    theirs = _memories(inputs)
    its_own = _memory(value) not in theirs and _memory(before) not in theirs
    return before if its_own and _layout(value) == _layout(before) else value


def _computed(captured: Captured, node: Node, values: dict[Node, Any], name: str) -> Any:
    said = node.meta.get("val")
    if node.op == "get_attr" and getattr(said, "fake_mode", None) is not captured.fake_mode:
        held = operator.attrgetter(str(node.target))(captured.gm)
        is_tensor = isinstance(held, Tensor)
        return captured.fake_mode.from_tensor(held, static_shapes=True) if is_tensor else said
    if not _is_repeatable(node):
        return said
    if drops_nothing(node):
        return values[node.all_input_nodes[0]]
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    if writes(node):  # it may change the sizes of its inputs
        args, kwargs = _aliases((args, kwargs))
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as why:
        raise VerifyError(f"after {name}: {node.name} cannot be computed: {why}") from why


def _check_value(node: Node, value: Any, name: str) -> None:
    said = node.meta.get("val", value)
    for got, want in zip(tree_leaves(value), tree_leaves(said), strict=False):
        if isinstance(got, Tensor) and (not isinstance(want, Tensor) or _kind(got) != _kind(want)):
            told = _kind(want) if isinstance(want, Tensor) else want
            raise VerifyError(
                f"after {name}: the fake value of {node.name} is {told}, "
                f"but it computes {_kind(got)}"
            )


@contextmanager
def _quietly(captured: Captured) -> Iterator[None]:
    """Fake mode without new guards on symbolic sizes."""
    with ExitStack() as entered:
        if (shapes := captured.fake_mode.shape_env) is not None:
            entered.enter_context(shapes.suppress_guards())
            entered.enter_context(shapes.ignore_fresh_unbacked_symbols())
        entered.enter_context(torch.no_grad())
        entered.enter_context(captured.fake_mode)
        entered.enter_context(enable_python_dispatcher())  # as graph.fake_result does
        yield


def _is_repeatable(node: Node) -> bool:
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, OpOverload) or "val" not in node.meta:
        return False
    # a second run would make new unbacked symbols
    unknown = any(tag in node.target.tags for tag in _UNREPEATABLE)
    return not unknown and not any(map(_is_unbacked, tree_leaves(node.meta["val"])))


def _is_unbacked(value: Any) -> bool:
    symbolic = isinstance(value, (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool))
    return symbolic and bool(free_unbacked_symbols(value))


def _aliases(value: Any) -> Any:
    """Aliases of the tensors, whose sizes can change independently."""
    return tree_map_only(Tensor, Tensor.detach, value)


def _kind(value: Tensor) -> tuple[Any, ...]:
    return tuple(map(_number, value.shape)), value.dtype, value.device


def _number(size: int | torch.SymInt) -> int | str:
    """A canonical form of a size: equal sizes are one int or one text."""
    return size if isinstance(size, int) else str(sympy.expand(size.node.expr))


# --- outputs -------------------------------------------------------------------------------------


def _outputs(captured: Captured, values: dict[Node, Any]) -> list[tuple[Node | None, Any]]:
    """(node, description) of each output. That of a tensor has its layout, and the first input or
    output that shares its memory."""
    owners: dict[int, str] = {}
    for node, value in values.items():
        if node.op in ("placeholder", "get_attr") and isinstance(value, Tensor):
            owners.setdefault(_memory(value), node.name)
    found: list[tuple[Node | None, Any]] = []
    for i, leaf in enumerate(tree_leaves(captured.gm.graph.output_node().args)):
        value = values[leaf] if isinstance(leaf, Node) else leaf
        seen: Any = str(value)
        if isinstance(value, Tensor):
            owner = owners.setdefault(_memory(value), f"output {i}")
            seen = (*_layout(value), f"in the memory of {owner}")
        found.append((leaf if isinstance(leaf, Node) else None, seen))
    return found


def _memory(value: Tensor) -> int:
    return storage_id(value) if value.layout is torch.strided else id(value)


def _layout(value: Tensor) -> tuple[Any, ...]:
    """Kind, strides of dims whose size is not 1, storage offset and storage size."""
    if value.layout is not torch.strided or _number(value.numel()) == 0:
        return _kind(value)
    strides = (
        _number(s) for s, n in zip(value.stride(), value.shape, strict=True) if _number(n) != 1
    )
    size = value.untyped_storage().nbytes()
    begins = _number(value.storage_offset())
    return *_kind(value), tuple(strides), begins, f"{_number(size)} bytes"


def _check_outputs(before: list[Any], now: list[Any], name: str) -> None:
    if len(before) != len(now):
        raise VerifyError(f"after {name}: {len(now)} outputs, {len(before)} were captured")
    for i, ((_, want), (node, got)) in enumerate(zip(before, now, strict=True)):
        if want != got:
            raise VerifyError(
                f"after {name}: output {i}, {node and node.name}, is {got}, captured was {want}"
            )


# --- constants and linears -----------------------------------------------------------------------


def _check_constants(
    graph: Graph,
    taken: Iterable[Node],
    values: dict[Node, Any],
    written: dict[int, Node],
    name: str,
) -> None:
    if not written:
        return
    weights = {n: _weights(n) for n in graph.nodes}
    for reader, read in (*weights.items(), *((n, [n]) for n in taken)):
        for value in sorted(ancestors(read)):
            if by := next((written[m] for m in _memories(values[value]) if m in written), None):
                raise VerifyError(
                    f"after {name}: {reader.name} takes {value.name} for constant, which "
                    f"{by.name} writes in place"
                )


def _written(graph: Graph, values: dict[Node, Any]) -> dict[int, Node]:
    """Storages that are written in place -> the writing node."""
    return {m: node for node in graph.nodes for v in writes(node) for m in _memories(values[v])}


def _written_inputs(
    captured: Captured, values: dict[Node, Any], written: dict[int, Node]
) -> set[str]:
    inputs = {*captured.gm.graph.find_nodes(op="placeholder"), *captured.parameters}
    # unread parameters may be gone
    return {n.name for n in inputs & values.keys() if {*_memories(values[n])} & written.keys()}


def _memories(value: Any) -> list[int]:
    return [_memory(t) for t in tree_leaves(value) if isinstance(t, Tensor)]


def _weights(linear: Node) -> list[Node]:
    """The weights and bias of a rewritten linear."""
    if linear.target is int8_linear.target:
        made = arguments(linear)
        values = [made.wq, made.w_scale, made.w_sum, made.bias]
    elif _is_ours(linear):
        values = [arguments(linear).weight, arguments(linear).bias]
    else:
        return []
    return [v for v in values if isinstance(v, Node)]


def _check_linears(graph: Graph, record: Record, name: str) -> None:
    carriers = record.linears()
    for node in graph.nodes:
        if node.target is LINEAR and node not in carriers and not _is_ours(node):
            raise VerifyError(f"after {name}: {node.name} is a linear that is not on record")
    for node, paths in carriers.items():
        if node._erased:
            told = ", ".join(paths)
            raise VerifyError(f"after {name}: {node.name} is gone, which computed {told}")


def _is_ours(node: Node) -> bool:
    return node.target is LINEAR and node.meta.get("graphquant") is not None
