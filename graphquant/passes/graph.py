"""Questions about a graph. Nothing here changes one.

The graph is pre-dispatch ATen: `aten.linear`, `aten.layer_norm`, `aten.gelu` and
`aten.scaled_dot_product_attention` are single nodes, parameters are inputs (or attributes), and
every node carries a fake tensor in `meta["val"]`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from graphquant.passes.regions import region_of, regions, sets_state

aten = torch.ops.aten

LINEAR = aten.linear.default
SDPA = aten.scaled_dot_product_attention.default
RESIDUAL = 7  # among the arguments of int8_linear
MODULE = "graphquant_module"  # meta of a node: the path of the module that calls it (paths.py)
LITERAL = "graphquant_literal"  # meta of an attribute that is no parameter: its tensor

CASTS = frozenset(
    {
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten._to_copy.default,
        aten.type_as.default,
    }
)

# Casts between these are no more than rounding beside int8's steps. Float8's steps are coarser.
ROUND_FINELY = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})

# Ops without tensors among their inputs that make the same tensor at every call.
FACTORIES = frozenset(
    {
        aten.arange.default,
        aten.arange.start,
        aten.arange.start_step,
        aten.eye.default,
        aten.eye.m,
        aten.full.default,
        aten.linspace.default,
        aten.logspace.default,
        aten.ones.default,
        aten.scalar_tensor.default,
        aten.tril_indices.default,
        aten.triu_indices.default,
        aten.zeros.default,
    }
)
UNSET = frozenset({aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default})

SIZED_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})

# Views that may keep every row (last dim) whole; `keeps_rows` decides for one node.
ROW_VIEWS = SIZED_VIEWS | frozenset(
    {
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.transpose.int,
        aten.permute.default,
        aten.contiguous.default,
        aten.clone.default,
    }
)


def is_call(value: object, *targets: Any) -> TypeGuard[Node]:
    """Is this a node that calls one of these functions?"""
    return isinstance(value, Node) and value.op == "call_function" and value.target in targets


def full_args(node: Node) -> tuple[Any, ...]:
    """All arguments in schema order, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload), node
    return tuple(
        node.args[i] if i < len(node.args) else node.kwargs.get(a.name, a.default_value)
        for i, a in enumerate(node.target._schema.arguments)
    )


def operand(value: Node, reader: Node) -> str:
    """What this reader of the value calls it: "wq"."""
    assert isinstance(reader.target, torch._ops.OpOverload), reader
    for argument, given in zip(reader.target._schema.arguments, full_args(reader), strict=True):
        if value in nodes_in(given):
            return argument.name
    raise AssertionError(f"{reader.name} does not read {value.name}")


def nodes_in(argument: Any) -> list[Node]:
    """The nodes in an argument, which may be a list of them, in order."""
    found: list[Node] = []
    map_arg(argument, found.append)
    return found


def fake_result(mode: FakeTensorMode, target: Any, args: Any, kwargs: Any) -> Any:
    """What a call computes, as a fake value, from the fake values of its arguments.

    With the Python dispatcher, as in tracing: some of torch's C++ composites (matmul in torch 2.11)
    ask for sizes that are symbols here.
    """
    args, kwargs = map_arg((args, kwargs), lambda n: n.meta["val"])
    with mode, enable_python_dispatcher():
        return target(*args, **kwargs)


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Do two fake values lie in memory alike: sizes, strides, offset, and how much there is of it?

    Of sizes that are symbols: only what is known without a guard.
    """
    return a.dim() == b.dim() and all(
        statically_known_true(m == n) for m, n in zip(_layout(a), _layout(b), strict=True)
    )


def _layout(value: Tensor) -> tuple[Any, ...]:
    storage = value.untyped_storage().nbytes() if _storage(value) is not None else 0
    return (*value.shape, *value.stride(), value.storage_offset(), storage)


def is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def shape(node: Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def dtype(node: Node) -> torch.dtype:
    result: torch.dtype = node.meta["val"].dtype
    return result


def hint(size: int | torch.SymInt) -> int:
    """The size seen at compile time. Adds no guard; 0 where torch has none (unbacked or ragged)."""
    if isinstance(size, torch.SymInt):
        seen = size.node.hint
        return seen if isinstance(seen, int) else 0  # the ragged size of a nested tensor is none
    return int(size)


def rows(node: Node) -> int:
    """How many rows (product of all dims but the last) the node's value had at compile time."""
    total = 1
    for size in shape(node)[:-1]:
        total *= hint(size)
    return total


