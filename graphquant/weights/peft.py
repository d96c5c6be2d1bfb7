"""Hooks on PEFT: report its writes to weights.

PEFT merges, unmerges and swaps adapters by `base_layer.weight.data += delta`, which leaves no trace
on the parameter. Its methods that write are wrapped as soon as it is imported.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from itertools import chain
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

OnWrite = Callable[[Iterable[Tensor]], None]

# Methods that write to parameters: of a layer, and of the tuner that holds all layers of a model.
_OF_LAYERS = re.compile(
    r"_?(un)?merge(_masks)?|unload_and_optionally_merge_module|set_base_weight|_restore_weights"
    r"|update_layer|reset_\w+|\w+_init"
)
_OF_MODELS = re.compile("add_weighted_adapter|update_and_allocate")
_FUNCTIONS = ("hotswap_adapter_from_state_dict", "_update_scaling")
_WRAPPED = "_graphquant_wrapped"


def watch(on_write: OnWrite) -> bool:
    """Call `on_write` with all parameters of a module after PEFT has written to it.

    Wraps what of PEFT is imported by now, so call it often. True if something was wrapped: its
    earlier writes went unnoticed.
    """
    found = False
    for name in [name for name in _pending if name in sys.modules]:
        if _pending[name](sys.modules[name], on_write):
            del _pending[name]
            found = True
    return found


def _wrap_tuners(module: ModuleType, on_write: OnWrite) -> bool:
    layer, model = (vars(module).get(name) for name in ("BaseTunerLayer", "BaseTuner"))
    if layer is None or model is None:  # another thread is importing it
        return False
    for base, names in ((layer, _OF_LAYERS), (model, _OF_MODELS)):
        _wrap_future_subclasses(base, names, on_write)
        for cls in {base, *_subclasses(base)}:
            _wrap_methods(cls, names, on_write)
    return True


def _wrap_hotswap(module: ModuleType, on_write: OnWrite) -> bool:
    found = [name for name in _FUNCTIONS if inspect.isfunction(vars(module).get(name))]
    for name in found:
        setattr(module, name, _reporting(vars(module)[name], on_write))
    return bool(found)


_pending = {"peft.tuners.tuners_utils": _wrap_tuners, "peft.utils.hotswap": _wrap_hotswap}


def _wrap_future_subclasses(base: Any, names: re.Pattern[str], on_write: OnWrite) -> None:
    own = vars(base).get("__init_subclass__")

    def init_subclass(cls: Any, /, **kwargs: Any) -> None:
        if own is None:
            super(base, cls).__init_subclass__(**kwargs)
        else:
            own.__func__(cls, **kwargs)
        _wrap_methods(cls, names, on_write)

    base.__init_subclass__ = classmethod(init_subclass)


def _subclasses(cls: Any) -> Iterable[Any]:
    for below in cls.__subclasses__():
        yield below
        yield from _subclasses(below)


def _wrap_methods(cls: Any, names: re.Pattern[str], on_write: OnWrite) -> None:
    for name, method in list(vars(cls).items()):
        if names.fullmatch(name) and inspect.isfunction(method):
            setattr(cls, name, _reporting(method, on_write))


def _reporting(function: Any, on_write: OnWrite) -> Any:
    """`function`, followed by `on_write` for the modules among its arguments."""
    if hasattr(function, _WRAPPED):
        return function

    @functools.wraps(function)
    def reporting(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # the graph writes, at run time
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        finally:
            for a in chain(args, kwargs.values()):
                if isinstance(a, nn.Module):
                    on_write(chain(a.parameters(), a.buffers()))

    setattr(reporting, _WRAPPED, True)
    return reporting
