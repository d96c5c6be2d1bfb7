"""varlen_attention against float64, for any lengths, masks, widths, strides and biases."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import graphquant.lowering.inductor  # noqa: F401 - registers the lowerings
from graphquant.ops import token_index, varlen_attention
from graphquant.ops.define import Kernel, Op
from tests.ops.bounds import U, implementations, kernels
from tests.ops.test_pack_weight import at_the_end_of_memory
from tests.strategies import FLOATS

LAYOUTS = ("heads", "fused", "columns")


@dataclass(frozen=True)
class Batch:
    lengths: tuple[int, ...] = (5, 0, 70, 1)
    S: int = 80  # padded length; no sequence is longer
    H: int = 4
    Hkv: int = 4
    D: int = 16
    dtype: torch.dtype = torch.float32
    layout: str = "fused"
    holes: bool = False  # valid tokens anywhere in their sequence, else at its start
    front: bool = False
    causal: bool = False
    window: int | None = None
    bias: str = ""  # "", "heads", "shared" or "swapped" (another order of strides)
    bias_dtype: torch.dtype = torch.float32
    spread: float = 1.0  # of the scores
    seed: int = 0

    def valid(self) -> Tensor:
        g = torch.Generator().manual_seed(self.seed)
        valid = torch.arange(self.S) < torch.tensor(self.lengths)[:, None]
        if self.holes:
            valid = torch.stack([v[torch.randperm(self.S, generator=g)] for v in valid])
        return valid

    def on(self, device: str) -> tuple[Any, ...]:
        """Arguments of the op, all of them. Rows of no sequence are nan; v has a mean."""
        g = torch.Generator().manual_seed(self.seed)
        where = packing(self.valid(), self.front)
        n, T = int(where[0][-1]), where[1].numel()
        wide = [torch.randn(1, n, h, self.D, generator=g) for h in (self.H, self.Hkv, self.Hkv)]
        wide[0] *= self.spread
        wide[2] += torch.linspace(-2, 2, self.D)
        qkv = (self._laid_out(t.to(self.dtype), T).to(device) for t in wide)
        bias = None if not self.bias else self._bias(g).to(device)
        return (
            *qkv,
            *(t.to(device) for t in where),
            self.D**-0.5,
            self.S,
            self.causal,
            self.window,
            bias,
        )

    def _laid_out(self, t: Tensor, T: int) -> Tensor:
        """[1, heads, T, D]"""
        nan = torch.full((1, T - t.shape[1], *t.shape[2:]), torch.nan, dtype=t.dtype)
        t = torch.cat([t, nan], 1)
        if self.layout == "heads":
            return t.transpose(1, 2).contiguous()
        if self.layout == "columns":
            return t.transpose(1, 3).contiguous().permute(0, 2, 3, 1)
        fused = torch.cat([torch.full_like(t, torch.nan), t], 2)
        return fused[:, :, t.shape[2] :].transpose(1, 2)

    def _bias(self, g: torch.Generator) -> Tensor:
        S, H = self.S, 1 if self.bias == "shared" else self.H
        if self.bias == "swapped":
            return torch.randn(S, S, H, generator=g).to(self.bias_dtype).permute(2, 0, 1)[None]
        return torch.randn(1, H, S, S, generator=g).to(self.bias_dtype)


def taken_by(kernel: Kernel, batch: Batch) -> Batch:
    """With what the kernel takes instead of what it refuses."""
    if kernel.name != "hopper":
        return batch
    half = torch.bfloat16 if batch.dtype == torch.float32 else batch.dtype
    layout = "heads" if batch.layout == "columns" else batch.layout
    return replace(batch, dtype=half, D=-(-batch.D // 8) * 8, layout=layout)


def packing(valid: Tensor, front: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """cu_seqlens, position, tiles; not front: without rows of pads, which a GPU has"""
    _, _, position, cu_seqlens, tiles, count = token_index(valid, front)
    return cu_seqlens, position if front else position[: int(count)].clone(), tiles


def sequences(cu_seqlens: Tensor) -> Iterator[slice]:
    return (slice(a, b) for a, b in itertools.pairwise(cu_seqlens.tolist()))


def assert_right(
    y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    position: Tensor,
    tiles: Tensor,
    scale: float,
    max_length: int,
    causal: bool,
    window: int | None,
    bias: Tensor | None,
) -> None:
    """y against float64, one sequence after the other.

    The bound is that of tests/ops/test_attention.py. A bias is one more term of a score, and the
    conversion to powers of two multiplies by a rounded log2(e): 4 U of both.
    """
    assert y.shape == q.shape and y.dtype == q.dtype and y.transpose(1, 2).is_contiguous()
    eps = 0.0 if y.dtype == torch.float32 else torch.finfo(y.dtype).eps
    group, D = q.shape[1] // k.shape[1], q.shape[3]
    q, k, v, y = (t.cpu().double() for t in (q, k, v, y))
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    for own in sequences(cu_seqlens):
        p = position[own].cpu().long()
        apart = p - p[:, None]
        hidden = (apart > 0) & causal
        if window is not None:
            hidden |= apart.abs() > window
        qs, ks, vs = (t[:, :, own] for t in (q, k, v))
        added = torch.zeros(()) if bias is None else bias.cpu().double()[:, :, p[:, None], p]
        scores = scale * (qs @ ks.transpose(2, 3)) + added
        size = scale * (qs.abs() @ ks.abs().transpose(2, 3)) + added.abs()
        e = ((D + 8) * U * size).masked_fill(hidden, 0)
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
        want, seen = weights @ vs, weights @ vs.abs()
        if not want.numel():
            continue
        bound = (2 * (e.amax(-1, keepdim=True) + 2**-21) + ks.shape[2] * U) * seen
        bound += eps * (seen + want.abs()) + 1e-7
        assert ((y[:, :, own] - want).abs() <= bound).all()


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    S = draw(st.integers(1, 20) | st.sampled_from([64, 130, 200]))
    lengths = draw(st.lists(st.integers(0, S) | st.just(S), min_size=1, max_size=4))
    Hkv = draw(st.integers(1, 2))
    return Batch(
        tuple(lengths),
        S,
        Hkv * draw(st.integers(1, 2)),
        Hkv,
        draw(st.integers(1, 40) | st.sampled_from([64, 72, 96, 128])),
        draw(st.sampled_from(FLOATS)),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.none() | st.integers(0, S)),
        draw(st.sampled_from(["", "heads", "shared", "swapped"])),
        draw(st.sampled_from(FLOATS)),
        draw(st.sampled_from([0.0, 1.0, 20.0])),
        draw(st.integers(0, 99)),
    )


@implementations(varlen_attention)
@given(batch=batches())
@settings(max_examples=20)
@example(Batch((0, 0), 3))  # nothing is valid: one row of no sequence
@example(Batch((0, 0), 3, front=True))
@example(Batch((1,), 1, 1, 1, 1))
@example(Batch(window=2**31 - 1))
@example(Batch((300, 140), 300, 1, 1, 64, torch.bfloat16))  # several blocks of keys
@example(Batch((300, 140), 300, 1, 1, 64, holes=True, front=True))
@example(Batch((300,), 300, 1, 1, 32, torch.bfloat16, window=40))
@example(Batch((300,), 300, 1, 1, 32, causal=True, window=0))
@example(Batch((300,), 300, 2, 1, 33, torch.bfloat16, causal=True, bias="heads"))
@example(Batch((200, 130), 300, 1, 1, 20, torch.float16, holes=True, window=7, bias="shared"))
def test_result_is_the_float64_result_up_to_rounding(
    op: Op, kernel: Kernel, device: str, batch: Batch
) -> None:
    args = taken_by(kernel, batch).on(device)
    assert kernel.name.startswith("cpu") or kernel.refuses(*args) is None
    assert_right(kernel.fn(*args), *args)


ALONE = (
    Batch((5, 0, 200, 64, 1, 129), 210, 2, 1, 64),
    Batch((40, 150, 70), 160, 2, 2, 40, holes=True, window=30, bias="heads"),
    Batch((200, 70), 210, 1, 1, 32, causal=True, front=True),
)


@kernels(varlen_attention)
@pytest.mark.parametrize("batch", ALONE, ids=["lengths", "window and bias", "causal, front"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(
    op: Op, kernel: Kernel, device: str, batch: Batch, dtype: torch.dtype
) -> None:
    """Also on any number of threads."""
    args = taken_by(kernel, replace(batch, dtype=dtype)).on(device)
    q, k, v, cu_seqlens, position, _, *rest = args
    y = kernel.fn(*args)
    for b, own in enumerate(sequences(cu_seqlens)):
        if own.start == own.stop:
            continue
        # clones: alone it is aligned otherwise, too
        qkv = (t[:, :, own].transpose(1, 2).clone().transpose(1, 2) for t in (q, k, v))
        where = packing(batch.valid()[b : b + 1].to(device))
        alone = kernel.fn(*qkv, *where, *rest)
        assert torch.equal(where[1], position[own])
        assert torch.equal(alone, y[:, :, own])
    if kernel.name.startswith("cpu"):
        n = int(cu_seqlens[-1])
        with threads(2):
            assert torch.equal(kernel.fn(*args)[:, :, :n], y[:, :, :n])


class threads:
    """Context with this number of threads."""

    def __init__(self, n: int) -> None:
        self.n, self.before = n, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self.n)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


@kernels(varlen_attention)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_element_is_written(
    op: Op, kernel: Kernel, device: str, dtype: torch.dtype, poisoned: None
) -> None:
    args = taken_by(kernel, Batch((3, 64, 0, 65, 1), 70, 2, 1, 24, dtype)).on(device)
    assert kernel.fn(*args).isfinite().all()


@kernels(varlen_attention)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_not_finite_leave_other_sequences_alone(
    op: Op, kernel: Kernel, device: str, dtype: torch.dtype
) -> None:
    """A query's nan is in its own row alone, a key's in its own sequence alone."""
    batch = Batch((20, 70, 9), 70, 2, 2, 16, dtype, layout="heads")
    args = taken_by(kernel, batch).on(device)
    q, k = args[:2]
    clean = kernel.fn(*args)
    q[0, 1, 3, 2] = torch.nan
    k[0, 0, 95, 0] = torch.nan
    y = kernel.fn(*args)
    touched = torch.zeros(y.shape[:3], dtype=torch.bool)
    touched[0, 1, 3] = touched[0, 0, 90:] = True
    assert torch.equal(y.cpu()[~touched], clean.cpu()[~touched])
    assert y.cpu()[touched].isnan().all()


@kernels(varlen_attention, named="cpu")
@pytest.mark.parametrize("D", [5, 32, 64, 72])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nothing_is_read_behind_the_operands(
    op: Op, kernel: Kernel, D: int, dtype: torch.dtype
) -> None:
    q, k, v, *rest = Batch((5, 70, 33), 70, 2, 2, D, dtype, bias="heads").on("cpu")
    rows = [t.transpose(1, 2).reshape(-1, 2 * D) for t in (q, k, v)]
    ended = [at_the_end_of_memory(t, 2 * D).view(1, -1, 2, D).transpose(1, 2) for t in rows]
    bias = at_the_end_of_memory(rest[-1].reshape(-1, 70), 70).view(1, 2, 70, 70)
    where = [at_the_end_of_memory(t.view(1, -1), t.numel()).view_as(t) for t in rest[:3]]
    assert torch.equal(op(*ended, *where, *rest[3:-1], bias), op(q, k, v, *rest))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", ["", "swapped"])
def test_opcheck_of_layouts(layout: str, bias: str, device: str) -> None:
    args = Batch((3, 70), 80, 4, 2, 16, layout=layout, bias=bias).on(device)
    torch.library.opcheck(varlen_attention.target, args)


@pytest.mark.parametrize("front", [False, True])
def test_one_compiled_graph_takes_every_batch(front: bool) -> None:
    """Inductor calls the CPU kernel with symbolic sizes, on views that it does not copy."""
    torch._dynamo.reset()
    w = torch.randn(3 * 64, 64) / 8

    def attended(x: Tensor, valid: Tensor, bias: Tensor) -> Tensor:
        index, slot, position, cu_seqlens, tiles, _ = token_index(valid, front)
        packed = torch.nn.functional.linear(x.flatten(0, 1)[index][None], w)
        q, k, v = (t.unflatten(2, (4, 16)).transpose(1, 2) for t in packed.split(64, -1))
        where = cu_seqlens, position, tiles
        y = varlen_attention(q, k, v, *where, 0.25, valid.shape[1], False, 50, bias)
        return y.transpose(1, 2).flatten(2)[0][slot].view_as(x)

    run = torch.compile(attended, fullgraph=True, dynamic=True)
    for B, S in ((3, 70), (4, 90), (2, 33)):
        batch = Batch((S, *range(3, B + 2)), S, holes=True)
        x, bias = torch.randn(B, S, 64), torch.randn(S, S, 4).permute(2, 0, 1)[None]
        valid = batch.valid()
        got, want = run(x, valid, bias), attended(x, valid, bias)
        torch.testing.assert_close(got[valid], want[valid], rtol=1e-4, atol=1e-4)
