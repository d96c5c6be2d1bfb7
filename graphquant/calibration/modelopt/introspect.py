"""Predicates on quantized modules and their quantizers.

They accept graphquant's Quantizer and QuantizedLinear and any module with the same attributes (see
quantizer.py). A quantizer is a module with the attribute `_disabled`, enabled or not; a sequence of
them is an nn.Sequential. After NVIDIA Model-Optimizer's functions of these names.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from graphquant.ops import int8_linear


def is_quantizer(module: object) -> bool:
    """Is this a single quantizer (not a sequence)?"""
    one = isinstance(module, nn.Module) and not isinstance(module, (nn.Sequential, nn.ModuleList))
    return one and hasattr(module, "_disabled")


def is_quantized(module: nn.Module) -> bool:
    """Does the module contain a quantizer, enabled or not, or an FX graph with int8 products?

    The graphs of a compiled module are not visible to it: use `graphquant.explain` for those.
    """
    if any(map(is_quantizer, module.modules())):
        return True
    graphs = (m.graph for m in module.modules() if isinstance(m, GraphModule))
    return any(n.target is int8_linear.target for graph in graphs for n in graph.nodes)


def is_quantized_linear(module: nn.Module) -> bool:
    """Has it a single input_quantizer, a weight_quantizer and a 2-D weight (or weight0)?

    Embeddings never count.
    """
    if isinstance(module, nn.Embedding) or getattr(module, "weight_quantizer", None) is None:
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        weight = getattr(module, "weight0", None)  # of grouped linears
    two = isinstance(weight, Tensor) and weight.dim() == 2
    return two and is_quantizer(getattr(module, "input_quantizer", None))


def is_quantized_column_parallel_linear(module: nn.Module) -> bool:
    """A quantized linear with `_is_column_parallel`: ranks have different output channels, so
    scales per output channel are local to a rank."""
    return is_quantized_linear(module) and bool(getattr(module, "_is_column_parallel", False))


def is_quantized_row_parallel_linear(module: nn.Module) -> bool:
    """A quantized linear with `_is_row_parallel`: ranks have different input channels, so they
    must agree on scales."""
    return is_quantized_linear(module) and bool(getattr(module, "_is_row_parallel", False))


def representative_weight_quantizer(
    module: nn.Module, weight_name: str = "weight"
) -> nn.Module | None:
    """The quantizer of the parameter `weight_name`, or None. Never raises.

    It is `weight_quantizer`, or `<name>_weight_quantizer` for a parameter not named "weight"; of an
    nn.ModuleList under that name, or with an `s` added, the first (that of the first expert).
    """
    name = "weight_quantizer" if weight_name == "weight" else f"{weight_name}_weight_quantizer"
    for found in (getattr(module, name, None), getattr(module, f"{name}s", None)):
        if isinstance(found, nn.ModuleList):
            found = next(iter(found), None)
        if isinstance(found, nn.Module) and (is_quantizer(found) or _is_sequence(found)):
            return found
    return None


def weight_attr_names(module: nn.Module) -> Iterator[str]:
    """The names of the module's own weights that have a quantizer, "weight" first.

    "weight" may be any value but None; the others are parameters. A parameter with two names is
    yielded once.
    """
    if getattr(module, "weight", None) is not None and representative_weight_quantizer(module):
        yield "weight"
    for name, parameter in module.named_parameters(recurse=False):
        plain = isinstance(parameter, torch.nn.Parameter) and name != "weight"
        if plain and representative_weight_quantizer(module, name) is not None:
            yield name


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and len(module) > 0 and all(map(is_quantizer, module))
