"""Int8 weight of a linear: symmetric, one scale per output channel.

    wq, w_scale = quantize_symmetric(w, absmax)     (numerics.py)
    w_sum[n]    = w_scale[n] * sum_k wq[n, k]

    w          [N, K]  float16 | bfloat16 | float32
    method     "absmax": the largest magnitude of a channel is 127 steps
               "mse": the share of it that minimizes sum_k (w - w_scale wq)^2
    -> wq      [N, K]  int8 in [-127, 127], row stride padded(K) bytes, pads zero
    -> w_scale [N]     float32 > 0
    -> w_sum   [N]     float32, what int8_linear multiplies with the activation's shift

Output channels are independent: quantizing stacked weights equals stacking quantized weights, bit
for bit. It runs once, when a weight is packed, so the reference serves on CUDA as well.

"mse" tries shares of absmax, half a percent apart, and keeps each channel's best. Rounding costs
w_scale^2 / 12 an element and clipping (|w| - 127 w_scale)^2, so the minimum of the sum has

    w_scale >= absmax / 127 / (1 + K / c),    c = 12 * 127^2

(one clipped element alone balances K rounded ones): with 8 bits clipping hardly pays off. The rest
of the gain is chance, above absmax as well as below: from one share to the next, the rounding
errors of a row change the sum by 0.9 / sqrt(K) of itself (standard deviation), 0.1 to 0.2 dB in
total.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graphquant.errors import UnsupportedInputError
from graphquant.ops import checks
from graphquant.ops.define import define
from graphquant.ops.numerics import MIN_ABSMAX, QMAX, empty_rows, quantize_symmetric

METHODS = ("absmax", "mse")
PER_SHARE = 200  # shares of absmax are 1 / 200 apart
MOST = 5  # shares above 1: there the sum grows by 5 %, which chance rarely compensates
CACHED = 2**17  # elements per chunk on a CPU: they fit a core's cache
ELSEWHERE = 2**24  # elements per chunk on a GPU, to launch fewer kernels


def _check(w: Tensor, method: str = "absmax") -> None:
    checks.rows("quantize_weight", "w", w)
    if w.dim() != 2:
        raise UnsupportedInputError(f"quantize_weight: w has {w.dim()} dims, needs [N, K]")
    if method not in METHODS:
        raise UnsupportedInputError(
            f"quantize_weight: method is {method!r}, needs one of {', '.join(METHODS)}"
        )


def _fake(w: Tensor, method: str = "absmax") -> tuple[Tensor, Tensor, Tensor]:
    scale = w.new_empty(w.shape[0], dtype=torch.float32)
    return empty_rows(w, w.shape), scale, torch.empty_like(scale)


@define(
    '(Tensor w, str method="absmax") -> (Tensor wq, Tensor w_scale, Tensor w_sum)',
    float_form=lambda w, *_: w,
    fake=_fake,
    check=_check,
    kernels=(),
    cpu=False,
)
def quantize_weight(w: Tensor, method: str = "absmax") -> tuple[Tensor, Tensor, Tensor]:
    wq, scale = quantize_symmetric(w, _least_squares(w) if method == "mse" else None)
    total = wq.sum(-1, dtype=torch.int32)
    return wq, scale.squeeze(-1), total.float() * scale.squeeze(-1)


def shares(K: int) -> list[float]:
    """The shares of absmax that are tried for rows of K elements, 1 first."""
    least = math.floor(PER_SHARE * (1 / (1 + K / (12 * QMAX**2)) - 1)) - 2  # and two for chance
    return [1 + i / PER_SHARE for i in (0, *range(least, 0), *range(1, MOST + 1))]


def _least_squares(w: Tensor) -> Tensor:
    """The absmax of each row with the least squared error: w [N, K] -> [N, 1] float32.

    In chunks of rows, without a copy of w.
    """
    K = w.shape[-1]
    together = max(1, (CACHED if w.device.type == "cpu" else ELSEWHERE) // K)
    return torch.cat([_best(rows.float(), shares(K)) for rows in w.split(together)])


def _best(w: Tensor, shares: list[float]) -> Tensor:
    absmax = w.abs().amax(-1, keepdim=True).clamp_(min=MIN_ABSMAX)
    best, least = absmax, torch.full_like(absmax, torch.inf)
    steps, rounded = torch.empty_like(w), torch.empty_like(w)
    for share in shares:
        # a row that is not finite has no sum below inf and keeps its absmax
        tried = (absmax * share).clamp_(MIN_ABSMAX, torch.finfo(torch.float32).max)
        torch.mul(w, torch.full_like(tried, QMAX) / tried, out=steps)
        torch.round(steps, out=rounded).clamp_(-QMAX, QMAX)
        # in units of absmax: squares of the weights themselves may overflow
        off = torch.linalg.vector_norm(steps.sub_(rounded), dim=-1, keepdim=True).mul_(share)
        best, least = torch.where(off < least, tried, best), torch.fmin(off, least)
    return best
