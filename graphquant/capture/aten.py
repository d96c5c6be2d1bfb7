"""Dynamo graph or ExportedProgram -> one IR: a pre-dispatch ATen graph whose parameters are known.

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
from graphquant.capture.sources import (
    _being_compiled,
    _is_parameter,
    _real,
    _spelling,
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
    """Retrace what Dynamo hands to a backend. None if the graph has no tensor input.

    root  where paths begin: by itself the module that is being compiled

    Raises CaptureError for a graph that would not be the model's any more: one with a value that
    make_fx cannot follow, or with an effect that it would lose.
    """
    given = gm.graph.find_nodes(op="placeholder")
    fakes = [n.meta["example_value"] for n in given]
    fake_mode = next((f.fake_mode for f in fakes if isinstance(f, FakeTensor)), None)
    if fake_mode is None:
        return None
    trains = any(isinstance(v, Tensor) and v.requires_grad for v in example_inputs)
    if why := _unfollowable(gm, trains):
        raise CaptureError(why)
    try:
        with fake_mode, preserve_node_meta():
            retraced = make_fx(lambda *a: _retrace(gm, *a), pre_dispatch=True)(*fakes)
    finally:  # Dynamo's graph may still be compiled as it was
        _drop_policies(gm)
    _drop_policies(retraced)
    if why := _lost(retraced):
        raise CaptureError(why)
    places = Places(_being_compiled() if root is None else root)
    places.mark(retraced)
    captured = Captured(retraced, fake_mode, {}, {}, grad_enabled=torch.is_grad_enabled())
    for node in retraced.graph.find_nodes(op="get_attr"):
        value = getattr(retraced, str(node.target), None)
        if isinstance(value, Tensor):  # torch.tensor([1.0]) in the forward
            node.meta[LITERAL] = value
            # make_fx leaves a fake value of another mode, which does not go with the others
            node.meta["val"] = fake_mode.from_tensor(value, static_shapes=True)
    placeholders = retraced.graph.find_nodes(op="placeholder")
    for old, new, value in zip(given, placeholders, example_inputs, strict=True):
        copy_source(old, new)
        value = _real(old, value)
        if not isinstance(value, Tensor):
            continue
        if value.requires_grad:
            captured.differentiable.add(new)
        if _is_parameter(value):
            captured.parameters[new] = value
            captured.names[new] = places.tensor(value, _spelling(old))
    captured.training = places.training
    captured.elsewhere = places.elsewhere(captured.parameters.values())
    # CUDA graphs treat parameters as static only if the graph says where its inputs come from
    retraced.meta.update(gm.meta)
    # constants of the forward, such as the 0 of `y[:, 0] = 0`, need a name of their own
    constants = (n for n, _ in chain(retraced.named_parameters(), retraced.named_buffers()))
    name_parameters(retraced, constants)
    return captured


@contextmanager
def forgotten_afterwards(backend: Callable[..., Any]) -> Iterator[None]:
    """Dynamo forgets the functions that it compiles in here, for this backend and for no other.

    Else the code behind a graph break keeps what was compiled, and at the recompile_limit Dynamo
    runs that code as it is, whatever backend asks.
    """
    codes: list[CodeType] = []

    def note(code: CodeType, new_code: CodeType) -> CodeType | None:
        codes.append(code)
        return None

    hook = on_bytecode(note)
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


def _unfollowable(gm: GraphModule, trains: bool) -> str | None:
    """Why this graph cannot be retraced, or None. Asked before anything of it is run.

    A call that takes and gives no value is there for what it does to the state of torch. Those of
    STATEFUL are kept; to leave out any other would change what the model computes.
    """
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            if trains and getattr(node.target, "_name", "") == _FUNCTION:
                return f"{node.name} is an autograd.Function with a backward of its own"
            if _is_of_functorch(node.target):
                return f"{node.name} is a step of torch.vmap or torch.func"
            if node.op == "call_method" and node.target in _ON_AUTOGRAD:
                return f"{node.name} tells autograd something about a value"
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


_FUNCTION = "autograd_function_apply"  # make_fx follows into its forward, and forgets the rest
_ON_AUTOGRAD = ("requires_grad_", "retain_grad", "register_hook")


def _without_value(node: Node) -> bool:
    """Does this call neither take nor give a value? Contexts that it takes are none."""
    if any(not sets_state(n) for n in node.all_input_nodes):
        return False
    given = tree_leaves(node.meta.get("example_value"))
    return sets_state(node) or not any(isinstance(v, _VALUES) for v in given)


_VALUES = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, int, float)


def _is_of_functorch(target: Any) -> bool:
    if isinstance(target, HigherOrderOperator):  # autograd.Function is one
        return False
    return "functorch" in str(getattr(target, "__module__", ""))


def _is_nested(value: Any) -> bool:
    return any(isinstance(v, Tensor) and v.is_nested for v in tree_leaves(value))


def _name(target: Any) -> str:
    return getattr(target, "__name__", str(target))


def _lost(retraced: GraphModule) -> str | None:
    """What make_fx could not follow and took for a constant."""
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
    return Captured(gm, fake_mode, attributes, {n: str(n.target) for n in attributes})


def without_checks(program: ExportedProgram) -> GraphModule:
    """The program's module, which does not check its inputs."""
    module = program.module(check_guards=False)
    return GraphModule(module, module.graph)  # a plain copy: the checks are hooks of `module`