def width(node: Node) -> int:
    """The size of the last dim of the node's value at compile time; 1 where it has none."""
    return hint(*shape(node)[-1:] or (1,))


def is_widening(node: Node) -> bool:
    """A cast to a type that holds every value of the one before: it changes none."""
    if not is_float_cast(node):
        return False
    old, new = torch.finfo(dtype(node.all_input_nodes[0])), torch.finfo(dtype(node))
    return new.max >= old.max and new.eps <= old.eps and new.smallest_normal <= old.smallest_normal


def is_float_cast(node: object) -> TypeGuard[Node]:
    """A cast that rounds no further than int8 does: between ROUND_FINELY, on one device."""
    if not is_call(node, *CASTS):
        return False
    old, new = node.all_input_nodes[0].meta["val"], node.meta["val"]
    return {old.dtype, new.dtype} <= ROUND_FINELY and old.device == new.device


def overflowing(value: Node, producer: Node, given: torch.dtype) -> Node | None:
    """The cast between a producer and this value, made of it by views and casts, that turns finite
    numbers to inf: numbers which `given` can hold."""
    found = None
    while value is not producer:
        source = value.all_input_nodes[0]
        if is_float_cast(value) and torch.finfo(dtype(value)).max < torch.finfo(given).max / 2:
            found = value  # bfloat16's maximum is float32's but for rounding
        value = source
    return found


def keeps_rows(node: Node) -> bool:
    """A view or copy whose rows (slices along the last dim) are its input's rows."""
    if not is_call(node, *ROW_VIEWS):
        return False
    before, after = shape(node.all_input_nodes[0]), shape(node)
    widths = before[-1:] + after[-1:]
    if not all(isinstance(w, int) for w in widths) or len(set(widths)) != 1 or len(widths) != 2:
        return False
    last = len(before) - 1
    if node.target is aten.transpose.int:
        return last not in (node.args[1] % len(before), node.args[2] % len(before))  # type: ignore[operator]
    if node.target is aten.permute.default:
        return bool(node.args[1][-1] % len(before) == last)  # type: ignore[index, operator]
    if node.target in (aten.unflatten.int, aten.squeeze.dim):
        return last != node.args[1] % len(before)  # type: ignore[operator]
    if node.target is aten.squeeze.dims:
        return last not in [d % len(before) for d in node.args[1]]  # type: ignore[operator, union-attr]
    return True


def origin(node: Node, found: Callable[[Node], object]) -> tuple[Node, list[Node]]:
    """Walk up through row-keeping views and casts that hardly round: (producer, views in data
    order).

    `found(node)`: is this one it already? A norm that was spelled out may end in a cast.
    """
    views: list[Node] = []
    while not found(node) and (keeps_rows(node) or is_float_cast(node)):
        if not is_float_cast(node):
            views.append(node)
        node = node.all_input_nodes[0]
    return node, views[::-1]


def between(out: Node, x: Node) -> list[Node]:
    """What is computed on the way from x to out, without these two."""
    found: dict[Node, bool] = {x: True, out: False}

    def from_x(node: Node) -> bool:
        if node not in found:
            inputs = node.all_input_nodes if node > x else []
            found[node] = sum(map(from_x, inputs)) > 0  # all of them, not up to the first
        return found[node]

    for i in out.all_input_nodes:
        from_x(i)
    return [n for n, is_ in found.items() if is_ and n is not x]


def only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def leads_only_to(node: Node, goal: Node) -> bool:
    """Is every use of this value, through row-keeping views and casts, an argument of `goal`?"""
    return all(
        user is goal or ((keeps_rows(user) or is_float_cast(user)) and leads_only_to(user, goal))
        for user in node.users
    )


