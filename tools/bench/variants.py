"""How a model is made faster: torch.compile, torchao, graphquant, AOTInductor, other runtimes."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from graphquant import Report
from graphquant.backend import graphquant as graphquant_backend
from graphquant.weights.packed import packed_tensors
from graphquant.weights.released import is_in_host_memory, is_released
from tools.bench.models import widened
from tools.bench.packages import FLOAT_PACKAGES, INT8_PACKAGES, PACKAGES, Package
from tools.bench.runtimes import RUNTIMES, Runtime

MODES = {
    "bf16-default": "default",
    "bf16-max-autotune": "max-autotune-no-cudagraphs",
    "bf16-reduce-overhead": "reduce-overhead",
    "bf16-max-autotune-graphs": "max-autotune",
    "fp32-default": "default",
}
TORCHAO = ("torchao-int8", "torchao-fp8")
_GRAPHS = {"mode": "reduce-overhead"}
_PACKED = {"padding": "remove"}
GRAPHQUANT: dict[str, dict[str, Any]] = {
    "graphquant": {},
    "graphquant-fp32": {},
    "graphquant-reduce-overhead": _GRAPHS,
    "graphquant-packed": _PACKED,
    "graphquant-packed-reduce-overhead": {**_PACKED, **_GRAPHS},
    "float-packed": {**_PACKED, "quantize": False},
}
FLOAT = ("eager", *MODES, *FLOAT_PACKAGES)  # what a speed-up may be measured against
VARIANTS = (*FLOAT, *TORCHAO, *GRAPHQUANT, *INT8_PACKAGES, *RUNTIMES)
FP32 = ("fp32-default", "graphquant-fp32", *RUNTIMES)  # the others run the bfloat16 model
USUAL = ("eager", *list(MODES)[:3], *TORCHAO, "graphquant", "graphquant-reduce-overhead")
CPU_USUAL = ("fp32-default", "bf16-default", "torchao-int8", *RUNTIMES, *list(GRAPHQUANT)[:2])


class MissingError(Exception):
    """A variant needs a package or a processor that is not there."""


@dataclass(frozen=True)
class Prepared:
    """module: the model that runs, quantized or not. reports: filled when graphquant compiles.
    given: inputs as it takes them."""

    run: Callable[..., Any]
    module: nn.Module
    reports: list[Report]
    given: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict


def prepare(variant: str, model: nn.Module) -> Prepared:
    """The model under this variant; it compiles at its first call. `model` itself stays as it is.

    Raises MissingError where a package is needed and not installed.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    with torch.inference_mode(False), torch.no_grad():  # copies with version counters
        # on a CPU torchao's int8 was measured to be faster from float32 than from bfloat16
        if variant not in FP32 and not (variant in TORCHAO and on_cpu):
            return _prepare(variant, model, on_cpu)
        return replace(_prepare(variant, copy.deepcopy(model).float(), on_cpu), given=widened)


def _prepare(variant: str, model: nn.Module, on_cpu: bool) -> Prepared:
    reports: list[Report] = []
    if variant == "eager":
        return Prepared(model, model, reports)
    if variant in MODES:
        mode = MODES[variant]
        return Prepared(torch.compile(model, fullgraph=True, mode=mode), model, reports)
    if variant in TORCHAO:
        module = _torchao(variant, copy.deepcopy(model))
        torch._inductor.config.freezing = on_cpu  # its int8 GEMMs on a CPU need constant weights
        return Prepared(torch.compile(module, fullgraph=True), module, reports)
    if variant in GRAPHQUANT:
        options = {**GRAPHQUANT[variant], "on_report": reports.append}
        # what backend="graphquant" finds, but also where the package is not installed
        run = torch.compile(model, fullgraph=True, backend=graphquant_backend, options=options)
        return Prepared(run, model, reports)
    if variant in PACKAGES:
        return Prepared(Package(variant, model, reports), model, reports)
    if variant in RUNTIMES:
        make, packages = RUNTIMES[variant]
        lacking = [p for p in packages if importlib.util.find_spec(p) is None]
        if lacking:
            raise MissingError(f"{lacking[0]} is not installed")
        if variant == "openvino-bf16" and not torch.cpu.get_capabilities().get("amx_bf16"):
            raise MissingError("this processor has no AMX")
        return Prepared(Runtime(make, model), model, reports)
    raise ValueError(f"no variant {variant!r}: there are {', '.join(VARIANTS)}")


def _torchao(variant: str, model: nn.Module) -> nn.Module:
    try:
        from torchao import quantization as ao
    except ImportError as error:
        raise MissingError("torchao is not installed") from error
    if variant == "torchao-int8":
        config = ao.Int8DynamicActivationInt8WeightConfig()
    else:
        config = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
    precision = torch.get_float32_matmul_precision()
    try:
        ao.quantize_(model, config)
        # Mode "default", as the other variants: torchao also sets a search of every kernel's
        # settings, with which SigLIP was not compiled after four minutes. What else it sets stays.
        torch._inductor.config.coordinate_descent_tuning = False
    finally:  # it sets "high", which Dynamo would notice, and which is nothing to a bfloat16 model
        torch.set_float32_matmul_precision(precision)
    return model


@contextmanager
def settings_kept() -> Iterator[None]:
    """Inductor's settings as they were: torchao changes them for the process, for its own good."""
    config = torch._inductor.config
    with config.patch(config.get_config_copy()):
        yield


def weight_bytes(prepared: Prepared) -> int | None:
    """What the variant keeps on the device between calls: parameters, buffers, packed weights.

    graphquant keeps the float weights beside the int8 ones, unless told to free them. A package
    has the weights that its program has. None: another runtime does not say.
    """
    if isinstance(prepared.run, Runtime):
        return None
    if isinstance(prepared.run, Package):
        return prepared.run.weight_bytes
    tensors = [*prepared.module.parameters(), *prepared.module.buffers()]
    int8 = packed_tensors(tensors) if prepared.reports else []
    sizes: dict[tuple[torch.device, int], int] = {}
    for t in (inner for outer in (*tensors, *int8) for inner in _plain(outer)):
        if not is_released(t) and not is_in_host_memory(t):
            storage = t.untyped_storage()
            sizes[t.device, storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _plain(t: Tensor) -> Iterator[Tensor]:
    """The tensors that a tensor subclass is made of."""
    if not is_traceable_wrapper_subclass(t):
        yield t
        return
    for name in t.__tensor_flatten__()[0]:
        if isinstance(inner := getattr(t, name), Tensor):
            yield from _plain(inner)
