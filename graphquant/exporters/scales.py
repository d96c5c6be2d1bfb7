"""Which int8 linears of an exported program have a scale for each token: for runtimes that need one
scale for the tensor."""

from __future__ import annotations

from collections.abc import Iterator

from torch.export import ExportedProgram
from torch.fx import Node

from graphquant.ir.graph import arguments, is_call
from graphquant.ops import OPS, int8_linear

_QUANTIZERS = tuple(op.target for op in OPS.values() if op.quantizes)


def dynamic_linears(program: ExportedProgram) -> Iterator[str]:
    """The paths of the int8 linears whose input has a scale for each token, "layers.0.fc1"."""
    buffers = program.graph_signature.inputs_to_buffers
    for linear in program.graph.find_nodes(op="call_function", target=int8_linear.target):
        quantizer = _quantizer(linear)
        if quantizer is not None and arguments(quantizer).low is None:
            yield buffers[arguments(linear).wq.name].rpartition(".")[0]


def _quantizer(linear: Node) -> Node | None:
    """The op that quantizes what a linear reads. None if that is a constant."""
    node: Node = arguments(linear).xq
    while node.op == "call_function" and not is_call(node, *_QUANTIZERS):
        node = node.all_input_nodes[0]  # items, and views of rows
    return node if node.op == "call_function" else None
