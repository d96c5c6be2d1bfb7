"""What (xq, x_scale, x_shift) must mean, and helpers to run every implementation of an op."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from graphquant.ops import cpu, define
from graphquant.ops.define import Kernel, Op, load_cpu_kernels, load_kernels
from graphquant.ops.numerics import MIN_ABSMAX, padded, with_pads
from graphquant.ops.qparams import DYNAMIC, QParams
from graphquant.ops.runtime import nvrtc
from tests.ops.qparams import meant

U = 2.0**-24  # float32 rounds to nearest with a relative error of at most U
HALF = 0.5 + 127 * 5 * U  # of a step: how far x may be from what it was quantized to (assert_means)

load_kernels()
load_cpu_kernels()

needs_nvrtc = pytest.mark.skipif(
    nvrtc.missing() is not None, reason="NVRTC is not installed: pip install nvidia-cuda-nvrtc"
)


def runnable(op: Op) -> list[Kernel]:
    """Triton's kernels run in its interpreter too; those in hopper.cu need a Hopper GPU, and the
    CPU kernel, one for each instruction set, is for tensors on the CPU."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    on_cpu = os.environ.get("TRITON_INTERPRET") == "1" and op.cpu_kernels
    native = [_native(op, isa) for isa in cpu.INSTRUCTION_SETS] if on_cpu else []
    return [k for k in op.kernels if not k.name.startswith("hopper") or hopper] + native


def _native(op: Op, isa: cpu.InstructionSet) -> Kernel:
    def fn(*args: Any) -> Any:
        with compiled_for(isa):
            assert op.on_cpu(*args) is not None
            return op(*args)

    lacks = f"NOT RUN: this processor lacks {', '.join(isa.missing)}" if isa.missing else None
    return Kernel(f"cpu-{isa.name}", fn, lambda *_: lacks)


@contextlib.contextmanager
def compiled_for(isa: cpu.InstructionSet) -> Iterator[None]:
    """The CPU kernels are those of this instruction set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(define, "cpu_function", partial(getattr, _module(isa)))
        yield


@functools.cache
def _module(isa: cpu.InstructionSet) -> Any:
    return cpu.build(isa)


def _case(op: Op, kernel: Kernel) -> Any:
    is_native = kernel.name.startswith("cpu-")
    why = kernel.refuses() if is_native else None
    marks = [pytest.mark.skip(reason=why)] if why else []
    return pytest.param(op, kernel, id=f"{op.name}-{kernel.name}", marks=marks)


def implementations(*ops: Op) -> pytest.MarkDecorator:
    """Parametrize over (op, kernel): each op's reference, wrapped as a kernel, and its kernels."""
    cases = [
        _case(op, kernel)
        for op in ops
        for kernel in (Kernel("reference", op.reference, lambda *_: None), *runnable(op))
    ]
    return pytest.mark.parametrize(("op", "kernel"), cases)


def kernels(*ops: Op, named: str | tuple[str, ...] = "") -> pytest.MarkDecorator:
    """Parametrize over (op, kernel) of the kernels alone, or of those whose names begin so."""
    cases = [_case(op, k) for op in ops for k in runnable(op) if k.name.startswith(named)]
    return pytest.mark.parametrize(("op", "kernel"), cases)


def to_cpu(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.cpu() if isinstance(a, Tensor) else a for a in args)


def assert_rows(q: Tensor, shape: torch.Size) -> None:
    """int8 [..., K] in [-127, 127], rows padded(K) bytes apart, all of them in the storage."""
    assert q.dtype == torch.int8 and q.shape == shape
    wide = torch.empty((*shape[:-1], padded(shape[-1])), device="meta")
    assert q.stride() == wide.stride()
    assert q.untyped_storage().nbytes() >= q.storage_offset() + wide.numel()
    if q.numel():
        assert int(q.to(torch.int32).abs().max()) <= 127


def assert_layout(xq: Tensor, x_scale: Tensor, x_shift: Tensor, shape: torch.Size) -> None:
    """Dtypes, shapes and strides of a quantizer's result. What its pads hold is not specified."""
    assert_rows(xq, shape)
    for column in (x_scale, x_shift):
        assert column.dtype == torch.float32 and column.shape == (*shape[:-1], 1)
        assert column.is_contiguous()


