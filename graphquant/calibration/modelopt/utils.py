"""Replacements for helpers of NVIDIA Model-Optimizer's `modelopt.torch.quantization.utils`.

They work on graphquant's quantized modules and graphs, and on any module with the attributes listed
in quantizer.py.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from graphquant.calibration.modelopt.groups import (
    SHARED_PATTERNS,
    SharedQuantState,
    SharedWeightGlobalAmaxState,
    find_shared_input_groups,
    shared_quant_states,
)
from graphquant.calibration.modelopt.introspect import (
    is_quantized,
    is_quantized_column_parallel_linear,
    is_quantized_linear,
    is_quantized_row_parallel_linear,
    representative_weight_quantizer,
    weight_attr_names,
)
from graphquant.calibration.modelopt.quantizer import export_torch_mode, is_torch_export_mode
from graphquant.calibration.modelopt.reduce import (
    convert_quantization_axis_to_reduce_axis,
    reduce_amax,
    reduce_sum,
)

__all__ = [
    "SHARED_PATTERNS",
    "SharedQuantState",
    "SharedWeightGlobalAmaxState",
    "convert_quantization_axis_to_reduce_axis",
    "export_torch_mode",
    "find_shared_input_groups",
    "is_quantized",
    "is_quantized_column_parallel_linear",
    "is_quantized_linear",
    "is_quantized_row_parallel_linear",
    "is_torch_export_mode",
    "reduce_amax",
    "reduce_sum",
    "replace_function",
    "representative_weight_quantizer",
    "shared_quant_states",
    "update_quant_cfg_with_kv_cache_quant",
    "weight_attr_names",
]

log = logging.getLogger(__name__)

_originals: dict[tuple[int, str, str], Any] = {}  # functions that are replaced at present


@contextmanager
def replace_function(
    package: Any, name: str, new_func: Callable[..., Any], og_func_cache_name: str | None = None
) -> Iterator[None]:
    """Context in which `package.name` is `new_func` and `package._name` the original.

    package             a module, class or object; the change is visible to the whole process
    og_func_cache_name  another name for the original

    Both attributes are restored on exit, also after an exception. When nested, `package._name`
    stays the outermost original: otherwise two replacements that call it would recurse forever.

    Raises AttributeError if `package` has no `name`.
    """
    kept = f"_{name}" if og_func_cache_name is None else og_func_cache_name
    outer = (id(package), name, kept) in _originals
    old = _originals.setdefault((id(package), name, kept), getattr(package, name))
    own = {key: vars(package)[key] for key in (kept, name) if key in vars(package)}
    try:
        setattr(package, kept, old)
        setattr(package, name, new_func)
        yield
    finally:
        if not outer:
            del _originals[id(package), name, kept]
        for key in (kept, name):
            if key in own:
                setattr(package, key, own[key])  # from vars(): a staticmethod stays one
            elif key in vars(package):
                delattr(package, key)


def update_quant_cfg_with_kv_cache_quant(
    quant_cfg: Mapping[str, Any], kv_cache_quant_cfg: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A deep copy of `quant_cfg` with the entries for a KV cache appended to its "quant_cfg" list.

    If that list is missing or empty, it gets a first entry that disables all quantizers; if
    "algorithm" is missing or empty, it becomes "max". graphquant's encoders have no KV cache: this
    is for configurations meant for other tools.
    """
    merged = copy.deepcopy(dict(quant_cfg))
    entries = merged.get("quant_cfg") or [{"quantizer_name": "*", "enable": False}]
    merged["quant_cfg"] = [*entries, *copy.deepcopy(list(kv_cache_quant_cfg))]
    merged["algorithm"] = merged.get("algorithm") or "max"
    log.debug("quant_cfg with KV cache: %s", merged)
    return merged
