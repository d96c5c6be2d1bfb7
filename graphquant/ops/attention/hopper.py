"""hopper.cu on sm_90a: compiled by NVRTC for the tile, the head and the keys, cached, launched.

Tokens must start at multiples of 16 bytes, for the tensor memory accelerator.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphquant.ops.attention.hopper_tiles import (
    ONLY,
    PART,
    PTX_NAMES,
    ROWS,
    STORED,
    TILES,
    HopperTile,
)
from graphquant.ops.attention.op import Operands, attention
from graphquant.ops.hopper import compile_kernel
from graphquant.ops.runtime import nvrtc
from graphquant.ops.runtime.device import gpu_properties
from graphquant.ops.runtime.launch import ALIGNED, MAP_SWIZZLES, MAP_TYPES, Param, launch, native

LOG2_E = 1.4426950408889634


def _refuses(*args: Any) -> str | None:
    q, k, v, _, tile, key_mask, causal, window, bias = Operands(*args)
    if tile is None:
        return "no tile is named"
    if tile not in TILES:
        return f"tile {tile} is another kernel's"
    if causal or any(given is not None for given in (key_mask, window, bias)):
        return "it computes no masks and no bias"
    if k.shape[1] != q.shape[1]:
        return f"q has {q.shape[1]} heads, k has {k.shape[1]}"
    if (why := refuses_heads(q, k, v)) is not None:
        return why
    if (why := TILES[tile].refuses(q.shape[3])) is not None:
        return f"tile {tile}: {why}"
    return None


def refuses_heads(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why q, k and v cannot be read by TMA on this device, or None."""
    sm = gpu_properties(q.device).sm
    if q.device.type != "cuda" or sm != ONLY:
        return f"the device is sm_{sm}, this one is for sm_{ONLY} alone"
    if (why := nvrtc.missing()) is not None:
        return why
    if _name(q) not in PTX_NAMES:
        return f"q is {q.dtype}, needs float16 or bfloat16"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.data_ptr() % ALIGNED:
            return f"{name} does not start at a multiple of {ALIGNED} bytes"
        if t.numel() and (t.stride(3) != 1 or any(n % ALIGNED or not n for n in _strides(t))):
            return f"{name} with strides {tuple(t.stride())} is not tokens at multiples of 16 bytes"
    return None


def _name(of: Tensor) -> str:
    return str(of.dtype).removeprefix("torch.")


def _strides(t: Tensor) -> tuple[int, ...]:
    """Bytes from head to head, token to token, batch to batch. A dim of one has any."""
    width = t.shape[3] * t.itemsize
    return tuple(t.stride(i) * t.itemsize if t.shape[i] > 1 else width for i in (1, 2, 0))


def cubin(tile: HopperTile, T: int, D: int, dtype: str) -> bytes:
    """The kernel for T keys (or as many more as fill whole blocks) and heads of D columns."""
    source = Path(__file__).with_suffix(".cu")
    return compile_kernel(source, tile.defines(T, D, dtype), tile.wgmma_shapes(T, D, dtype))


@functools.cache
def _function(tile: HopperTile, keys: int, D: int, dtype: str, device: torch.device) -> int:
    """The handle of a loaded specialization. `device`: each has functions of its own."""
    code = cubin(tile, keys, D, dtype)
    with torch.cuda.device(device):
        function: int = native().load(device.index, code, "attention_hopper", tile.shared(D))
    return function


@attention.kernel("hopper", refuses=_refuses)
def attention_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    tile: str | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    bias: Tensor | None = None,
    *,
    out: tuple[Tensor],
) -> None:
    (y,) = out
    if not y.numel():
        return
    assert tile is not None
    (B, H, S, D), T, chosen = q.shape, k.shape[2], TILES[tile]
    launch(
        _function(chosen, chosen.first(T), D, _name(q), q.device),
        chosen.grid(B, H, S, gpu_properties(q.device).num_sms),
        chosen.threads,
        chosen.shared(D),
        (
            *(heads_map(t, n) for t, n in ((q, ROWS), (k, chosen.n), (v, chosen.n), (y, STORED))),
            *(("i32", n) for n in (S, *chosen.cover(B, H, S, T))),
            ("f32", scale * LOG2_E),
        ),
        pdl=True,
    )


def heads_map(t: Tensor, tokens: int) -> Param:
    """Of [B, H, _, D], in boxes of 64 columns of a head by `tokens`."""
    B, H, S, D = t.shape
    box = (PART, 1, tokens, 1)
    return "map", t, MAP_TYPES[t.dtype], (D, H, S, B), _strides(t), box, MAP_SWIZZLES[128]
