"""Private APIs of torch._dynamo. Importing this imports torch._dynamo, which takes a second.

All were seen in torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from types import CodeType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._C._dynamo.eval_frame import reset_code as reset_code
from torch._dynamo.exc import BackendCompilerFailed as BackendCompilerFailed
from torch._dynamo.exc import RestartAnalysis as RestartAnalysis
from torch._dynamo.exc import SkipFrame as SkipFrame
from torch._dynamo.source import ConstantSource as ConstantSource
from torch._dynamo.source import ParamBufferSource as ParamBufferSource
from torch._dynamo.source import UnspecializedParamBufferSource as UnspecializedParamBufferSource
from torch._dynamo.utils import dynamo_timed as dynamo_timed
from torch.fx import GraphModule, Node
from torch.utils.weak import TensorWeakRef

_STATIC = "_dynamo_static_input_type"  # attribute of parameters and buffers


def lookup_backend(name: str) -> Callable[..., Callable[..., Any]]:
    """The backend of torch.compile with this name. Raises InvalidBackend if there is none."""
    backend: Callable[..., Callable[..., Any]] = torch._dynamo.lookup_backend(name)
    return backend


def patch_config(**values: Any) -> AbstractContextManager[Any]:
    """torch._dynamo.config with these values, as a context."""
    patch: AbstractContextManager[Any] = torch._dynamo.config.patch(values)
    return patch


def on_bytecode(hook: Any) -> Any:
    """Call hook(code, new_code) after each compilation. Returns a handle with `remove()`."""
    return torch._dynamo.convert_frame.register_bytecode_hook(hook)


def compiled_for(code: CodeType) -> set[Any]:
    """The backends for which Dynamo keeps compilations of this code."""
    entries: Iterable[Any] = _debug_get_cache_entry_list(code)
    return {getattr(entry.backend, "compiler_fn", entry.backend) for entry in entries}


def replace_methods(backend: Callable[..., Any], replacement: Callable[[Any, str], Any]) -> None:
    """What torch.compile(module, backend=backend) returns: its attributes that are methods of the
    module, and not of itself, become replacement(method, name).

    Dynamo does not see it: it traces the module instead.
    """
    cls = torch._dynamo.OptimizedModule
    look_up = cls.__getattr__

    def getattr_(self: Any, name: str) -> Any:
        value = look_up(self, name)
        if not isinstance(value, MethodType) or name.startswith("_"):
            return value
        if value.__self__ is not self._orig_mod or _backend_of(self) is not backend:
            return value
        return replacement(value, name)

    cls.__getattr__ = getattr_  # type: ignore[method-assign]


def _backend_of(compiled: Any) -> Any:
    found: Any = getattr(compiled.dynamo_ctx, "callback", None)
    while hasattr(found, "_torchdynamo_orig_backend"):
        found = found._torchdynamo_orig_backend
    return getattr(found, "compiler_fn", found)


# Placeholders of Dynamo's graphs ------------------------------------------------------------------


def example(placeholder: Node) -> Any:
    """The tensor that Dynamo was called with, or None if it no longer exists."""
    found = getattr(placeholder.meta.get("grapharg"), "_example", None)
    return found() if isinstance(found, TensorWeakRef) else found


def is_static(value: Tensor) -> bool:
    """Did Dynamo mark this tensor as a parameter or buffer of a module?"""
    return bool(getattr(value, _STATIC, None))


def copy_source(old: Node, new: Node) -> None:
    """Copy to `new` where Dynamo took the input `old` from."""
    if hasattr(old, "_dynamo_source"):
        new._dynamo_source = old._dynamo_source
    if "tensor_dict" in old.meta:
        new.meta["tensor_dict"] = old.meta["tensor_dict"]


def mark_static(placeholder: Node) -> None:
    """Tell CUDA graphs that this input keeps its address from call to call."""
    placeholder._dynamo_source = None
    placeholder.meta["tensor_dict"] = {_STATIC: "unguarded"}


def name_parameters(gm: GraphModule, names: Iterable[str]) -> None:
    """Give attributes of the graph's module the sources that Dynamo would give them."""
    gm._param_name_to_source = {name: ConstantSource(name) for name in names}  # type: ignore[assignment]
