"""Tensors of more than 2^31 elements: offsets must be 64 bits wide."""

from __future__ import annotations

import pytest
import torch

from graphquant import ops
from tests.ops.bounds import assert_within_a_step

pytestmark = pytest.mark.cuda

M, K = 600_000, 4096  # 2.46e9 elements; 2^31 = 2.15e9
LAST = slice(M - 5, M)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    x = torch.empty(M, K, device="cuda", dtype=torch.bfloat16)
    for part in x.split(50_000):
        part.normal_()
    return x


def test_quantize_reaches_the_last_rows(x: torch.Tensor) -> None:
    triple = ops.quantize(x)
    want = ops.quantize.reference(x[LAST].cpu())
    assert_within_a_step([t[LAST] for t in triple], want)


def test_norm_quantize_keep_reaches_the_last_rows(x: torch.Tensor) -> None:
    y, *triple = ops.norm_quantize_keep(x, None, None, 1e-5, False, torch.bfloat16)
    want = ops.norm_quantize_keep.reference(x[LAST].cpu(), None, None, 1e-5, False, torch.bfloat16)
    assert_within_a_step([t[LAST] for t in triple], want[1:], noise=1e-4)
    assert torch.allclose(y[LAST].cpu().float(), want[0].float(), rtol=2**-7, atol=1e-4)


def test_quantize_reads_slices_past_2_31(x: torch.Tensor) -> None:
    gate, up = x[:, : K // 2], x[:, K // 2 :]
    triple = ops.quantize(gate, up, "silu")
    want = ops.quantize.reference(gate[LAST].cpu(), up[LAST].cpu(), "silu")
    assert_within_a_step([t[LAST] for t in triple], want, noise=1e-4)


@pytest.mark.parametrize("kernel", ["triton_tma", "triton"])
def test_int8_linear_writes_the_last_rows(x: torch.Tensor, kernel: str) -> None:
    quantized = ops.quantize(x[:, :64])
    packed = ops.quantize_weight(torch.randn(K, 64, device="cuda"))
    args = *quantized, *packed, None, x, torch.bfloat16
    (chosen,) = (k for k in ops.int8_linear.kernels if k.name == kernel)
    if (why := chosen.refuses(*args)) is not None:
        pytest.skip(why)
    y = chosen.fn(*args)
    last = (t[LAST].cpu() for t in quantized)
    want = ops.int8_linear.reference(
        *last, *(t.cpu() for t in packed), None, x[LAST].cpu(), torch.bfloat16
    )
    assert torch.allclose(y[LAST].cpu().float(), want.float(), rtol=2**-7, atol=1e-4)
