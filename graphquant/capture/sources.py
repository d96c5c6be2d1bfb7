"""Where the inputs of Dynamo's graphs come from, and which of them a module holds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from graphquant._torch import MODULE_CALL, FakeTensor, is_compiled, original
from graphquant._torch.dynamo import (
    ParamBufferSource,
    UnspecializedParamBufferSource,
    example,
    is_static,
    mark_static,
)
from graphquant.ir.graph import module_path
from graphquant.ir.paths import Places, linear_path

_HELD = (ParamBufferSource, UnspecializedParamBufferSource)  # an entry of a module's tables


_WRAPPER = "compile_wrapper"  # the function that torch.compile returns


def _real(placeholder: Node, value: Any) -> Any:
    """The tensor behind a fake input. DDP's optimizer, which cuts Dynamo's graph at its buckets,
    compiles the pieces with fake inputs, and leaves on each what Dynamo made it from."""
    if not isinstance(value, FakeTensor):
        return value
    real = getattr(placeholder.meta.get("grapharg"), "example", None)
    return real if isinstance(real, Tensor) else value


def _is_parameter(value: Tensor) -> bool:
    """A parameter or buffer of a module, as opposed to an argument of the call."""
    return isinstance(value, torch.nn.Parameter) or is_static(value)


def belong_to_modules(gm: GraphModule) -> list[bool]:
    """Of each input of Dynamo's graph: is it a parameter or buffer that a module holds? Arguments
    of the call are none, be they Parameters or marked static."""
    return [_is_held(n) for n in gm.graph.find_nodes(op="placeholder")]


def _is_held(placeholder: Node) -> bool:
    argument = placeholder.meta.get("grapharg")
    source = argument.source if argument is not None else None
    while source is not None and not isinstance(source, _HELD):
        source = getattr(source, "base", None)
    return source is not None


def linears_of(gm: GraphModule) -> Iterator[tuple[Node, str]]:
    """The linears of Dynamo's graph, and their module paths."""
    places = Places(_being_compiled())
    places.mark(gm)
    for node in gm.graph.find_nodes(op="call_function", target=F.linear):
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        held = isinstance(weight, Node) and weight.op == "placeholder" and _is_held(weight)
        names = [places.tensor(example(weight), _spelling(weight))] if held else []
        yield node, linear_path(module_path(node), names)


def _spelling(placeholder: Node) -> str:
    """How Dynamo says where an input is: "L['self']._modules['fc']._parameters['weight']"."""
    argument = placeholder.meta.get("grapharg")
    if argument is None or argument.source is None:
        return placeholder.name
    name = argument.source.name
    return name() if callable(name) else str(name)


def _being_compiled() -> torch.nn.Module | None:
    """The module that torch.compile was given and whose call brought Dynamo here. Behind a graph
    break Dynamo speaks of what is inside it as if it stood alone.

    None for a function that is compiled.
    """
    frame = sys._getframe(1)
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_code is MODULE_CALL:
            module = frame.f_locals.get("self")
            if is_compiled(module):
                return original(module)  # type: ignore[no-any-return]
            if isinstance(module, torch.nn.Module) and module._compiled_call_impl is not None:
                return module
        elif frame.f_code.co_name == _WRAPPER and "fn" in frame.f_code.co_freevars:
            fn = frame.f_locals.get("fn")
            for method in (fn, getattr(fn, "__wrapped__", None)):
                owner = getattr(method, "__self__", None)
                if isinstance(owner, torch.nn.Module):  # torch.compile(model.forward)
                    return owner
    return None


def static_inputs(graph: Graph) -> Callable[[str], Node]:
    """Returns a function that adds an input, behind those that the graph has.

    CUDA graphs take it for static: it keeps its address from call to call.
    """
    last: Node = graph.find_nodes(op="placeholder")[-1]

    def new_input(name: str) -> Node:
        nonlocal last
        with graph.inserting_after(last):
            last = graph.placeholder(name)
        mark_static(last)
        return last

    return new_input
