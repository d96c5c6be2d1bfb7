"""A rewritten model as an ExportedProgram: int8 weights are its buffers, float ones are gone.

The rewritten graph becomes a module that owns its packed weights, and torch.export takes that: so
what comes out is a program like any other, with torch's own checks of its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from graphquant.capture import from_export
from graphquant.config import Config
from graphquant.passes.graph import operand, shape
from graphquant.passes.ir import Captured
from graphquant.passes.pipeline import linear_path, rewrite
from graphquant.passes.prepack import prepack
from graphquant.report import Report


def to_program(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    config: Config,
) -> tuple[ExportedProgram, Report]:
    """Export, rewrite, pack, and export what came of it."""

    def exported(module: nn.Module) -> ExportedProgram:
        return torch.export.export(
            module, tuple(args), dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False
        )

    with torch.no_grad():
        program = exported(model)
        captured = from_export(program)
        if captured is None:  # a program of numbers only
            return program, Report(())
        report = rewrite(captured, config)
        return exported(packed(captured)), report


def packed(captured: Captured) -> GraphModule:
    """The rewritten graph as a module with packed weights in buffers: "layers.0.fc1.wq"."""
    gm, graph = captured.gm, captured.gm.graph
    first = next(iter(graph.nodes))

    def new_input(name: str) -> Node:
        gm.register_buffer(name, torch.empty(0))  # until its values are known
        with graph.inserting_before(first):
            return graph.create_node("get_attr", name, name=name)

    for packing in prepack(captured, new_input):
        values = packing.recipe.compute([captured.parameters[r].detach() for r in packing.roots])
        path = _path([captured.names[r] for r in packing.roots if len(shape(r)) > 1])
        for node, value in zip(packing.inputs, values, strict=True):
            node.target = _keep(gm, f"{path}.{operand(node)}", value)
    graph.lint()
    return GraphModule(gm, graph)  # holds what the graph reads, and nothing else


def _path(weights: Sequence[str]) -> str:
    """Of linears that are one product: "layers.0.q_proj_k_proj_v_proj"."""
    # an input may be a parameter too, as the probe of a pooling head is
    named = [name for name in weights if name.endswith("weight")] or weights
    paths = [linear_path(name) for name in named]
    parents = {path.rpartition(".")[0] for path in paths}
    if len(parents) > 1:
        return paths[0]
    return ".".join(filter(None, (*parents, "_".join(path.rpartition(".")[2] for path in paths))))


def _keep(root: nn.Module, name: str, value: Tensor) -> str:
    """Make it a buffer, under this name if that is free."""
    path, _, last = name.rpartition(".")
    owner = root
    kept = []
    for part in filter(None, path.split(".")):
        # a weight may be a parameter of that name itself
        free = next(n for n in _names(part) if isinstance(getattr(owner, n, owner), nn.Module))
        if not hasattr(owner, free):
            owner.add_module(free, nn.Module())
        owner = owner.get_submodule(free)
        kept.append(free)
    free = next(n for n in _names(last) if not hasattr(owner, n))
    owner.register_buffer(free, value)
    return ".".join((*kept, free))


def _names(wanted: str) -> Iterator[str]:
    """That name, and others like it."""
    return chain([wanted], (f"{wanted}_{i}" for i in count(1)))
