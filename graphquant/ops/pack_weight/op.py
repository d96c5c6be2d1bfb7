"""Int8 weights in the order in which CPU kernels read them.

The output channels are in panels of 32, the last one padded with zeros, as K is to a multiple
of 64. A panel of Kp = up(K, 64) is [Kp / 64, 2, 16, 16, 4]:

    step of K, half of the panel, four consecutive k of the step, channel of the half, k of the four

so that 1 KiB is a tile of AMX, and 64 bytes of it what a VNNI instruction multiplies. Behind it are
the panel's 32 sums over K as int32, which VNNI needs because it reads activations as unsigned.

    wq      [N, K]                      int8 in [-127, 127]
    -> packed  [up(N, 32) / 32, 32 up(K, 64) + 128]   int8

It runs once, when a weight is packed. int8_linear on the CPU takes the result in place of wq.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphquant._torch import statically_known_true
from graphquant.errors import UnsupportedInputError
from graphquant.ops import checks
from graphquant.ops.define import define

PANEL = 32  # output channels
STEP = 64  # of K
SUMS = 4 * PANEL  # bytes


def packed_shape(N: Any, K: Any) -> tuple[Any, Any]:
    """The shape of the packed weight of a linear with N outputs and K inputs."""
    return (N + PANEL - 1) // PANEL, (K + STEP - 1) // STEP * STEP * PANEL + SUMS


def is_packed(wq: Tensor, N: Any, K: Any) -> bool:
    """Is this the packed weight [N, K], rather than the weight itself?"""
    return wq.dim() == 2 and bool(statically_known_true(wq.shape[1] == packed_shape(N, K)[1]))


def unpacked(packed: Tensor, N: int, K: int) -> Tensor:
    """The weight [N, K] of a packed one."""
    panels = packed[:, :-SUMS].reshape(packed.shape[0], -1, 2, 16, 16, 4)
    return panels.permute(0, 2, 4, 1, 3, 5).reshape(packed.shape[0] * PANEL, -1)[:N, :K]


def _check(wq: Tensor) -> None:
    checks.rows("pack_weight", "wq", wq, (torch.int8,))
    if wq.dim() != 2:
        raise UnsupportedInputError(f"pack_weight: wq has {wq.dim()} dims, needs [N, K]")


def _fake(wq: Tensor) -> Tensor:
    return wq.new_empty(packed_shape(*wq.shape))


@define("(Tensor wq) -> Tensor", float_form=lambda wq: wq, fake=_fake, check=_check, kernels=())
def pack_weight(wq: Tensor) -> Tensor:
    N, K = wq.shape
    panels, width = packed_shape(N, K)
    steps = (K + STEP - 1) // STEP
    w = F.pad(wq, (0, steps * STEP - K, 0, panels * PANEL - N)).view(panels, 2, 16, steps, 16, 4)
    ordered = w.permute(0, 3, 1, 4, 2, 5).reshape(panels, width - SUMS)
    sums = w.sum((3, 4, 5), dtype=torch.int32).view(panels, PANEL).view(torch.int8)
    return torch.cat((ordered, sums), 1)
