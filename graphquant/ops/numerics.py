"""The one definition of our int8 arithmetic. Kernels are tested against this.

    absmax  = max(max_k |x[..., k]|, MIN_ABSMAX)                        float32
    x_scale = absmax / 127                                              float32
    xq      = clamp(round_half_even(x * (127 / absmax)), -127, 127)     int8

so that |x - xq * x_scale| <= x_scale / 2, up to float32 rounding. A row that holds inf or nan has
x_scale inf or nan and xq = 0: it dequantises to nan, and no other row notices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

QMAX = 127  # symmetric: -128 is never produced, so |xq| * x_scale never exceeds absmax
MIN_ABSMAX = 1e-20  # rows below this quantise to 0; a floor, not `== 0`: the scale is continuous
ALIGN = 16  # bytes; TMA and 128-bit loads want rows that start at a multiple of it

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    # x * Phi(x). erfc and not 1 + erf: no cancellation for negative x
    "gelu": lambda x: 0.5 * x * torch.erfc(x * -(0.5**0.5)),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def padded(K: int) -> int:
    """K rounded up to a multiple of ALIGN: the row stride of every int8 tensor we make."""
    return (K + ALIGN - 1) // ALIGN * ALIGN


def empty_rows(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Uninitialised int8 [..., K] on `like`'s device with rows padded(K) bytes apart.

    The pads belong to the storage, that of the last row too. Sizes may be symbols.
    """
    *lead, K = shape
    buffer = like.new_empty((*lead, padded(K)), dtype=torch.int8)
    if isinstance(K, int) and K % ALIGN == 0:
        return buffer
    return buffer.as_strided((*lead, K), buffer.stride())


def with_pads(xq: Tensor) -> Tensor:
    """The memory of an `empty_rows` tensor [..., K] with its pads: [..., padded(K)]."""
    wide = (*xq.shape[:-1], padded(xq.shape[-1]))
    return xq.as_strided(wide, xq.stride(), xq.storage_offset())


def empty_pair(like: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Uninitialised (xq [..., K] int8, x_scale [..., 1] float32): what every quantiser returns."""
    return empty_rows(like, shape), like.new_empty((*shape[:-1], 1), dtype=torch.float32)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 over the last dim, as this module's head defines it.

    x [..., K] float, K >= 1  ->  xq [..., K] int8 with zeroed pads,  x_scale [..., 1] float32
    """
    x = x.float().contiguous()
    absmax = x.abs().amax(-1, keepdim=True).clamp_(min=MIN_ABSMAX)
    steps = torch.round(x * (QMAX / absmax)).clamp_(-QMAX, QMAX)
    xq = empty_rows(x, x.shape)
    with_pads(xq)[..., x.shape[-1] :] = 0
    xq.copy_(steps.nan_to_num_(nan=0.0))  # nan only where absmax is inf or nan
    return xq, absmax / QMAX
