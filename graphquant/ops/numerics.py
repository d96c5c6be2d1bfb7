"""Int8 arithmetic: the reference implementation of quantization that kernels are tested against.

Activations, one scale and one shift per row. low <= 0 <= high bound the row's values:

    x_shift = (high + low) / 2                                                  float32
    absmax  = max((high - low) / 2, MIN_ABSMAX)                                 float32
    x_scale = absmax / 127                                                      float32
    xq      = clamp(round_half_even((x - x_shift) * (127 / absmax)), -127, 127)    int8

so that |x - (xq * x_scale + x_shift)| <= x_scale / 2, up to float32 rounding. The shift is worth up
to one bit: a GELU's result hardly goes below zero, and a norm's outlier channels are one-sided. It
costs a linear nothing but one more product in its epilogue:

    sum_k x w  ~  x_scale * w_scale * sum_k xq wq  +  x_shift * w_sum,    w_sum = w_scale * sum_k wq

A row that holds inf or nan has x_scale inf or nan and xq = 0: it dequantizes to nan, and no other
row is affected. Weights are symmetric: w_scale = max_k |w| / 127, no shift.

Quantization parameters (qparams.py) change what is quantized:

    factor     x * factor in place of x, from here on
    clip       clamp(x, -clip, clip) in place of x, before its row's range is taken
    low, high  the range of every row, as it is given; clamp(x, low, high) in place of x, and with
               x_shift as above

                   absmax = max(high - x_shift, x_shift - low, MIN_ABSMAX)

               which is half the width, and holds where x_shift was rounded far from zero

A clip propagates nan. A static range cannot, since its scale does not depend on the row: nan
becomes low, and inf is clamped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphquant._torch import statically_known_true
from graphquant.ops.qparams import DYNAMIC, QParams

aten = torch.ops.aten

QMAX = 127  # symmetric: -128 is never produced, so |xq| * x_scale never exceeds absmax
MIN_ABSMAX = 1e-20  # rows below this quantize to 0; a floor, not `== 0`: the scale is continuous
ALIGN = 16  # bytes; TMA and 128-bit loads need rows that start at a multiple of it
LINE = 128  # bytes of a cache line: long rows that start at one multiply 10 % faster on Hopper
LONG = 1024  # elements of a row from which on that padding is at most one byte in eight

# Widths of 16-bit rows that `quantize` may overwrite with its int8 rows: each of its programs holds
# one whole row, which it reads before it writes; and the new rows start at cache lines.
OVERLAID = range(2048, 16_384 + 1, LINE)


@dataclass(frozen=True)
class Activation:
    """An elementwise function that `quantize` knows by name. Calling it computes `exact`.

    exact     as the reference computes it in float32, without cancellation
    onnx      (opset, value) -> value: in operators of ONNX, opset 20
    whole     the ATen operator that computes it, called with `keywords`; None if there is none
    grows     its result may be larger in magnitude than its input, and so overflow a float dtype
    """

    exact: Callable[[Tensor], Tensor]
    onnx: Callable[[Any, Any], Any]
    whole: Callable[..., Tensor] | None = None
    keywords: Mapping[str, Any] = field(default_factory=dict)
    grows: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        return self.exact(x)

    def fused(self, x: Tensor) -> Tensor:
        """By the operator that exporters and compilers know, if there is one."""
        return self.exact(x) if self.whole is None else self.whole(x, **self.keywords)


def _squared_relu(x: Tensor) -> Tensor:
    y = F.relu(x)
    return y * y


# A new one is an entry here and a branch in `activate` (triton_rows.py), whose approximation is
# fitted by hand; the reference, the TensorRT and ONNX exports and recognition use the entry.
ACTIVATIONS: dict[str, Activation] = {
    # x * Phi(x). erfc and not 1 + erf: no cancellation for negative x
    "gelu": Activation(
        lambda x: 0.5 * x * torch.erfc(x * -(0.5**0.5)),
        lambda op, x: op.Gelu(x),
        aten.gelu.default,
        {"approximate": "none"},
    ),
    "gelu_tanh": Activation(
        lambda x: F.gelu(x, approximate="tanh"),
        lambda op, x: op.Gelu(x, approximate="tanh"),
        aten.gelu.default,
        {"approximate": "tanh"},
    ),
    "quick_gelu": Activation(
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda op, x: op.Mul(x, op.Sigmoid(op.Mul(x, op.Constant(value_float=1.702)))),
    ),
    "silu": Activation(F.silu, lambda op, x: op.Mul(x, op.Sigmoid(x)), aten.silu.default),
    "relu": Activation(F.relu, lambda op, x: op.Relu(x)),
    "relu2": Activation(_squared_relu, lambda op, x: op.Mul(op.Relu(x), op.Relu(x)), grows=True),
}


def vectors(K: int) -> int:
    """K rounded up to a multiple of ALIGN: bytes of an int8 row that kernels read and write."""
    return (K + ALIGN - 1) // ALIGN * ALIGN


def padded(K: int) -> int:
    """The row stride of the ops' int8 results: K rounded up to ALIGN, or to LINE if LONG."""
    return (K + LINE - 1) // LINE * LINE if K >= LONG else vectors(K)


