"""The torch.compile backend: `torch.compile(model, backend="graphquant")`.

capture -> rewrite (normalise, recognise, rules) -> prepack -> hand over
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from graphquant.capture import from_dynamo, mark_static
from graphquant.config import Config
from graphquant.errors import CaptureError, ReleasedWeightError
from graphquant.handover.inductor import compile_graph
from graphquant.packed import Supply, is_released
from graphquant.passes.graph import readers
from graphquant.passes.ir import Captured
from graphquant.passes.pipeline import rewrite
from graphquant.passes.prepack import prepack
from graphquant.report import Report

log = logging.getLogger(__name__)


def graphquant(
    gm: GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one of Dynamo's graphs. Found by name through the entry point; not called directly.

    mode     as for Inductor: "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"
    options  the fields of graphquant.Config
    """
    config = Config.of({**({"mode": mode} if mode is not None else {}), **(options or {})})
    try:
        captured = from_dynamo(gm, example_inputs)
    except CaptureError as why:
        _tell(config, Report.left(why))
        return compile_graph(gm, example_inputs, config)
    if captured is None:  # a graph of numbers only
        _tell(config, Report(()))
        return compile_graph(gm, example_inputs, config)
    report = rewrite(captured, config)
    run = _hand_over(captured, example_inputs, config)
    _tell(config, report)
    return run


def _tell(config: Config, report: Report) -> None:
    for note in report.notes:
        log.warning("%s", note)
    if config.on_report is not None:
        config.on_report(report)


def _hand_over(
    captured: Captured, example_inputs: Sequence[Any], config: Config
) -> Callable[..., Any]:
    graph = captured.gm.graph
    given = graph.find_nodes(op="placeholder")
    names = [captured.names.get(n, n.name) for n in given]
    index = {node: i for i, node in enumerate(given)}
    last = given[-1]

    def new_input(name: str) -> Node:
        nonlocal last
        with graph.inserting_after(last):
            last = graph.placeholder(name)
        mark_static(last)
        return last

    packings = prepack(captured, new_input)
    jobs = [(p.recipe, tuple(index[r] for r in p.roots)) for p in packings]
    kept = [i for i, n in enumerate(given) if n.users]
    floats = [i for i in kept if given[i] in captured.parameters] if config.free_weights else []
    supply = Supply(jobs, names.__getitem__, floats)
    tensors = supply(example_inputs)
    _refuse_released(captured, given, kept, example_inputs)
    for node in given:
        if not node.users:
            graph.erase_node(node)
    captured.gm.recompile()
    on_gpu = any(isinstance(a, torch.Tensor) and a.is_cuda for a in example_inputs)
    hides = on_gpu and can_run_twice(graph)
    # static shapes: a packed weight never changes its size
    fakes = _fake(captured, example_inputs, tensors)
    inputs = [*(example_inputs[i] for i in kept), *fakes]
    inner = compile_graph(captured.gm, inputs, config)
    if config.free_weights:
        freed = supply.release(example_inputs)
        log.info("free_weights released %.1f MiB of float weights", freed / 2**20)

    def run(*args: Any) -> Any:
        return inner(*[args[i] for i in kept], *supply(args))

    def run_and_look(*args: Any) -> Any:
        """The GPU starts at once; whether the packs were fresh is found out while it computes."""
        guess = supply.guess(args) if not torch.cuda.is_current_stream_capturing() else None
        if guess is not None:
            result = inner(*[args[i] for i in kept], *guess.tensors)
            if supply.confirms(guess, args):
                return result
            del result
        return run(*args)

    return run_and_look if hides else run


def can_run_twice(graph: Graph) -> bool:
    """Is it no matter whether a graph has run before? It writes to nothing, draws no random numbers
    and talks to nobody."""
    return all(
        n.op in ("placeholder", "get_attr", "output") or n.target in _PURE or _is_pure(n)
        for n in graph.nodes
    )


_PURE = {
    *(operator.getitem, operator.neg, operator.not_, operator.and_, operator.or_),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod),
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.pow),
    *(torch.sym_int, torch.sym_float, torch.sym_max, torch.sym_min, torch.sym_not),
}
_SDPA = torch.ops.aten.scaled_dot_product_attention.default


def _is_pure(node: Node) -> bool:
    op = node.target
    if not isinstance(op, torch._ops.OpOverload):
        return False
    if op is _SDPA:  # random only with a dropout_p
        return not (node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0))
    name = op._schema.name
    return (
        op.namespace in ("aten", "prims", "graphquant")
        and not op._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in op.tags
        and not ("batch_norm" in name or "instance_norm" in name)  # write running statistics
    )


def _fake(captured: Captured, example_inputs: Sequence[Any], tensors: list[Any]) -> list[Any]:
    mode = torch._guards.detect_fake_mode(example_inputs)
    if mode is None:
        return tensors
    return [mode.from_tensor(t, static_shapes=True) for t in tensors]


def _refuse_released(
    captured: Captured, given: Sequence[Node], kept: Sequence[int], example_inputs: Sequence[Any]
) -> None:
    for i in kept:
        if given[i] in captured.parameters and is_released(example_inputs[i]):
            raise ReleasedWeightError(
                f"{captured.names[given[i]]} was released by free_weights=True, but is read in "
                f"float by {readers(given[i])}"
            )
