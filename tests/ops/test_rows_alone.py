"""A row's results are the same bits wherever it stands, and however many rows there are.

On each device and with each kernel, for what has the same strides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from graphquant import ops
from graphquant.ops.define import Kernel, Op, _as_tuple
from graphquant.ops.int8_linear import tiled
from graphquant.ops.numerics import ACTIVATIONS, empty_rows
from graphquant.ops.runtime.launch import recorded
from tests.ops.bounds import implementations, kernels
from tests.ops.qparams import RECIPES
from tests.strategies import FLOATS

pytestmark = pytest.mark.usefixtures("poisoned_throughout")


@dataclass(frozen=True)
class Batch:
    """M rows of K values, of which one is looked at."""

    M: int
    at: int  # modulo M
    K: int
    dtype: torch.dtype
    form: str = ""  # of the op: an activation, "rms"
    recipe: str = ""  # of QParams
    sliced: bool = False  # rows of a wider tensor
    seed: int = 0

    def rows(self, device: str) -> tuple[Tensor, Tensor]:
        """(x [M, K], and [1, K] of it alone), each in memory of its own."""
        wide = self.K + (3 if self.sliced else 0)
        g = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.M, wide, generator=g) * torch.logspace(-3, 3, self.M)[:, None]
        x = x.to(device, self.dtype)
        i = self.at % self.M
        return x[:, : self.K], x[i : i + 1].clone()[:, : self.K]


batches = st.builds(
    Batch,
    M=st.integers(1, 300),
    at=st.integers(0, 299),
    K=st.integers(1, 200) | st.sampled_from([256, 1000, 1152]),
    dtype=st.sampled_from(FLOATS),
    form=st.sampled_from(["", "rms", *ACTIVATIONS]),
    recipe=st.sampled_from(["", *RECIPES]),
    sliced=st.booleans(),
    seed=st.integers(0, 99),
)


def _arguments(op: Op, x: Tensor, batch: Batch) -> tuple[Any, ...]:
    K, device = x.shape[-1], x.device
    qparams = RECIPES[batch.recipe].on(K, device) if batch.recipe else ()
    if op is ops.quantize:
        return x, 1 - x, None if batch.form in ("", "rms") else batch.form, *qparams
    gamma, beta = torch.linspace(-2, 2, 2 * K, device=device).to(batch.dtype).view(2, K)
    norm = (x, gamma, beta, 1e-5, batch.form == "rms")
    return (*norm, *qparams) if op is ops.norm_quantize else (*norm, batch.dtype, *qparams)


def _assert_same(all_rows: Any, alone: Any, at: int) -> None:
    for a, b in zip(_as_tuple(all_rows), _as_tuple(alone), strict=True):
        assert torch.equal(a[at], b[0])


@kernels(ops.quantize, ops.norm_quantize, ops.norm_quantize_keep)
@given(batch=batches)
@example(Batch(9, 4, 16_401, torch.bfloat16))
@example(Batch(40, 39, 1001, torch.float32, "gelu"))
def test_a_quantized_row_is_the_same_alone(
    op: Op, kernel: Kernel, device: str, batch: Batch
) -> None:
    if kernel.name == "triton" and device == "cpu":  # interpreted: programs have at most 8 rows
        batch = replace(batch, M=1 + batch.M % 40)
    x, alone = batch.rows(device)
    of_all, of_one = (kernel.fn(*_arguments(op, t, batch)) for t in (x, alone))
    _assert_same(of_all, of_one, batch.at % batch.M)


def _linear(batch: Batch, N: int, device: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(int8_linear's arguments for all rows, for one)."""
    x, _ = batch.rows("cpu")
    quantized = [_moved(t, device) for t in ops.quantize.reference(x)]
    g = torch.Generator().manual_seed(batch.seed)
    w = ops.quantize_weight.reference(torch.randn(N, batch.K, generator=g))
    packed = [_moved(t, device) for t in w]
    bias, residual = torch.randn(N, generator=g), torch.randn(batch.M, N + 8, generator=g)
    bias, residual = bias.to(device), residual.to(device, batch.dtype)
    i = batch.at % batch.M

    def of(rows: slice) -> tuple[Any, ...]:
        q = [_moved(t[rows], device) for t in quantized]
        r = residual[rows].clone()[:, :N] if batch.sliced else residual[rows, :N].contiguous()
        last = (None, None) if batch.form == "rms" else (bias, r)
        return *q, *packed, *last, batch.dtype

    return of(slice(None)), of(slice(i, i + 1))


def _moved(t: Tensor, device: str) -> Tensor:
    """A copy; int8 rows with their pads."""
    if t.dtype != torch.int8:
        return t.to(device, copy=True)
    return empty_rows(torch.empty(0, device=device), t.shape).copy_(t)


@implementations(ops.int8_linear)
@given(batch=batches, N=st.integers(1, 20).map(lambda n: 8 * n) | st.integers(1, 80))
def test_a_row_of_a_product_is_the_same_alone(
    op: Op, kernel: Kernel, device: str, batch: Batch, N: int
) -> None:
    of_all, of_one = _linear(batch, N, device)
    if kernel.refuses(*of_all) is not None:
        of_all, of_one = _linear(batch, 16 * N, device)
    assert kernel.refuses(*of_all) is None
    _assert_same(kernel.fn(*of_all), kernel.fn(*of_one), batch.at % batch.M)


@kernels(*(op for op in ops.define.OPS.values() if op.quantizes), named="triton")
@pytest.mark.parametrize("K", [81, 1000, 1152])
@pytest.mark.parametrize("sliced", [False, True])
def test_the_program_for_one_row_is_the_program_for_many(
    op: Op, kernel: Kernel, device: str, K: int, sliced: bool
) -> None:
    """What a kernel is compiled for decides the order of its sums: alignments as well."""
    assert kernel.fill is not None
    seen = []
    for M in (1, 2, 40):
        x, _ = Batch(M, 0, K, torch.bfloat16, sliced=sliced).rows(device)
        args = op.full(_arguments(op, x, Batch(M, 0, K, torch.bfloat16)))
        (call,) = recorded(partial(kernel.fill, *args, out=_as_tuple(op.fake(*args))))
        named = dict(zip(call.kernel.arg_names, call.args, strict=False))
        numbers = {n: v for n, v in named.items() if not isinstance(v, Tensor) and n != "M"}
        seen.append((call.kernel, call.meta, numbers))
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.cuda
@pytest.mark.parametrize("form", ["", "rms"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_all_tiles_of_a_kernel_give_the_same_bits(form: str, dtype: torch.dtype) -> None:
    """So that it does not matter which of them some number of rows gets."""
    args, _ = _linear(Batch(300, 0, 1000, dtype, form), 384, "cuda")
    operands, _ = ops.int8_linear.split(args)
    o = tiled.Operands(*operands)
    for name, kernel in tiled.KERNELS.items():
        if kernel.refuses(o, dtype) is not None:
            continue
        tiles = {str(t): t for t in kernel.tiles(tiled.Problem.of(o, dtype), o.xq.device)}
        results = {}
        for tile in tiles.values():
            y = torch.full((300, 384), torch.nan, dtype=dtype, device="cuda")
            kernel.run(tile, o, y)
            results[tile] = y
        first, *others = results.items()
        assert others, name
        for tile, y in others:
            assert torch.equal(y, first[1]), f"{name}: {tile} and {first[0]} differ"
