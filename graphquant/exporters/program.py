"""A rewritten model as an ExportedProgram with int8 weights in its buffers and no float ones.

The rewritten graph becomes a module that owns its packed weights, and torch.export exports that
module: the result is an ordinary program, with torch's own checks of its inputs. On a CPU its int8
weights are in the order in which the kernels read them (ops/pack_weight); `unpack_weights` is for
whatever else reads weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from graphquant._torch import finite, tree_leaves
from graphquant.capture.aten import from_export
from graphquant.config import Config
from graphquant.errors import UnsupportedInputError
from graphquant.failure import stage
from graphquant.ir.captured import Captured
from graphquant.ir.graph import arguments, operand, shape
from graphquant.ops import int8_linear
from graphquant.ops.pack_weight import is_packed, unpacked
from graphquant.passes.pack_weights import pack_weights
from graphquant.passes.pipeline import Rewritten, rewrite
from graphquant.passes.prepack import prepack
from graphquant.report import Report


def to_program(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    config: Config,
) -> tuple[ExportedProgram, Report]:
    """Export, rewrite, pack, and export the rewritten module: (program, report)."""

    def exported(module: nn.Module, sizes: Any) -> ExportedProgram:
        return torch.export.export(
            module, tuple(args), dict(kwargs), dynamic_shapes=sizes, strict=False
        )

    with torch.no_grad():
        program = exported(model, dynamic_shapes)
        with stage("capture"):
            captured = from_export(program)
        if captured is None:  # no tensors in the program
            return program, Report(())
        sizes = _dynamic_shapes(program, tree_leaves((tuple(args), dict(kwargs))))
        rewritten = rewrite(captured, config)
        with stage("packing"):
            pack_weights(captured)
            module = packed(captured, rewritten)
        with stage("the export of the int8 graph"):
            int8 = exported(module, sizes)
    return int8, rewritten.report


def _dynamic_shapes(program: ExportedProgram, inputs: Sequence[Any]) -> ShapesCollection:
    """The inputs' dynamic sizes as the first export found them: it may have narrowed what it was
    given, and its graph is correct for those sizes only."""
    placeholders = program.graph.find_nodes(op="placeholder")[-len(inputs) or None :]
    dims: dict[Any, Any] = {}

    def dim(size: torch.SymInt) -> Any:
        """A Dim, or a * Dim + b."""
        (symbol,) = (expr := size.node.expr).free_symbols
        if symbol not in dims:
            found = program.range_constraints[symbol]
            dims[symbol] = Dim(str(symbol), min=int(found.lower), max=finite(found.upper))
        if expr == symbol:
            return dims[symbol]
        return int(expr.coeff(symbol, 1)) * dims[symbol] + int(expr.coeff(symbol, 0))

    sizes = ShapesCollection()
    for node, value in zip(placeholders, inputs, strict=True):
        if isinstance(value, Tensor):
            found = enumerate(node.meta["val"].shape)
            sizes[value] = {i: dim(n) for i, n in found if not is_concrete_int(n)}
    return sizes


def require_program(entry: str, program: object) -> None:
    """Raises UnsupportedInputError, in the name of an entry point, for another type."""
    if not isinstance(program, ExportedProgram):
        raise UnsupportedInputError(
            f"{entry} needs what graphquant.export returned, got {type(program).__name__}"
        )


def unpack_weights(program: ExportedProgram) -> ExportedProgram:
    """The program with all int8 weights as [N, K]: itself, unless some are packed."""
    if not any(_packed_sizes(n) for n in _int8_linears(program.graph_module)):
        return program
    state, gm = dict(program.state_dict), copy.deepcopy(program.graph_module)
    for old, new in zip(program.graph.nodes, gm.graph.nodes, strict=True):
        new.name = old.name  # a copy renames `input`, which the signature names
    buffers = program.graph_signature.inputs_to_buffers
    for linear in _int8_linears(gm):
        wq = arguments(linear).wq
        if sizes := _packed_sizes(linear):  # not where another linear had the same weight
            name = buffers[wq.name]
            state[name] = unpacked(state[name], *sizes).contiguous()
            wq.meta["val"] = wq.meta["val"].new_empty(sizes)
    return ExportedProgram(
        gm,
        gm.graph,
        program.graph_signature,
        state,
        program.range_constraints,
        program.module_call_graph,
        program.example_inputs,
        program.constants,
        verifiers=program.verifiers,
    )


def _int8_linears(gm: GraphModule) -> list[Node]:
    return list(gm.graph.find_nodes(op="call_function", target=int8_linear.target))


def _packed_sizes(linear: Node) -> tuple[int, int] | None:
    """(N, K) of this int8 linear if its weight is packed."""
    given = arguments(linear)
    N, K = shape(given.w_scale)[0], shape(given.xq)[-1]
    return (N, K) if is_packed(given.wq.meta["val"], N, K) else None


def packed(captured: Captured, rewritten: Rewritten) -> GraphModule:
    """The rewritten graph as a module with packed weights in buffers: "layers.0.fc1.wq"."""
    gm, graph = captured.gm, captured.gm.graph
    of_model = {id(t) for t in chain(gm.parameters(), gm.buffers())}
    first = next(iter(graph.nodes))

    def new_input(name: str) -> Node:
        gm.register_buffer(name, torch.empty(0))  # a placeholder
        with graph.inserting_before(first):
            return graph.create_node("get_attr", name, name=name)

    for packing in prepack(captured, new_input):
        values = packing.recipe.compute([captured.parameters[r].detach() for r in packing.roots])
        path = _path(packing.inputs, rewritten) if packing.for_linears else "constants"
        for node, value in zip(packing.inputs, values, strict=True):
            if node.users:  # an op on weights alone was packed as a whole, its input is unused
                last = node.name.removeprefix("constant_")
                if packing.for_linears:
                    last = operand(node, next(iter(node.users)))
                node.target = _register(gm, f"{path}.{last}", value)
    graph.eliminate_dead_code()
    graph.lint()
    module = GraphModule(gm, graph)  # copies only the attributes that the graph reads
    _copy_tensors(module, of_model)
    return module


def _path(inputs: Sequence[Node], rewritten: Rewritten) -> str:
    """The parent path for these weights, by the linears of their product:
    "layers.0.q_proj_k_proj"."""
    readers = dict.fromkeys(user for node in inputs for user in node.users)
    paths: list[str] = [
        outcome.path for r in readers for outcome, _ in rewritten.linears.get(r, ())
    ] or ["packed"]
    parents = {path.rpartition(".")[0] for path in paths}
    if len(parents) > 1:
        return paths[0]
    return ".".join(filter(None, (*parents, "_".join(path.rpartition(".")[2] for path in paths))))


def _register(root: nn.Module, name: str, value: Tensor) -> str:
    """Register a buffer under this name, numbered if it is taken. Returns the final name."""
    *path, last = name.split(".")
    taken: list[str] = []
    owner = root
    for part in path:
        found = (n for n in _numbered(part) if isinstance(getattr(owner, n, owner), nn.Module))
        taken.append(next(found))
        if not hasattr(owner, taken[-1]):
            owner.add_module(taken[-1], nn.Module())
        owner = owner.get_submodule(taken[-1])
    free = next(n for n in _numbered(last) if not hasattr(owner, n))
    owner.register_buffer(free, value)
    return ".".join((*taken, free))


def _numbered(name: str) -> chain[str]:
    return chain([name], (f"{name}_{i}" for i in count(1)))


def _copy_tensors(module: nn.Module, ids: set[int]) -> None:
    """Replace the tensors with these ids by copies that need no gradient: the module must not
    follow later changes of the model."""
    copies: dict[int, Tensor] = {}
    tables: list[dict[str, Any]] = []
    for owner in module.modules():
        tables += (owner._parameters, owner._buffers)
    for table in tables:
        for name, tensor in table.items():
            if id(tensor) not in ids:
                continue
            if id(tensor) not in copies:
                with torch.inference_mode(False):
                    copy = tensor.detach().clone()
                is_parameter = isinstance(tensor, nn.Parameter)
                copies[id(tensor)] = nn.Parameter(copy, False) if is_parameter else copy
            table[name] = copies[id(tensor)]
