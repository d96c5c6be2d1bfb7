"""hopper/attention.cu on a padded batch: with any masks, bias and grouped heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphquant.ops.attention.hopper import heads_map, refuses_heads
from graphquant.ops.attention.hopper_tiles import MASKED
from graphquant.ops.attention.op import Operands, attention
from graphquant.ops.hopper.attention import (
    LOG2_E,
    MAX_KEYS,
    TILE,
    WIDEST,
    Variant,
    function,
)
from graphquant.ops.runtime.device import gpu_properties
from graphquant.ops.runtime.launch import ALIGNED, launch


def _refuses(*args: Any) -> str | None:
    q, k, v, _, tile, key_mask, _, _, bias = Operands(*args)
    if tile != MASKED:
        return f"tile {tile} is another kernel's"
    if (why := refuses_heads(q, k, v)) is not None:
        return why
    if (D := q.shape[3]) % 8 or D > WIDEST:
        return f"heads of {D}: needs a multiple of 8 up to {WIDEST}"
    if key_mask is not None and k.shape[2] > MAX_KEYS:
        return f"{k.shape[2]} keys with a mask, needs at most {MAX_KEYS}"
    if key_mask is not None and k.shape[2] > 1 and key_mask.stride(1) != 1:
        return f"key_mask with strides {key_mask.stride()} is not rows of adjacent keys"
    for name, t in (("key_mask", key_mask), ("bias", bias)):
        if t is not None and t.data_ptr() % ALIGNED:
            return f"{name} does not start at a multiple of {ALIGNED} bytes"
    return None


@attention.kernel("hopper_padded", refuses=_refuses)
def attention_hopper_padded(
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
    (B, H, S, D), (Hkv, T) = q.shape, k.shape[1:3]
    variant = Variant(
        D,
        q.dtype,
        causal,
        window is not None,
        bias.dtype if bias is not None else None,
        padded=True,
        key_mask=key_mask is not None,
        bias_pairs=bias is not None and _in_pairs(bias),
    )
    items = -(-S // TILE) * B * -(-H // 2)
    launch(
        function(variant, q.device),
        min(gpu_properties(q.device).num_sms, items),
        variant.threads,
        variant.shared,
        (
            *(heads_map(t, TILE) for t in (q, k, v)),
            ("pointer", y),
            ("null",) if key_mask is None else ("pointer", key_mask),
            ("i64", 0 if key_mask is None else key_mask.stride(0)),
            ("null",) if bias is None else ("pointer", bias),
            *(("i64", n) for n in _bias_strides(bias)),
            *(("i32", n) for n in (H, H // Hkv, B, S, T, min(window or 0, max(S, T)))),
            ("f32", scale * LOG2_E),
        ),
        pdl=True,
    )


def _bias_strides(bias: Tensor | None) -> tuple[int, ...]:
    """Bytes from batch to batch, head to head, row to row, key to key; 0 where there is one."""
    if bias is None:
        return 0, 0, 0, 0
    return tuple(
        bias.stride(i) * bias.itemsize if bias.shape[i] > 1 else 0 for i in range(bias.dim())
    )


def _in_pairs(bias: Tensor) -> bool:
    """Are keys 2i and 2i + 1 next to each other, at multiples of both their bytes?"""
    *strides, column = (n // bias.itemsize for n in _bias_strides(bias))
    return column == 1 and not any(n % 2 for n in (*strides, bias.shape[3]))
