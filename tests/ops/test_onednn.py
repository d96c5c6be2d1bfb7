"""int8_linear by oneDNN, where there is no C++ compiler: exact, or not used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graphquant.ops import cpu, int8_linear, pack_weight
from graphquant.ops.define import load_cpu_kernels
from graphquant.ops.int8_linear import onednn
from graphquant.ops.int8_linear.onednn import EXACT_K
from graphquant.ops.int8_linear.op import MAX_K
from graphquant.ops.numerics import padded
from tests.processes import in_a_new_process

# A process without a compiler. It prints what refuses, and whether the op is exact at extremes.
WITHOUT_COMPILER = """
import os
import sys
os.environ["CXX"], os.environ["TRITON_CACHE_DIR"] = "/nonexistent/c++", sys.argv[1]
os.environ.update(word.split("=") for word in sys.argv[2:])
import torch
from graphquant.ops import cpu, int8_linear
from graphquant.ops.int8_linear import onednn
x = torch.full((9, 1030), 127, dtype=torch.int8)
w = torch.full((5, 1030), 127, dtype=torch.int8)
x[::2], w[1], w[:, -1] = -127, -127, 2
one, none = torch.ones(9, 1), torch.zeros(9, 1)
y = int8_linear(x, one, none, w, one[:5, 0], none[:5, 0], None, None, torch.float32)
print("/nonexistent/c++" in cpu.missing(), onednn.missing())
exact = torch.equal(y.double(), x.double() @ w.double().T)
print(int8_linear.in_torch(*[None] * 10).__name__, exact)
"""


def arguments(M: int, N: int, K: int, dtype: torch.dtype, *, bias: bool) -> tuple[Any, ...]:
    """Arguments of int8_linear: half of the values are extreme."""

    def int8(rows: int) -> Tensor:
        values = torch.randint(-127, 128, (rows, K), dtype=torch.int8)
        return torch.where(torch.rand(rows, K) < 0.5, values, 127 * values.sign())

    wq, w_scale = int8(N), torch.rand(N)
    w_sum = w_scale * wq.float().sum(1)
    xq = torch.empty(M, padded(K), dtype=torch.int8)[:, :K].copy_(int8(M))  # with pads
    b, residual = (torch.randn(N), torch.randn(M, N).to(dtype)) if bias else (None, None)
    return xq, torch.rand(M, 1), torch.randn(M, 1), wq, w_scale, w_sum, b, residual, dtype


@pytest.fixture
def _exact_here() -> None:
    if (why := onednn.missing()) is not None:
        pytest.skip(why)


@pytest.mark.usefixtures("_exact_here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [(1, 1, 1), (0, 8, 24), (5, 33, 65), (33, 40, EXACT_K), (7, 9, EXACT_K + 1), (4, 6, 3420)],
)
def test_it_is_the_reference_bit_for_bit(M: int, N: int, K: int, dtype: torch.dtype) -> None:
    for bias in (False, True):
        args = arguments(M, N, K, dtype, bias=bias)
        got = onednn.int8_linear_onednn(*args)
        assert torch.equal(got, int8_linear.reference(*args)) and got.dtype == dtype


@pytest.mark.usefixtures("_exact_here")
def test_the_longest_rows_of_extreme_values_are_exact() -> None:
    x, w = torch.full((2, MAX_K), 127, dtype=torch.int8), torch.full((3, MAX_K), -127)
    x[1, ::2], w = -127, w.to(torch.int8)
    w[2] = 127
    w[1, ::3] = 126
    one, none = torch.ones(3), torch.zeros(3)
    y = onednn.int8_linear_onednn(
        x, one[:2, None], none[:2, None], w, one, none, None, None, torch.float32
    )
    want = (x.double() @ w.double().T).float()  # int32, rounded once
    assert torch.equal(y, want) and y.abs().max() == 127**2 * MAX_K // 128 * 128


@pytest.mark.usefixtures("_exact_here")
def test_it_reads_batches_slices_and_packed_weights() -> None:
    xq, x_scale, x_shift, wq, *rest = arguments(12, 40, 70, torch.float32, bias=False)
    lead = [t.unflatten(0, (3, 4)) for t in (xq, x_scale, x_shift)]
    want = int8_linear.reference(*lead, wq, *rest)
    assert torch.equal(onednn.int8_linear_onednn(*lead, wq, *rest), want)
    assert torch.equal(onednn.int8_linear_onednn(*lead, pack_weight(wq), *rest), want)
    columns = wq.T.contiguous().T
    assert torch.equal(onednn.int8_linear_onednn(*lead, columns, *rest), want)


@pytest.mark.usefixtures("_exact_here")
def test_the_op_uses_it_where_the_cpu_kernel_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    load_cpu_kernels()
    args = arguments(5, 8, 48, torch.float32, bias=True)
    called = []

    def product(xq: Tensor, wq: Tensor) -> Tensor:
        called.append(xq.shape)
        return _product(xq, wq)

    _product = onednn._product
    monkeypatch.setattr(onednn, "_product", product)
    monkeypatch.setattr(cpu, "missing", lambda: "no compiler")
    want = int8_linear.reference(*args)
    assert torch.equal(int8_linear(*args), want) and called == [(5, 48)]
    monkeypatch.setattr(onednn, "missing", lambda: "it saturates")
    assert torch.equal(int8_linear(*args), want) and len(called) == 1


def test_products_that_saturate_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(xq: Tensor, wq: Tensor) -> Tensor:
        """As `vpmaddubsw` adds pairs of products."""
        x, w = (xq.int() + 128).unflatten(1, (-1, 2)), wq.int().unflatten(1, (-1, 2))
        pairs = (x[:, None] * w).sum(-1).clamp(-(2**15), 2**15 - 1)
        return (pairs.sum(-1) - 128 * wq.sum(1)).float()

    def compensated_in_float(xq: Tensor, wq: Tensor) -> Tensor:
        sums = ((xq.int()[:, None] + 128) * wq.int()).sum(-1).float()
        return sums - 128.0 * wq.sum(1)

    def in_bfloat16(xq: Tensor, wq: Tensor) -> Tensor:
        return (xq.double() @ wq.double().T).bfloat16().float()

    def exact(xq: Tensor, wq: Tensor) -> Tensor:
        return (xq.double() @ wq.double().T).float()

    for product in (exact, compensated_in_float):
        monkeypatch.setattr(onednn, "_product", product)
        assert onednn._is_exact(), product.__name__
    for product in (saturating, in_bfloat16):
        monkeypatch.setattr(onednn, "_product", product)
        assert not onednn._is_exact(), product.__name__
    monkeypatch.setattr(onednn, "_product", compensated_in_float)
    monkeypatch.setattr(onednn, "EXACT_K", 1024)  # too long, and that is noticed
    assert not onednn._is_exact()


def test_torch_without_onednn_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(xq: Tensor, wq: Tensor) -> Tensor:
        raise AttributeError("'_OpNamespace' 'onednn' object has no attribute 'qlinear_prepack'")

    monkeypatch.setattr(onednn, "_product", absent)
    why = onednn.missing.__wrapped__()
    assert why == "this build of torch has no int8 products of oneDNN"


def test_without_a_compiler_the_op_is_exact(tmp_path: Any) -> None:
    done = in_a_new_process(WITHOUT_COMPILER, tmp_path)
    assert done.returncode == 0, done.stderr
    refused, computed = done.stdout.splitlines()
    used = "reference int8_linear" if onednn.missing() else "int8_linear_onednn"
    assert refused.startswith("True") and computed == f"{used.split()[-1]} True"


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])  # both without VNNI
def test_instructions_that_saturate_are_refused(isa: str, tmp_path: Any) -> None:
    done = in_a_new_process(WITHOUT_COMPILER, tmp_path, f"ONEDNN_MAX_CPU_ISA={isa}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "True oneDNN's int8 products saturate on this processor",
        "int8_linear True",
    ]
