"""Is every op right on this device? Against float64, quickly, before anything is timed.

The op tests are the thorough ones (`python -m tools.check --gpu`); this guards a table of times
from being about wrong results. Outputs are poisoned, and every op runs twice on other values of the
same shapes: what the second call takes over from the first is checked as well.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from graphquant.ops import (
    OPS,
    attention,
    int8_linear,
    norm_quantize,
    norm_quantize_keep,
    quantize,
    varlen_attention,
)
from graphquant.ops.attention.hopper_tiles import MASKED, TILES
from graphquant.ops.define import Op
from graphquant.ops.numerics import ACTIVATIONS, MIN_ABSMAX
from graphquant.ops.pack_weight.op import SUMS, unpacked

# M, N, K: nothing a multiple of anything; the widths of one layer with few and with many rows
SHAPES = ((5, 72, 43), (577, 4304, 1152), (4617, 1152, 4304))
DTYPE = torch.bfloat16
NOISE = 1e-4  # float32 arithmetic and a fitted GELU, on values near 1
STEP = 0.505  # of a quantization step: half of one, and what float32 adds
Args = tuple[Any, ...]
Triple = tuple[Tensor, Tensor, Tensor]


def wrong_ops(device: str, shapes: tuple[tuple[int, int, int], ...] = ()) -> list[str]:
    """What is wrong, one sentence each; nothing if all is well."""
    said = []
    # the largest takes a CPU half a minute
    shapes = shapes or (SHAPES[:2] if device == "cpu" else SHAPES)
    for name, op in OPS.items():
        if name not in CASES:
            said.append(f"{name}: tools.bench does not know what it means")
            continue
        for M, N, K in shapes:
            small = shapes[0][0] == M
            for label, make in CASES[name](M, N, K, device, small):
                why = _twice(op, make)
                if why is not None:
                    said.append(f"{name} {label}: {why}")
    return said


def _twice(op: Callable[..., Any], make: Callable[[], tuple[Args, Compare]]) -> str | None:
    torch.manual_seed(0)
    for _ in range(2):
        args, compare = make()
        try:
            with poisoned():
                got = op(*args)
            why = compare(got)
        except Exception as error:  # noqa: BLE001 - an op that raises is wrong, whatever it raises
            why = f"{type(error).__name__}: {error}".splitlines()[0]
        if why is not None:
            return why
    return None


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody has written yet is nan, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills by torch's default
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


# --- what the ops mean, in float64 --------------------------------------------------------------


def meaning(op: Op, args: Args) -> Tensor:
    """The op's float form in float64."""
    doubles = [_double(a) for a in (op.parted(args)[0] if op.quantizes else args)]
    y: Tensor = op.float_form(*doubles)
    return y


def _double(argument: Any) -> Any:
    if isinstance(argument, torch.dtype):
        return torch.float64
    is_number = isinstance(argument, Tensor) and argument.dtype != torch.bool
    return argument.double() if is_number else argument


def size_of_terms(
    xq: Tensor,
    x_scale: Tensor,
    x_shift: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *_: Any,
) -> Tensor:
    """The sum of the magnitudes of what int8_linear adds: its rounding errors go by that."""
    size = (xq.double() @ wq.double().T * x_scale * w_scale).abs()
    size = size + (x_shift.double() * w_sum).abs()
    for term in (bias, residual):
        size = size if term is None else size + term.double().abs()
    return size


def wrong_triple(triple: Triple, y: Tensor) -> str | None:
    """Does (xq, x_scale, x_shift) stand for y [..., K] float64, by the scale it should have?"""
    xq, scale, shift = (t.double() for t in triple)
    if xq.shape != y.shape or int(xq.abs().max()) > 127:
        return f"xq is {tuple(xq.shape)} up to {int(xq.abs().max())}"
    high, low = y.amax(-1, keepdim=True).clamp(min=0), y.amin(-1, keepdim=True).clamp(max=0)
    half = ((high - low) / 2).clamp(min=MIN_ABSMAX)
    apart = {
        "x_scale": _worst((scale * 127 - half) / (1e-3 * half + NOISE)),
        "x_shift": _worst((shift - (high + low) / 2) / (1e-3 * half + NOISE)),
        "xq": _worst((xq * scale + shift - y) / (STEP * scale + NOISE)),
    }
    wrong = [f"{name} is off by {a:.3g} of what it may be" for name, a in apart.items() if a > 1]
    return "; ".join(wrong) or None