def overlay(x: Tensor) -> Tensor:
    """An int8 view [..., K] of the first half of each row of x [..., K], float16 or bfloat16,
    contiguous."""
    return x.view(torch.int8)[..., : x.shape[-1]]


def row_stride(x: Tensor) -> int | None:
    """Elements from row to row when x [..., K] is [M, K] in memory, last stride 1; else None.

    Slices x[..., a:b] of a wider tensor have one. If M is 1, any stride would do, and an aligned
    one is returned. Symbolic sizes: only if it holds for all their values.
    """
    K = x.shape[-1]
    if K > 1 and not statically_known_true(x.stride(-1) == 1):
        return None
    row = span = 0
    rows: int | None = 1  # None: a symbol
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if statically_known_true(size == 1):
            continue
        if rows == 1:
            row = stride
        elif not statically_known_true(stride == span):
            return None
        rows = rows * size if rows is not None and isinstance(size, int) else None
        span = size * stride
    if rows is None or rows > 1:
        return row
    first = x.stride(0) if x.dim() > 1 else 0
    return first if isinstance(first, int) and first >= K else padded(K)


def empty_rows(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Uninitialized int8 [..., K] on `like`'s device with rows padded(K) bytes apart.

    The storage includes the pads, also those of the last row. Sizes may be symbolic.
    """
    *lead, K = shape
    buffer = like.new_empty((*lead, padded(K)), dtype=torch.int8)
    if isinstance(K, int) and padded(K) == K:
        return buffer
    return buffer.as_strided((*lead, K), buffer.stride())


def with_pads(xq: Tensor) -> Tensor:
    """An `empty_rows` tensor [..., K] with its pads: a view [..., padded(K)]."""
    wide = (*xq.shape[:-1], padded(xq.shape[-1]))
    return xq.as_strided(wide, xq.stride(), xq.storage_offset())


def empty_triple(like: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized (xq [..., K] int8, x_scale, x_shift [..., 1] float32): quantize's results."""
    column = (*shape[:-1], 1)
    return (
        empty_rows(like, shape),
        like.new_empty(column, dtype=torch.float32),
        like.new_empty(column, dtype=torch.float32),
    )


def quantize_rows(x: Tensor, qparams: QParams = DYNAMIC) -> tuple[Tensor, Tensor, Tensor]:
    """Int8 over the last dim with a scale and a shift, as defined at the top of this module.

    x [..., K] float, K >= 1  ->  xq [..., K] int8,  x_scale, x_shift [..., 1] float32

    All rows, whatever num_rows is.
    """
    factor, low, high, clip, _ = qparams
    x = x.float()
    if factor is not None:
        x = x * factor
    if low is not None and high is not None:
        return _in_range(x, low, high)
    if clip is not None:
        x = x.clamp(-clip, clip)
    most = x.amax(-1, keepdim=True).clamp(min=0.0)
    least = x.amin(-1, keepdim=True).clamp(max=0.0)
    shift = 0.5 * most + 0.5 * least  # halves first: most - least may overflow
    absmax = (0.5 * most - 0.5 * least).clamp(min=MIN_ABSMAX)
    return *_in_steps(x - shift, absmax), shift


def _in_range(x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., K] float32 quantized with a static range."""
    least, most = x.new_full((1,), low), x.new_full((1,), high)
    shift = 0.5 * most + 0.5 * least
    absmax = torch.maximum(most - shift, shift - least).clamp(min=MIN_ABSMAX)
    x = torch.fmin(torch.fmax(x, least), most)  # nan becomes low
    lead = (*x.shape[:-1], 1)
    xq, scale = _in_steps(x - shift, absmax.expand(lead))
    return xq, scale, shift.expand(lead).contiguous()


def quantize_symmetric(x: Tensor, absmax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Int8 over the last dim with a scale alone, and zeros in the pads.

    x [..., K] float, K >= 1; absmax [..., 1] float32 >= MIN_ABSMAX, None for that of each row
    ->  xq [..., K] int8,  x_scale [..., 1] float32
    """
    x = x.float()
    if absmax is None:
        absmax = x.abs().amax(-1, keepdim=True).clamp_(min=MIN_ABSMAX)
    return _in_steps(x, absmax)


def _in_steps(x: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] as int8 steps of absmax / 127, clamped to 127 of them, and that scale."""
    # a tensor: for a number torch uses a reciprocal, with two roundings (denormal near 3e38)
    qmax = torch.full_like(absmax, QMAX)
    steps = torch.round(x * (qmax / absmax)).clamp(-QMAX, QMAX)
    xq = steps.nan_to_num(nan=0.0)  # nan: absmax is inf or nan
    xq = xq.to(torch.int8, memory_format=torch.contiguous_format)
    K = x.shape[-1]
    return F.pad(xq, (0, padded(K) - K))[..., :K], absmax / qmax
