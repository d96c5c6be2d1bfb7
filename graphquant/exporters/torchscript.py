"""TorchScript of an exported program, for hosts that still load TorchScript.

torch.jit.trace follows sizes through tensor methods, `x.size(0)` and `x.reshape(n, -1)`, but not
through overloads such as aten.sym_size.int, whose results it bakes in as constants of the example.
So calls that return or take a dynamic size are replaced by methods first.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from graphquant._torch import OpOverload
from graphquant.capture.aten import without_checks
from graphquant.errors import UnsupportedInputError
from graphquant.exporters.program import require_program
from graphquant.ir.graph import aten, is_call

CHECKS = (
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)


def torchscript(program: ExportedProgram) -> torch.jit.ScriptModule:
    """The program as a traced TorchScript module: `.save(path)` it, `torch.jit.load(path)` it.

    program  what `graphquant.export` returned; not modified, traced with its example inputs

    The module takes the model's arguments by position or by name, and returns plain dicts, tuples
    and tensors. Sizes that are dynamic in the export are dynamic in the trace. Its weights are the
    program's own tensors until it is saved.

    A process that loads the file must import graphquant first, for its ops, so it needs Python.
    torch deprecates TorchScript: where you can choose, save the program.

    Raises UnsupportedInputError for anything but an ExportedProgram, and for one without example
    inputs or with inputs that are not tensors; and what torch.jit.trace raises.
    """
    require_program("torchscript", program)
    if program.example_inputs is None:
        raise UnsupportedInputError("torchscript needs a program with example inputs")
    gm = without_checks(program)
    _use_traceable_calls(gm)
    args, kwargs = program.example_inputs
    inputs = {**dict(zip(inspect.signature(gm.forward).parameters, args, strict=False)), **kwargs}
    if others := [name for name, x in inputs.items() if not isinstance(x, Tensor)]:
        raise UnsupportedInputError(
            f"torchscript takes only tensors, but {others[0]} is "
            f"{type(inputs[others[0]]).__name__}: wrap the model in a module that sets it"
        )
    with torch.no_grad():
        traced: torch.jit.ScriptModule = torch.jit.trace(
            gm.eval(),
            example_kwarg_inputs=inputs,
            strict=False,  # a dict may be returned
            check_trace=False,  # would run the model twice more
        )
    return traced


def _use_traceable_calls(gm: GraphModule) -> None:
    """Replace calls that return or take a dynamic size by ones that torch.jit.trace follows."""
    graph = gm.graph
    for check in CHECKS:
        for node in graph.find_nodes(op="call_function", target=check):
            graph.erase_node(node)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.op == "call_function" and any(map(_is_size, (node, *node.all_input_nodes))):
            node.target = _traceable(node)
    gm.recompile()


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _traceable(node: Node) -> Any:
    """The torch.Tensor method or torch function that computes the same as the node's target."""
    if is_call(node, aten.sym_size.int):
        return torch.Tensor.size
    if is_call(node, aten.sym_numel.default):
        return torch.Tensor.numel
    if is_call(node, aten.slice.Tensor):
        return _slice
    if not isinstance(node.target, OpOverload):  # arithmetic on sizes
        return node.target
    name = node.target._schema.name.removeprefix("aten::")
    for owner in (torch.Tensor, torch):
        if (found := getattr(owner, name, None)) is not None:
            return found
    return node.target


def _slice(x: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> Tensor:
    return x[(slice(None),) * (dim % x.dim()) + (slice(start, end, step),)]
