"""PyTorch's private APIs, each in one place, with the versions of torch it was seen in.

No other part of graphquant imports a name from torch that begins with an underscore
(tests/test_private_torch.py), so a new version of torch is checked here. This module holds what
`import torch` loads anyway. Two modules beside it are imported where they are needed, because what
they import takes a second each:

    _torch.dynamo    torch._dynamo
    _torch.inductor  torch._inductor's lowerings

Attributes of torch's objects that are read where they are needed, all seen in 2.11 to 2.13:

    OpOverload._schema, ._overloadname       the schema of an op
    Node._erased                             whether a node was erased from its FX graph
    Module._parameters, ._buffers            the tables of a module
    Module._call_impl, ._compiled_call_impl  what Module.__call__ calls. Dynamo traces the calls
                                             of them, so they cannot be functions here
    torch.ops.aten._*                        operators, whose names appear in graphs
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunction as DisableTorchFunction
from torch._C import DispatchKey as DispatchKey
from torch._dispatch.python import enable_python_dispatcher as enable_python_dispatcher
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily as unset_fake_temporarily
from torch.autograd import forward_ad
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import TreeSpec as TreeSpec
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_leaves_with_path as tree_leaves_with_path
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only
from torch.utils._pytree import tree_unflatten as tree_unflatten

# The names imported above: 2.11 to 2.13

# Calls in Dynamo's graphs that change torch's global state ----------------------------------------

# 2.11 to 2.13: targets of call_function nodes
SET_GRAD: Any = torch._C._set_grad_enabled
ENTER_AUTOCAST: Any = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST: Any = torch.amp.autocast_mode._exit_autocast
ENTER_INFERENCE: Any = torch.autograd.grad_mode._enter_inference_mode
EXIT_INFERENCE: Any = torch.autograd.grad_mode._exit_inference_mode
SET_SDPA: Any = torch.nn.attention._sdpa_kernel
SDPA_BACKEND: Any = torch.nn.attention._backend_from_string  # makes an argument of SET_SDPA
FORBID_HOOKS: Any = torch._C._autograd._saved_tensors_hooks_disable
ALLOW_HOOKS: Any = torch._C._autograd._saved_tensors_hooks_enable
# 2.11 to 2.13: API usage logging, without an effect on results
LOG_USAGE: frozenset[Any] = frozenset(
    {torch._C._log_api_usage_once, torch._C._log_api_usage_metadata}
)
# 2.11 to 2.13: `x.data`, and the fused inference path of torch.nn.TransformerEncoderLayer
GET_DATA: Any = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]
TRANSFORMER_LAYER: Any = torch._transformer_encoder_layer_fwd


def why_hooks_are_forbidden() -> str | None:
    """The message with which saved-tensor hooks were disabled, or None where they are allowed.

    2.11 to 2.13."""
    return torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()


def sdpa_backends(*, by_priority: bool = False) -> list[Any]:
    """The enabled attention backends, in order of priority if asked. 2.11 to 2.13."""
    backends: list[Any] = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=by_priority)
    return backends


def set_sdpa_priority(backends: Sequence[Any]) -> None:
    """Set the order in which torch tries the attention backends. 2.11 to 2.13."""
    torch._C._set_sdp_priority_order(list(map(int, backends)))


# Modes ------------------------------------------------------------------------------------------


def detect_fake_mode(values: Sequence[Any]) -> FakeTensorMode | None:
    """The fake mode of these values or of the current trace. 2.11 to 2.13."""
    return torch._guards.detect_fake_mode(values)


def has_function_mode() -> bool:
    """Is a torch function mode active, such as that of torch.set_default_device? 2.11 to 2.13."""
    return torch._C._is_torch_function_mode_enabled()


def forward_ad_is_on() -> bool:
    """Are we inside a torch.autograd.forward_ad.dual_level? 2.11 to 2.13."""
    return forward_ad._current_level >= 0


# 2.11 to 2.13: a context in which forward-mode AD computes no tangents
set_forward_grad: Callable[[bool], Any] = forward_ad._set_fwd_grad_enabled


@contextmanager
def allow_unbacked_sizes(mode: FakeTensorMode) -> Iterator[None]:
    """Context for ops whose results have sizes that depend on data, which Dynamo does not allow by
    default; from then on they may be traced again. 2.11 to 2.13."""
    shapes = mode.shape_env
    if shapes is None:
        yield
        return
    shapes.settings = dataclasses.replace(shapes.settings, allow_dynamic_output_shape_ops=True)
    with shapes.ignore_fresh_unbacked_symbols():
        yield


# Compiled modules ---------------------------------------------------------------------------------

# 2.11 to 2.13: the code object of Module.__call__, to recognize its stack frames
MODULE_CALL: Any = nn.Module._wrapped_call_impl.__code__


def is_compiled(model: object) -> bool:
    """Is this what torch.compile returned for a module? 2.11 to 2.13."""
    return isinstance(model, torch._dynamo.OptimizedModule)


def original(model: Any) -> Any:
    """The module that torch.compile was given, for what it returned; else the argument itself.

    2.11 to 2.13."""
    return model._orig_mod if is_compiled(model) else model


def hook_tables(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """The dicts of a module's own forward and backward hooks. 2.11 to 2.13."""
    return (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )


# Inductor ---------------------------------------------------------------------------------------


def mode_options(mode: str) -> dict[str, Any]:
    """The Inductor options that a torch.compile mode stands for. 2.11 to 2.13."""
    options: dict[str, Any] = torch._inductor.list_mode_options(mode)
    return options


