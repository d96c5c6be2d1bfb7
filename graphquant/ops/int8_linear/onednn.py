"""int8_linear by oneDNN, for where the CPU kernel cannot be built: without a C++ compiler.

oneDNN multiplies uint8 by int8, so the activations are xq + 128 with a zero point of 128. With AMX
it takes off the zero point in float32. Without VNNI it adds pairs of products in 16 bits, which
saturate, and says nothing. So it is used only where sums of extreme products were exact.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from graphquant.ops.int8_linear.op import epilogue, exact_matmul, int8_linear
from graphquant.ops.pack_weight.op import is_packed, unpacked

log = logging.getLogger(__name__)

ZERO_POINT = 128
EXACT_K = 512  # 255 * 127 * 512 < 2^24: float32 has the sum before the zero point is taken off


@functools.cache
def missing() -> str | None:
    """Why oneDNN's int8 products are not used on this machine, or None."""
    try:
        exact = _is_exact()
    except (AttributeError, RuntimeError, NotImplementedError) as why:
        log.debug("oneDNN cannot multiply int8: %s", why)
        return "this build of torch has no int8 products of oneDNN"
    return None if exact else "oneDNN's int8 products saturate on this processor"


@int8_linear.torch_kernel("onednn", refuses=lambda *_: missing())
def int8_linear_onednn(
    xq: Tensor,
    x_scale: Tensor,
    x_shift: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    num_rows: Tensor | None = None,
) -> Tensor:
    N, K = w_scale.shape[0], xq.shape[-1]
    if is_packed(wq, N, K):
        wq = unpacked(wq, N, K)
    acc = exact_matmul(xq.reshape(-1, K), wq, _product, EXACT_K)
    return epilogue(acc, xq, x_scale, x_shift, wq, w_scale, w_sum, bias, residual, dtype)


def _product(xq: Tensor, wq: Tensor) -> Tensor:
    unsigned = (xq.view(torch.uint8) ^ ZERO_POINT).contiguous()  # xq + 128
    packed = torch.ops.onednn.qlinear_prepack(wq.contiguous(), None)
    w_scale, w_zero_point = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    output: Any = (1.0, 0, torch.float32, "none", [], "")
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, ZERO_POINT, packed, w_scale, w_zero_point, None, *output
    )
    return product


def _is_exact() -> bool:
    """Is the product of extreme values exact? Some of the sums of uint8 products are odd."""
    M, N = 33, 40
    x = torch.full((M, EXACT_K), 127, dtype=torch.int8)
    x[::2] = -127
    x[1::4, ::3] = 126
    w = torch.full((N, EXACT_K), -127, dtype=torch.int8)
    w[::2], w[1] = 127, 3
    w[:, -1] = 2  # 511 odd products and an even one
    return torch.equal(_product(x, w).double(), x.double() @ w.double().T)
