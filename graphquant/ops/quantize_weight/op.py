"""A linear's weight as int8, symmetric, one scale per output channel.

    wq, w_scale = quantize_symmetric(w)     (numerics.py)
    w_sum[n]    = w_scale[n] * sum_k wq[n, k]

    w          [N, K]  float16 | bfloat16 | float32
    -> wq      [N, K]  int8 in [-127, 127], row stride padded(K) bytes, pads zero
    -> w_scale [N]     float32 > 0
    -> w_sum   [N]     float32, what int8_linear multiplies with the activation's shift

Output channels don't see each other: quantising stacked weights equals stacking quantised weights,
bit for bit. It runs once, when a weight is packed, so the reference serves on CUDA as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphquant.errors import UnsupportedInputError
from graphquant.ops import checks
from graphquant.ops.define import define
from graphquant.ops.numerics import empty_rows, quantize_symmetric


def _check(w: Tensor) -> None:
    checks.rows("quantize_weight", "w", w)
    if w.dim() != 2:
        raise UnsupportedInputError(f"quantize_weight: w has {w.dim()} dims, needs [N, K]")


def _fake(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = w.new_empty(w.shape[0], dtype=torch.float32)
    return empty_rows(w, w.shape), scale, torch.empty_like(scale)


@define(
    "(Tensor w) -> (Tensor wq, Tensor w_scale, Tensor w_sum)", fake=_fake, check=_check, kernels=()
)
def quantize_weight(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wq, scale = quantize_symmetric(w)
    total = wq.sum(-1, dtype=torch.int32)
    return wq, scale.squeeze(-1), total.float() * scale.squeeze(-1)
