"""Capture: a Dynamo graph or an ExportedProgram as a pre-dispatch ATen graph with its parameters.

    torch.compile:  from_dynamo(gm, example_inputs)      parameters are placeholders
    torch.export:   from_export(program)                 parameters are get_attr nodes

The entries of `node.meta` that Dynamo writes (`example_value`, `grapharg`) are read in this folder
alone; torch's private functions are in graphquant/_torch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.fx.node import map_arg
from torch.fx.traceback import preserve_node_meta
from torch.utils.checkpoint import noop_context_fn

from graphquant._torch import (
    ALLOW_HOOKS,
    ENTER_AUTOCAST,
    ENTER_INFERENCE,
    EXIT_AUTOCAST,
    EXIT_INFERENCE,
    FORBID_HOOKS,
    GET_DATA,
    LOG_USAGE,
    SET_GRAD,
    SET_SDPA,
    TRANSFORMER_LAYER,
    DisableTorchFunction,
    FakeTensor,
    HigherOrderOperator,
    local_of,
    sdpa_backends,
    set_sdpa_priority,
    tree_leaves,
    why_hooks_are_forbidden,
)
from graphquant._torch.dynamo import (
    compiled_for,
    copy_source,
    name_parameters,
    on_bytecode,
    reset_code,
)
from graphquant.capture.local import localized
from graphquant.capture.sources import (
    _being_compiled,
    _is_parameter,
    _real,
    _source_name,
    input_name,
)
from graphquant.capture.transformer_layer import _encoder_layer
from graphquant.errors import CaptureError
from graphquant.ir.captured import Captured
from graphquant.ir.contexts import sets_state
from graphquant.ir.graph import LITERAL, aten, is_impure
from graphquant.ir.paths import Places

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
_POLICY = "_checkpoint_context_fn"  # make_fx wants one, and most checkpoints have none


def from_dynamo(
    gm: GraphModule, example_inputs: list[Any], root: torch.nn.Module | None = None
) -> Captured | None:
    """Retrace the graph that Dynamo gives a backend. None if the graph has no tensor input.

    With DTensors, the result is the graph of this process's shards, which has other inputs: see
    Captured.shards.

    root  module at which paths begin, by default the one that is being compiled

    Raises CaptureError if make_fx cannot trace a value or would drop a side effect.
    """
    dynamo, owners = gm, example_inputs
    if (local := localized(gm, example_inputs)) is not None:
        gm, owners = local.gm, [example_inputs[i] for i in local.shards.kept]
    inputs = gm.graph.find_nodes(op="placeholder")
    fakes = [n.meta["example_value"] for n in inputs]
    fake_mode = next((f.fake_mode for f in fakes if isinstance(f, FakeTensor)), None)
    if fake_mode is None:
        return None
    trains = any(isinstance(v, Tensor) and v.requires_grad for v in example_inputs)
    if why := _untraceable(gm, trains):
        raise CaptureError(why)
    try:
        with fake_mode, preserve_node_meta():
            retraced = make_fx(lambda *a: _retrace(gm, *a), pre_dispatch=True)(*fakes)
    finally:  # Dynamo's graph may be compiled unchanged instead
        _drop_policies(gm)
    _drop_policies(retraced)
    if why := _untraced(retraced):
        raise CaptureError(why)
    places = Places(_being_compiled() if root is None else root)
    places.mark(retraced)
    captured = Captured(retraced, fake_mode, {}, {}, grad_enabled=torch.is_grad_enabled())
    captured.shards = None if local is None else local.shards
    for node in retraced.graph.find_nodes(op="get_attr"):
        value = getattr(retraced, str(node.target), None)
        if isinstance(value, Tensor):  # torch.tensor([1.0]) in the forward
            node.meta[LITERAL] = value
            # make_fx leaves a fake tensor of another mode, which cannot be mixed with the others
            node.meta["val"] = fake_mode.from_tensor(value, static_shapes=True)
    placeholders = retraced.graph.find_nodes(op="placeholder")
    for old, new, value in zip(inputs, placeholders, owners, strict=True):
        copy_source(old, new)
        value = _real(old, value)
        if not isinstance(value, Tensor):
            continue
        captured.inputs[new] = input_name(old)
        if not isinstance(value, FakeTensor):
            captured.examples[new] = local_of(value)
        if value.requires_grad:
            captured.differentiable.add(new)
        if _is_parameter(value):
            captured.parameters[new] = local_of(value)
            captured.names[new] = places.tensor(value, _source_name(old))
    captured.training = places.training
    captured.elsewhere = places.elsewhere(captured.parameters.values())
    # CUDA graphs treat parameters as static only if the graph says where its inputs come from
    retraced.meta.update(dynamo.meta)
    # constants of the forward, such as the 0 of `y[:, 0] = 0`, need a source as well
    constants = (n for n, _ in chain(retraced.named_parameters(), retraced.named_buffers()))
    name_parameters(retraced, constants)
    return captured


@contextmanager
def reset_dynamo_afterwards(backend: Callable[..., Any]) -> Iterator[None]:
    """Context that resets the Dynamo cache of functions compiled in it for this backend only.

    Otherwise the entries of code after a graph break accumulate, and at the recompile_limit Dynamo
    runs that code eagerly for every backend.
    """
    codes: list[CodeType] = []

    def record(code: CodeType, new_code: CodeType) -> CodeType | None:
        codes.append(code)
        return None

    hook = on_bytecode(record)
    try:
        yield
    finally:
        hook.remove()
        for code in set(codes):
            if compiled_for(code) == {backend}:
                reset_code(code)


def _drop_policies(gm: GraphModule) -> None:
    for module in gm.modules():
        if isinstance(module, GraphModule) and module.meta.get(_POLICY) is noop_context_fn:
            del module.meta[_POLICY]


def _untraceable(gm: GraphModule, trains: bool) -> str | None:
    """Why this graph cannot be retraced, or None. Checked before it is run.

    A call without inputs and results is there for its effect on torch's global state. The effects
    in ir/contexts.py are kept; dropping any other would change what the model computes.
    """
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            if trains and getattr(node.target, "_name", "") == _FUNCTION:
                return f"{node.name} is an autograd.Function with a backward of its own"
            if _is_of_functorch(node.target):
                return f"{node.name} belongs to torch.vmap or torch.func"
            if node.op == "call_method" and node.target in _ON_AUTOGRAD:
                return f"{node.name} changes how autograd treats a value"
            if node.op != "placeholder" and _is_nested(node.meta.get("example_value")):
                return f"{node.name} makes a nested tensor"
            if node.op != "call_function" or not _without_value(node):
                continue
            if node.target in LOG_USAGE:
                continue
            if not sets_state(node):
                return f"{_name(node.target)} changes a state that is not kept"
            if module is not gm and node.target is not SET_GRAD:
                return f"{_name(node.target)} is called inside a higher-order op"
    return None


_FUNCTION = "autograd_function_apply"  # make_fx traces its forward and drops its backward
_ON_AUTOGRAD = ("requires_grad_", "retain_grad", "register_hook")


def _without_value(node: Node) -> bool:
    """Has this call neither inputs nor results? Contexts do not count as inputs."""
    if any(not sets_state(n) for n in node.all_input_nodes):
        return False
    results = tree_leaves(node.meta.get("example_value"))
    return sets_state(node) or not any(isinstance(v, _VALUES) for v in results)


_VALUES = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, int, float)


def _is_of_functorch(target: Any) -> bool:
    if isinstance(target, HigherOrderOperator):  # autograd.Function is one
        return False
    return "functorch" in str(getattr(target, "__module__", ""))


def _is_nested(value: Any) -> bool:
    return any(isinstance(v, Tensor) and v.is_nested for v in tree_leaves(value))


def _name(target: Any) -> str:
    return getattr(target, "__name__", str(target))


def _untraced(retraced: GraphModule) -> str | None:
    """A value that make_fx could not trace and recorded as a constant."""
    for name, value in chain(retraced.named_buffers(), vars(retraced).items()):
        if isinstance(value, FakeTensor):
            return f"{name} was computed from no input of the graph"
    return None


def from_export(program: ExportedProgram) -> Captured | None:
    """The module of an exported program, without its input checks. None if it has no tensors."""
    gm = without_checks(program)
    attributes = {
        n: value
        for n in gm.graph.find_nodes(op="get_attr")
        if isinstance(value := operator.attrgetter(str(n.target))(gm), Tensor)
    }
    fakes = (n.meta.get("val") for n in gm.graph.nodes)
    fake_mode = next((f.fake_mode for f in fakes if isinstance(f, FakeTensor)), None)
    if fake_mode is None:
        return None
    for node, value in attributes.items():
        node.meta.setdefault("val", fake_mode.from_tensor(value, static_shapes=True))
    Places(None).mark(gm)
    inputs = {n: n.name for n in gm.graph.find_nodes(op="placeholder")}
    names = {n: str(n.target) for n in attributes}
    return Captured(gm, fake_mode, attributes, names, inputs=inputs)


def without_checks(program: ExportedProgram) -> GraphModule:
    """The module of an exported program, without checks of its inputs."""
    module = program.module(check_guards=False)
    return GraphModule(module, module.graph)  # a plain copy: the checks are hooks of `module`


def _retrace(gm: GraphModule, *inputs: Any) -> Any:
    """Run the graph under make_fx, and restore the global state that it changes."""
    run, grad, sdpa = _Retrace(gm), torch.is_grad_enabled(), _sdpa_kernels()
    hooks = why_hooks_are_forbidden()
    try:
        return run.run(*inputs)
    finally:
        with DisableTorchFunction():
            for leave, context in reversed(run.open.values()):
                leave(context)
            SET_GRAD(grad)
        if _sdpa_kernels() != sdpa:
            SET_SDPA(sdpa[0])
            set_sdpa_priority(sdpa[1])
        if hooks is None:
            ALLOW_HOOKS()
        else:
            FORBID_HOOKS(hooks)


def _sdpa_kernels() -> tuple[list[Any], list[Any]]:
    return sdpa_backends(), sdpa_backends(by_priority=True)


class _Retrace(Interpreter):
    """Interpreter of a Dynamo graph under make_fx, which records the operators on tensors.

    Calls that set global state are recorded as nodes, and take effect as well, so that fake tensors
    under autocast have their real dtype. Checks on data-dependent sizes are copied: Dynamo has
    assumed them true, so that running them on fake tensors would record a constant. Fused inference
    ops of torch.nn.Transformer are decomposed, so that their linears can be found.
    """

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        mode = get_proxy_mode()
        assert mode is not None
        self._tracer = mode.tracer
        self._copies: dict[Node, Node] = {}  # nodes that are copied, not traced
        # exit function and context of those that are entered
        self.open: dict[Node, tuple[Callable[[Any], Any], Any]] = {}

    @property
    def _new(self) -> Graph:
        return self._tracer.graph

    def run_node(self, n: Node) -> Any:
        if sets_state(n):
            return self._set_state(n)
        before = len(self._new.nodes)
        value = super().run_node(n)
        calls = n.op == "call_method" or (
            n.op == "call_function" and not isinstance(n.target, HigherOrderOperator)
        )
        if value is None and calls:
            new = list(reversed(self._new.nodes))[: len(self._new.nodes) - before]
            if n.all_input_nodes and (self._is_check(n) or not any(map(is_impure, new))):
                for node in new:
                    self._new.erase_node(node)
                self._copy(n, None)
        return value

    def _is_check(self, n: Node) -> bool:
        """Has this call no tensor inputs?"""
        return not any(isinstance(self.env[i], Tensor) for i in n.all_input_nodes)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in _DECOMPOSITIONS:
            return _DECOMPOSITIONS[target](*args, **kwargs)
        if target is _CHECKPOINT:
            args[0].meta.setdefault(_POLICY, noop_context_fn)
        return super().call_function(target, args, kwargs)

    def _set_state(self, n: Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        with DisableTorchFunction():
            value = n.target(*args, **kwargs)  # type: ignore[operator]
        if n.target in _EXITS:
            self.open[n] = _EXITS[n.target], value
        elif n.target in _EXITS.values():
            del self.open[n.args[0]]  # type: ignore[arg-type]
        self._copy(n, None)
        return value

    def _copy(self, n: Node, value: Any) -> Node:
        """Copy the call itself to the new graph, instead of what tracing it records."""
        args, kwargs = map_arg((n.args, n.kwargs), self._source)
        copy = self._tracer.create_node(n.op, n.target, args, kwargs)
        copy.meta["val"] = value
        self._copies[n] = copy
        return copy

    def _source(self, n: Node) -> Any:
        """The node or constant for n in the new graph."""
        if n in self._copies:
            return self._copies[n]
        value = self.env[n]
        if isinstance(value, Tensor):
            slot = get_proxy_slot(value, self._tracer, None)
            if slot is None:
                raise CaptureError(f"a check of {n.name} would be lost")
            return slot.proxy.node
        if n.op in ("call_function", "call_method"):
            return self._copy(n, value)  # a copy: torch's compilers check where it comes from
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return get_proxy_slot(value, self._tracer).force().node
        return value


_EXITS: dict[Any, Callable[[Any], Any]] = {
    ENTER_AUTOCAST: EXIT_AUTOCAST,
    ENTER_INFERENCE: EXIT_INFERENCE,
}


_DECOMPOSITIONS: dict[Any, Callable[..., Tensor]] = {
    # make_fx would record `x.data` as a constant
    GET_DATA: Tensor.detach,
    TRANSFORMER_LAYER: _encoder_layer,
    aten._transformer_encoder_layer_fwd.default: _encoder_layer,
}
