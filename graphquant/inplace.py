"""In-place optimization: `optimize_` makes a module run in int8, `restore_` undoes it.

Like torch.nn.Module.compile, it sets the module's `_compiled_call_impl`; for callers of
`module.forward` it also sets an instance attribute `forward`. Copies and pickles leave both out.
Three things differ from torch.nn.Module.compile:

    each module has its own code object for Dynamo to compile: otherwise all modules of a process
    share one recompile_limit, beyond which Dynamo runs float

    changed hooks on submodules are noticed: Dynamo does not guard on them, and transformers
    installs some at the first call with output_hidden_states=True

    threads wait while one of them compiles: in Dynamo each would compile, and use up the
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

from graphquant._torch import hook_tables, is_compiled
from graphquant.backend import graphquant
from graphquant.capture.tracing import missing_linears
from graphquant.config import Config
from graphquant.errors import OptionError, ReleasedWeightError, UnsupportedInputError
from graphquant.report import Report
from graphquant.utils.locks import Lock
from graphquant.weights.released import is_released, move_back
from graphquant.weights.versions import forget

_CALL = "_compiled_call_impl"  # torch.nn.Module.__call__ calls this if set
_FORWARD, _STATE = "forward", "__getstate__"  # instance attributes that override the class's
_OVERRIDE = "_graphquant_optimized"  # attribute of the functions behind them
_running = threading.local()  # .modules: ids of the optimized modules that this thread is inside of
_EMBEDDED = ("inputs_embeds", "hidden_states")  # arguments of shape [batch, tokens, hidden_size]
_MAX_VARIANTS = 8  # of one module, for different hooks; Dynamo's recompile_limit is 8 as well


class LiveReport(Report):
    """Report of an optimized module, updated whenever it compiles a graph."""

    @property
    def ran(self) -> bool:
        """Has the module been called since `optimize_`?"""
        return self.graphs > 0

    def become(self, report: Report) -> None:
        """Replace the content by that of another report."""
        for field in fields(Report):
            object.__setattr__(self, field.name, getattr(report, field.name))


def optimize_(
    module: nn.Module, *, bsz: int | None = None, seqlen: int | None = None, **options: Any
) -> Report:
    """Make this module run in int8 from its next call; the code around it stays eager.

    module       any torch.nn.Module that is called, such as `model.vision_model.encoder`
    bsz, seqlen  optional, and not limits. With both, a module that reads embeddings [bsz, seqlen,
                 hidden_size] is compiled now, by a call on zeros, not at its first call: if its
                 only required argument is `inputs_embeds` or `hidden_states`, and it has a
                 `config.hidden_size`. Do it under the torch.inference_mode() or torch.no_grad()
                 under which it will run, or the first call compiles again.
    options      as for `torch.compile(module, backend="graphquant", options=options)`;
                 quantize=False stacks q/k/v in float, without int8

    Signature, outputs and their types, parameters, state_dict, hooks and submodules do not change.
    Anything that can need a gradient stays float, so call it under torch.inference_mode() or
    torch.no_grad(). `module.forward(...)` runs in int8 as well, without hooks as usual, unless the
    instance has its own `forward`. Copies and pickles are float. If an enclosing module is
    compiled, that compilation includes this module, with its own backend.

    A second call with equal options does nothing and returns the same Report; with other options,
    they replace the old ones.

    The Report is empty until a graph is compiled (`report.ran`), and stays up to date. A graph that
    is compiled again (other sizes, other arguments) replaces its old entries. Paths begin at the
    module.

    Raises UnsupportedInputError for what is not a module, is never called itself (nn.ModuleList) or
    came from torch.compile; OptionError for an unknown option and for an invalid bsz or seqlen;
    ReleasedWeightError if the options to be replaced have released weights.
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
    call = _OptimizedCall(module, config, options)
    setattr(module, _CALL, call)
    if _FORWARD not in vars(module):
        vars(module)[_FORWARD] = MethodType(_forward_of(type(module)), module)
        vars(module)[_STATE] = MethodType(_state_of(type(module)), module)
    # last, because Dynamo guards on the attributes that were set above
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
    """Undo `optimize_` for this module and all its submodules.

    Their packed weights are dropped; another compilation that uses them repacks. Weights that
    free_weights="host" has moved go back to their device. Does nothing to other modules.

    Raises ReleasedWeightError, and changes nothing, if free_weights=True has released weights:
    restore those by `module.load_state_dict(values, assign=True)` first.
    """
    _undo([m for m in module.modules() if _optimized(m) is not None])


