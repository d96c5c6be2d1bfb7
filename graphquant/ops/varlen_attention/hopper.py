"""hopper/attention.cu on packed sequences: compiled by NVRTC for the head, the masks and the bias,
cached, launched."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphquant.ops.hopper import SM
from graphquant.ops.hopper.attention import (
    BOX,
    COLUMNS,
    LOG2_E,
    PTX_NAMES,
    WIDEST,
    Variant,
    function,
)
from graphquant.ops.runtime import nvrtc
from graphquant.ops.runtime.device import gpu_properties
from graphquant.ops.runtime.launch import ALIGNED, MAP_SWIZZLES, MAP_TYPES, Param, launch
from graphquant.ops.varlen_attention.op import Operands, varlen_attention


def _refuses(*args: Any) -> str | None:
    q, k, v, cu_seqlens, position, tiles, *_, bias = Operands(*args)
    sm, D = gpu_properties(q.device).sm, q.shape[3]
    if q.device.type != "cuda" or sm != SM:
        return f"the device is sm_{sm}, this one is for sm_{SM} alone"
    if (why := nvrtc.missing()) is not None:
        return why
    if q.dtype not in PTX_NAMES:
        return f"q is {q.dtype}, needs float16 or bfloat16"
    if D % 8 or D > WIDEST:
        return f"heads of {D}: needs a multiple of 8 up to {WIDEST}"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.stride(3) != 1 or any(n % ALIGNED or not n for n in _strides(t)):
            return f"{name} with strides {tuple(t.stride())} is not tokens at multiples of 16 bytes"
    ints = {"cu_seqlens": cu_seqlens, "position": position, "tiles": tiles}
    for name, t in ints.items():
        if not t.is_contiguous():
            return f"{name} is not contiguous"
    for name, x in {"q": q, "k": k, "v": v, "bias": bias, **ints}.items():
        if x is not None and x.data_ptr() % ALIGNED:
            return f"{name} does not start at a multiple of {ALIGNED} bytes"
    return None


def _strides(t: Tensor) -> tuple[int, int]:
    """Bytes from head to head and token to token. A dim of one has any."""
    width = t.shape[3] * t.itemsize
    head, row = (t.stride(i) * t.itemsize if t.shape[i] > 1 else width for i in (1, 2))
    return head, row


@varlen_attention.kernel("hopper", refuses=_refuses)
def varlen_attention_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    position: Tensor,
    tiles: Tensor,
    scale: float,
    max_length: int,
    causal: bool = False,
    window: int | None = None,
    bias: Tensor | None = None,
    *,
    out: tuple[Tensor],
) -> None:
    (y,) = out
    (_, H, _, D), entries = q.shape, tiles.shape[0]
    if not y.numel() or not entries:
        return
    sm = gpu_properties(q.device).num_sms
    variant = Variant(
        D, q.dtype, causal, window is not None, bias.dtype if bias is not None else None
    )
    launch(
        function(variant, q.device),
        min(sm, entries * -(-H // 2)),
        variant.threads,
        variant.shared,
        (
            *map(_map, (q, k, v)),
            *(("pointer", t) for t in (y, cu_seqlens, position, tiles)),
            ("null",) if bias is None else ("pointer", bias),
            *(("i64", n) for n in _bias_strides(bias)),
            *(("i32", n) for n in (H, H // k.shape[1], entries)),
            ("i32", min(window or 0, max_length)),
            ("f32", scale * LOG2_E),
        ),
        pdl=True,
    )


def _map(t: Tensor) -> Param:
    _, heads, T, D = t.shape
    box = (COLUMNS, 1, BOX, 1)
    return (
        "map",
        t,
        MAP_TYPES[t.dtype],
        (D, heads, T, 1),
        (*_strides(t), ALIGNED),
        box,
        MAP_SWIZZLES[128],
    )


def _bias_strides(bias: Tensor | None) -> tuple[int, int, int]:
    """Bytes from head to head, row to row, column to column; 0 where all heads share one."""
    if bias is None:
        return 0, 0, 0
    head, row, column = (bias.stride(i) * bias.itemsize for i in (1, 2, 3))
    return head if bias.shape[1] > 1 else 0, row, column