def steps_off(triple: Triple, y: Tensor) -> float:
    """How many quantization steps the worst value is away from y [..., K] float64."""
    xq, scale, shift = (t.double() for t in triple)
    return _worst((xq * scale + shift - y) / scale)


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; inf for nan."""
    error = float((got.double() - want.double()).norm() / want.double().norm())
    return error if error == error else float("inf")


def _worst(ratio: Tensor) -> float:
    worst = float(ratio.abs().max())
    return worst if worst == worst else float("inf")


# --- arguments and comparisons for each op ------------------------------------------------------

Compare = Callable[[Any], "str | None"]
Cases = Iterator["tuple[str, Callable[[], tuple[Args, Compare]]]"]


def _rows(M: int, K: int, device: str) -> Tensor:
    """Gaussian, some rows with one large outlier, some small."""
    x = torch.randn(M, K, device=device)
    x[::3, 0] *= 20
    x[1::3] *= 0.1
    return x.to(DTYPE)


def _quantizer(op: Op, args: Args) -> tuple[Args, Compare]:
    """Arguments of an op that quantizes, and what is wrong with its results."""

    def compare(got: Any) -> str | None:
        want = meaning(op, args)
        if op.keeps:
            off = _worst((got[0].double() - want) / (2**-8 * want.abs() + NOISE))
            if off > 1:
                return f"y is off by {off:.3g} of what it may be"
        return wrong_triple(got[-3:], want)

    return args, compare


def _quantize(M: int, N: int, K: int, device: str, small: bool) -> Cases:
    def plain() -> Args:
        return (_rows(M, K, device),)

    yield f"{M} x {K}", lambda: _quantizer(quantize, plain())
    for act in ACTIVATIONS if small else ("gelu", "gelu_tanh"):

        def activation(act: str = act) -> tuple[Args, Compare]:
            return _quantizer(quantize, (*plain(), None, act))

        yield f"{M} x {K} {act}", activation

    def gated() -> tuple[Args, Compare]:
        gate, up = _rows(M, 2 * K, device).clamp(-4, 4).split(K, -1)
        return _quantizer(quantize, (gate, up, "silu"))

    yield f"{M} x {K} silu, gated", gated


def _norm_quantize(M: int, N: int, K: int, device: str, small: bool) -> Cases:
    for rms in (False, True):

        def make(rms: bool = rms) -> tuple[Args, Compare]:
            return _quantizer(norm_quantize, (*_norm_args(M, K, device, rms), 1e-6, rms))

        yield f"{M} x {K} rms={rms}", make


def _norm_quantize_keep(M: int, N: int, K: int, device: str, small: bool) -> Cases:
    def make() -> tuple[Args, Compare]:
        args = (*_norm_args(M, K, device, False), 1e-6, False, DTYPE)
        return _quantizer(norm_quantize_keep, args)

    if small or K < N:
        yield f"{M} x {K}", make


def _norm_args(M: int, K: int, device: str, rms: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    gamma = 1 + 0.2 * torch.randn(K, device=device)
    beta = None if rms else 0.2 * torch.randn(K, device=device).to(DTYPE)
    return _rows(M, K, device), gamma.to(DTYPE), beta


def _quantize_weight(M: int, N: int, K: int, device: str, small: bool) -> Cases:
    def make() -> tuple[Args, Compare]:
        w = _rows(N, K, device)

        def compare(got: Any) -> str | None:
            wq, w_scale, w_sum = (t.double() for t in got)
            want = w.double().abs().amax(-1) / 127
            off = {
                "w_scale": _worst((w_scale - want) / (1e-6 * want)),
                "wq": _worst((wq * w_scale[:, None] - w.double()) / (STEP * w_scale[:, None])),
                "w_sum": _worst((w_sum - w_scale * wq.sum(-1)) / (1e-6 * w_scale * 127 * K)),
            }
            wrong = [f"{n} is off by {a:.3g} of what it may be" for n, a in off.items() if a > 1]
            return "; ".join(wrong) or None

        return (w,), compare

    yield f"{N} x {K}", make


def linear_args(
    M: int, N: int, K: int, device: str, *, bias: bool = True, residual: bool = False
) -> Args:
    """Random arguments of int8_linear, all but dtype, in the layouts that our quantizers write."""
    xq, x_scale, x_shift = OPS["quantize"].reference(torch.randn(M, K, device=device))
    wq, w_scale, w_sum = OPS["quantize_weight"].reference(torch.randn(N, K, device=device) / K**0.5)
    b = torch.randn(N, device=device).to(DTYPE) if bias else None
    r = torch.randn(M, N, device=device).to(DTYPE) if residual else None
    return xq, x_scale, x_shift, wq, w_scale, w_sum, b, r


def _int8_linear(M: int, N: int, K: int, device: str, small: bool) -> Cases:
    for bias, residual in ((True, False), (True, True), *([(False, False)] if small else [])):

        def make(bias: bool = bias, residual: bool = residual) -> tuple[Args, Compare]:
            args = (*linear_args(M, N, K, device, bias=bias, residual=residual), DTYPE)

            def compare(got: Tensor) -> str | None:
                want, size = meaning(int8_linear, args), size_of_terms(*args)
                off = _worst((got.double() - want) / (2**-8 * want.abs() + 1e-5 * size))
                return f"y is off by {off:.3g} of what it may be" if off > 1 else None

            return args, compare

        yield f"{M} x {N} x {K} bias={bias} residual={residual}", make


def _attention(M: int, N: int, K: int, device: str, small: bool) -> Cases:
    """M tokens of two heads, as views of one result, in every tile, and with masks."""
    tokens = min(M, 577)
    plain = [(t, D, ()) for t in TILES for D in (64, 72) if TILES[t].refuses(D) is None]
    forms: tuple[tuple[Any, ...], ...] = ((), (True,), (True, False, 9), (False, True))
    for tile, width, form in (*plain, *((MASKED, 64, form) for form in forms)):

        def make(tile: str = tile, width: int = width, form: Any = form) -> tuple[Args, Compare]:
            qkv = torch.randn(3, 1, tokens, 2, width, device=device).to(DTYPE).transpose(2, 3)
            keys = torch.rand(1, tokens, device=device) < 0.5
            masks = (keys if form[0] else None, *form[1:]) if form else ()
            args = (*qkv, width**-0.5, tile, *masks)

            def compare(got: Tensor) -> str | None:  # probabilities are rounded to bfloat16
                want = meaning(attention, args)
                off = _worst((got.double() - want) / (2**-7 * (want.abs() + 1)))
                return f"y is off by {off:.3g} of what it may be" if off > 1 else None

            return args, compare

        if small or K < N:
            yield f"{tokens} x {width} {tile} {form}", make


def _pack_weight(M: int, N: int, K: int, device: str, small: bool) -> Cases:
    """Another order of the same values, and their sums."""

    def make() -> tuple[Args, Compare]:
        wq = OPS["quantize_weight"].reference(torch.randn(N, K, device=device))[0]

        def compare(got: Tensor) -> str | None:
            sums = got[:, -SUMS:].contiguous().view(torch.int32).flatten()[:N]
            wrong = [] if torch.equal(unpacked(got, N, K), wq) else ["wq is off"]
            wrong += (
                [] if torch.equal(sums, wq.sum(-1, dtype=torch.int32)) else ["the sums are off"]
            )
            return "; ".join(wrong) or None

        return (wq,), compare

    yield f"{N} x {K}", make


def _token_index(M: int, N: int, K: int, device: str, small: bool) -> Cases:
    """Tokens in order, each where `slot` says that it is."""

    def make() -> tuple[Args, Compare]:
        valid = torch.rand(M, N, device=device) < 0.5

        def compare(got: Any) -> str | None:
            index, slot, position, cu_seqlens, tiles, count = (t.cpu() for t in got)
            want = valid.cpu().flatten().nonzero().squeeze(1)
            lengths = valid.cpu().sum(1)
            index, position = index[: len(want)], position[: len(want)]  # then rows of pads
            found = {
                "index": torch.equal(index, want),
                "slot": torch.equal(slot[want], torch.arange(len(want))),
                "position": torch.equal(position, (want % N).int()),
                "cu_seqlens": torch.equal(cu_seqlens.diff(), lengths.int()),
                "count": int(count) == len(want) == int(cu_seqlens[-1]),
                "tiles": int((tiles[:, 0] >= 0).sum()) == int(((lengths + 63) // 64).sum()),
            }
            return ", ".join(f"{n} is off" for n, right in found.items() if not right) or None

        return (valid,), compare

    yield f"{M} x {N}", make


def _varlen_attention(M: int, N: int, K: int, device: str, small: bool) -> Cases:
    """Two sequences of M tokens at most, two heads, as views of one result."""
    S = min(M, 577)
    valid = torch.arange(S, device=device) < torch.tensor([[S], [S // 2 + 1]], device=device)
    _, _, position, cu_seqlens, tiles, _ = OPS["token_index"].reference(valid)
    for width, causal, window in ((64, False, None), (72, True, S // 3)):

        def make(
            width: int = width, causal: bool = causal, window: int | None = window
        ) -> tuple[Args, Compare]:
            qkv = torch.randn(3, 1, len(position), 2, width, device=device).to(DTYPE)
            where = cu_seqlens, position, tiles
            args = (*qkv.transpose(2, 3), *where, width**-0.5, S, causal, window)

            def compare(got: Tensor) -> str | None:  # probabilities are rounded to bfloat16
                want = meaning(varlen_attention, args)
                off = _worst((got.double() - want) / (2**-7 * (want.abs() + 1)))
                return f"y is off by {off:.3g} of what it may be" if off > 1 else None

            return args, compare

        if small or K < N:
            yield f"{S} x {width} causal={causal} window={window}", make


CASES: dict[str, Callable[[int, int, int, str, bool], Cases]] = {
    "quantize": _quantize,
    "quantize_weight": _quantize_weight,
    "norm_quantize": _norm_quantize,
    "norm_quantize_keep": _norm_quantize_keep,
    "pack_weight": _pack_weight,
    "int8_linear": _int8_linear,
    "attention": _attention,
    "token_index": _token_index,
    "varlen_attention": _varlen_attention,
}
