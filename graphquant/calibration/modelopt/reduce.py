"""Reductions for scales: absolute maxima and sums of tensors along dims, without gradients.

After the functions of these names in NVIDIA Model-Optimizer's `modelopt.torch.quantization.utils`,
with the same results for valid arguments, but for these: `()` reduces no dims (torch: all), so that
there can be a scale for every element; |-128| of int8 is 128; axes that do not exist always raise;
float8 can be summed.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex, TypeAlias

import torch
from torch import Tensor

from graphquant.errors import UnsupportedInputError

Axis: TypeAlias = SupportsIndex | Sequence[SupportsIndex] | None


def convert_quantization_axis_to_reduce_axis(input: Tensor, axis: Axis) -> list[int] | None:
    """The dims to reduce for a scale along `axis`: all others, ascending; None for per-tensor.

    For `input` of shape (2, 3, 4): 0 -> [1, 2]; -1 -> [0, 1]; (0, -1) -> [1]; (0, 1, 2) -> [], a
    scale for every element; () -> [0, 1, 2]; None -> None. An axis may occur twice.

    Raises IndexError for an axis that `input` does not have, TypeError for one that is not an
    integer, UnsupportedInputError (a TypeError) if `input` is not a tensor.
    """
    dims = _dims(input, axis)
    if dims is None:
        return None
    kept = {d % input.dim() for d in dims}
    return [d for d in range(input.dim()) if d not in kept]


@torch.no_grad()
def reduce_amax(
    input: Tensor, axis: Axis = None, keepdims: bool = True, squeeze_scalar: bool = True
) -> Tensor:
    """max |input| over the dims `axis`: None for all, with a 0-d result; () for none.

    keepdims        keep reduced dims with size 1; not for axis=None
    squeeze_scalar  make a result of one element 0-d, whatever keepdims is

    The dtype is that of `input`, but torch's default for float8, and int64 for signed integers
    (where |-2^63| is 2^63 - 1). nan propagates.

    Raises IndexError for a dim that `input` does not have or that is empty, RuntimeError for a
    repeated dim and for an empty `input` without axis, TypeError for an axis that is not an
    integer, UnsupportedInputError (a TypeError) for what is not a tensor, bool and complex.
    """
    dims = _dims(input, axis)
    if input.dtype == torch.bool or input.is_complex():
        raise UnsupportedInputError(f"reduce_amax has no order of magnitude for {input.dtype}")
    x = _computable(input)
    if not x.is_floating_point() and x.dtype.is_signed:
        x = x.long()
    if dims == ():
        amax = _abs(x)
    elif dims is None:
        amax = torch.maximum(_abs(x.amax()), _abs(x.amin()))  # no copy of |x|
    else:
        amax = torch.maximum(_abs(x.amax(dims, keepdims)), _abs(x.amin(dims, keepdims)))
    return amax.reshape(()) if squeeze_scalar and amax.numel() == 1 else amax


@torch.no_grad()
def reduce_sum(input: Tensor, axis: Axis = None, keepdims: bool = True) -> Tensor:
    """The sum over the dims `axis`: None for all, with a 0-d result; () for none.

    keepdims  keep reduced dims with size 1; not for axis=None

    The dtype is int64 for integers and bool, torch's default for float8, else that of `input`, so
    float16 can overflow to inf. An empty sum is 0. Raises as `reduce_amax`, but not for empty dims.
    """
    dims = _dims(input, axis)
    x = _computable(input)
    if not x.is_floating_point() and not x.is_complex():
        x = x.long()
    if dims == ():
        return x.clone()
    return x.sum() if dims is None else x.sum(dims, keepdims)


def _dims(input: Tensor, axis: Axis) -> tuple[int, ...] | None:
    """`axis` as a tuple, checked against the dims of `input`."""
    if not isinstance(input, Tensor):
        raise UnsupportedInputError(f"input is a {type(input).__name__}, needs a tensor")
    if axis is None:
        return None
    given: list[Any] = list(axis) if isinstance(axis, (list, tuple)) else [axis]
    for a in given:
        tensor = isinstance(a, Tensor) and (a.is_floating_point() or a.dtype == torch.bool)
        if tensor or isinstance(a, bool) or not hasattr(a, "__index__"):
            raise TypeError(f"axis {a!r} is not an integer")
    dims = tuple(operator.index(a) for a in given)
    for d in dims:
        if not -input.dim() <= d < input.dim():
            raise IndexError(f"axis {d} is out of range for a tensor of {input.dim()} dims")
    return dims


def _computable(x: Tensor) -> Tensor:
    """Convert float8, which has no arithmetic."""
    narrow = x.is_floating_point() and x.dtype.itemsize == 1
    return x.to(torch.get_default_dtype()) if narrow else x


def _abs(x: Tensor) -> Tensor:
    if x.dtype == torch.int64:
        x = x.clamp(min=-torch.iinfo(torch.int64).max)
    return x.abs() if x.dtype.is_signed else x
