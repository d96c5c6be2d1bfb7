"""int8_linear: exact sums, an epilogue within float32's rounding, any M, N, K and strides; and what
quantized operands cost, end to end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from graphquant.ops import int8_linear, quantize, quantize_weight
from graphquant.ops.define import Kernel, Op
from graphquant.ops.int8_linear import hopper, tiles, triton_tma
from graphquant.ops.numerics import empty_rows, quantize_symmetric, with_pads
from graphquant.ops.runtime.device import GpuProperties
from tests.ops.bounds import HALF, U, implementations, kernels
from tests.strategies import FINITE, FLOATS, Rows, rows


@dataclass(frozen=True)
class Linear:
    lead: tuple[int, ...]
    K: int
    N: int
    dtype: torch.dtype = torch.float32
    bias: torch.dtype | None = None
    residual: torch.dtype | None = None
    residual_layout: str = "contiguous"
    rows: str = "padded"  # of xq: padded, packed (stride K), swapped
    mean: float = 0.0  # of x: its shift, in units of its standard deviation
    seed: int = 0

    def on(self, device: str) -> tuple[Any, ...]:
        g = torch.Generator().manual_seed(self.seed)
        x = torch.randn(*self.lead, self.K, generator=g) + self.mean
        xq, x_scale, x_shift = quantize.reference(x)
        wq, *w = quantize_weight.reference(torch.randn(self.N, self.K, generator=g))
        bias = None if self.bias is None else torch.randn(self.N, generator=g).to(self.bias)
        residual = None
        if self.residual is not None:
            residual = torch.randn(*self.lead, self.N + 3, generator=g).to(self.residual)
            residual = residual[..., 3:]
            if self.residual_layout == "contiguous":
                # one row is contiguous with any stride, so .contiguous() would keep that
                residual = residual.clone(memory_format=torch.contiguous_format)
            elif self.residual_layout == "every other":
                residual = residual.repeat_interleave(2, -1).to(device)[..., ::2]
        if self.residual_layout != "every other" and residual is not None:
            residual = _moved(residual, device)
        return (
            self._laid_out(xq, device),
            x_scale.to(device),
            x_shift.to(device),
            _padded(wq, device),
            *(t.to(device) for t in w),
            None if bias is None else bias.to(device),
            residual,
            self.dtype,
        )

    def _laid_out(self, xq: Tensor, device: str) -> Tensor:
        if self.rows == "packed":
            return xq.contiguous().to(device)
        if self.rows == "swapped" and len(self.lead) > 1:
            return xq.transpose(0, 1).contiguous().to(device).transpose(0, 1)
        return _padded(xq, device)


def _moved(x: Tensor, device: str) -> Tensor:
    """x on `device` with its strides."""
    y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return y.copy_(x)


def _padded(q: Tensor, device: str) -> Tensor:
    moved = empty_rows(torch.empty(0, device=device), q.shape)
    with_pads(moved)[..., q.shape[-1] :] = 0
    return moved.copy_(q)


optional = st.none() | st.sampled_from(FLOATS)
linears = st.builds(
    Linear,
    lead=st.sampled_from([(), (1,), (0,), (2, 3), (4, 0)]) | st.tuples(st.integers(1, 150)),
    K=st.integers(1, 300) | st.sampled_from([16, 128, 256, 1040]),
    N=st.integers(1, 150) | st.sampled_from([8, 64, 128]),
    dtype=st.sampled_from(FLOATS),
    bias=optional,
    residual=optional,
    residual_layout=st.sampled_from(["contiguous", "slice", "every other"]),
    rows=st.sampled_from(["padded", "packed", "swapped"]),
    mean=st.sampled_from([0.0, 3.0, -100.0]),
    seed=st.integers(0, 99),
)


def _assert_right(y: Tensor, args: tuple[Any, ...]) -> None:
    """y against float64.

    float(acc), its two products and the three sums after them in float32, each within U of what it
    saw, make 6 U for acc, and less for what joins later: 8 U of the magnitudes that went in. Then
    one rounding to dtype, of at most eps |y| (half of it on the GPU; Triton's interpreter cuts to
    bfloat16), or its smallest number where that is denormal.
    """
    want, seen = _float64(args)
    dtype = args[-1]
    assert y.dtype == dtype and y.shape == want.shape and y.is_contiguous()
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    error = (y.cpu().double() - want).abs()
    assert (error <= 8 * U * seen + eps * want.abs() + tiny).all()


def _float64(args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """(y, the sum of its terms' magnitudes) by the op's definition."""
    q, (bias, residual) = [t.cpu().double() for t in args[:6]], args[6:8]
    xq, x_scale, x_shift, wq, w_scale, w_sum = q
    terms = [xq @ wq.T * x_scale * w_scale, x_shift * w_sum]  # exact sums
    terms += [t.cpu().double().expand_as(terms[0]) for t in (bias, residual) if t is not None]
    return sum(terms[1:], terms[0]), sum((t.abs() for t in terms[1:]), terms[0].abs())


def _columns(N: int) -> int:
    """The next number that makes rows of any dtype a multiple of 16 bytes."""
    return -(-N // 16) * 16


def _taken(linear: Linear, kernel: Kernel, device: str) -> tuple[Any, ...]:
    """Arguments that the kernel takes: if not these, then with more columns, for TMA to write."""
    args = linear.on(device)
    if kernel.refuses(*args) is not None:
        args = replace(linear, N=_columns(linear.N)).on(device)
    assume(kernel.refuses(*args) is None)
    return args


@implementations(int8_linear)
@given(linear=linears)
def test_result_is_the_float64_result_up_to_rounding(
    op: Op, kernel: Kernel, device: str, linear: Linear
) -> None:
    args = _taken(linear, kernel, device)
    _assert_right(kernel.fn(*args), args)


TILES = [("triton", t) for t in tiles.POINTER] + [
    ("triton_tma", t) for t in (*tiles.TMA, *tiles.TMA_FLOAT32)
]


@pytest.mark.parametrize(("name", "tile"), TILES, ids=str)
@pytest.mark.parametrize("K", [256, 300])
def test_every_tile_of_the_tables_gives_the_result(
    name: str, tile: tiles.Tile, K: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kernel,) = (k for k in int8_linear.kernels if k.name == name)
    args = Linear((300,), K, 136, torch.bfloat16, torch.float32, torch.bfloat16).on(device)
    if (why := kernel.refuses(*args)) is not None:
        pytest.skip(why)
    monkeypatch.setattr(tiles, "choose", lambda *_: tile)
    _assert_right(kernel.fn(*args), args)


@implementations(int8_linear)
@pytest.mark.parametrize("K", [1024, 1025, 4304])
def test_sums_are_exact_where_products_are_large(
    op: Op, kernel: Kernel, device: str, K: int
) -> None:
    """Partial sums pass 2^24, where float32 loses the last bit; the whole is small and keeps it."""
    g = torch.Generator().manual_seed(K)
    x, w = (torch.randint(120, 128, (n, K), generator=g, dtype=torch.int8) for n in (3, 5))
    w[:, K // 2 :] *= -1
    w[4] = 127  # and one that stays at the largest sum there is
    x[2] = 127
    one, zero = torch.ones(5, 1, device=device), torch.zeros(5, 1, device=device)
    args = (
        _padded(x, device), one[:3], zero[:3], _padded(w, device), one[:, 0], one[:, 0],
        None, None, torch.float32,
    )  # fmt: skip
    if (why := kernel.refuses(*args)) is not None:
        pytest.skip(why)
    want = x.long() @ w.long().T
    assert torch.equal(kernel.fn(*args).cpu(), want.float())


def test_cpu_sums_are_exact_under_autocast() -> None:
    args = Linear((7,), 300, 20).on("cpu")
    want = int8_linear(*args)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(int8_linear(*args), want)


@implementations(int8_linear)
@pytest.mark.parametrize("K", [1, 100, 140, 300])
@pytest.mark.parametrize("poison", [99, -128])
def test_what_the_pads_hold_does_not_matter(
    op: Op, kernel: Kernel, device: str, K: int, poison: int
) -> None:
    """Those of x are unspecified. Those of a weight are zeros, but nothing leans on it."""
    args = Linear((40,), K, 24, mean=3.0).on(device)
    want = kernel.fn(*args)
    for q in (args[0], args[3]):
        with_pads(q)[..., K:] = poison
    assert torch.equal(kernel.fn(*args), want)


@kernels(quantize)
@pytest.mark.parametrize("K", [1, 100, 140, 300])
def test_what_a_quantizer_leaves_in_the_pads_does_not_matter(
    op: Op, kernel: Kernel, device: str, K: int
) -> None:
    """Of one-sided rows a zero is the last step, so pads that were computed are full of it."""
    triple = kernel.fn(torch.rand(40, K, device=device) + 1)
    clean = _padded(triple[0], device), *triple[1:]  # zeros in the pads
    packed = quantize_weight(torch.randn(24, K, device=device))
    for linear in int8_linear.kernels:
        args = [(*x, *packed, None, None, torch.float32) for x in (triple, clean)]
        if linear.refuses(*args[0]) is None:
            assert torch.equal(linear.fn(*args[0]), linear.fn(*args[1]))


@implementations(int8_linear)
@pytest.mark.parametrize(
    "bad", [(torch.inf,), (-torch.inf,), (torch.nan,), (torch.inf, -torch.inf)]
)
def test_a_row_that_is_not_finite_leaves_the_others_alone(
    op: Op, kernel: Kernel, device: str, bad: tuple[float, ...]
) -> None:
    x, w = torch.randn(40, 96, device=device), torch.randn(24, 96, device=device)
    packed = quantize_weight(w)
    clean = kernel.fn(*quantize(x), *packed, None, None, torch.float32)
    x[7, 5 : 5 + len(bad)] = torch.tensor(bad, device=device)
    y = kernel.fn(*quantize(x), *packed, None, None, torch.float32)
    others = torch.arange(40, device=device) != 7
    assert torch.equal(y[others], clean[others])
    assert y[7].isnan().all()


@implementations(int8_linear)
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_channel_that_is_not_finite_leaves_the_others_alone(
    op: Op, kernel: Kernel, device: str, bad: float
) -> None:
    x, w = torch.randn(40, 96, device=device), torch.randn(24, 96, device=device)
    quantized = quantize(x)
    clean = kernel.fn(*quantized, *quantize_weight(w), None, None, torch.float32)
    w[7, 5] = bad
    y = kernel.fn(*quantized, *quantize_weight(w), None, None, torch.float32)
    others = torch.arange(24, device=device) != 7
    assert torch.equal(y[:, others], clean[:, others])
    assert y[:, 7].isnan().all()


@implementations(int8_linear)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_element_of_the_result_is_written(
    op: Op, kernel: Kernel, device: str, dtype: torch.dtype, poisoned: None
) -> None:
    for M, N in [(1, 1), (67, 131), (300, 136)]:
        args = _taken(Linear((M,), 100, N, dtype, dtype, dtype, mean=3.0), kernel, device)
        _assert_right(kernel.fn(*args), args)


@implementations(int8_linear)
@given(
    x=rows(max_exponent=12, contents=FINITE),
    w=st.builds(Rows, st.tuples(st.integers(1, 40)), st.just(1), st.sampled_from(FLOATS),
                st.sampled_from([0.02, 1.0]), st.sampled_from(FINITE), seed=st.integers(0, 99)),
    bias=optional,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_quantized_operands_cost_at_most_half_a_step_each(
    op: Op,
    kernel: Kernel,
    device: str,
    x: Rows,
    w: Rows,
    bias: torch.dtype | None,
    dtype: torch.dtype,
) -> None:
    """int8_linear(*quantize(x), *quantize_weight(w)) against x @ w.T in float64.

    With X and W for what the int8 operands stand for,  x w - X W = x (w - W) + (x - X) W,  so

        |x w - X W| <= sum_k |x| w_scale HALF + x_scale HALF |W|

    and X W is what int8_linear computes, up to its own 8 U of the terms' magnitudes, one U more for
    the rounding of w_sum, and the rounding to dtype (_assert_right).
    """
    xs = x.on(device)

    def with_weight(w: Rows) -> tuple[Tensor, tuple[Any, ...]]:
        ws = replace(w, K=x.K).on(device)
        b = None if bias is None else torch.linspace(-2, 2, w.lead[0], device=device).to(bias)
        return ws, (*quantize(xs), *quantize_weight(ws), b, None, dtype)

    ws, args = with_weight(w)
    if kernel.refuses(*args) is not None:
        ws, args = with_weight(replace(w, lead=(_columns(w.lead[0]),)))
    y, b = kernel.fn(*args), args[6]
    xs, ws = xs.cpu().double(), ws.cpu().double()
    want = xs @ ws.T + (0.0 if b is None else b.cpu().double())
    _, x_scale, _, wq, w_scale, _ = (t.cpu().double() for t in args[:6])
    of_w = xs.abs().sum(-1, keepdim=True) * w_scale * HALF
    of_x = x_scale * HALF * (wq.abs().sum(-1) * w_scale)
    steps = of_w + of_x
    finfo, seen = torch.finfo(dtype), _float64(args)[1]
    rounding = 9 * U * seen + finfo.eps * (want.abs() + steps + 9 * U * seen)
    assert ((y.cpu().double() - want).abs() <= steps + rounding + finfo.smallest_normal).all()


def _rms_errors(kernel: Kernel, x: Tensor, w: Tensor) -> tuple[float, float]:
    """Of int8_linear against x @ w.T in float64: with a shift, and with x symmetric."""
    packed, tail = quantize_weight(w), (None, None, torch.float32)
    shifted = kernel.fn(*quantize(x), *packed, *tail)
    xq, x_scale = (t.to(x.device) for t in quantize_symmetric(x.cpu()))
    symmetric = kernel.fn(_padded(xq, str(x.device)), x_scale, 0 * x_scale, *packed, *tail)
    want = x.double() @ w.double().T
    first, second = ((y - want).square().mean().sqrt().item() for y in (shifted, symmetric))
    return first, second


def _after_gelu(device: str, K: int = 400) -> Tensor:
    """gelu of a normal pre-activation with a few large channels, as a trained fc1 has them."""
    x = torch.randn(64, K, generator=torch.Generator().manual_seed(0))
    x[:, :: K // 8] *= 3
    return F.gelu(x).to(device)


@implementations(int8_linear)
def test_on_a_gelu_the_shift_wins_over_symmetric_steps(op: Op, kernel: Kernel, device: str) -> None:
    """Steps are 0.52 of the symmetric ones (gelu >= -0.17, a row's largest is near 5 here), the
    error of w is the same: together a factor > 1.5."""
    w = torch.randn(96, 400, generator=torch.Generator().manual_seed(1)).to(device)
    shifted, symmetric = _rms_errors(kernel, _after_gelu(device), w)
    assert symmetric > 1.5 * shifted


@implementations(int8_linear)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("one_sided", ["gelu", "relu", "uniform"])
def test_of_one_sided_rows_half_of_the_error_is_left(
    op: Op, kernel: Kernel, device: str, one_sided: str, sign: int
) -> None:
    """Weights that are int8 already (their largest is 127 steps) have no error of their own."""
    g = torch.Generator().manual_seed(2)
    w = torch.randint(-127, 128, (96, 400), generator=g)
    w[:, 0] = 127
    x = _after_gelu("cpu")
    if one_sided == "relu":
        x = x.relu()
    elif one_sided == "uniform":
        x = torch.rand(x.shape, generator=g)
    shifted, symmetric = _rms_errors(kernel, sign * x.to(device), w.to(device) * 2.0**-7)
    assert symmetric > 1.8 * shifted


def _kernel(name: str) -> Kernel:
    (kernel,) = (k for k in int8_linear.kernels if k.name == name)
    return kernel


def _refusal(*args: Any) -> str:
    why = _kernel("triton_tma").refuses(*args)
    assert why is not None
    return why


def test_tma_refuses_what_it_cannot_read_and_says_why(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_tma, "gpu_properties", lambda _: GPUS["H200"])
    padded = Linear((5,), 100, 24).on(device)
    assert _kernel("triton_tma").refuses(*padded) is None
    packed = Linear((5,), 100, 24, rows="packed").on(device)
    assert "xq has rows 100 bytes apart, TMA needs a multiple of 16" in _refusal(*packed)
    swapped = Linear((2, 3), 96, 24, rows="swapped").on(device)
    assert "xq with strides (96, 192, 1) is not rows of consecutive bytes" in _refusal(*swapped)
    wide = torch.zeros(5, 128, dtype=torch.int8, device=device)
    column = padded[1]
    shifted = (
        wide[:, 3:99], column, column, wide[:, 3:99], column[:, 0], column[:, 0],
        None, None, torch.float32,
    )  # fmt: skip
    assert "xq starts 3 bytes after a multiple of 16" in _refusal(*shifted)
    for module in (hopper, triton_tma):
        monkeypatch.setattr(module, "gpu_properties", lambda _: GPUS["L40"])
    assert "the device is sm_89, TMA needs sm_90 or later" in _refusal(*padded)
    assert int8_linear.choose(*padded).name == "triton"


GPUS = {
    "A100": GpuProperties(80, 108, 166_912),
    "A10": GpuProperties(86, 72, 101_376),
    "L40": GpuProperties(89, 142, 101_376),
    "H200": GpuProperties(90, 132, 232_448),
    "B200": GpuProperties(100, 148, 232_448),
    "5090": GpuProperties(120, 170, 101_376),
}


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS.keys())
@given(M=st.integers(1, 10**6), N=st.integers(1, 20_000), K=st.integers(1, 20_000))
def test_the_chosen_tile_fits_the_gpu(gpu: GpuProperties, M: int, N: int, K: int) -> None:
    for table in (tiles.POINTER, tiles.TMA, tiles.TMA_FLOAT32, tiles.TMA_ODD_N):
        assert tiles.choose(table, M, N, K, gpu).shared + tiles.SPARE <= gpu.shared


def test_the_measured_shapes_get_the_measured_tiles() -> None:
    h200 = GPUS["H200"]
    shallow, deep = tiles.Tile(128, 128, 128, 4, 3), tiles.Tile(256, 128, 128, 8, 4)
    assert tiles.choose(tiles.TMA, 46656, 3456, 1152, h200) == shallow
    assert tiles.choose(tiles.TMA, 46656, 4304, 1152, h200) == shallow
    assert tiles.choose(tiles.TMA, 46656, 1152, 4304, h200) == deep
    assert tiles.choose(tiles.TMA, 1, 1024, 1024, h200) == tiles.TMA[-1]
