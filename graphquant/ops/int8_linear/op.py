"""int8 x int8 linear with dequantization, bias and residual in its epilogue.

    acc[..., n] = sum_k xq[..., k] * wq[n, k]                                       exact int32
    y[..., n]   = acc * x_scale * w_scale[n] + x_shift * w_sum[n] + bias[n] + residual[..., n]
                                                              float32, rounded once to `dtype`

    xq        [..., K]  int8 in [-127, 127]     K <= MAX_K
    x_scale   [..., 1]  float32
    x_shift   [..., 1]  float32                 x ~ xq * x_scale + x_shift
    wq        [N, K]    int8 in [-127, 127]; on the CPU also what `pack_weight` made of it
    w_scale   [N]       float32
    w_sum     [N]       float32                 w_scale * sum_k wq
    bias      [N]       float16 | bfloat16 | float32, or None
    residual  [..., N]  float16 | bfloat16 | float32, or None
    num_rows  [1]       int32, or None for all: how many leading rows of xq [M, K] have to be
                        computed; those behind are unspecified in y
    -> y      [..., N]  `dtype` (float16 | bfloat16 | float32), contiguous

The layouts that `quantize` writes are the fastest; results are correct for any strides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from graphquant.errors import UnsupportedInputError
from graphquant.ops import checks
from graphquant.ops.define import define
from graphquant.ops.pack_weight.op import is_packed, unpacked

MAX_K = (2**31 - 1) // 127**2  # 133_144: beyond this an int32 sum can overflow
EXACT_K = 1024  # 127^2 * 1024 < 2^24: a float32 sum of that many int8 products is exact


def _check(
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
) -> None:
    op, int8 = "int8_linear", (torch.int8,)
    checks.rows(op, "xq", xq, int8)
    checks.rows(op, "wq", wq, int8)
    N, K = _channels(wq, w_scale), xq.shape[-1]
    if not is_packed(wq, N, K):
        checks.shape(op, "wq", wq, (N, K), "[N, K] like xq [..., K]")
    elif xq.device.type != "cpu":
        raise UnsupportedInputError(
            f"{op}: wq is packed for CPUs, and xq is on {xq.device}: a program that was exported "
            "on a CPU runs on CPUs; export the model on the device where the program is to run"
        )
    if isinstance(K, int) and K > MAX_K:
        raise UnsupportedInputError(f"{op}: K={K} is over {MAX_K}, where int32 sums can overflow")
    checks.float32(op, "x_scale", x_scale)
    checks.shape(op, "x_scale", x_scale, (*xq.shape[:-1], 1), "[..., 1] like xq [..., K]")
    checks.float32(op, "x_shift", x_shift)
    checks.shape(op, "x_shift", x_shift, (*xq.shape[:-1], 1), "[..., 1] like xq [..., K]")
    checks.float32(op, "w_scale", w_scale)
    checks.shape(op, "w_scale", w_scale, (N,), "[N] like wq [N, K]")
    checks.float32(op, "w_sum", w_sum)
    checks.shape(op, "w_sum", w_sum, (N,), "[N] like wq [N, K]")
    checks.vector(op, "bias", bias, N, "[N] like wq [N, K]")
    if residual is not None:
        checks.floating(op, "residual", residual)
        checks.shape(op, "residual", residual, (*xq.shape[:-1], N), "[..., N], the result's shape")
    checks.result_dtype(op, dtype)
    checks.num_rows(op, num_rows)
    checks.one_device(
        op,
        xq=xq,
        x_scale=x_scale,
        x_shift=x_shift,
        wq=wq,
        w_scale=w_scale,
        w_sum=w_sum,
        bias=bias,
        residual=residual,
        num_rows=num_rows,
    )


def _fake(
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
    return xq.new_empty((*xq.shape[:-1], _channels(wq, w_scale)), dtype=dtype)


def _channels(wq: Tensor, w_scale: Tensor) -> int:
    """N, also of a packed weight; of wq where w_scale is not [N]."""
    return w_scale.shape[0] if w_scale.dim() == 1 else wq.shape[0]


def _float_product(xq: Tensor, wq: Tensor) -> Tensor:
    with torch.autocast(xq.device.type, enabled=False):  # it would cast the operands
        return torch.mm(xq.float(), wq.float().T)


def exact_matmul(
    xq: Tensor,
    wq: Tensor,
    product: Callable[[Tensor, Tensor], Tensor] = _float_product,
    exact_k: int = EXACT_K,
) -> Tensor:
    """xq [M, K] @ wq [N, K].T as float32 [M, N]: the int32 accumulators, rounded once.

    product  the same for K <= exact_k, where it is exact: by default float32 GEMMs. torch._int_mm
             is 25 to 50 times slower on a CPU without AVX-512 VNNI, and oneDNN's products of
             unsigned by signed bytes saturate there.
    """
    sums = [
        product(xq[:, k : k + exact_k], wq[:, k : k + exact_k])
        for k in range(0, xq.shape[1], exact_k)
    ]
    if len(sums) == 1:
        return sums[0]
    return functools.reduce(torch.add, (s.to(torch.int32) for s in sums)).float()


def _float_form(
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
    return linear(xq * x_scale + x_shift, wq * w_scale[:, None], bias, residual, dtype)


def linear(
    x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The float form on dequantized operands, x [..., K] and w [N, K]."""
    y = F.linear(x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype))
    return y if residual is None else (y + residual).to(dtype)


@define(
    "(Tensor xq, Tensor x_scale, Tensor x_shift, Tensor wq, Tensor w_scale, Tensor w_sum,"
    " Tensor? bias, Tensor? residual, ScalarType dtype, Tensor? num_rows=None) -> Tensor",
    float_form=_float_form,
    fake=_fake,
    check=_check,
    kernels=("hopper", "triton_tma", "triton"),
)
def int8_linear(
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
    acc = exact_matmul(xq.reshape(-1, K), wq)
    return epilogue(acc, xq, x_scale, x_shift, wq, w_scale, w_sum, bias, residual, dtype)


def epilogue(
    acc: Tensor,
    xq: Tensor,
    x_scale: Tensor,
    x_shift: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """y from the accumulators, acc [M, N] float32, and the op's arguments."""
    y = acc.view(*xq.shape[:-1], wq.shape[0])
    y = (y * x_scale * w_scale).addcmul(x_shift, w_sum)
    if bias is not None:
        y = y + bias.float()
    if residual is not None:
        y = y + residual.float()
    return y.to(dtype)
