"""Single ops: int8_linear beside other GEMMs, quantizers beside a copy of the same bytes.

Inputs, weights and results rotate through more memory than the last cache holds, inside CUDA
graphs, so that neither a warm cache nor the host counts. The implementations of one shape take
turns, and each is compared with float64 on some rows before it is timed.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphquant import ops as gq
from graphquant.ops.define import Op
from tests.ops.float64_checks import linear_args, meaning, relative_error, steps_off
from tools.bench.encoders import Limit
from tools.bench.models import Model
from tools.bench.records import LATE, OpTime, reason, short
from tools.bench.timing import Call, Timer, host_us, interleaved

BEYOND = 3  # times the last cache: the memory that rotates
MOST_SETS = 128
ROWS = 64  # compared with float64
DTYPE = torch.bfloat16
MAX_ERROR = 0.01  # relative, of a linear: bfloat16 rounds to 0.002, and never is 0.01 rounding
MAX_FP8 = 0.03  # of fp8's own product: Hopper's fast accumulation keeps 14 bits
MAX_STEPS = 0.52  # of a quantizer: half a step, and the float32 noise on it
EPS = 1e-6
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


@dataclass(frozen=True)
class Group:
    """Implementations of one op at one shape, to be timed in turns.

    make   one set of inputs, random; the sets rotate
    bytes  that a call reads and writes, at least
    """

    op: str
    M: int
    N: int
    K: int
    detail: str
    bytes: int
    make: Callable[[str], Any]
    calls: tuple[Implementation, ...]


@dataclass(frozen=True)
class Implementation:
    """variant and detail as in OpTime. error: of a result for one set of inputs."""

    variant: str
    run: Callable[[Any], Any]
    error: Callable[[Any, Any], float]
    most: float
    detail: str = ""


def groups(model: Model, batch: int) -> Iterator[Group]:
    """The linears and quantizers of one layer."""
    M, H, F_ = batch * model.tokens, model.hidden, model.mlp
    for N, K in ((3 * H, H), (H, H), (F_, H), (H, F_)):
        yield _linear(M, N, K, residual=N == H)
    yield _rows(gq.quantize, M, H, "", _plain)
    for rms in (False, True):
        yield _norm(M, H, rms)
    for act in ("gelu", "gelu_tanh"):
        yield _act(M, F_, act)
    yield _glu(M, F_)


def measure(group: Group, timer: Timer, *, seconds: float) -> list[OpTime]:
    """One record for each implementation. One that fails, or is wrong, says so and is not timed."""
    facts: dict[tuple[str, str], dict[str, Any]] = {}
    calls: dict[tuple[str, str], Call] = {}
    torch.manual_seed(0)
    count = sets(group.bytes, timer.cache_bytes)
    with torch.inference_mode():
        inputs = [group.make(timer.device) for _ in range(count)]
        for one in group.calls:
            key = one.variant, one.detail
            try:
                facts[key] = _right(one, inputs[0])
                if "failed" not in facts[key]:
                    bound = [lambda i=i, f=one.run: f(i) for i in inputs]
                    facts[key]["host_us"] = short(host_us(timer, bound[0]))
                    calls[key] = timer.sequence(bound)
            except Exception as error:  # noqa: BLE001 - recorded
                facts[key] = {"failed": reason(error)}
        named = {f"{v}\n{d}": call for (v, d), call in calls.items()}
        times = interleaved(timer, named, seconds)
    for name, samples in times.items():
        variant, _, detail = name.partition("\n")
        if isinstance(samples, Exception):
            facts[variant, detail] = {"failed": reason(samples)}
        else:
            ms = statistics.median(s.ms for s in samples)
            facts[variant, detail]["us"] = short(1000 * ms / count)
    return [
        OpTime(
            group.op,
            group.M,
            group.N,
            group.K,
            v,
            detail=d or group.detail,
            bytes=group.bytes,
            **f,
        )
        for (v, d), f in facts.items()
    ]


def sets(size: int, cache: int) -> int:
    """How many sets of `size` bytes rotate: BEYOND times the cache, at least two."""
    return max(2, min(MOST_SETS, -(-BEYOND * cache // size)))


def run(
    models: Sequence[Model],
    batches: Sequence[int],
    timer: Timer,
    *,
    seconds: float,
    limit: Limit,
    done: Callable[[list[OpTime]], None],
) -> None:
    """Every shape of these models once; `done` after each."""
    seen = set()
    for model in models:
        for batch in batches:
            for group in groups(model, batch):
                shape = group.op, group.M, group.N, group.K, group.detail
                if shape in seen:
                    continue
                seen.add(shape)
                if limit.passed:
                    print(f"{shape} {LATE}", file=sys.stderr)
                    continue
                done(measure(group, timer, seconds=seconds))
                timer.forget()  # graphs and their memory


def _right(one: Implementation, inputs: Any) -> dict[str, Any]:
    error = one.error(inputs, one.run(inputs))
    if not error <= one.most:  # nan is wrong too
        return {"failed": f"wrong: off by {error:.3g}, may be {one.most:g}"}
    return {"error": short(error)}


def _sample(M: int, device: torch.device) -> Tensor:
    """Some rows, the last one among them."""
    return torch.linspace(0, M - 1, min(M, ROWS), device=device).round().long()


# --- GEMMs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Gemm:
    """One x and w in every form that an implementation wants."""

    int8: tuple[Any, ...]  # int8_linear's arguments but dtype
    x: Tensor
    w: Tensor
    x8: Tensor
    x8_scale: Tensor
    w8: Tensor
    w8_scale: Tensor


def _gemm(M: int, N: int, K: int, device: str, residual: bool) -> _Gemm:
    args = linear_args(M, N, K, device, residual=residual)
    xq, x_scale, x_shift, wq, w_scale, *_ = args
    x = (xq * x_scale + x_shift).to(DTYPE)
    w = (wq * w_scale[:, None]).to(DTYPE)
    return _Gemm(args, x, w, *_fp8(x), *_fp8(w))


def _fp8(t: Tensor) -> tuple[Tensor, Tensor]:
    scale = t.float().abs().amax(-1, keepdim=True) / FP8_MAX
    return (t.float() / scale).to(FP8), scale


def _linear(M: int, N: int, K: int, *, residual: bool) -> Group:
    def ours(with_residual: bool) -> Implementation:
        def arguments(i: _Gemm) -> tuple[Any, ...]:
            return i.int8 if with_residual else (*i.int8[:-1], None)

        def error(i: _Gemm, y: Tensor) -> float:
            at = _sample(M, y.device)
            xq, x_scale, x_shift, *weights, bias, r = arguments(i)
            rows = (xq[at], x_scale[at], x_shift[at], *weights, bias, None if r is None else r[at])
            return relative_error(y[at], meaning(gq.int8_linear, (*rows, DTYPE)))

        detail = "bias + residual" if with_residual else "bias"
        return Implementation(
            "graphquant", lambda i: gq.int8_linear(*arguments(i), DTYPE), error, MAX_ERROR, detail
        )

    def float_error(x: Callable[[_Gemm], Tensor], w: Callable[[_Gemm], Tensor]) -> Any:
        def error(i: _Gemm, y: Tensor) -> float:
            at = _sample(M, y.device)
            want = x(i)[at].double() @ w(i).double().T + i.int8[6].double()
            return relative_error(y[at], want)

        return error

    def exact(i: _Gemm, y: Tensor) -> float:
        at = _sample(M, y.device)
        return relative_error(y[at], i.int8[0][at].double() @ i.int8[3].double().T)

    def scaled(i: _Gemm) -> Tensor:
        scales = i.x8_scale, i.w8_scale.T
        return torch._scaled_mm(
            i.x8, i.w8.T, *scales, bias=i.int8[6], out_dtype=DTYPE, use_fast_accum=True
        )

    calls = (
        ours(False),
        *((ours(True),) if residual else ()),
        Implementation(
            "bf16 F.linear",
            lambda i: F.linear(i.x, i.w, i.int8[6]),
            float_error(lambda i: i.x, lambda i: i.w),
            MAX_ERROR,
            "bias",
        ),
        Implementation(
            "torch._int_mm", lambda i: torch._int_mm(i.int8[0], i.int8[3].T), exact, 0.0, "int32"
        ),
        Implementation(
            "torch._scaled_mm fp8",
            scaled,
            float_error(lambda i: i.x8.double() * i.x8_scale, lambda i: i.w8.double() * i.w8_scale),
            MAX_FP8,
            "bias",
        ),
    )
    size = M * K + N * K + 2 * M * N  # of the one that moves least
    return Group("int8_linear", M, N, K, "", size, lambda d: _gemm(M, N, K, d, residual), calls)


# --- quantizers ---------------------------------------------------------------------------------


def _rows(
    op: Op,
    M: int,
    K: int,
    detail: str,
    make: Callable[[int, int, str], Any],
    reads: int = 1,
) -> Group:
    """make: the op's arguments. reads: of [M, K] bfloat16."""

    def error(inputs: Any, got: Any) -> float:
        x, *rest = inputs
        at = _sample(M, x.device)
        sampled = [t[at] if isinstance(t, Tensor) and t.dim() == 2 else t for t in (x, *rest)]
        return steps_off(tuple(t[at] for t in got[-3:]), meaning(op, tuple(sampled)))

    size = M * (2 * K * reads + K + 8)  # bfloat16 in; int8, scale and shift out

    def both(device: str) -> tuple[tuple[Any, ...], Tensor]:
        return make(M, K, device), _bytes(size // 2, device)

    calls = (
        Implementation("graphquant", lambda i: op(*i[0]), lambda i, y: error(i[0], y), MAX_STEPS),
        Implementation("copy", lambda i: ~i[1], lambda i, y: float(not torch.equal(~y, i[1])), 0.0),
    )
    return Group(op.name, M, 0, K, detail, size, both, calls)


def _bytes(count: int, device: str) -> Tensor:
    """In words, to be inverted by torch's kernel: the driver's copy inside a CUDA graph reached 2.6
    TB/s on an H200, less than any of our kernels."""
    return torch.randint(-(2**31), 2**31, (count // 4,), device=device, dtype=torch.int32)


def _plain(M: int, K: int, device: str) -> tuple[Tensor]:
    return (torch.randn(M, K, device=device).to(DTYPE),)


def _norm(M: int, K: int, rms: bool) -> Group:
    def make(M: int, K: int, device: str) -> tuple[Any, ...]:
        gamma = (1 + 0.2 * torch.randn(K, device=device)).to(DTYPE)
        beta = None if rms else (0.2 * torch.randn(K, device=device)).to(DTYPE)
        return *_plain(M, K, device), gamma, beta, EPS, rms

    return _rows(gq.norm_quantize, M, K, "rms" if rms else "layer", make)


def _act(M: int, K: int, act: str) -> Group:
    def make(M: int, K: int, device: str) -> tuple[Any, ...]:
        return *_plain(M, K, device), None, act

    return _rows(gq.quantize, M, K, act, make)


def _glu(M: int, K: int) -> Group:
    """Gate and up are the halves of one result, as a stacked linear gives them."""

    def make(M: int, K: int, device: str) -> tuple[Any, ...]:
        gate, up = torch.randn(M, 2 * K, device=device).to(DTYPE).split(K, -1)
        return gate, up, "silu"

    return _rows(gq.quantize, M, K, "silu, gated", make, reads=2)
