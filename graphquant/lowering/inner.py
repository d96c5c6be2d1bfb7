"""Inner backends that compile the rewritten graph: Inductor, Torch-TensorRT, aot_eager, eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from graphquant._torch import compile_by_inductor, mode_options, unset_fake_temporarily
from graphquant._torch.dynamo import lookup_backend
from graphquant.config import Config
from graphquant.ir.graph import calls, full_args
from graphquant.lowering import torch_tensorrt
from graphquant.lowering.shared_masks import share_masks
from graphquant.lowering.version import version
from graphquant.ops import int8_linear
from graphquant.ops.int8_linear.tiled import Operands, Problem, tune
from graphquant.passes.policy.speed import cut_out


def compile_graph(
    gm: GraphModule, example_inputs: Sequence[Any], config: Config
) -> Callable[..., Any]:
    """The compiled graph: a callable that takes the graph's inputs."""
    if config.inner == "eager":
        return gm.forward
    if config.inner == "aot_eager":
        aot_eager = lookup_backend("aot_eager")
        return aot_eager(gm, list(example_inputs))
    if config.inner == "torch_tensorrt":
        return torch_tensorrt.compile_graph(gm, example_inputs, config)
    from graphquant.lowering import inductor  # noqa: F401 registers our lowerings

    share_masks(gm.graph)
    gm.recompile()
    mode = config.mode or "default"
    if mode.startswith("max-autotune"):
        _tune(gm)
    options = {**mode_options(mode), **config.inductor}
    tag = torch.compiler.config.cache_key_tag + version()
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        return compile_by_inductor(gm, example_inputs, options)


def build_kernels(gm: GraphModule) -> None:
    """Call every distinct CUDA op of the graph once: a kernel that cannot be built raises now,
    while the graph can still run in float."""
    known = set()
    with unset_fake_temporarily(), torch.inference_mode():
        for node in calls(gm.graph, _is_our_kernel):
            alone = cut_out([node])
            if alone.is_sized and alone.text not in known:
                known.add(alone.text)
                alone.bind()()


def _is_our_kernel(node: Node) -> bool:
    if getattr(node.target, "namespace", None) != "graphquant":
        return False
    first = node.all_input_nodes[0].meta["val"]
    return isinstance(first, torch.Tensor) and first.device.type == "cuda"


def _tune(gm: GraphModule) -> None:
    """Autotune the tiles of every distinct int8 product on CUDA."""
    problems = {}
    for node in gm.graph.find_nodes(op="call_function", target=int8_linear.target):
        args = [a.meta["val"] if isinstance(a, Node) else a for a in full_args(node)]
        operands, (dtype,) = int8_linear.split(args)
        o = Operands(*operands)
        if o.xq.device.type == "cuda" and isinstance(o.xq.numel(), int):
            problems[Problem.of(o, dtype)] = o.xq.device
    with unset_fake_temporarily(), torch.inference_mode():
        for problem, device in problems.items():
            tune(problem, device)
