"""Which modules are quantised, and by what.

They speak of graphquant's Quantizer and QuantizedLinear and of any module with their attributes
(quantizer.py names them): a quantiser is a module that has `_disabled`, enabled or not; several in
a row are an nn.Sequential of such. After NVIDIA Model-Optimizer's functions of these names.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from graphquant.ops import int8_linear


def is_quantizer(module: object) -> bool:
    """Is this one quantiser (not several in a row)?"""
    one = isinstance(module, nn.Module) and not isinstance(module, (nn.Sequential, nn.ModuleList))
    return one and hasattr(module, "_disabled")


def is_quantized(module: nn.Module) -> bool:
    """Does the module hold a quantiser, enabled or not, or is it a graph with int8 products?

    What torch.compile returns holds its graphs out of sight: `graphquant.explain` tells of them.
    """
    if any(map(is_quantizer, module.modules())):
        return True
    graphs = (m.graph for m in module.modules() if isinstance(m, GraphModule))
    return any(n.target is int8_linear.target for graph in graphs for n in graph.nodes)


def is_quantized_linear(module: nn.Module) -> bool:
    """Has it one input_quantizer, a weight_quantizer and a weight (or weight0) of two dims?

    An embedding is none, whatever it has.
    """
    if isinstance(module, nn.Embedding) or getattr(module, "weight_quantizer", None) is None:
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        weight = getattr(module, "weight0", None)  # of grouped linears
    two = isinstance(weight, Tensor) and weight.dim() == 2
    return two and is_quantizer(getattr(module, "input_quantizer", None))


def is_quantized_column_parallel_linear(module: nn.Module) -> bool:
    """A quantised linear whose attribute `_is_column_parallel` is true: each rank has some of the
    output channels, so scales per output channel are its own."""
    return is_quantized_linear(module) and bool(getattr(module, "_is_column_parallel", False))


def is_quantized_row_parallel_linear(module: nn.Module) -> bool:
    """A quantised linear whose attribute `_is_row_parallel` is true: each rank has some of the
    input channels, so ranks must agree on scales."""
    return is_quantized_linear(module) and bool(getattr(module, "_is_row_parallel", False))


def representative_weight_quantizer(
    module: nn.Module, weight_name: str = "weight"
) -> nn.Module | None:
    """The quantiser of the parameter `weight_name`, or None. It never raises.

    `weight_quantizer`, or `<name>_weight_quantizer` for a parameter that is not called "weight";
    the first of several experts' where that is an nn.ModuleList, or `..._quantizers` is one.
    """
    name = "weight_quantizer" if weight_name == "weight" else f"{weight_name}_weight_quantizer"
    for found in (getattr(module, name, None), getattr(module, f"{name}s", None)):
        if isinstance(found, nn.ModuleList):
            found = next(iter(found), None)
        if isinstance(found, nn.Module) and (is_quantizer(found) or _in_a_row(found)):
            return found
    return None


def weight_attr_names(module: nn.Module) -> Iterator[str]:
    """The names of the module's own weights that have a quantiser, "weight" first.

    "weight" itself may be any value but None, the others are parameters. One parameter that has two
    names is named once.
    """
    if getattr(module, "weight", None) is not None and representative_weight_quantizer(module):
        yield "weight"
    for name, parameter in module.named_parameters(recurse=False):
        plain = isinstance(parameter, torch.nn.Parameter) and name != "weight"
        if plain and representative_weight_quantizer(module, name) is not None:
            yield name


def _in_a_row(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and len(module) > 0 and all(map(is_quantizer, module))
