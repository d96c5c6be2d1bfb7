"""pack_weight, and int8_linear on what it returns."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphquant.errors import UnsupportedInputError
from graphquant.ops import int8_linear, pack_weight, quantize, quantize_weight
from graphquant.ops.define import Kernel, Op
from graphquant.ops.pack_weight import is_packed, unpacked
from graphquant.ops.pack_weight.op import packed_shape
from tests.ops.bounds import implementations, kernels

sizes = st.integers(1, 200)
PROT_NONE = 0  # of sys/mman.h


def int8(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=random)


@implementations(pack_weight)
@given(N=sizes, K=sizes, cut=st.booleans(), seed=st.integers(0, 9))
def test_every_weight_is_where_the_layout_puts_it(
    op: Op, kernel: Kernel, N: int, K: int, cut: bool, seed: int
) -> None:
    w = int8(N, K + 5, seed=seed)[:, 2 : K + 2] if cut else int8(N, K, seed=seed)
    packed = kernel.fn(w)
    assert packed.shape == packed_shape(N, K) and packed.is_contiguous()
    assert torch.equal(packed, pack_weight.reference(w))
    assert torch.equal(unpacked(packed, N, K), w)
    steps = packed[:, :-128].view(-1, (K + 63) // 64, 2, 16, 16, 4)
    n, k = N - 1, K - 1
    assert steps[n // 32, k // 64, n % 32 // 16, k % 64 // 4, n % 16, k % 4] == w[n, k]
    assert int(steps.count_nonzero()) == int(w.count_nonzero())  # the rest is padding
    sums = packed[:, -128:].contiguous().view(torch.int32).flatten()
    assert torch.equal(sums[:N], w.sum(1, dtype=torch.int32)) and not sums[N:].any()


def test_packed_and_plain_weights_never_have_the_same_width() -> None:
    for K in (*range(1, 300), 4304, 133_144):
        packed = pack_weight(int8(1, K))
        assert is_packed(packed, 1, K) and not is_packed(int8(1, K), 1, K)


@kernels(int8_linear, named="cpu")
@given(
    M=st.integers(0, 150),
    N=sizes,
    K=sizes,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    threads=st.sampled_from([1, 2, 5]),
    residual=st.booleans(),
)
def test_packed_weights_give_the_same_bits_as_plain_ones_on_any_number_of_threads(
    op: Op,
    kernel: Kernel,
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    threads: int,
    residual: bool,
) -> None:
    random = torch.Generator().manual_seed(M)
    xq = quantize(torch.randn(M, K, generator=random))
    wq, *scales = quantize_weight(torch.randn(N, K, generator=random))
    bias, more = torch.randn(N, generator=random), torch.randn(M, N, generator=random)
    rest = (*scales, bias, more.to(dtype) if residual else None, dtype)
    want = kernel.fn(*xq, wq, *rest)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(kernel.fn(*xq, pack_weight(wq), *rest), want)
    finally:
        torch.set_num_threads(before)


@kernels(int8_linear, named="cpu")
@pytest.mark.parametrize(("M", "N", "K"), [(33, 40, 200), (1, 1, 1), (70, 33, 4304), (5, 65, 9000)])
def test_sums_of_extreme_values_are_exact(op: Op, kernel: Kernel, M: int, N: int, K: int) -> None:
    for x, w in ((127, 127), (-127, 127), (127, -127), (-127, -127)):
        xq, wq = torch.full((M, K), x, dtype=torch.int8), torch.full((N, K), w, dtype=torch.int8)
        xq[:, ::7], wq[::3] = 1, 5
        one, zero = torch.ones(M, 1), torch.zeros(M, 1)
        y = kernel.fn(
            *(xq, one, zero, pack_weight(wq), torch.ones(N), torch.zeros(N)),
            *(None, None, torch.float32),
        )
        assert torch.equal(y, (xq.double() @ wq.double().T).float())


def test_the_reference_takes_packed_weights() -> None:
    xq, (wq, *scales) = quantize(torch.randn(7, 70)), quantize_weight(torch.randn(40, 70))
    rest = (*scales, None, None, torch.float32)
    want = int8_linear.reference(*xq, wq, *rest)
    assert torch.equal(int8_linear.reference(*xq, pack_weight(wq), *rest), want)


def test_packed_weights_of_another_k_are_refused() -> None:
    xq, (wq, *scales) = quantize(torch.randn(7, 70)), quantize_weight(torch.randn(40, 140))
    with pytest.raises(UnsupportedInputError, match=r"wq has shape \[2, 6272\], needs \[40, 70\]"):
        int8_linear(*xq, pack_weight(wq), *scales, None, None, torch.float32)


def at_the_end_of_memory(values: Tensor, row: int) -> Tensor:
    """A copy of values [M, K], rows `row` elements apart, behind which nothing may be read."""
    size, page = values.element_size(), mmap.PAGESIZE
    M, K = values.shape
    used = ((M - 1) * row + K) * size
    pages = (used + page - 1) // page
    memory = mmap.mmap(-1, (pages + 1) * page)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(first + pages * page), page, PROT_NONE) == 0
    flat = torch.frombuffer(memory, dtype=values.dtype, count=pages * page // size)
    end = flat[flat.numel() - used // size :].as_strided((M, K), (row, 1))
    end.copy_(values)
    return end


@kernels(int8_linear, named="cpu")
@pytest.mark.parametrize(("M", "K", "row"), [(33, 70, 128), (1, 70, 70), (40, 100, 112), (3, 5, 5)])
def test_nothing_is_read_behind_the_operands(
    op: Op, kernel: Kernel, M: int, K: int, row: int
) -> None:
    N = 37
    xq, scale, shift = quantize(torch.randn(M, K))
    wq, *scales = quantize_weight(torch.randn(N, K))
    more, bias = torch.randn(M, N), torch.randn(N)
    want = kernel.fn(xq, scale, shift, pack_weight(wq), *scales, bias, more, torch.float32)
    got = kernel.fn(
        at_the_end_of_memory(xq, row),
        *(at_the_end_of_memory(t, 1) for t in (scale, shift)),
        at_the_end_of_memory(pack_weight(wq), pack_weight(wq).shape[1]),
        *(at_the_end_of_memory(t[None], N)[0] for t in (*scales, bias)),
        at_the_end_of_memory(more, N),
        torch.float32,
    )
    assert torch.equal(got, want)
