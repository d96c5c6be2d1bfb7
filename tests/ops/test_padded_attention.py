"""attention with masks, a bias and heads in groups against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphquant.ops import attention
from graphquant.ops.attention.hopper_tiles import MASKED, TILES
from graphquant.ops.define import Kernel, Op
from tests.ops.bounds import U, implementations, kernels
from tests.strategies import FLOATS

PADDINGS = ("all", "right", "left", "holes", "none")
BIASES = ("heads", "shared", "batches", "sentences", "swapped", "hiding")


@dataclass(frozen=True)
class Padded:
    B: int = 3
    H: int = 4
    Hkv: int = 4
    S: int = 9
    T: int | None = None  # None: S
    D: int = 16
    dtype: torch.dtype = torch.float32
    paddings: tuple[str, ...] = ()  # of sentences in turn; (): no mask
    causal: bool = False
    window: int | None = None
    bias: str = ""
    bias_dtype: torch.dtype = torch.float32
    seed: int = 0

    def on(self, device: str) -> tuple[Any, ...]:
        """Arguments of the op, all of them: q, k and v are of one product, and v has a mean."""
        g = torch.Generator().manual_seed(self.seed)
        T = self.S if self.T is None else self.T
        wide = [
            torch.randn(self.B, n, 3 * h, self.D, generator=g)
            for n, h in ((self.S, self.H), (T, self.Hkv), (T, self.Hkv))
        ]
        wide[2] += torch.linspace(-2, 2, self.D)
        heads = (self.H, self.Hkv, self.Hkv)
        q, k, v = (
            t.to(self.dtype).to(device)[:, :, h : 2 * h].transpose(1, 2)
            for t, h in zip(wide, heads, strict=True)
        )
        mask = self._mask(T, g).to(device) if self.paddings else None
        bias = self._bias(T, g).to(device) if self.bias else None
        if bias is not None and self.bias == "swapped":
            bias = bias.transpose(2, 3).contiguous().transpose(2, 3)
        return q, k, v, self.D**-0.5, MASKED, mask, self.causal, self.window, bias

    def _mask(self, T: int, g: torch.Generator) -> Tensor:
        j = torch.arange(T)

        def sentence(kind: str) -> Tensor:
            n = int(torch.randint(1, T + 1, (), generator=g))
            return {
                "all": j >= 0,
                "right": j < n,
                "left": j >= T - n,
                "holes": torch.rand(T, generator=g) < 0.5,
                "none": j < 0,
            }[kind]

        kinds = [self.paddings[b % len(self.paddings)] for b in range(self.B)]
        return torch.stack([sentence(kind) for kind in kinds])

    def _bias(self, T: int, g: torch.Generator) -> Tensor:
        lead = {
            "shared": (1, 1),
            "batches": (self.B, self.H),
            "sentences": (self.B, 1),
        }.get(self.bias, (1, self.H))
        bias = 2 * torch.randn(*lead, self.S, T, generator=g)
        if self.bias == "hiding":
            bias[torch.rand(bias.shape, generator=g) < 0.3] = -math.inf
        return bias.to(self.bias_dtype)


def assert_right(y: Tensor, *args: Any) -> None:
    """y against float64, as in test_attention.py; e is of the bias as well."""
    q, k, v, scale, _, mask, causal, window, bias = (
        a.cpu() if isinstance(a, Tensor) else a for a in args
    )
    assert y.shape == q.shape and y.dtype == q.dtype
    assert y.transpose(1, 2).is_contiguous()
    eps = 0.0 if y.dtype == torch.float32 else torch.finfo(y.dtype).eps
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    q, k, v, y = (t.cpu().double() for t in (q, k, v, y))
    scores, sizes = scale * (q @ k.transpose(2, 3)), scale * (q.abs() @ k.abs().transpose(2, 3))
    if bias is not None:
        # torch's SDPA, and so the kernel that calls it, has the bias in q's type
        rounded = eps * bias.double().abs().nan_to_num(posinf=0.0)
        scores = scores + bias.double()
        sizes = sizes + bias.double().abs().nan_to_num(posinf=0.0) + rounded / (20 * U)
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    seen = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool)
    if causal:
        seen = seen & (j <= i)
    if window is not None:
        seen = seen & ((i - j).abs() <= window)
    if mask is not None:
        seen = seen & mask[:, None, None]
    p = torch.softmax(scores.masked_fill(~seen, -math.inf), -1).nan_to_num(0.0)
    want, there = p @ v, p @ v.abs()
    e = (q.shape[3] + 4) * U * sizes.amax(-1, keepdim=True)
    bound = (2 * (e + 2**-21) + k.shape[2] * U) * there + eps * (there + want.abs())
    assert ((y - want).abs() <= bound + 1e-7).all()


padded = st.builds(
    lambda heads, **rest: Padded(H=heads[0], Hkv=heads[1], **rest),
    heads=st.sampled_from([(1, 1), (3, 3), (4, 4), (4, 2), (3, 1)]),
    B=st.integers(1, 6),
    S=st.integers(1, 70) | st.sampled_from([128, 130, 200]),
    D=st.sampled_from([8, 16, 32, 64, 72, 128]),
    dtype=st.sampled_from(FLOATS),
    paddings=st.lists(st.sampled_from(PADDINGS), max_size=5).map(tuple),
    causal=st.booleans(),
    window=st.none() | st.integers(0, 80),
    bias=st.sampled_from(["", *BIASES]),
    bias_dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)


@given(case=padded)
def test_reference_is_the_float64_result_up_to_rounding(case: Padded) -> None:
    args = case.on("cpu")
    assert_right(attention.reference(*args), *args)


def taken_by(kernel: Kernel, case: Padded) -> Padded:
    """With what the kernel takes instead of what it refuses."""
    if kernel.name.startswith("cpu"):
        return replace(case, Hkv=case.H, causal=False, window=None, bias="")
    half = case.dtype == torch.float32 and kernel.name != "reference"
    return replace(case, dtype=torch.bfloat16) if half else case


@kernels(attention)
@given(case=padded)
@settings(max_examples=40)  # nearly every one compiles a kernel
def test_kernel_result_is_the_float64_result_up_to_rounding(
    op: Op, kernel: Kernel, device: str, case: Padded
) -> None:
    args = taken_by(kernel, case).on(device)
    if kernel.name == "hopper":
        masked = case.paddings or case.causal or case.window is not None or case.bias
        plain = (*args[:4], "128x128", *args[5:])
        assert bool(masked) == ("no masks" in str(kernel.refuses(*plain)))
        return
    assert kernel.name.startswith("cpu") or kernel.refuses(*args) is None
    assert_right(kernel.fn(*args), *args)


CASES = {
    "grouped heads": Padded(H=6, Hkv=2, S=70, paddings=PADDINGS, B=5),
    "other keys": Padded(S=70, T=150, paddings=PADDINGS, B=5),
    "other keys with a bias": Padded(S=9, T=70, bias="heads"),
    "long": Padded(S=1030, D=32, paddings=PADDINGS, B=5, H=1, Hkv=1),
    "long window": Padded(S=700, D=32, window=64, paddings=PADDINGS, B=5, H=2, Hkv=2),
    "long causal": Padded(S=700, D=32, causal=True, paddings=("left", "holes"), H=2, Hkv=2),
}


@implementations(attention)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(2))
def test_more_forms(
    op: Op, kernel: Kernel, device: str, name: str, seed: int, poisoned: None
) -> None:
    case = replace(CASES[name], seed=seed)
    args = taken_by(kernel, case).on(device)
    if kernel.name != "hopper":
        assert_right(kernel.fn(*args), *args)


@implementations(attention)
def test_a_query_that_sees_no_key_gets_zeros(op: Op, kernel: Kernel, device: str) -> None:
    if kernel.name == "hopper":
        return
    case = Padded(B=2, S=70, paddings=("all", "none"), dtype=torch.bfloat16)
    y = kernel.fn(*case.on(device))
    assert y[0].abs().max() > 0 and (y[1] == 0).all()


@implementations(attention)
def test_a_hidden_key_changes_nothing(op: Op, kernel: Kernel, device: str) -> None:
    if kernel.name == "hopper":
        return
    args = Padded(B=2, S=150, paddings=("holes", "right"), dtype=torch.bfloat16).on(device)
    y = kernel.fn(*args)
    hidden = ~args[5][:, None, :, None]
    k, v = (torch.where(hidden, 9.0, t) for t in args[1:3])
    assert torch.equal(kernel.fn(args[0], k, v, *args[3:]), y)


@kernels(attention)
@pytest.mark.parametrize("padding", ["right", "left", "holes"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_on_a_cpu_hidden_keys_are_left_out(
    op: Op, kernel: Kernel, device: str, padding: str, dtype: torch.dtype
) -> None:
    """A sentence has the same bits with and without its pads."""
    if not kernel.name.startswith("cpu"):
        return
    case = Padded(B=1, S=140, D=40, paddings=(padding,), dtype=dtype, seed=3)
    q, k, v, scale, tile, mask, *rest = case.on(device)
    alone = kernel.fn(q, k[:, :, mask[0]], v[:, :, mask[0]], scale, tile)
    assert torch.equal(kernel.fn(q, k, v, scale, tile, mask, *rest), alone)


def test_what_the_cpu_kernel_takes() -> None:
    (kernel,) = attention.cpu_kernels
    for case in (Padded(causal=True), Padded(window=3), Padded(bias="heads")):
        assert "key_mask alone" in str(kernel.refuses(*case.on("cpu")))
    assert "q has 4 heads, k has 2" in str(kernel.refuses(*Padded(Hkv=2).on("cpu")))


def test_what_the_kernels_take() -> None:
    plain, masked, _ = attention.kernels
    q, k, v, scale, tile, *rest = Padded(H=4, Hkv=2, paddings=("all",)).on("cpu")
    assert "another kernel" in str(plain.refuses(q, k, v, scale, tile))
    assert "another kernel" in str(masked.refuses(q, k, v, scale, next(iter(TILES))))
    assert "no masks" in str(plain.refuses(q, k, v, scale, "128x128", *rest))
    assert "q has 4 heads, k has 2" in str(plain.refuses(q, k, v, scale, "128x128"))
    assert "sm_90 alone" in str(masked.refuses(q, k, v, scale, tile, *rest))


@pytest.mark.cuda
def test_the_kernel_says_what_is_wrong_with_its_inputs() -> None:
    kernel = attention.kernels[1]
    good = Padded(D=64, dtype=torch.bfloat16, paddings=("all",), bias="heads").on("cuda")
    if (why := kernel.refuses(*good)) is not None:
        pytest.skip(why)
    q, k, v, *start, mask, causal, window, bias = good
    wide = Padded(D=136, dtype=torch.bfloat16).on("cuda")
    long = Padded(D=8, S=4097, dtype=torch.bfloat16, paddings=("all",)).on("cuda")
    for wrong, said in [
        (wide, "heads of 136"),
        (long, "4097 keys with a mask, needs at most 4096"),
        ((q.float(), *good[1:]), "q is torch.float32"),
        ((q, k[..., 4:], v[..., 4:], *good[3:]), "k does not start"),
        ((q, k, v, *start, mask.t().contiguous().t(), causal, window, bias), "key_mask with"),
        ((q, k, v, *start, mask[:, 1:], causal, window, bias), "key_mask does not start"),
        ((q, k, v, *start, mask, causal, window, bias[..., 1:]), "bias does not start"),
    ]:
        assert said in str(kernel.refuses(*wrong))


@pytest.mark.parametrize("case", [Padded(paddings=("right",)), Padded(causal=True, bias="shared")])
def test_the_op_keeps_torchs_contract(case: Padded) -> None:
    torch.library.opcheck(attention.target, case.on("cpu"))
