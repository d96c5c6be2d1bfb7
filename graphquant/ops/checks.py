"""Argument checks of the ops: each returns None or raises UnsupportedInputError.

They also run on fake tensors, where a size can be a symbol: if its value is unknown, the check
passes and adds no guard, because the run itself checks again with numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphquant.errors import UnsupportedInputError
from graphquant.ops.numerics import ACTIVATIONS
from graphquant.ops.qparams import QParams

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_FLOAT_NAMES = "float16, bfloat16 or float32"
_FLOAT32_MAX = torch.finfo(torch.float32).max


def rows(op: str, name: str, x: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """x [..., K] of one of `dtypes`, K >= 1."""
    if x.dtype not in dtypes:
        need = _FLOAT_NAMES if dtypes == FLOATS else " or ".join(map(_short, dtypes))
        raise UnsupportedInputError(f"{op}: {name} is {_short(x.dtype)}, needs {need}")
    if x.dim() == 0:
        raise UnsupportedInputError(f"{op}: {name} is a scalar, needs at least one dim")
    nonempty(op, name, x, -1, "K >= 1")


def nonempty(op: str, name: str, x: Tensor, dim: int, need: str) -> None:
    """x is not empty along dim."""
    at_least(op, name, x, dim, 1, need)


def at_least(op: str, name: str, x: Tensor, dim: int, size: int, need: str) -> None:
    """x has at least this size along dim."""
    if _known(x.shape[dim] < size):
        raise UnsupportedInputError(f"{op}: {name} has shape {_show(x.shape)}, needs {need}")


def shape(op: str, name: str, x: Tensor, want: tuple[int, ...], why: str) -> None:
    """x has shape `want`, described by `why`, such as "[N] like wq [N, K]"."""
    if type(x) is Tensor and x.shape == want:
        return  # no symbols here: numbers compare at C speed, and this runs on every call
    if len(x.shape) != len(want) or any(_known(a != b) for a, b in zip(x.shape, want, strict=True)):
        raise UnsupportedInputError(
            f"{op}: {name} has shape {_show(x.shape)}, needs {_show(want)}: {why}"
        )


def floating(op: str, name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise UnsupportedInputError(f"{op}: {name} is {_short(x.dtype)}, needs {_FLOAT_NAMES}")


def float32(op: str, name: str, x: Tensor) -> None:
    if x.dtype != torch.float32:
        raise UnsupportedInputError(f"{op}: {name} is {_short(x.dtype)}, needs float32")


def result_dtype(op: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise UnsupportedInputError(f"{op}: dtype is {_short(dtype)}, needs {_FLOAT_NAMES}")


def vector(op: str, name: str, x: Tensor | None, length: int, why: str) -> None:
    """None, or a float vector [length]."""
    if x is not None:
        floating(op, name, x)
        shape(op, name, x, (length,), why)


def qparams(op: str, x: Tensor, qparams: QParams) -> None:
    """Quantization parameters of x [..., K]."""
    factor, low, high, clip, count = qparams
    if factor is not None:
        float32(op, "factor", factor)
        shape(op, "factor", factor, x.shape[-1:], "[K] like x [..., K]")
        one_device(op, x=x, factor=factor)
    if (low is None) != (high is None):
        raise UnsupportedInputError(f"{op}: low is {low}, high is {high}, needs both or neither")
    for name, number in (("low", low), ("high", high), ("clip", clip)):
        if number is not None and not abs(number) <= _FLOAT32_MAX:
            raise UnsupportedInputError(f"{op}: {name} is {number}, needs a finite float32")
    if low is not None and high is not None and low > high:
        raise UnsupportedInputError(f"{op}: low is {low}, above high, {high}")
    if clip is not None and clip <= 0.0:
        raise UnsupportedInputError(f"{op}: clip is {clip}, needs > 0")
    if clip is not None and low is not None:
        raise UnsupportedInputError(f"{op}: clip is given beside low and high, which clip as well")
    num_rows(op, count)
    one_device(op, x=x, num_rows=count)


def num_rows(op: str, x: Tensor | None) -> None:
    """None, or how many rows are computed, as a tensor."""
    if x is not None:
        if x.dtype != torch.int32:
            raise UnsupportedInputError(f"{op}: num_rows is {_short(x.dtype)}, needs int32")
        shape(op, "num_rows", x, (1,), "one number")


def activation(op: str, act: str | None) -> None:
    """None, or the name of an activation."""
    if act is not None and act not in ACTIVATIONS:
        raise UnsupportedInputError(f"{op}: act is {act!r}, needs one of {', '.join(ACTIVATIONS)}")


def one_device(op: str, **tensors: Tensor | None) -> None:
    """All on one device: a kernel would segfault on a CPU tensor among CUDA ones."""
    first: tuple[str, torch.device] | None = None
    for name, x in tensors.items():
        if x is None:
            continue
        if first is None:
            first = name, x.device
        elif x.device != first[1]:
            raise UnsupportedInputError(
                f"{op}: {name} is on {x.device}, {first[0]} is on {first[1]}, need one device"
            )


def _known(condition: bool | torch.SymBool) -> bool:
    """Is the condition true for all values of its symbols? Adds no guard."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def _show(sizes: tuple[int, ...] | torch.Size) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
