"""How a model is made faster: torch.compile in its modes, torchao, graphquant, AOTInductor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from graphquant import Report
from graphquant.backend import graphquant as graphquant_backend
from graphquant.weights.packed import packed_tensors
from graphquant.weights.released import is_in_host_memory, is_released
from tools.bench.packages import FLOAT_PACKAGES, INT8_PACKAGES, PACKAGES, Package

MODES = {
    "bf16-default": "default",
    "bf16-max-autotune": "max-autotune-no-cudagraphs",
    "bf16-reduce-overhead": "reduce-overhead",
    "bf16-max-autotune-graphs": "max-autotune",
}
TORCHAO = ("torchao-int8", "torchao-fp8")
GRAPHQUANT = {"graphquant": None, "graphquant-reduce-overhead": "reduce-overhead"}
FLOAT = ("eager", *MODES, *FLOAT_PACKAGES)  # what a speed-up may be measured against
VARIANTS = (*FLOAT, *TORCHAO, *GRAPHQUANT, *INT8_PACKAGES)
USUAL = ("eager", *(m for m in MODES if m != "bf16-max-autotune-graphs"), *TORCHAO, *GRAPHQUANT)


class MissingError(Exception):
    """A variant needs a package that is not installed."""


@dataclass(frozen=True)
class Prepared:
    """module: the model that runs, quantized or not. reports: filled when graphquant compiles."""

    run: Callable[..., Any]
    module: nn.Module
    reports: list[Report]


def prepare(variant: str, model: nn.Module) -> Prepared:
    """The model under this variant; it compiles at its first call. `model` itself stays as it is.

    Raises MissingError where torchao is needed and not installed.
    """
    reports: list[Report] = []
    if variant == "eager":
        return Prepared(model, model, reports)
    if variant in MODES:
        mode = MODES[variant]
        return Prepared(torch.compile(model, fullgraph=True, mode=mode), model, reports)
    if variant in TORCHAO:
        with torch.inference_mode(False), torch.no_grad():  # copies with version counters
            module = _torchao(variant, copy.deepcopy(model))
        return Prepared(torch.compile(module, fullgraph=True), module, reports)
    if variant in GRAPHQUANT:
        options: dict[str, Any] = {"mode": GRAPHQUANT[variant], "on_report": reports.append}
        # what backend="graphquant" finds, but also where the package is not installed
        run = torch.compile(model, fullgraph=True, backend=graphquant_backend, options=options)
        return Prepared(run, model, reports)
    if variant in PACKAGES:
        return Prepared(Package(variant, model, reports), model, reports)
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


def weight_bytes(prepared: Prepared) -> int:
    """What the variant keeps on the device between calls: parameters, buffers, packed weights.

    graphquant keeps the float weights beside the int8 ones, unless told to free them. A package
    has the weights that its program has.
    """
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