def assert_means(
    xq: Tensor,
    x_scale: Tensor,
    x_shift: Tensor,
    y: Tensor,
    noise: Tensor | float = 0.0,
    qparams: QParams = DYNAMIC,
) -> None:
    """The triple stands for y [..., K] float64, of which the op saw v = y + e with |e| <= noise.

    With qparams, y is `meant` of the y that is given.

    low <= 0 <= high are the ends of y's range with zero in it, N is the row's largest noise. Halves
    are exact (but for the last bit of a denormal: TINY), every other operation is off by U:

        x_shift = fl(h/2 + l/2)     is off by N + U |(high + low) / 2|                     (1)
        absmax  = fl(h/2 - l/2)     is off by N + U (high - low) / 2
        x_scale = fl(absmax / 127)  is off by N / 127 + 2 U x_scale                        (2)

    and since |high + low| <= high - low, zero stays inside: |x_shift| <= 127 x_scale (1 + 4 U)  (3)

    What cancels in v - x_shift: v and x_shift are float32, so their difference is rounded relative
    to itself, by U |v - x_shift|; and (1) drops out, because the float32 that is subtracted is the
    one that is added again. What cancellation does leave is e: it is relative to |v|, which may be
    127 times two steps, and not to |v - x_shift|. It is in `noise`, as it stands. Steps are
    fl(fl(v - x_shift) * fl(127 / absmax)), three roundings, to an integer, times x_scale, one more:

        |v - (xq x_scale + x_shift)|  <=  x_scale / 2 + 4 U |v - x_shift|
                                      <=  x_scale (1 / 2 + 127 * 4 U (1 + 3 U))            (4)

    for |v - x_shift| <= absmax (1 + 2 U). HALF has 5 U, for U squared. 127 * 5 U is 3.8e-5.

    A static range [low, high] has no noise, and zero may be outside: with m = (low + high) / 2,

        x_shift is off by U |m|
        absmax  = fl(max(high - x_shift, x_shift - low)) is off by U |m|, and by U of itself    (2')

    and no v in the range is further from x_shift than absmax, as rounding is monotonous: (4) holds.
    Rows that are not finite have a scale that is not finite, and zeros: they dequantize to nan.
    """
    assert_layout(xq, x_scale, x_shift, y.shape)
    TINY = 2.0**-149
    xq, s, c, y = xq.cpu().double(), x_scale.cpu().double(), x_shift.cpu().double(), y.cpu()
    y, noise = meant(y, torch.as_tensor(noise, dtype=torch.float64).expand_as(y), qparams)
    finite = y.isfinite().all(-1, keepdim=True)
    assert (s.isfinite() == finite).all()
    assert ((xq == 0) | finite).all()
    assert ((xq * s + c).isnan() | finite).all()
    assert (~finite | ((y - (xq * s + c)).abs() <= s * HALF + noise)).all()  # (4)
    _, low, high, *_ = qparams
    if low is not None and high is not None:
        middle, want = (low + high) / 2, max((high - low) / 2, MIN_ABSMAX) / 127
        assert ((c - middle).abs() <= U * abs(middle) + TINY).all()  # (1)
        assert ((s - want).abs() <= U * (2 * abs(middle) / 127 + 3 * want)).all()  # (2')
        return
    assert (~finite | (c.abs() <= 127 * s * (1 + 4 * U))).all()  # (3)
    N = noise.amax(-1, keepdim=True) * (1 + 4 * U)
    high = y.amax(-1, keepdim=True).clamp(min=0.0)
    low = y.amin(-1, keepdim=True).clamp(max=0.0)
    middle = (high + low) / 2
    assert (~finite | ((c - middle).abs() <= N + 2 * U * middle.abs() + TINY)).all()  # (1)
    want = ((high - low) / 2).clamp(min=MIN_ABSMAX) / 127
    assert (~finite | ((s - want).abs() <= N / 127 + 3 * U * want)).all()  # (2)


def assert_within_a_step(triple: Any, reference: Any, noise: Tensor | float = 0.0) -> None:
    """Two triples for one value: each is within half a step of what it saw, so they are within a
    step of each other. Both saw the value with noise."""
    (xq, s, c), (rq, rs, rc) = ([t.cpu().double() for t in p] for p in (triple, reference))
    finite = s.isfinite() & rs.isfinite()
    assert (s.isfinite() == rs.isfinite()).all()
    apart = ((xq * s + c) - (rq * rs + rc)).abs()
    assert (~finite | (apart <= (s + rs) * HALF + 2 * noise)).all()
    assert ((xq == 0) & (rq == 0) | finite).all()
    assert (apart.isnan() | finite).all()


def assert_weight(
    wq: Tensor, w_scale: Tensor, w_sum: Tensor, w: Tensor, absmax: Tensor | None = None
) -> None:
    """The triple stands for w [N, K], which the op saw exactly, clamped to absmax [N] if given.

    absmax is exact (its floor is off by U), steps are fl(w * fl(127 / absmax)): two roundings, and
    one of w_scale = fl(absmax / 127), so |w - wq w_scale| <= w_scale (1 / 2 + 127 * 3 U (1 + 2 U)).
    w_sum is one product of two float32: |sum wq| <= 127 K < 2^24 up to K = 132_104. (For weights
    near 3e38 it is inf, as their sum is.)
    """
    assert_rows(wq, w.shape)
    for vector in (w_scale, w_sum):
        assert vector.dtype == torch.float32 and vector.shape == w.shape[:1]
        assert vector.is_contiguous()
    if w.numel():
        assert not with_pads(wq)[..., w.shape[-1] :].any()
    wq, w_scale, w_sum, w = wq.cpu(), w_scale.cpu(), w_sum.cpu(), w.cpu().double()
    finite, s = w.isfinite().all(-1), w_scale.double()
    assert (w_scale.isfinite() == finite).all()
    assert not wq[~finite].any() and w_sum[~finite].isnan().all()
    absmax = w.abs().amax(-1).clamp(min=MIN_ABSMAX) if absmax is None else absmax.cpu().double()
    error = (w.clamp(-absmax[:, None], absmax[:, None]) - wq.double() * s[:, None]).abs()[finite]
    assert (error <= s[finite, None] * (0.5 + 127 * 4 * U)).all()
    want = absmax / 127
    assert ((s - want).abs() <= 3 * U * want)[finite].all()
    total = wq.long().sum(-1)
    assert w.shape[1] <= 132_104
    assert torch.equal(w_sum[finite], (total.double() * s).float()[finite])  # 24 + 24 bits: exact
