"""Which int8 linears of an exported program have a scale for each token: for runtimes that need one
scale for the tensor."""

from __future__ import annotations

from collections.abc import Iterator

from torch.export import ExportedProgram
from torch.fx import Node

from graphquant.ir.graph import full_args, is_call
from graphquant.ops import (
    act_quantize,
    glu_quantize,
    int8_linear,
    norm_quantize,
    norm_quantize_keep,
    quantize,
)

_QUANTISERS = tuple(
    op.target for op in (quantize, norm_quantize, norm_quantize_keep, act_quantize, glu_quantize)
)
_LOW = -3  # among the arguments of a quantiser, which end with factor, low, high, clip
_WQ = 3  # among those of int8_linear


def dynamic_linears(program: ExportedProgram) -> Iterator[str]:
    """The paths of the int8 linears whose input has a scale for each token, "layers.0.fc1"."""
    buffers = program.graph_signature.inputs_to_buffers
    for linear in program.graph.find_nodes(op="call_function", target=int8_linear.target):
        quantiser = _quantiser(linear)
        if quantiser is not None and full_args(quantiser)[_LOW] is None:
            yield buffers[full_args(linear)[_WQ].name].rpartition(".")[0]


def _quantiser(linear: Node) -> Node | None:
    """The op that quantises what a linear reads. None if that is a constant."""
    node: Node = full_args(linear)[0]
    while node.op == "call_function" and not is_call(node, *_QUANTISERS):
        node = node.all_input_nodes[0]  # items, and views of rows
    return node if node.op == "call_function" else None
