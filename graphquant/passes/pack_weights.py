"""On the CPU, int8 weights as kernels read them: pack_weight(wq) in place of wq.

The rules leave wq [N, K], which every device understands. This runs before prepack. What needs
[N, K] of a program that is packed asks exporters/program.py for it.
"""

from __future__ import annotations

from torch.fx import Node

from graphquant.ir.captured import Captured
from graphquant.ir.constants import Constants
from graphquant.ir.graph import arguments, calls, shape
from graphquant.ops import cpu, int8_linear, pack_weight
from graphquant.ops.pack_weight import is_packed


def pack_weights(captured: Captured) -> None:
    """Pack the weights of all int8 linears whose CPU kernels can run here."""
    graph, constants = captured.gm.graph, Constants(captured.parameters)
    packed: dict[Node, Node] = {}
    for linear in calls(graph, lambda n: n.target is int8_linear.target):
        wq = arguments(linear).wq
        if wq not in constants or not is_packed_for(linear):
            continue
        if wq not in packed:
            with graph.inserting_after(wq):
                packed[wq] = graph.call_function(pack_weight.target, (wq,))
            with captured.fake_mode:
                packed[wq].meta["val"] = pack_weight(wq.meta["val"])
        linear.replace_input_with(wq, packed[wq])


def is_packed_for(linear: Node) -> bool:
    """Is the weight of this int8 linear to be packed for its kernel? That of an exported program
    is already."""
    if linear.meta["val"].device.type != "cpu" or cpu.missing() is not None:
        return False
    given = arguments(linear)
    N, K = shape(given.w_scale)[0], shape(given.xq)[-1]
    if not (isinstance(N, int) and isinstance(K, int)):
        return False  # the op cannot tell which layout it got while sizes are unknown
    return not is_packed(given.wq.meta["val"], N, K)
