"""What an optimized module and its parts call.

Like torch.nn.Module.compile, `optimize_` sets the module's `_compiled_call_impl`; for callers of
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

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import chain
from types import FunctionType, MethodType
from typing import Any, Protocol
from weakref import ref

import torch
from torch import nn
from torch.fx import GraphModule

from graphquant._torch import hook_tables, local_of
from graphquant.backend import graphquant
from graphquant.parts import UNHOOKED, fills_cache, is_hooked
from graphquant.report import Report
from graphquant.utils.locks import Lock

CALL = "_compiled_call_impl"  # torch.nn.Module.__call__ calls this if set
FORWARD, _STATE = "forward", "__getstate__"  # instance attributes that override the class's
_OVERRIDE = "_graphquant_optimized"  # attribute of the functions behind them: the OptimizedCall
# .modules: ids of the optimized modules that this thread is inside of
# .cached: how many calls of this thread that fill a key/value cache it is inside of
_running = threading.local()
_MAX_VARIANTS = 8  # of one module, for different hooks; Dynamo's recompile_limit is 8 as well


class Owner(Protocol):
    """The module that `optimize_` was called for, as its calls see it."""

    options: dict[str, Any]
    parts: dict[str, OptimizedCall]
    module: Callable[[], Any]

    def add(self, reads: frozenset[Hashable], report: Report) -> None: ...

    def tell(self) -> None: ...


def inside_cached_call() -> bool:
    """Is this thread inside of a call that fills a key/value cache?"""
    return bool(_running.__dict__.get("cached"))


class _Variant:
    """A module compiled for one set of hooks: the only owner of its graphs."""

    def __init__(self) -> None:
        self.call: Callable[..., Any] = _call
        self.graphs: list[Callable[..., Any]] = []


class OptimizedCall:
    """Replacement for the `_call_impl` of an optimized module, and for the `forward` of its parts.

    compiled  it was called, and compiled
    cached    it was called with a key/value cache
    """

    def __init__(self, module: nn.Module, optimized: Owner, path: str) -> None:
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
        if inside_cached_call() and isinstance(self._module(), nn.Linear):
            self.cached = True
            return True
        return False

    def remove(self) -> None:
        """Undo what was set on the module as a part, or as what is called by `forward`."""
        module = self._module()
        for name in (FORWARD, _STATE):
            if module is not None and _isoverride(vars(module).get(name)):
                del vars(module)[name]
        if module is not None and _isoverride(vars(module).get(UNHOOKED)):
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


def override(module: nn.Module, call: OptimizedCall) -> None:
    """Set the `forward` and `__getstate__` of an optimized module or part."""
    for name, function in (
        (UNHOOKED if is_hooked(module) else FORWARD, _forward_of(type(module))),
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
    call = overriding(self)
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
        plain = {k: v for k, v in found.items() if k != CALL and not _isoverride(v)}
        return plain | ({UNHOOKED: MethodType(cls.forward, self)} if UNHOOKED in found else {})

    return state


def _isoverride(value: object) -> bool:
    """Is this a method that `optimize_` has set on a module?"""
    return isinstance(value, MethodType) and hasattr(value.__func__, _OVERRIDE)


def _hook_dicts(module: nn.Module) -> list[dict[int, Any]]:
    """The hook dicts of all modules in it. Their keys are unique in the process."""
    return [hooks for m in module.modules() for hooks in hook_tables(m)]


def overriding(module: nn.Module) -> OptimizedCall | None:
    """What the module's `forward` calls, by itself or in a hook, if `optimize_` has replaced it."""
    for name in (FORWARD, UNHOOKED):
        call = getattr(vars(module).get(name), _OVERRIDE, None)
        if isinstance(call, OptimizedCall) and call.is_of(module):
            return call
    return None