def compile_by_inductor(
    gm: GraphModule, example_inputs: Sequence[Any], options: dict[str, Any]
) -> Callable[..., Any]:
    """The graph compiled by Inductor: a callable that takes its inputs. 2.11 to 2.13."""
    compiled: Callable[..., Any] = torch._inductor.compile(
        gm, list(example_inputs), options=options
    )
    return compiled


# Memory -------------------------------------------------------------------------------------------


def storage_id(t: Tensor) -> int:
    """The address of the C++ StorageImpl, equal for tensors that share memory. Fake tensors have
    one as well. Raises NotImplementedError for tensors without storage. 2.11 to 2.13."""
    return int(t.untyped_storage()._cdata)


def getters() -> tuple[Any, Any, Any]:
    """C-level (Tensor._version, Tensor.data_ptr, Storage._expired), without attribute lookup.

    2.11 to 2.13."""
    storage: Any = torch._C.StorageBase
    return torch._C.TensorBase._version, torch._C.TensorBase.data_ptr, storage._expired


def version_of(t: Tensor) -> int | None:
    """The number of in-place writes so far; None for inference tensors, which do not count them.

    2.11 to 2.13."""
    return None if t.is_inference() else t._version


def forbid_reads(storage: torch.UntypedStorage, message: str) -> bool:
    """Make reads of this storage raise this message. False in builds without that feature.

    2.11 to 2.13, in builds for CUDA."""
    if not hasattr(torch._C, "_set_storage_data_ptr_access_error_msg"):
        return False
    torch._C._set_storage_data_ptr_access_error_msg(storage._cdata, message)
    return True


def point_at(storage: Any, address: int, device: torch.device) -> None:
    """Point this empty storage at memory that it does not own. 2.11 to 2.13."""
    if hasattr(storage, "_swap_data_ptr_"):
        borrowed = torch._C._construct_storage_from_data_pointer(address, device, 0)
        storage._swap_data_ptr_(borrowed)


def forbid_writes(t: Tensor) -> None:
    """Make writes to this tensor, and its data_ptr(), raise. 2.11 to 2.13."""
    torch._C._set_throw_on_mutable_data_ptr(t)


# DTensors -----------------------------------------------------------------------------------------


def is_dtensor(value: object) -> bool:
    """Is this a torch.distributed.tensor.DTensor? Imports nothing: where that is not loaded, there
    are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local_of(value: Any) -> Any:
    """The tensor with this process's part of a DTensor, always the same object; of anything else
    the value itself. 2.11 to 2.13."""
    if not is_dtensor(value):
        return value
    local = value._local_tensor
    return local.wait() if hasattr(local, "wait") else local  # of a collective that is under way


def mesh_of(value: Any) -> Any:
    """The device mesh of a DTensor. Dynamo's fake DTensors have a stand-in for it in 2.13, and the
    mesh itself in 2.11."""
    return getattr(value.device_mesh, "real_obj", value.device_mesh)


def with_local(value: Any, local: Any) -> Any:
    """A DTensor like this one with another local tensor; `local` itself if this is none.

    By the protocol of tensor subclasses that AOTAutograd uses. 2.11 to 2.13."""
    if not is_dtensor(value):
        return local
    names, context = value.__tensor_flatten__()
    inner = {name: getattr(value, name) for name in names} | {"_local_tensor": local}
    return type(value).__tensor_unflatten__(inner, context, value.shape, value.stride())


# Hardware -----------------------------------------------------------------------------------------


def current_raw_stream(index: int) -> int:
    """The handle of the current CUDA stream of GPU `index`. 2.11 to 2.13, in builds for CUDA."""
    handle: int = torch._C._cuda_getCurrentRawStream(index)
    return handle


def has_vnni() -> bool:
    """Does this x86 CPU have the VNNI instructions? 2.11 to 2.13."""
    return torch.cpu._is_vnni_supported()


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] int8 @ b [K, N] int8 -> [M, N] int32, exact. 2.11 to 2.13.

    Not exact on a CPU for K = 1 and b in columns, and where the environment tells oneDNN to do
    without VNNI on a processor that has it.
    """
    return torch._int_mm(a, b)


# Symbolic sizes -----------------------------------------------------------------------------------


def statically_known_true(condition: bool | torch.SymBool) -> bool:
    """Does this hold for all values of the symbolic sizes? Adds no guard.

    torch's function, imported at the first symbolic size: sympy takes half a second to import.
    """
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true as known

    return known(condition)


def register_quantized_decomposed() -> Any:
    """torch.ops.quantized_decomposed, with its quantize and dequantize ops registered.

    2.11 to 2.13."""
    import torch.ao.quantization.fx._decomposed

    return torch.ops.quantized_decomposed


def finite(bound: Any) -> int | None:
    """A bound of a symbolic size, or None for torch's integer infinity. 2.11 to 2.13."""
    from torch.utils._sympy.numbers import int_oo

    return None if bound >= int_oo else int(bound)


def inductor_cache_dir() -> str:
    """Where Inductor keeps compiled code by default. 2.11 to 2.13."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return str(default_cache_dir())


class SizeGuards:
    """What a graph that Dynamo compiled needs of its symbolic inputs. 2.11 to 2.13.

    symbols  the graph's SymInt inputs, in order
    """

    def __init__(self, symbols: Sequence[torch.SymInt]) -> None:
        self._symbols: Sequence[torch.SymInt] | None = symbols
        self._code: str | None = None

    def hold(self, values: Sequence[int]) -> bool:
        """Do the guards hold for these values? To be asked when the graph has been compiled, which
        adds guards."""
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        if self._symbols is not None:
            shape_env = self._symbols[0].node.shape_env
            self._code = shape_env.produce_guards_expression(self._symbols)
            self._symbols = None  # they keep all that was known while compiling
        return self._code is None or bool(ShapeEnv().evaluate_guards_expression(self._code, values))
