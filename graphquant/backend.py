"""The torch.compile backend: `torch.compile(model, backend="graphquant")`.

capture -> rewrite (normalize, recognize, rules) -> prepack -> lowering
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import Graph, GraphModule, Node

from graphquant._torch import FakeTensor, OpOverload, detect_fake_mode, forward_ad_is_on
from graphquant._torch.dynamo import replace_methods
from graphquant.bypass import telling
from graphquant.capture.aten import from_dynamo
from graphquant.capture.fallback import with_fallback
from graphquant.capture.sources import belong_to_modules, static_inputs
from graphquant.config import Config
from graphquant.errors import ReleasedWeightError
from graphquant.failure import stage
from graphquant.ir.captured import Captured
from graphquant.ir.graph import draws_nothing, readers
from graphquant.lowering.inner import build_kernels, compile_graph
from graphquant.lowering.size_buckets import SizeBuckets, find_size_buckets
from graphquant.passes.attention.dtype import with_bfloat16_attention
from graphquant.passes.attention.on_cpu import choose_attention
from graphquant.passes.notes import with_machine_notes
from graphquant.passes.pack_weights import pack_weights
from graphquant.passes.pipeline import rewrite
from graphquant.passes.prepack import prepack
from graphquant.report import Report, log_notes
from graphquant.utils.progress import compilation, phase
from graphquant.weights.packed import PackedInputs
from graphquant.weights.released import is_released

log = logging.getLogger(__name__)


def graphquant(
    gm: GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    root: torch.nn.Module | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph. Registered as a backend by the package's entry point.

    mode     as for Inductor: "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"
    options  the fields of graphquant.Config
    root     module at which paths begin, by default the one given to torch.compile
    """
    config = Config.of({**({"mode": mode} if mode is not None else {}), **(options or {})})
    with compilation("graphquant", config.progress):
        report, run = with_fallback(gm, lambda: _compile_int8(gm, example_inputs, config, root))
        if run is None:
            with phase("float"):
                run = compile_graph(gm, example_inputs, config)
    _report(config, report)
    return _float_for_forward_ad(run, gm, released=config.free_weights is True)


def _compile_int8(
    gm: GraphModule, example_inputs: list[Any], config: Config, root: torch.nn.Module | None
) -> tuple[Report, Callable[..., Any]]:
    """(report, callable that replaces Dynamo's graph). Does not change that graph."""
    with stage("capture"):
        captured = from_dynamo(gm, example_inputs, root)
    if captured is None:  # no tensor inputs
        return Report(()), compile_graph(gm, example_inputs, config)
    report = with_machine_notes(rewrite(captured, config).report, captured)
    with stage("the dtype of attention"):
        report = with_bfloat16_attention(report, captured, config)
    with stage("the choice of attention on the CPU"):
        choose_attention(captured, config)
    with stage("buckets of sizes"):
        buckets, note = find_size_buckets(captured) if config.size_buckets else (None, "")
        report = replace(report, notes=(*report.notes, *filter(None, [note])))
    held = captured.local(belong_to_modules(gm))
    owned = [i for i, is_held in enumerate(held) if is_held]
    inputs = captured.local(example_inputs)
    return report, captured.around(_lower(captured, inputs, config, owned, buckets))


def _report(config: Config, report: Report) -> None:
    log_notes(report.notes, log)
    if config.on_report is not None:
        config.on_report(report)


