"""Queries on FX graphs and nodes, and dead-code elimination.

The graph is pre-dispatch ATen: `aten.linear`, `aten.layer_norm`, `aten.gelu` and
`aten.scaled_dot_product_attention` are single nodes, parameters are inputs (or attributes), and
every node carries a fake tensor in `meta["val"]`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from graphquant._torch import (
    FakeTensorMode,
    HigherOrderOperator,
    OpOverload,
    enable_python_dispatcher,
    statically_known_true,
)
from graphquant.ir.contexts import region_of, sets_state

aten = torch.ops.aten

LINEAR = aten.linear.default
SDPA = aten.scaled_dot_product_attention.default
MODULE = "graphquant_module"  # meta of a node: the path of the module that calls it (paths.py)
LITERAL = "graphquant_literal"  # meta of a get_attr that is not a parameter: its tensor


def is_call(value: object, *targets: Any) -> TypeGuard[Node]:
    """Is this a node that calls one of these functions?"""
    return isinstance(value, Node) and value.op == "call_function" and value.target in targets


def full_args(node: Node) -> tuple[Any, ...]:
    """All arguments in schema order, defaults filled in."""
    assert isinstance(node.target, OpOverload), node
    return tuple(
        node.args[i] if i < len(node.args) else node.kwargs.get(a.name, a.default_value)
        for i, a in enumerate(node.target._schema.arguments)
    )


def arguments(node: Node) -> SimpleNamespace:
    """All arguments by their names in the schema, defaults filled in."""
    assert isinstance(node.target, OpOverload), node
    names = [a.name for a in node.target._schema.arguments]
    return SimpleNamespace(**dict(zip(names, full_args(node), strict=True)))


def with_arguments(node: Node, **changed: Any) -> tuple[Any, ...]:
    """All arguments in schema order, with these replaced. The last ones are left out where their
    default is None and stands, as torch does."""
    assert isinstance(node.target, OpOverload), node
    schema, named = node.target._schema.arguments, vars(arguments(node))
    assert changed.keys() <= named.keys(), f"{node.target} has no {changed.keys() - named.keys()}"
    args = list((named | changed).values())
    while args[-1] is None and schema[len(args) - 1].has_default_value():
        args.pop()
    return tuple(args)


def operand(value: Node, reader: Node) -> str:
    """The name of the argument as which this reader takes the value: "wq"."""
    for name, given in vars(arguments(reader)).items():
        if value in nodes_in(given):
            return name
    raise AssertionError(f"{reader.name} does not read {value.name}")


def nodes_in(argument: Any) -> list[Node]:
    """The nodes in an argument, which may be a list of them, in order."""
    found: list[Node] = []
    map_arg(argument, found.append)
    return found


def fake_result(mode: FakeTensorMode, target: Any, args: Any, kwargs: Any) -> Any:
    """The fake result of a call, from the fake values of its arguments.

    With the Python dispatcher, as in tracing: some of torch's C++ composites (matmul in torch 2.11)
    ask for sizes that are symbols here.
    """
    args, kwargs = map_arg((args, kwargs), lambda n: n.meta["val"])
    with mode, enable_python_dispatcher():
        return target(*args, **kwargs)


def new_call(graph: Graph, mode: FakeTensorMode, target: Any, *args: Any) -> Node:
    """Add target(*args) at the graph's insertion point, with its fake result."""
    made = graph.call_function(target, args)
    made.meta["val"] = fake_result(mode, target, args, {})
    return made


def sdpa_scale(node: Node) -> Any:
    """The scale of an SDPA: as it is given, which may be a symbol, or the default."""
    call = arguments(node)
    return shape(call.query)[-1] ** -0.5 if call.scale is None else call.scale