def _undo(optimized: list[nn.Module]) -> None:
    for m in optimized:
        if released := [name for name, p in m.named_parameters() if is_released(p)]:
            raise ReleasedWeightError(
                f"free_weights=True has released {len(released)} weights, such as {released[0]}: "
                "load them first, by module.load_state_dict(values, assign=True)"
            )
    for m in optimized:
        before = vars(m).pop(_CALL).before
        if _is_override(vars(m).get(_FORWARD)):
            del vars(m)[_FORWARD]
        if _is_override(vars(m).get(_STATE)):
            del vars(m)[_STATE]
        if before is not None:
            setattr(m, _CALL, before)
        forget(m)
        move_back(chain(m.parameters(), m.buffers()))


class _Variant:
    """A module compiled for one set of hooks: the only owner of its graphs."""

    def __init__(self) -> None:
        self.call: Callable[..., Any] = _call
        self.graphs: list[Callable[..., Any]] = []


class _OptimizedCall:
    """Replacement for the `_call_impl` of an optimized module.

    before  the replacement that torch.nn.Module.compile had set, None if there was none
    """

    def __init__(self, module: nn.Module, config: Config, options: dict[str, Any]) -> None:
        self.config = config
        self.report = LiveReport(())
        self.before = vars(module).get(_CALL)
        self._options = options
        self._module = ref(module)
        self._variants: dict[_Key, _Variant] = {}
        self._graphs: dict[frozenset[Hashable], Report] = {}  # by ids of the parameters of each
        self._hooks = _hook_dicts(module)
        self._compiling = Lock()
        self._compilations = 0
        self._settled = False  # the last call did not compile
        self._update(Report.merge(()), ("nothing is compiled yet: the module was not called",))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self._module()
        if torch.compiler.is_dynamo_compiling():  # as part of an enclosing module
            return module._call_impl(*args, **kwargs)
        with _inside(module):
            return self._run(_call, module, args, kwargs)

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replacement for module.forward(...)."""
        with _inside(module):
            return self._run(_forward, module, args, kwargs)

    def _run(self, what: Callable[..., Any], module: Any, args: Any, kwargs: Any) -> Any:
        hooks = tuple(chain.from_iterable(self._hooks)) if any(self._hooks) else ()
        key = what, hooks
        variant = self._variants.get(key)
        if variant is not None and self._settled:
            return variant.call(module, *args, **kwargs)
        with self._compiling:
            variant = self._variants.get(key) or self._add(key)
            before = self._compilations
            result = variant.call(module, *args, **kwargs)
            self._settled = self._compilations == before
            return result

    def _add(self, key: _Key) -> _Variant:
        if len(self._variants) == _MAX_VARIANTS:
            del self._variants[next(iter(self._variants))]

        self._variants[key] = variant = _Variant()
        self_ref, variant_ref = ref(self), ref(variant)

        # A new backend for each variant: code after a graph break is cached by backend, and must
        # not be shared between sets of hooks. Dynamo keeps the backend, and what it returns, as
        # long as the compiled code, such as the forward of a class. Weak references, so that this
        # does not keep graphs and packed weights alive; during a call the caller does.
        def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            call, variant = self_ref(), variant_ref()
            assert call is not None and variant is not None
            index = len(variant.graphs)
            variant.graphs.append(call._compile(gm, example_inputs))

            def graph(*args: Any) -> Any:
                variant: Any = variant_ref()
                return variant.graphs[index](*args)

            return graph

        call = FunctionType(key[0].__code__.replace(), globals())
        variant.call = torch.compile(call, backend=backend)
        return variant

    def _compile(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self._settled = False
        self._compilations += 1
        module: Any = self._module()
        self._hooks = _hook_dicts(module)  # submodules may have been replaced
        reads = frozenset(id(v) for v in example_inputs if isinstance(v, nn.Parameter))

        def on_report(report: Report) -> None:
            key: frozenset[Hashable] = reads or frozenset(o.node for o in report.outcomes)
            others = {k: r for k, r in self._graphs.items() if not (k <= key or key <= k)}
            self._graphs = {**others, key: report}
            notes = missing_linears(module, set().union(*self._graphs))
            self._update(Report.merge(self._graphs.values()), notes)
            if self.config.on_report is not None:
                self.config.on_report(report)

        options = {**self._options, "on_report": on_report}
        return graphquant(gm, example_inputs, options=options, root=module)

    def _update(self, report: Report, notes: Iterable[str]) -> None:
        self.report.become(replace(report, notes=(*report.notes, *notes)))


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self._call_impl(*args, **kwargs)  # named `self` as in a method: paths leave it out


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    return type(self).forward(self, *args, **kwargs)


_Key = tuple[Any, tuple[int, ...]]  # _call or _forward, and the hooks of all submodules


@contextmanager
def _inside(module: nn.Module) -> Iterator[None]:
    """Context in which `module.forward` is the class's own, for this thread."""
    modules: list[int] = _running.__dict__.setdefault("modules", [])
    modules.append(id(module))
    try:
        yield
    finally:
        modules.pop()