def _lower(
    captured: Captured,
    example_inputs: Sequence[Any],
    config: Config,
    owned: Sequence[int],
    buckets: SizeBuckets | None,
) -> Callable[..., Any]:
    """Pack the weights and compile the graph with them as inputs.

    example_inputs  of the captured graph
    owned           which of them belong to a module, see PackedInputs
    buckets         how to pad dynamic sizes, which runs the graph twice now and then
    """
    graph = captured.gm.graph
    nodes = graph.find_nodes(op="placeholder")
    names = [captured.names.get(n, n.name) for n in nodes]
    index = {node: i for i, node in enumerate(nodes)}
    real = [captured.parameters.get(n, v) for n, v in zip(nodes, example_inputs, strict=True)]

    with stage("the layout of weights"):
        pack_weights(captured)
    with stage("prepack"):
        packings = prepack(captured, static_inputs(graph))
    jobs = [(p.recipe, tuple(index[r] for r in p.roots)) for p in packings]
    used = [i for i, n in enumerate(nodes) if n.users]
    floats: list[int] = []
    if config.free_weights:  # another size of input needs other constants of the same parameters
        of_constants = {r for p in packings if not p.for_linears for r in p.roots}
        read = [n for n in nodes if n.users or n in of_constants]
        floats = [index[n] for n in read if n in captured.parameters]
    packed_inputs = PackedInputs(jobs, names.__getitem__, floats, owned)
    with stage("packing"):
        tensors = packed_inputs(real)
    _refuse_released(captured, nodes, used, real)
    for node in nodes:
        if not node.users:
            graph.erase_node(node)
    captured.gm.recompile()
    on_gpu = any(isinstance(a, Tensor) and a.is_cuda for a in example_inputs)
    twice = can_run_twice(graph)
    # static shapes: a packed weight keeps its shape
    fakes = _fake(example_inputs, tensors)
    inputs = [*(_as_known(captured, example_inputs, i) for i in used), *fakes]
    with stage("the build of kernels"):
        build_kernels(captured.gm)
    with stage(f"inner={config.inner!r}"):
        inner = compile_graph(captured.gm, inputs, config)
    to_release = [config.free_weights] if config.free_weights else []

    def run(*args: Any) -> Any:
        result = inner(*[args[i] for i in used], *packed_inputs(args))
        if to_release:  # after the first run no failure can need the float weights any more
            freed = packed_inputs.release(args, config.free_weights)  # safe in two threads at once
            to_release.clear()
            log.info("free_weights released %.1f MiB of float weights", freed / 2**20)
        return result

    def run_and_confirm(*args: Any) -> Any:
        """Start the GPU at once, and check the packed weights while it computes."""
        if not to_release and not torch.cuda.is_current_stream_capturing():
            plan = packed_inputs.speculate(args)
            if plan is not None:
                result = inner(*[args[i] for i in used], *plan.tensors)
                if packed_inputs.confirm(plan, args):
                    return result
                del result
        return run(*args)

    compiled = run_and_confirm if on_gpu and twice else run
    if not packings and len(used) == len(nodes) and not to_release:
        compiled = inner  # nothing to pack or to check
    if buckets is not None and twice:
        compiled = buckets.around(compiled)

    def run_or_trace(*args: Any) -> Any:
        if any(isinstance(a, FakeTensor) for a in args):
            return inner(*[args[i] for i in used], *fakes)
        return compiled(*args)

    # DDPOptimizer runs compiled graphs on fake inputs to get the strides of the results
    return run_or_trace if any(isinstance(v, FakeTensor) for v in example_inputs) else compiled


def can_run_twice(graph: Graph) -> bool:
    """Is the graph free of side effects: in-place writes, random numbers, collectives?"""
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


def _is_pure(node: Node) -> bool:
    op = node.target
    if not isinstance(op, OpOverload):
        return False
    if draws_nothing(node):
        return True
    name = op._schema.name
    return (
        op.namespace in ("aten", "prims", "graphquant")
        and not op._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in op.tags
        and not ("batch_norm" in name or "instance_norm" in name)  # they write running statistics
    )


def _float_for_forward_ad(
    run: Callable[..., Any], gm: GraphModule, *, released: bool
) -> Callable[..., Any]:
    """Run Dynamo's float graph if an input has a forward-mode AD tangent.

    int8 ops have no derivative, and Dynamo does not guard on tangents.
    """

    def choose(*args: Any) -> Any:
        if not forward_ad_is_on() or not any(map(_has_tangent, args)):
            return run(*args)
        if released:
            raise ReleasedWeightError(
                "forward-mode AD runs in float, but free_weights=True released the float weights"
            )
        return gm.forward(*args)

    return choose


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def _fake(example_inputs: Sequence[Any], tensors: list[Any]) -> list[Any]:
    mode = detect_fake_mode(example_inputs)
    if mode is None:
        return tensors
    return [mode.from_tensor(t, static_shapes=True) for t in tensors]


def _as_known(captured: Captured, example_inputs: Sequence[Any], i: int) -> Any:
    """An input as the inner backend takes it. Of a DTensor, whose local tensor Dynamo does not
    know, a fake one with static shapes."""
    value = example_inputs[i]
    if captured.shards is None or i not in captured.shards.sharded:
        return value
    return _fake(example_inputs, [value])[0]


def _refuse_released(
    captured: Captured, nodes: Sequence[Node], used: Sequence[int], example_inputs: Sequence[Any]
) -> None:
    for i in used:
        if nodes[i] in captured.parameters and is_released(example_inputs[i]):
            raise ReleasedWeightError(
                f"{captured.names[nodes[i]]} was released by free_weights=True, but is read in "
                f"float by {readers(nodes[i])}"
            )


replace_methods(graphquant, telling)
