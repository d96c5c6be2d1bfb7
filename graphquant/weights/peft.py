"""PEFT's writes to weights, announced.

`base_layer.weight.data += delta` leaves no trace on the parameter, and PEFT merges, unmerges and
swaps adapters in this way. Its methods that write are wrapped as soon as it is imported.
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

Renew = Callable[[Iterable[Tensor]], None]

# Methods that write to parameters: of a layer, and of the object that holds all layers of a model.
_OF_LAYERS = re.compile(
    r"_?(un)?merge(_masks)?|unload_and_optionally_merge_module|set_base_weight|_restore_weights"
    r"|update_layer|reset_\w+|\w+_init"
)
_OF_MODELS = re.compile("add_weighted_adapter|update_and_allocate")
_FUNCTIONS = ("hotswap_adapter_from_state_dict", "_update_scaling")
_ANNOUNCES = "_graphquant_announces"


def announce(renew: Renew) -> bool:
    """From now on, call `renew` with all parameters of a module to which PEFT has written.

    True if something of it was found for the first time: until now it has written in silence. To be
    asked often: modules are imported at any time.
    """
    found = False
    for name in [name for name in _unseen if name in sys.modules]:
        if _unseen[name](sys.modules[name], renew):
            del _unseen[name]
            found = True
    return found


def _tuners(module: ModuleType, renew: Renew) -> bool:
    layer, model = (vars(module).get(name) for name in ("BaseTunerLayer", "BaseTuner"))
    if layer is None or model is None:  # another thread is importing it
        return False
    for base, names in ((layer, _OF_LAYERS), (model, _OF_MODELS)):
        _follow(base, names, renew)
        for cls in {base, *_subclasses(base)}:
            _wrap_methods(cls, names, renew)
    return True


def _hotswap(module: ModuleType, renew: Renew) -> bool:
    found = [name for name in _FUNCTIONS if inspect.isfunction(vars(module).get(name))]
    for name in found:
        setattr(module, name, _announcing(vars(module)[name], renew))
    return bool(found)


_unseen = {"peft.tuners.tuners_utils": _tuners, "peft.utils.hotswap": _hotswap}


def _follow(base: Any, names: re.Pattern[str], renew: Renew) -> None:
    """Wrap the methods of classes to come."""
    own = vars(base).get("__init_subclass__")

    def init_subclass(cls: Any, /, **kwargs: Any) -> None:
        if own is None:
            super(base, cls).__init_subclass__(**kwargs)
        else:
            own.__func__(cls, **kwargs)
        _wrap_methods(cls, names, renew)

    base.__init_subclass__ = classmethod(init_subclass)


def _subclasses(cls: Any) -> Iterable[Any]:
    for below in cls.__subclasses__():
        yield below
        yield from _subclasses(below)


def _wrap_methods(cls: Any, names: re.Pattern[str], renew: Renew) -> None:
    for name, method in list(vars(cls).items()):
        if names.fullmatch(name) and inspect.isfunction(method):
            setattr(cls, name, _announcing(method, renew))


def _announcing(function: Any, renew: Renew) -> Any:
    """It, and then `renew` for the modules among its arguments."""
    if hasattr(function, _ANNOUNCES):
        return function

    @functools.wraps(function)
    def announcing(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # then the graph writes, not we
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        finally:
            for a in chain(args, kwargs.values()):
                if isinstance(a, nn.Module):
                    renew(chain(a.parameters(), a.buffers()))

    setattr(announcing, _ANNOUNCES, True)
    return announcing
