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

Methods such as `get_image_features` and `generate` do not call the module but parts of it
(graphquant/parts.py). Each part has an attribute `forward` too, which compiles it where it is not
called by an optimized module. A call that fills a key/value cache stays eager, except for the parts
in it that take none; a single linear in it, such as the head of a language model, stays eager too.
"""

from __future__ import annotations

import atexit
import inspect
import logging
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import wraps
from itertools import chain
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import nn
from torch.fx import GraphModule

from graphquant._torch import hook_tables, is_compiled, local_of
from graphquant.backend import graphquant
from graphquant.capture.tracing import missing_linears
from graphquant.config import Config
from graphquant.errors import OptionError, ReleasedWeightError, UnsupportedInputError
from graphquant.parts import (
    UNHOOKED,
    fills_cache,
    is_hooked,
    module_of,
    parts_of,
    refuse_hooks,
)
from graphquant.report import Quiet, Report
from graphquant.utils.locks import Lock
from graphquant.weights.released import is_released, move_back
from graphquant.weights.versions import forget

log = logging.getLogger(__name__)

_CALL = "_compiled_call_impl"  # torch.nn.Module.__call__ calls this if set
_FORWARD, _STATE = "forward", "__getstate__"  # instance attributes that override the class's
_OVERRIDE = "_graphquant_optimized"  # attribute of the functions behind them: the _OptimizedCall
# .modules: ids of the optimized modules that this thread is inside of
# .cached: how many calls of this thread that fill a key/value cache it is inside of
_running = threading.local()
_EMBEDDED = ("inputs_embeds", "hidden_states")  # arguments of shape [batch, tokens, hidden_size]
_MAX_VARIANTS = 8  # of one module, for different hooks; Dynamo's recompile_limit is 8 as well


class LiveReport(Report):
    """Report of an optimized module, updated whenever it compiles a graph."""

    @property
    def ran(self) -> bool:
        """Has the module, or a part of it, been compiled by a call since `optimize_`?"""
        return self.graphs > 0

    def become(self, report: Report) -> None:
        """Replace the content by that of another report."""
        for field in fields(Report):
            object.__setattr__(self, field.name, getattr(report, field.name))


def optimize_(
    module: Any, *, bsz: int | None = None, seqlen: int | None = None, **options: Any
) -> Report:
    """Make this module run in int8 from its next call; the code around it stays eager.

    module       any torch.nn.Module that is called, such as `model.vision_model.encoder`, or an
                 object that holds one, such as a transformers pipeline
    bsz, seqlen  optional, and not limits. With both, a module that reads embeddings [bsz, seqlen,
                 hidden_size] is compiled now, by a call on zeros, not at its first call: if its
                 only required argument is `inputs_embeds` or `hidden_states`, and it has a
                 `config.hidden_size`. Do it under the torch.inference_mode() or torch.no_grad()
                 under which it will run, or the first call compiles again.
    options      as for `torch.compile(module, backend="graphquant", options=options)`;
                 quantize=False stacks q/k/v in float, without int8

    Methods that call parts of the module instead of the module, such as CLIP's `get_image_features`
    or Whisper's `generate`, run those parts in int8. Calls with a key/value cache (arguments
    `past_key_values` or `use_cache`) stay float: of a decoder nothing is int8, of the encoder or
    vision tower that it reads everything.

    Signature, outputs and their types, parameters, state_dict, hooks and submodules do not change.
    Anything that can need a gradient stays float, so call it under torch.inference_mode() or
    torch.no_grad(). `module.forward(...)` runs in int8 as well, without hooks as usual, unless the
    instance has its own `forward`. Copies and pickles are float. If an enclosing module is
    compiled, that compilation includes this module, with its own backend.

    A second call with equal options does nothing and returns the same Report; with other options,
    they replace the old ones.

    The Report is empty until a graph is compiled (`report.ran`), and stays up to date. A graph that
    is compiled again (other sizes, other arguments) replaces its old entries. Paths begin at the
    module. Notes name the parts that were not called, and those that stayed float with a key/value
    cache. There is a WARNING if nothing has run in int8 after the first call, and at the end of the
    process if nothing was called.

    Raises UnsupportedInputError for what is not a module and does not hold exactly one, is never
    called itself (nn.ModuleList), came from torch.compile or has hooks of accelerate inside of it
    (a device map over several devices, or offloaded weights); OptionError for an unknown option and
    for an invalid bsz or seqlen; ReleasedWeightError if the options to be replaced have released
    weights.
    """
    module = module_of(module)
    _check(module)
    refuse_hooks(module)
    _check_size("bsz", bsz)
    _check_size("seqlen", seqlen)
    config = Config.of(options)
    if (now := _optimized(module)) is not None:
        if now.config == config:
            return now.report
        _undo([now])
    if (part := _overriding(module)) is not None:
        _leave(part, module)
    width = _width(module)
    optimized = _Optimized(module, config, options)
    # last, because Dynamo guards on the attributes that were set
    if bsz and seqlen and width:
        weight = next(module.parameters())
        try:
            with torch.no_grad():
                optimized.call(weight.new_zeros(bsz, seqlen, width))
        except BaseException:
            _undo([optimized])
            raise
    return optimized.report


def restore_(module: Any) -> None:
    """Undo `optimize_` for this module (or what the object holds) and all its submodules.

    Their packed weights are dropped; another compilation that uses them repacks. Weights that
    free_weights="host" has moved go back to their device. Does nothing to other modules.

    Raises ReleasedWeightError, and changes nothing, if free_weights=True has released weights:
    restore those by `module.load_state_dict(values, assign=True)` first.
    """
    inside = list(module_of(module).modules())
    _undo([found for m in inside if (found := _optimized(m)) is not None])
    for m in inside:
        if (part := _overriding(m)) is not None:
            _leave(part, m)


def _undo(every: list[_Optimized]) -> None:
    modules = [(one, one.module()) for one in every]
    for _, m in modules:
        _refuse_released(m)
    for optimized, m in modules:
        optimized.remove()
        forget(m)
        move_back(map(local_of, chain(m.parameters(), m.buffers())))


def _leave(part: _OptimizedCall, module: nn.Module) -> None:
    """Undo `optimize_` for this part of an enclosing module."""
    _refuse_released(module)
    part.remove()


def _refuse_released(module: nn.Module) -> None:
    if released := [name for name, p in module.named_parameters() if is_released(local_of(p))]:
        raise ReleasedWeightError(
            f"free_weights=True has released {len(released)} weights, such as {released[0]}: "
            "load them first, by module.load_state_dict(values, assign=True)"
        )


class _Optimized:
    """A module that `optimize_` was called for.

    call    what the module calls
    parts   what its parts call, by path
    """

    def __init__(self, module: nn.Module, config: Config, options: dict[str, Any]) -> None:
        self.config = config
        self.report = LiveReport(())
        self.module: Callable[[], Any] = ref(module)
        self.options = options
        self._graphs: dict[frozenset[Hashable], Report] = {}  # by ids of the parameters of each
        self._told = False
        found = parts_of(module)
        self.call = _OptimizedCall(module, self, "")
        self.parts = {path: _OptimizedCall(part, self, path) for path, part in found.items()}
        self.before = vars(module).get(_CALL)
        setattr(module, _CALL, self.call)
        if _FORWARD not in vars(module) or is_hooked(module):
            _override(module, self.call)
        for path, part in found.items():
            _override(part, self.parts[path])
        self._update()
        _not_called.add(self)

    def remove(self) -> None:
        """Undo what was set on the module and its parts."""
        for part in list(self.parts.values()):
            part.remove()
        self.call.remove()
        vars(self.module()).pop(_CALL)
        if self.before is not None:
            setattr(self.module(), _CALL, self.before)
        _not_called.discard(self)

    def add(self, reads: frozenset[Hashable], report: Report) -> None:
        """Add the report of a graph.

        reads  ids of the parameters that it reads
        """
        key = reads or frozenset(o.node for o in report.outcomes)
        if key:  # a graph without weights replaces no other one
            overlaps = [k for k in self._graphs if k and (k <= key or key <= k)]
            for old in overlaps:
                del self._graphs[old]
        self._graphs[key] = report
        self._update()
        if self.config.on_report is not None:
            self.config.on_report(report)

    def tell(self) -> None:
        """Warn, once, if nothing has run in int8. To be called after a call."""
        _not_called.discard(self)
        self._update()
        if self._told or _running.__dict__.get("cached"):  # or not all of its parts were called yet
            return
        self._told = True
        log.info("optimize_: %s", "; ".join((self.report.summary(), *self.report.notes)))
        loud = [note for note in self.report.notes if not isinstance(note, Quiet)]
        if not self.report.ran:
            log.warning("optimize_: nothing has run in int8: %s", "; ".join(self.report.notes))
        elif self.config.quantize and not self.report.coverage and not loud:
            log.warning("optimize_: nothing runs in int8: %s", self.report.summary())

    def _update(self) -> None:
        report = Report.merge(self._graphs.values())
        self.report.become(replace(report, notes=(*report.notes, *self._notes())))

    def _notes(self) -> Iterator[str]:
        """What has not run, and why."""
        calls = {"": self.call, **self.parts}
        if not any(call.compiled or call.cached for call in calls.values()):
            yield "nothing is compiled yet: the module was not called"
            return
        seen: set[Hashable] = set().union(*self._graphs)
        cached, idle = dict[str, None](), dict[str, None]()
        for name, linear in self.module().named_modules():
            if not isinstance(linear, nn.Linear) or id(local_of(linear.weight)) in seen:
                continue
            around = [p for p in calls if not p or f"{name}.".startswith(f"{p}.")]
            if any(calls[p].compiled for p in around):
                continue  # for missing_linears
            seen.add(id(local_of(linear.weight)))
            if calls[inner := max(around, key=len)].cached:
                cached[inner or name] = None
            else:
                outer = min((p for p in around if p and not calls[p].cached), key=len, default=name)
                idle[outer] = None
        if cached:
            yield Quiet(
                f"in float, because called with a key/value cache: {', '.join(cached)}; decoding "
                "token by token is not quantized"
            )
        if idle:
            yield Quiet(f"not called: {', '.join(idle)}")
        if self._graphs:
            yield from missing_linears(self.module(), seen)


_not_called: WeakSet[_Optimized] = WeakSet()


@atexit.register
def _warn_of_what_was_not_called() -> None:
    for optimized in list(_not_called):
        if (module := optimized.module()) is not None:
            name = type(module).__name__
            log.warning("optimize_: nothing has run in int8: %s was never called", name)


class _Variant:
    """A module compiled for one set of hooks: the only owner of its graphs."""

    def __init__(self) -> None:
        self.call: Callable[..., Any] = _call
        self.graphs: list[Callable[..., Any]] = []


class _OptimizedCall:
    """Replacement for the `_call_impl` of an optimized module, and for the `forward` of its parts.

    compiled  it was called, and compiled
    cached    it was called with a key/value cache
    """

    def __init__(self, module: nn.Module, optimized: _Optimized, path: str) -> None:
        self.compiled = self.cached = False
        self.optimized = optimized
        self._path = path
        self._module = ref(module)
        self._variants: dict[_Key, _Variant] = {}
        self._hooks = _hook_dicts(module)
        self._compiling = Lock()
        self._compilations = 0
        self._settled = False  # the last call did not compile

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self._module()
        if torch.compiler.is_dynamo_compiling():  # as part of an enclosing module
            return module._call_impl(*args, **kwargs)
        if is_hooked(module):  # its hook runs eagerly, and then calls what was set by _override
            return module._call_impl(*args, **kwargs)
        if fills_cache(kwargs):
            return self._eager(module._call_impl, args, kwargs)
        with _inside(module):
            return self._run(_call, module, args, kwargs)

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replacement for module.forward(...)."""
        if fills_cache(kwargs):
            return self._eager(MethodType(type(module).forward, module), args, kwargs)
        with _inside(module):
            return self._run(_forward, module, args, kwargs)

    def is_of(self, module: nn.Module) -> bool:
        return self._module() is module

    def stays_eager(self) -> bool:
        """Is this module's `forward` called from its own call, or, if it is a part, from any
        optimized one's, or is it a single linear in a call with a key/value cache?"""
        running = _running.__dict__.get("modules", ())
        if not self._path:
            return id(self._module()) in running
        if running:
            return True
        if _running.__dict__.get("cached") and isinstance(self._module(), nn.Linear):
            self.cached = True
            return True
        return False

    def remove(self) -> None:
        """Undo what was set on the module as a part, or as what is called by `forward`."""
        module = self._module()
        for name in (_FORWARD, _STATE):
            if module is not None and _is_override(vars(module).get(name)):
                del vars(module)[name]
        if module is not None and _is_override(vars(module).get(UNHOOKED)):
            vars(module)[UNHOOKED] = MethodType(type(module).forward, module)
        self.optimized.parts.pop(self._path, None)

    def _eager(self, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        first, self.cached = not self.cached, True
        _running.cached = _running.__dict__.get("cached", 0) + 1
        try:
            result = method(*args, **kwargs)
        finally:
            _running.cached -= 1
        if first:
            self.optimized.tell()
        return result

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
            if not self._settled:
                self.optimized.tell()
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
        self.compiled = True
        optimized, module = self.optimized, self._module()
        assert module is not None
        self._hooks = _hook_dicts(module)  # submodules may have been replaced
        parameters = (v for v in example_inputs if isinstance(v, nn.Parameter))
        reads = frozenset(id(local_of(p)) for p in parameters)

        def on_report(report: Report) -> None:
            optimized.add(reads, report)

        options = {**optimized.options, "on_report": on_report}
        return graphquant(gm, example_inputs, options=options, root=optimized.module())


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


def _override(module: nn.Module, call: _OptimizedCall) -> None:
    """Set the `forward` and `__getstate__` of an optimized module or part."""
    for name, function in (
        (UNHOOKED if is_hooked(module) else _FORWARD, _forward_of(type(module))),
        (_STATE, _state_of(type(module))),
    ):
        setattr(function, _OVERRIDE, call)
        vars(module)[name] = MethodType(function, module)


def _forward_of(cls: Any) -> Callable[..., Any]:
    """The `forward` of an optimized module of this class, with the same signature and, as Dynamo
    counts compilations by code, with code of its own."""
    function = FunctionType(_forward_anywhere.__code__.replace(), globals())
    return wraps(cls.forward)(function)


def _forward_anywhere(self: Any, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_dynamo_compiling():
        return type(self).forward(self, *args, **kwargs)
    call = _overriding(self)
    if call is None or call.stays_eager():  # None: a copy that was made without __getstate__
        return type(self).forward(self, *args, **kwargs)
    return call.forward(self, args, kwargs)


def _state_of(cls: Any) -> Callable[..., Any]:
    """The `__getstate__` of optimized modules of this class, which leaves out the overrides."""

    @wraps(cls.__getstate__)
    def state(self: Any) -> Any:
        found = cls.__getstate__(self)
        if not isinstance(found, dict):
            return found
        plain = {k: v for k, v in found.items() if k != _CALL and not _is_override(v)}
        return plain | ({UNHOOKED: MethodType(cls.forward, self)} if UNHOOKED in found else {})

    return state


def _is_override(value: object) -> bool:
    """Is this a method that `optimize_` has set on a module?"""
    return isinstance(value, MethodType) and hasattr(value.__func__, _OVERRIDE)


def _hook_dicts(module: nn.Module) -> list[dict[int, Any]]:
    """The hook dicts of all modules in it. Their keys are unique in the process."""
    return [hooks for m in module.modules() for hooks in hook_tables(m)]


def _optimized(module: nn.Module) -> _Optimized | None:
    """What `optimize_` has made of this module, if it was called for it."""
    call = vars(module).get(_CALL)
    return call.optimized if isinstance(call, _OptimizedCall) else None


def _overriding(module: nn.Module) -> _OptimizedCall | None:
    """What the module's `forward` calls, by itself or in a hook, if `optimize_` has replaced it."""
    for name in (_FORWARD, UNHOOKED):
        call = getattr(vars(module).get(name), _OVERRIDE, None)
        if isinstance(call, _OptimizedCall) and call.is_of(module):
            return call
    return None


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