def _retrace(gm: GraphModule, *inputs: Any) -> Any:
    """Run the graph under make_fx. What it sets is set back, whatever happens."""
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
    """Runs a Dynamo graph under make_fx, which records the operators on tensors.

    Calls that set a state are recorded here, and take effect as well: a fake value under autocast
    has the type of a real run. So are checks on sizes that depend on data. Dynamo has taken them
    for true, and what runs on its fake values finds a constant where the check compares a size.
    Fused inference ops of torch.nn.Transformer are opened, so that their linears can be found.
    """

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        mode = get_proxy_mode()
        assert mode is not None
        self._tracer = mode.tracer
        self._copies: dict[Node, Node] = {}  # nodes that are recorded as they are
        self.open: dict[Node, tuple[Callable[[Any], Any], Any]] = {}  # contexts, and how to leave

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
            made = list(reversed(self._new.nodes))[: len(self._new.nodes) - before]
            if n.all_input_nodes and (self._is_check(n) or not any(map(is_impure, made))):
                for node in made:
                    self._new.erase_node(node)
                self._copy(n, None)
        return value

    def _is_check(self, n: Node) -> bool:
        """Does this call act on numbers alone?"""
        return not any(isinstance(self.env[i], Tensor) for i in n.all_input_nodes)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in _OPENED:
            return _OPENED[target](*args, **kwargs)
        if target is _CHECKPOINT:
            args[0].meta.setdefault(_POLICY, noop_context_fn)
        return super().call_function(target, args, kwargs)

    def _set_state(self, n: Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        with DisableTorchFunction():
            value = n.target(*args, **kwargs)  # type: ignore[operator]
        if n.target in _LEAVING:
            self.open[n] = _LEAVING[n.target], value
        elif n.target in _LEAVING.values():
            del self.open[n.args[0]]  # type: ignore[arg-type]
        self._copy(n, None)
        return value

    def _copy(self, n: Node, value: Any) -> Node:
        """The call itself in the new graph, not what running it records."""
        args, kwargs = map_arg((n.args, n.kwargs), self._source)
        copy = self._tracer.create_node(n.op, n.target, args, kwargs)
        copy.meta["val"] = value
        self._copies[n] = copy
        return copy

    def _source(self, n: Node) -> Any:
        """What stands for n in the new graph."""
        if n in self._copies:
            return self._copies[n]
        value = self.env[n]
        if isinstance(value, Tensor):
            slot = get_proxy_slot(value, self._tracer, None)
            if slot is None:
                raise CaptureError(f"a check of {n.name} would be lost")
            return slot.proxy.node
        if n.op in ("call_function", "call_method"):
            return self._copy(n, value)  # as Dynamo has it: torch's compilers look where it is from
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return get_proxy_slot(value, self._tracer).force().node
        return value


_LEAVING: dict[Any, Callable[[Any], Any]] = {
    ENTER_AUTOCAST: EXIT_AUTOCAST,
    ENTER_INFERENCE: EXIT_INFERENCE,
}


_OPENED: dict[Any, Callable[..., Tensor]] = {
    # make_fx takes `x.data` for a constant
    GET_DATA: Tensor.detach,
    TRANSFORMER_LAYER: _encoder_layer,
    aten._transformer_encoder_layer_fwd.default: _encoder_layer,
}