def is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def shape(node: Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Are these sizes equal? Sizes that depend on data are if that is known without looking."""

    def same(m: Any, n: Any) -> bool:
        unknown = any(isinstance(s, torch.SymInt) and s.node.hint is None for s in (m, n))
        return statically_known_true(m == n) if unknown else bool(m == n)

    return len(a) == len(b) and all(map(same, a, b))


def dtype(node: Node) -> torch.dtype:
    result: torch.dtype = node.meta["val"].dtype
    return result


def hint(size: int | torch.SymInt) -> int:
    """The size seen at compile time. Adds no guard; 0 where there is none (unbacked or ragged)."""
    return int(_hint(size) or 0) if isinstance(size, torch.SymInt) else int(size)


def hints(node: Node) -> tuple[int, ...]:
    """The sizes of the node's value that were seen at compile time."""
    return tuple(map(hint, shape(node)))


def has_hints(value: object) -> bool:
    """Was every size of this value seen at compile time? For numbers: the number itself."""
    sizes = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
    return all(not isinstance(n, torch.SymInt) or _hint(n) is not None for n in sizes)


def set_hint(size: torch.SymInt, seen: int) -> None:
    """Tell `hint` a size that depends on data."""
    _told.setdefault(size.node.shape_env, {})[size.node.expr] = sympy.Integer(seen)


# of sizes that depend on data: torch has no hints of those
_told: WeakKeyDictionary[Any, dict[Any, int]] = WeakKeyDictionary()


def _hint(size: torch.SymInt) -> int | None:
    if isinstance(seen := size.node.hint, int):
        return seen
    known = _told.get(size.node.shape_env) if hasattr(size.node, "shape_env") else None
    if not known:
        return None  # also the ragged size of a nested tensor
    value = size.node.expr.xreplace(known)
    return int(value) if value.is_number else None


def between(out: Node, x: Node) -> list[Node]:
    """The nodes on all paths from x to out, without these two."""
    found: dict[Node, bool] = {x: True, out: False}

    def from_x(node: Node) -> bool:
        if node not in found:
            inputs = node.all_input_nodes if node > x else []
            found[node] = sum(map(from_x, inputs)) > 0  # all of them, not up to the first
        return found[node]

    for i in out.all_input_nodes:
        from_x(i)
    return [n for n, is_ in found.items() if is_ and n is not x]


def ancestors(
    nodes: Iterable[Node], cut: Collection[Node] = (), *, of_sizes: bool = True
) -> set[Node]:
    """These nodes and all that they are computed from, back to those in `cut`.

    of_sizes  also the tensors of which only a size is read
    """
    found: set[Node] = set()
    edge = list(nodes)
    while edge:
        node = edge.pop()
        if node not in found:
            found.add(node)
            if node not in cut:
                edge += node.all_input_nodes if of_sizes else read_by_value(node)
    return found


def read_by_value(node: Node) -> list[Node]:
    """The inputs of a node, but for a tensor of which it reads a size only."""
    return [] if node.target is aten.sym_size.int else node.all_input_nodes


def only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


_DROPOUTS = frozenset(
    getattr(aten, f"{kind}dropout{in_place}").default
    for kind in ("", "feature_", "alpha_")
    for in_place in ("", "_")
)


def drops_nothing(node: Node) -> bool:
    """A dropout that returns its input itself, although its fake value is a copy."""
    if not is_call(node, *_DROPOUTS):
        return False
    _, p, train = full_args(node)
    return not train or p == 0


def is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def draws_nothing(node: Node) -> bool:
    """Attention without dropout, although its op is tagged as random."""
    return node.target is SDPA and not arguments(node).dropout_p


def autocast_at(node: Node) -> ExitStack:
    """The autocast regions of a node, entered: new fake values get the dtypes of a real run."""
    with ExitStack() as opened:
        for args in region_of(node).autocast:
            opened.enter_context(torch.autocast(*args))
        return opened.pop_all()


def is_impure(node: Node) -> bool:
    """Does this node do more than compute its value? Then it stays, even without users.

    Node.is_impure misses the contexts that are kept, and some ops that return nothing.
    """
    if node.is_impure() or sets_state(node):
        return True
    if isinstance(node.target, HigherOrderOperator):
        return "val" in node.meta and node.meta["val"] is None
    return isinstance(node.target, OpOverload) and not node.target._schema.returns


def drop_dead_code(graph: Graph) -> None:
    """Erase nodes without users; of impure ones, those that only draw random numbers."""

    def stays(node: Node) -> bool:
        return is_impure(node) and not (is_random(node) and not node.target._schema.is_mutable)  # type: ignore[union-attr]

    graph.eliminate_dead_code(stays)


def readers(node: Node) -> str:
    """The users of this value, for a message: "add, scaled_dot_product_attention"."""
    names = dict.fromkeys(
        "the output"
        if u.op == "output"
        else getattr(u.target, "__name__", str(u.target)).split(".")[0]
        for u in node.users
    )
    return ", ".join(names) or "nothing"


def described(node: Node, names: Mapping[Node, str]) -> str:
    """What a value is, for a message: "bias" or "the result of gelu in encoder.layers.0"."""
    if node in names:
        return names[node]
    if node.op != "call_function":
        return "an input of the model"
    op = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    path = module_path(node)
    return f"the result of {op} in {path}" if path else f"the result of {op}"


def module_path(node: Node) -> str:
    """The path of the module that calls this, "encoder.layers.0.mlp"; "" if not known."""
    return str(node.meta.get(MODULE, ""))


def calls(graph: Graph, wanted: Callable[[Node], bool]) -> Iterator[Node]:
    """The live nodes for which `wanted` holds, in order. The graph may change in between."""
    for node in list(graph.nodes):
        if not node._erased and node.op == "call_function" and wanted(node):
            yield node