class Constants:
    """Which nodes depend on parameters and buffers only. `roots` are those themselves.

    What the graph writes to while it runs is no constant, under whatever name: it has one value
    before the write and another after it, and the next run starts from that one.

    What numbers make (LITERAL, FACTORIES) may take part, but alone it is no weight: a packed weight
    belongs to its parameters.
    """

    def __init__(self, roots: Iterable[Node]) -> None:
        self.roots = frozenset(roots)
        self._written = {
            n for graph in {r.graph for r in self.roots} for n in written_in_place(graph)
        }
        self._fixed = {root: root not in self._written for root in self.roots}
        self._rooted = set(self.roots)

    def __contains__(self, node: object) -> bool:
        return isinstance(node, Node) and self.is_fixed(node) and node in self._rooted

    def is_fixed(self, node: Node) -> bool:
        """The same at every call, as long as the parameters are?"""
        if node not in self._fixed:
            inputs = node.all_input_nodes
            self._fixed[node] = LITERAL in node.meta or (
                node.op == "call_function"
                and (bool(inputs) or node.target in FACTORIES)
                and node.target not in UNSET
                and node not in self._written
                and not is_impure(node)
                and not is_random(node)
                and all(map(self.is_fixed, inputs))
            )
            if any(i in self._rooted for i in inputs):
                self._rooted.add(node)
        return self._fixed[node]

    def roots_of(self, node: Node) -> list[Node]:
        """The parameters a constant is computed from, in the order they are read."""
        seen: set[Node] = set()
        found, edge = [], [node]
        while edge:
            value = edge.pop()
            if value not in seen:
                seen.add(value)
                if value in self.roots:
                    found.append(value)
                else:
                    edge += reversed(value.all_input_nodes)
        return found

    def made_from(self, node: Node) -> list[Node]:
        """A constant and all that it is computed from."""
        found, edge = {node: None}, [node]
        for value in edge:
            if value not in self.roots:
                fresh = [i for i in value.all_input_nodes if i not in found]
                found |= dict.fromkeys(fresh)
                edge += fresh
        return list(found)

    def written_in(self, node: Node) -> Node | None:
        """What the graph writes to, if that is why this value is no constant: a parameter, or a
        value that is made of such."""
        edge, seen = [node], {node}
        for value in edge:
            if value not in self.roots and (value.op != "call_function" or is_random(value)):
                return None
            fresh = [i for i in value.all_input_nodes if not self.is_fixed(i) and i not in seen]
            seen.update(fresh)
            edge += fresh
        return min((n for n in edge if n in self._written), default=None)


_DROPOUTS = frozenset(
    getattr(aten, f"{kind}dropout{in_place}").default
    for kind in ("", "feature_", "alpha_")
    for in_place in ("", "_")
)


def drops_nothing(node: Node) -> bool:
    """A dropout that returns what it is given, itself: fake values say that it is a copy."""
    if not is_call(node, *_DROPOUTS):
        return False
    _, p, train = full_args(node)
    return not train or p == 0


