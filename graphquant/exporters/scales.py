"""The int8 linears of an exported program that have per-token scales, which runtimes with
per-tensor scales cannot run."""

from __future__ import annotations

from collections.abc import Iterator

from torch.export import ExportedProgram
from torch.fx import Node

from graphquant.ir.graph import arguments, is_call
from graphquant.ops import OPS, int8_linear

_QUANTIZERS = tuple(op.target for op in OPS.values() if op.quantizes)


def dynamic_linears(program: ExportedProgram) -> Iterator[str]:
    """The paths of the int8 linears whose input has per-token scales: "layers.0.fc1"."""
    buffers = program.graph_signature.inputs_to_buffers
    for linear in program.graph.find_nodes(op="call_function", target=int8_linear.target):
        quantizer = _quantizer(linear)
        if quantizer is not None and arguments(quantizer).low is None:
            yield buffers[arguments(linear).wq.name].rpartition(".")[0]


def _quantizer(linear: Node) -> Node | None:
    """The op that quantizes a linear's input; None if the input is a constant."""
    node: Node = arguments(linear).xq
    while node.op == "call_function" and not is_call(node, *_QUANTIZERS):
        node = node.all_input_nodes[0]  # getitems and row views
    return node if node.op == "call_function" else None
