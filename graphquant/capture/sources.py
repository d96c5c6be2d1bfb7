"""Sources of the inputs of Dynamo graphs: module parameters or arguments of the call."""

from __future__ import annotations

import re
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

_HELD = (ParamBufferSource, UnspecializedParamBufferSource)  # of parameters and buffers of a module


_WRAPPER = "compile_wrapper"  # name of the function that torch.compile returns


def _real(placeholder: Node, value: Any) -> Any:
    """The real tensor of a fake input.

    DDPOptimizer, which splits Dynamo's graph into buckets, compiles the parts with fake inputs, and
    keeps the real ones in their metadata.
    """
    if not isinstance(value, FakeTensor):
        return value
    real = getattr(placeholder.meta.get("grapharg"), "example", None)
    return real if isinstance(real, Tensor) else value


def _is_parameter(value: Tensor) -> bool:
    """A parameter or buffer of a module, as opposed to an argument of the call."""
    return isinstance(value, torch.nn.Parameter) or is_static(value)


def belong_to_modules(gm: GraphModule) -> list[bool]:
    """For each input of Dynamo's graph: is it a parameter or buffer of a module?

    Arguments of the call are not, even if they are Parameters or marked static.
    """
    return [_is_held(n) for n in gm.graph.find_nodes(op="placeholder")]


def _is_held(placeholder: Node) -> bool:
    argument = placeholder.meta.get("grapharg")
    source = argument.source if argument is not None else None
    while source is not None and not isinstance(source, _HELD):
        source = getattr(source, "base", None)
    return source is not None


def linears_of(gm: GraphModule) -> Iterator[tuple[Node, str]]:
    """The linears of Dynamo's graph with their module paths."""
    places = Places(_being_compiled())
    places.mark(gm)
    for node in gm.graph.find_nodes(op="call_function", target=F.linear):
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        held = isinstance(weight, Node) and weight.op == "placeholder" and _is_held(weight)
        names = [places.tensor(example(weight), _source_name(weight))] if held else []
        yield node, linear_path(module_path(node), names)


def _source_name(placeholder: Node) -> str:
    """Dynamo's source of an input: "L['self']._modules['fc']._parameters['weight']"."""
    argument = placeholder.meta.get("grapharg")
    if argument is None or argument.source is None:
        return placeholder.name
    name = argument.source.name
    return name() if callable(name) else str(name)


def input_name(placeholder: Node) -> str:
    """What the model calls an input: "attention_mask" for the source "L['attention_mask']"."""
    words = re.findall(r"\b[a-zA-Z_]\w*", _source_name(placeholder).removeprefix("L"))
    return words[-1] if words else placeholder.name


def _being_compiled() -> torch.nn.Module | None:
    """The module given to torch.compile whose call is being compiled; None if it is a function.

    Found on the stack: after a graph break, Dynamo's sources start at an inner module.
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
    """A function that appends an input to the graph, given its name.

    The input is static for CUDA graphs: it keeps its address from call to call.
    """
    last: Node = graph.find_nodes(op="placeholder")[-1]

    def new_input(name: str) -> Node:
        nonlocal last
        with graph.inserting_after(last):
            last = graph.placeholder(name)
        mark_static(last)
        return last

    return new_input