def is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def writes(node: Node) -> list[Node]:
    """The arguments whose memory this node writes to."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return _written_inside(node)
    if not isinstance(node.target, torch._ops.OpOverload) or node.target in _WRITES_NO_VALUE:
        return []
    schema, arguments = node.target._schema, full_args(node)
    named = {a.name: value for a, value in zip(schema.arguments, arguments, strict=True)}
    if schema.is_mutable:
        mutable = [a for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        return [n for a in mutable for n in nodes_in(named[a.name])]
    if any(named.get(flag) is True for flag in _UPDATES_STATISTICS):
        return [n for name in _STATISTICS for n in nodes_in(named.get(name))]
    return []


_WRITES_NO_VALUE = frozenset({aten.detach_.default})  # it changes what autograd knows

# batch_norm, instance_norm and their kin update these without a word of it in their schemas
_STATISTICS = ("running_mean", "running_var")
_UPDATES_STATISTICS = ("training", "train", "use_input_stats")


def _written_inside(node: Node) -> list[Node]:
    """What a higher-order op writes to: all that it reads, if any of its graphs writes at all."""
    root = node.graph.owning_module
    read = [n for n in node.all_input_nodes if is_tensor(n)]
    names = [n.target for n in node.all_input_nodes if n.op == "get_attr"]
    inner = [g for name in names if isinstance(g := getattr(root, str(name), None), GraphModule)]
    if any(writes(n) for g in inner for n in g.graph.nodes):
        return read
    return read if "mutation" in node.target.name() else []  # type: ignore[union-attr]  # Triton's


def memory(node: Node) -> frozenset[int]:
    """The storages in which the value of a node lies. Empty where none is known."""
    return memory_of(node.meta.get("val"))


def memory_of(value: object) -> frozenset[int]:
    """The storages of a fake value, or of several."""
    values = [value] if isinstance(value, Tensor) else tree_leaves(value)
    return frozenset(at for v in values if (at := _storage(v)) is not None)


def _storage(value: object) -> int | None:
    if not isinstance(value, Tensor):
        return None
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors and subclasses have none
        return None


def may_alias(node: Node) -> list[Node]:
    """The inputs whose memory this node's value may share.

    What its fake value lies in says so, and the schema: einsum, meshgrid or broadcast_tensors
    return views that their schemas do not declare; and a reshape that copied when the model was
    traced may return a view once a rule has changed how its input lies in memory.
    """
    if node.op != "call_function":
        return []
    declared: list[Node] = []
    if isinstance(node.target, torch._ops.OpOverload):
        for argument, given in zip(node.target._schema.arguments, full_args(node), strict=True):
            if argument.alias_info is not None:
                declared += nodes_in(given)
    elif node.target is operator.getitem:
        declared = node.all_input_nodes
    own = memory(node)
    return [i for i in node.all_input_nodes if i in declared or not own.isdisjoint(memory(i))]


def families(graph: Graph) -> Callable[[Node], Node]:
    """Values that may share memory have one head."""
    family: dict[Node, Node] = {}
    first: dict[int, Node] = {}

    def head(n: Node) -> Node:
        while n in family:
            n = family[n]
        return n

    for node in graph.nodes:
        here = (first.setdefault(at, node) for at in memory(node))  # inputs share memory as well
        for other in (*may_alias(node), *here):
            if head(node) is not head(other):
                family[head(node)] = head(other)
    return head


def written_in_place(graph: Graph) -> set[Node]:
    """Every value whose memory some node of the graph writes to, through any alias of it."""
    targets = [n for node in graph.nodes for n in writes(node)]
    if not targets:
        return set()
    head = families(graph)
    written = {head(n) for n in targets}
    return {n for n in graph.nodes if head(n) in written}


def leaving(graph: Graph) -> set[Node]:
    """Every value whose memory the caller gets to see, through any alias of it."""
    head = families(graph)
    returned = {head(n) for n in graph.output_node().all_input_nodes}
    return {n for n in graph.nodes if head(n) in returned}


def needs_gradient(graph: Graph, differentiable: Iterable[Node], grad_enabled: bool) -> set[Node]:
    """Values through which a gradient can flow back to one of the differentiable inputs."""
    found = set(differentiable)
    if not found:
        return found
    head = families(graph)
    for node, region in regions(graph, grad_enabled):
        if (
            region.records
            and node.op == "call_function"
            and node.target is not aten.detach.default
            and any(i in found for i in node.all_input_nodes)
            and _can_need_gradient(node)
        ):
            found.add(node)
        if node in found and (written := {head(n) for n in writes(node)}):
            # an in-place write passes the gradient on to what it wrote, whatever its name
            found |= {n for n in graph.nodes if head(n) in written}
    return found


def _can_need_gradient(node: Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return value.is_floating_point() or value.is_complex()
    return not isinstance(value, (int, torch.SymInt, torch.SymFloat, torch.SymBool, bool, float))


def autocast_at(node: Node) -> ExitStack:
    """The autocast regions that a node stands in: new fake values get the types of a real run."""
    with ExitStack() as opened:
        for args in region_of(node).autocast:
            opened.enter_context(torch.autocast(*args))
        return opened.pop_all()


def is_impure(node: Node) -> bool:
    """Does this node do more than compute its value? Then it stays, read or not.

    torch's own answer knows neither the contexts that are kept nor every op that returns nothing.
    """
    if node.is_impure() or sets_state(node):
        return True
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return "val" in node.meta and node.meta["val"] is None
    return isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns


def drop_dead_code(graph: Graph) -> None:
    """Erase what nobody reads and what does nothing but to draw random numbers."""

    def stays(node: Node) -> bool:
        return is_impure(node) and not (is_random(node) and not node.target._schema.is_mutable)  # type: ignore[union-attr]

    graph.eliminate_dead_code(stays)


def readers(node: Node) -> str:
    """Who reads this value, for a sentence: "add, scaled_dot_product_attention"."""
    names = dict.fromkeys(
        "the output"
        if u.op == "output"
        else getattr(u.target, "__name__", str(u.target)).split(".")[0]
        for u in node.users
    )
    return ", ".join(names) or "nothing"


def described(node: Node, names: Mapping[Node, str]) -> str:
    """What a value is, for a sentence: "bias" or "the result of gelu in encoder.layers.0"."""
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
