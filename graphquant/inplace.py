"""A module that runs int8 from its next call: `optimize_`, and `restore_`, which undoes it.

It is done where torch.nn.Module.compile does it, in the module's `_compiled_call_impl`, and for
callers of `module.forward` in an attribute `forward` of the instance; copies and pickles leave both
out. Three things differ from torch.nn.Module.compile:

    each module has a function of its own for Dynamo to compile: else all modules of a process share
    one recompile_limit, behind which Dynamo runs float

    hooks that come or go on the modules inside are noticed: Dynamo does not guard on them, and
    transformers installs some at the first call with output_hidden_states=True

    threads wait while one of them compiles: in Dynamo each would compile for itself, and use up the
    recompile_limit
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import wraps
from itertools import chain
from types import FunctionType, MethodType
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.fx import GraphModule

from graphquant.backend import graphquant
from graphquant.capture.tracing import unseen
from graphquant.config import Config
from graphquant.errors import OptionError, ReleasedWeightError, UnsupportedInputError
from graphquant.report import Report
from graphquant.utils.locks import Lock
from graphquant.weights.released import is_released, move_back
from graphquant.weights.versions import forget

_CALL = "_compiled_call_impl"  # torch.nn.Module.__call__ calls this, if it is set
_FORWARD, _STATE = "forward", "__getstate__"  # attributes of the instance, in front of its class's
_OURS = "_graphquant_optimized"  # marks the functions of these
_running = threading.local()  # .modules: ids of those that are in a call of their own
_EMBEDDED = ("inputs_embeds", "hidden_states")  # arguments of shape [batch, tokens, hidden_size]
_HOOK_SETS = 8  # of one module that are kept compiled; Dynamo, too, keeps 8 variants of a function


class LiveReport(Report):
    """The Report of what a module has compiled until now: it fills in as that happens."""

    @property
    def ran(self) -> bool:
        """Has the module been called since `optimize_`?"""
        return self.graphs > 0

    def become(self, report: Report) -> None:
        for field in fields(Report):
            object.__setattr__(self, field.name, getattr(report, field.name))


def optimize_(
    module: nn.Module, *, bsz: int | None = None, seqlen: int | None = None, **options: Any
) -> Report:
    """From its next call on, this module runs in int8; what is around it stays eager.

    module       any torch.nn.Module that is called, such as `model.vision_model.encoder`
    bsz, seqlen  never needed, and no limits. With both, a module that reads embeddings [bsz,
                 seqlen, hidden_size] is compiled now, by a call on zeros, and not at its first
                 call: if its one required argument is `inputs_embeds` or `hidden_states`, and it
                 has a `config.hidden_size`. Do it under the torch.inference_mode() or
                 torch.no_grad() under which it will run, or that call compiles again.
    options      as for `torch.compile(module, backend="graphquant", options=options)`;
                 quantize=False stacks q/k/v in float and leaves int8 alone

    Signature, outputs and their types, parameters, state_dict, hooks and submodules are the
    module's own. What can need a gradient stays float, so call it under torch.inference_mode() or
    torch.no_grad(). Calls of `module.forward(...)` run in int8 as well, past the hooks as ever;
    not if the instance has a `forward` of its own. Copies and pickles of it are float. If a module
    around this one is compiled as well, that compilation takes it in, with its own backend.

    Again with equal options it does nothing and returns the same Report; with others, these replace
    the former.

    The Report is empty until a graph is compiled, and says so (`report.ran`); whenever it is read,
    it is up to date. A graph that is compiled again (other sizes, other arguments) replaces what
    was reported for it. Paths begin at the module.

    Raises UnsupportedInputError for what is no module, is never called by itself (nn.ModuleList),
    or came from torch.compile; OptionError for an option that does not exist, or bsz or seqlen that
    are no sizes; ReleasedWeightError if the options to replace have released weights.
    """
    _check(module)
    _check_size("bsz", bsz)
    _check_size("seqlen", seqlen)
    config = Config.of(options)
    if (now := _optimized(module)) is not None:
        if now.config == config:
            return now.report
        _undo([module])
    width = _width(module)
    call = _Int8(module, config, options)
    setattr(module, _CALL, call)
    if _FORWARD not in vars(module):
        vars(module)[_FORWARD] = MethodType(_forward_of(type(module)), module)
        vars(module)[_STATE] = MethodType(_state_of(type(module)), module)
    # now that the module is as it will be called: Dynamo guards on its attributes
    if bsz and seqlen and width:
        weight = next(module.parameters())
        try:
            with torch.no_grad():
                call(weight.new_zeros(bsz, seqlen, width))
        except BaseException:
            _undo([module])
            raise
    return call.report


def restore_(module: nn.Module) -> None:
    """Undo `optimize_` for this module and all modules in it: they are as they were before.

    Their packed weights are let go; another compilation that uses them packs them again. Weights
    that free_weights="host" has moved are on their device again. What was not optimised stays as it
    is.

    Raises ReleasedWeightError, and changes nothing, if free_weights=True has released weights:
    `module.load_state_dict(values, assign=True)` brings them back.
    """
    _undo([m for m in module.modules() if _optimized(m) is not None])


def _undo(optimized: list[nn.Module]) -> None:
    for m in optimized:
        if gone := [name for name, p in m.named_parameters() if is_released(p)]:
            raise ReleasedWeightError(
                f"free_weights=True has released {len(gone)} weights, such as {gone[0]}: load them "
                "first, by module.load_state_dict(values, assign=True)"
            )
    for m in optimized:
        before = vars(m).pop(_CALL).before
        if _is_ours(vars(m).get(_FORWARD)):
            del vars(m)[_FORWARD]
        if _is_ours(vars(m).get(_STATE)):
            del vars(m)[_STATE]
        if before is not None:
            setattr(m, _CALL, before)
        forget(m)
        move_back(chain(m.parameters(), m.buffers()))


class _Run:
    """A module compiled with some hooks: nothing else keeps its graphs."""

    def __init__(self) -> None:
        self.call: Callable[..., Any] = _call
        self.graphs: list[Callable[..., Any]] = []


class _Int8:
    """What a module calls instead of its forward and its hooks.

    before  what it called until now, if torch.nn.Module.compile has set that
    """

    def __init__(self, module: nn.Module, config: Config, options: dict[str, Any]) -> None:
        self.config = config
        self.report = LiveReport(())
        self.before = vars(module).get(_CALL)
        self._options = options
        self._module = ref(module)
        self._runs: dict[_Key, _Run] = {}
        self._graphs: dict[frozenset[Hashable], Report] = {}  # by ids of what each reads
        self._hooks = _hooks(module)
        self._compiling = Lock()
        self._compilations = 0
        self._settled = False  # the last call compiled nothing
        self._tell(Report.merge(()), ("nothing is compiled yet: the module was not called",))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self._module()
        if torch.compiler.is_dynamo_compiling():  # with something around the module
            return module._call_impl(*args, **kwargs)
        with _inside(module):
            return self._run(_call, module, args, kwargs)

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What module.forward(...) runs."""
        with _inside(module):
            return self._run(_forward, module, args, kwargs)

    def _run(self, what: Callable[..., Any], module: Any, args: Any, kwargs: Any) -> Any:
        hooks = tuple(chain.from_iterable(self._hooks)) if any(self._hooks) else ()
        key = what, hooks
        run = self._runs.get(key)
        if run is not None and self._settled:
            return run.call(module, *args, **kwargs)
        with self._compiling:
            run = self._runs.get(key) or self._add(key)
            before = self._compilations
            result = run.call(module, *args, **kwargs)
            self._settled = self._compilations == before
            return result

    def _add(self, key: _Key) -> _Run:
        if len(self._runs) == _HOOK_SETS:
            del self._runs[next(iter(self._runs))]

        self._runs[key] = run = _Run()
        mine, its = ref(self), ref(run)

        # Equal to no other backend: what is behind a graph break is compiled by itself, and must
        # not be taken from a compilation with other hooks either. Dynamo keeps it, and what it
        # returns, as long as the code it has compiled, such as the forward of a class: so neither
        # keeps us alive, nor graphs and packed weights. Who calls us does while it calls.
        def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            me, run = mine(), its()
            assert me is not None and run is not None
            at = len(run.graphs)
            run.graphs.append(me._compile(gm, example_inputs))

            def graph(*args: Any) -> Any:
                run: Any = its()
                return run.graphs[at](*args)

            return graph

        call = FunctionType(key[0].__code__.replace(), globals())
        run.call = torch.compile(call, backend=backend)
        return run

    def _compile(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self._settled = False
        self._compilations += 1
        module: Any = self._module()
        self._hooks = _hooks(module)  # modules inside may have been replaced
        reads = frozenset(id(v) for v in example_inputs if isinstance(v, nn.Parameter))

        def tell(report: Report) -> None:
            key: frozenset[Hashable] = reads or frozenset(o.node for o in report.outcomes)
            others = {k: r for k, r in self._graphs.items() if not (k <= key or key <= k)}
            self._graphs = {**others, key: report}
            notes = unseen(module, set().union(*self._graphs))
            self._tell(Report.merge(self._graphs.values()), notes)
            if self.config.on_report is not None:
                self.config.on_report(report)

        options = {**self._options, "on_report": tell}
        return graphquant(gm, example_inputs, options=options, root=module)

    def _tell(self, report: Report, notes: Iterable[str]) -> None:
        self.report.become(replace(report, notes=(*report.notes, *notes)))


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self._call_impl(*args, **kwargs)  # `self` as in a method: paths begin behind it


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    return type(self).forward(self, *args, **kwargs)


_Key = tuple[Any, tuple[int, ...]]  # what is compiled, and the hooks inside


@contextmanager
def _inside(module: nn.Module) -> Iterator[None]:
    """In this thread, module.forward is the class's own: its call is what is being run."""
    modules: list[int] = _running.__dict__.setdefault("modules", [])
    modules.append(id(module))
    try:
        yield
    finally:
        modules.pop()


def _forward_of(cls: Any) -> Callable[..., Any]:
    """The `forward` of this class's modules that are optimized, with the class's signature."""

    @wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or id(self) in _running.__dict__.get("modules", ()):
            return type(self).forward(self, *args, **kwargs)
        call = _optimized(self)
        if call is None:  # a copy that was made past __getstate__
            return type(self).forward(self, *args, **kwargs)
        return call.forward(self, args, kwargs)

    setattr(forward, _OURS, True)
    return forward


def _state_of(cls: Any) -> Callable[..., Any]:
    """The `__getstate__` of this class's modules that are optimized: as if they were not."""

    @wraps(cls.__getstate__)
    def state(self: Any) -> Any:
        found = cls.__getstate__(self)
        if not isinstance(found, dict):
            return found
        return {k: v for k, v in found.items() if k != _CALL and not _is_ours(v)}

    setattr(state, _OURS, True)
    return state


def _is_ours(value: object) -> bool:
    """Is this a method that `optimize_` has put on a module?"""
    return isinstance(value, MethodType) and hasattr(value.__func__, _OURS)


def _hooks(module: nn.Module) -> list[dict[int, Any]]:
    """Every dict of hooks in it, by ids that are given once."""
    return [
        hooks
        for m in module.modules()
        for hooks in (
            m._forward_pre_hooks,
            m._forward_hooks,
            m._backward_pre_hooks,
            m._backward_hooks,
        )
    ]


def _optimized(module: nn.Module) -> _Int8 | None:
    call = vars(module).get(_CALL)
    return call if isinstance(call, _Int8) else None


def _width(module: nn.Module) -> int | None:
    """The hidden size of a module whose only required argument are embeddings, else None."""
    every = inspect.signature(module.forward).parameters.values()
    required = [p.name for p in every if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    width = getattr(getattr(module, "config", None), "hidden_size", None)
    return width if len(required) == 1 and required[0] in _EMBEDDED else None


def _check_size(name: str, size: int | None) -> None:
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise OptionError(f"{name} must be a number of at least 1, got {size!r}")


def _check(module: nn.Module) -> None:
    if isinstance(module, torch._dynamo.OptimizedModule):
        raise UnsupportedInputError(
            "optimize_ needs the module itself, got what torch.compile made of it: it is compiled "
            'already; torch.compile(module, backend="graphquant") does the same as optimize_'
        )
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedInputError(
            f"optimize_ needs a torch.nn.Module, got {type(module).__name__}"
        )
    if getattr(module.forward, "__func__", None) is nn.Module.forward:
        raise UnsupportedInputError(
            f"{type(module).__name__} has no forward, so it is never called: optimize the modules "
            "in it, or the one that calls them"
        )