def _forward_of(cls: Any) -> Callable[..., Any]:
    """The `forward` of optimized modules of this class, with the same signature."""

    @wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or id(self) in _running.__dict__.get("modules", ()):
            return type(self).forward(self, *args, **kwargs)
        call = _optimized(self)
        if call is None:  # a copy that was made without __getstate__
            return type(self).forward(self, *args, **kwargs)
        return call.forward(self, args, kwargs)

    setattr(forward, _OVERRIDE, True)
    return forward


def _state_of(cls: Any) -> Callable[..., Any]:
    """The `__getstate__` of optimized modules of this class, which leaves out the overrides."""

    @wraps(cls.__getstate__)
    def state(self: Any) -> Any:
        found = cls.__getstate__(self)
        if not isinstance(found, dict):
            return found
        return {k: v for k, v in found.items() if k != _CALL and not _is_override(v)}

    setattr(state, _OVERRIDE, True)
    return state


def _is_override(value: object) -> bool:
    """Is this a method that `optimize_` has set on a module?"""
    return isinstance(value, MethodType) and hasattr(value.__func__, _OVERRIDE)


def _hook_dicts(module: nn.Module) -> list[dict[int, Any]]:
    """The hook dicts of all modules in it. Their keys are unique in the process."""
    return [hooks for m in module.modules() for hooks in hook_tables(m)]


def _optimized(module: nn.Module) -> _OptimizedCall | None:
    call = vars(module).get(_CALL)
    return call if isinstance(call, _OptimizedCall) else None


def _width(module: nn.Module) -> int | None:
    """The hidden size of a module whose only required argument is embeddings, else None."""
    parameters = inspect.signature(module.forward).parameters.values()
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    width = getattr(getattr(module, "config", None), "hidden_size", None)
    return width if len(required) == 1 and required[0] in _EMBEDDED else None


def _check_size(name: str, size: int | None) -> None:
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise OptionError(f"{name} must be a number of at least 1, got {size!r}")


def _check(module: nn.Module) -> None:
    if is_compiled(module):
        raise UnsupportedInputError(
            "optimize_ needs the module itself, got the result of torch.compile, which is compiled "
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
