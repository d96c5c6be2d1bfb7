"""num_rows: so many leading rows are computed, and what stands behind them does not matter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphquant import ops
from graphquant.exporters.standalone import PRODUCTS, without_ops
from graphquant.ops import triton_rows
from graphquant.ops.define import Kernel, Op, _as_tuple
from graphquant.ops.runtime.device import GpuProperties
from graphquant.ops.runtime.launch import recorded
from tests.ops.bounds import implementations, kernels
from tests.ops.test_int8_linear import Linear
from tests.strategies import FLOATS

QUANTIZERS = (ops.quantize, ops.norm_quantize, ops.norm_quantize_keep)
TAKE_IT = (*QUANTIZERS, ops.int8_linear)
OF_ROWS = ("x", "up", "xq", "x_scale", "x_shift", "residual")  # arguments [..., K] or [..., 1]

pytestmark = pytest.mark.usefixtures("poisoned_throughout")


@dataclass(frozen=True)
class Sample:
    """Arguments of an op for M rows of K values."""

    lead: tuple[int, ...]
    K: int
    dtype: torch.dtype
    gated: bool = False  # of quantize: with `up`; of norms: RMSNorm
    seed: int = 0

    @property
    def M(self) -> int:
        return torch.Size(self.lead).numel()

    def of(self, op: Op, device: str) -> dict[str, Any]:
        """By name; new tensors each time, with the same values."""
        return op.named(self._positional(op, device))

    def _positional(self, op: Op, device: str) -> tuple[Any, ...]:
        if op is ops.int8_linear:
            residual = None if self.gated else self.dtype
            linear = Linear(self.lead, self.K, 48, self.dtype, self.dtype, residual, seed=self.seed)
            return linear.on(device)
        g = torch.Generator().manual_seed(self.seed)
        x, up = (torch.randn(*self.lead, self.K, generator=g).to(device, self.dtype) for _ in "12")
        if op is ops.quantize:
            return (x, up, "silu") if self.gated else (x, None, "gelu")
        gamma = torch.linspace(0.5, 2, self.K, device=device)
        norm = (x, gamma, None, 1e-5, self.gated)
        return norm if op is ops.norm_quantize else (*norm, self.dtype)


def _count(n: int, device: str) -> Tensor:
    return torch.tensor([n], dtype=torch.int32, device=device)


def _spoilt(args: dict[str, Any], n: int) -> dict[str, Any]:
    """The same with nan, or any bytes, in the rows behind the first n."""
    for name in OF_ROWS:
        if (t := args.get(name)) is not None:
            behind = t.view(-1, t.shape[-1])[n:]
            any_bytes = torch.randint(-128, 128, behind.shape, device=t.device)
            behind.copy_(any_bytes if t.dtype == torch.int8 else torch.full_like(behind, torch.nan))
    return args


def _rows(results: Any) -> list[Tensor]:
    """Each result as [M, *]."""
    return [r.reshape(-1, r.shape[-1]) for r in _as_tuple(results)]


def _given(kernel: Kernel, args: dict[str, Any]) -> tuple[Any, ...]:
    given = tuple(args.values())
    if (why := kernel.refuses(*given)) is not None:
        pytest.skip(why)
    return given


leads = st.tuples(st.integers(1, 70)) | st.tuples(st.integers(1, 3), st.integers(1, 20))
samples = st.builds(
    Sample, leads, st.integers(1, 200), st.sampled_from(FLOATS), st.booleans(), st.integers(0, 99)
)


@implementations(*TAKE_IT)
@given(sample=samples, count=st.sampled_from([0, 1, -3]) | st.integers(0, 80))
@example(Sample((70,), 128, torch.bfloat16), 70)
@example(Sample((300,), 65, torch.bfloat16), 129)
@example(Sample((3,), 16_401, torch.bfloat16), 2)
def test_the_leading_rows_are_those_of_all_rows_bit_for_bit(
    op: Op, kernel: Kernel, device: str, sample: Sample, count: int
) -> None:
    """Whatever the rows behind them hold."""
    n = min(max(count, 0), sample.M)
    want = kernel.fn(*_given(kernel, sample.of(op, device)))
    args = _spoilt(sample.of(op, device), n) | {"num_rows": _count(count, device)}
    got = kernel.fn(*_given(kernel, args))
    for g, w in zip(_rows(got), _rows(want), strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype
        assert torch.equal(g[:n], w[:n]), "nan is not equal to itself"


@kernels(*TAKE_IT)
def test_rows_far_behind_are_not_computed(op: Op, kernel: Kernel, device: str) -> None:
    """Tiles have at most 256 rows; rows that are quantized together are at most 8."""
    sample = Sample((600,), 40, torch.bfloat16)
    first = 512 if op is ops.int8_linear else 17
    for count in (0, 9):
        args = sample.of(op, device) | {"num_rows": _count(count, device)}
        for result in _rows(kernel.fn(*_given(kernel, args))):
            behind = result[first if count else 0 :]
            untouched = (behind == 127) if result.dtype == torch.int8 else behind.isnan()
            assert untouched.all()


@kernels(*QUANTIZERS, named="triton")
@pytest.mark.parametrize("count", [0, 1, 64, 65, 100])
def test_few_programs_compute_many_rows(
    op: Op, kernel: Kernel, device: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are not more of them than run at a time, whatever the number of rows."""
    monkeypatch.setattr(triton_rows, "gpu_properties", lambda _: GpuProperties(90, 1, 232_448))
    monkeypatch.setattr(triton_rows, "THREADS", 192)
    assert kernel.fill is not None
    sample = Sample((100,), 130, torch.bfloat16)
    want = kernel.fn(*sample.of(op, device).values())
    args = tuple(
        (_spoilt(sample.of(op, device), count) | {"num_rows": _count(count, device)}).values()
    )
    (call,) = recorded(partial(kernel.fill, *args, out=_as_tuple(op.fake(*args))))
    assert call.grid == (3,)
    for g, w in zip(_rows(kernel.fn(*args)), _rows(want), strict=True):
        assert torch.equal(g[:count], w[:count])


@implementations(*QUANTIZERS)
def test_what_is_quantized_behind_the_last_row_stays_behind_it(
    op: Op, kernel: Kernel, device: str
) -> None:
    """A quantizer's rows that were not written go into int8_linear as they are."""
    sample, packed = Sample((37,), 96, torch.float32), ops.quantize_weight(torch.randn(40, 96))
    packed = tuple(t.to(device) for t in packed)
    count = _count(5, device)
    args = _spoilt(sample.of(op, device), 5) | {"num_rows": count}
    some, all_ = kernel.fn(*args.values()), kernel.fn(*sample.of(op, device).values())
    for linear in ops.int8_linear.kernels:
        of_all = (*all_[-3:], *packed, None, None, torch.float32)
        if (linear.name == "hopper" and device == "cpu") or linear.refuses(*of_all) is not None:
            continue
        y = linear.fn(*some[-3:], *packed, None, None, torch.float32, count)
        assert torch.equal(y[:5], linear.fn(*of_all)[:5])


@pytest.mark.parametrize("op", TAKE_IT, ids=lambda op: op.name)
def test_opcheck_with_num_rows(op: Op, device: str) -> None:
    args = Sample((3, 5), 40, torch.float32).of(op, device)
    torch.library.opcheck(op.target, tuple((args | {"num_rows": _count(15, device)}).values()))


@pytest.mark.parametrize("op", TAKE_IT, ids=lambda op: op.name)
def test_it_is_the_last_argument_so_that_calls_without_it_stay_what_they_are(op: Op) -> None:
    last = op.target._schema.arguments[-1]
    assert (last.name, str(last.type), last.default_value) == ("num_rows", "Optional[Tensor]", None)


@pytest.mark.parametrize("op", TAKE_IT, ids=lambda op: op.name)
@pytest.mark.parametrize(
    ("num_rows", "message"),
    [
        (torch.tensor([1]), "num_rows is int64, needs int32"),
        (torch.ones(2, dtype=torch.int32), r"num_rows has shape \[2\], needs \[1\]: one number"),
        (torch.tensor(1, dtype=torch.int32), r"num_rows has shape \[\], needs \[1\]"),
        (torch.ones(1, dtype=torch.int32, device="meta"), "num_rows is on meta, xq? is on cpu"),
    ],
)
def test_what_is_no_number_of_rows_is_refused(op: Op, num_rows: Tensor, message: str) -> None:
    args = Sample((3,), 40, torch.float32).of(op, "cpu") | {"num_rows": num_rows}
    with pytest.raises(ops.define.UnsupportedInputError, match=f"{op.name}: {message}"):
        op.check(*args.values())


@kernels(*TAKE_IT, named="triton")
def test_a_launch_without_num_rows_has_no_place_for_it(op: Op, kernel: Kernel, device: str) -> None:
    """None is a constant of the compiled kernel, a tensor one pointer more."""
    sample = Sample((7,), 48, torch.bfloat16)
    assert kernel.fill is not None
    grids = []
    for count in (None, _count(3, device)):
        args = tuple((sample.of(op, device) | {"num_rows": count}).values())
        (call,) = recorded(partial(kernel.fill, *args, out=_as_tuple(op.fake(*args))))
        named = dict(zip(call.kernel.arg_names, call.args, strict=False))
        assert named["num_rows_ptr"] is count
        grids.append(call.grid)
    assert grids[0] == grids[1], "the value is known on the device alone"


class _Two(nn.Module):
    """A norm, and two linears with an activation between them, on the first rows alone."""

    def __init__(self) -> None:
        super().__init__()
        for name, size in (("a", (64, 48)), ("b", (48, 64))):
            packed = ops.quantize_weight(torch.randn(size))
            for part, t in zip(("q", "scale", "sum"), packed, strict=True):
                self.register_buffer(f"{name}_{part}", t)

    def forward(self, x: Tensor, num_rows: Tensor) -> Tensor:
        n = num_rows + 0  # computed in the graph
        xq = ops.norm_quantize(x, None, None, 1e-5, False, num_rows=n)
        h = ops.int8_linear(*xq, self.a_q, self.a_scale, self.a_sum, None, None, torch.float32, n)
        hq = ops.quantize(h, None, "gelu", num_rows=n)
        return ops.int8_linear(*hq, self.b_q, self.b_scale, self.b_sum, None, x, torch.float32, n)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_reads_the_number_when_it_runs(
    dynamic: bool, device: str, fresh_dynamo: None
) -> None:
    model, x = _Two().to(device), torch.randn(9, 48, device=device)
    compiled = torch.compile(model, fullgraph=True)
    want = model(x, _count(9, device))
    for n in (9, 4, 0):
        spoilt = x.clone()
        spoilt[n:] = torch.nan
        if dynamic:
            torch._dynamo.mark_dynamic(spoilt, 0)
        got = compiled(spoilt, _count(n, device))
        assert torch.equal(got[:n], want[:n])


@pytest.mark.parametrize("products", PRODUCTS)
def test_a_standalone_program_computes_the_leading_rows(products: str) -> None:
    """And those behind too: it has no kernels that could leave them out."""
    model, x, n = _Two(), torch.randn(9, 48), _count(4, "cpu")
    program = without_ops(torch.export.export(model, (x, n)), products)
    x[4:] = torch.nan
    torch.testing.assert_close(program.module()(x, n)[:4], model(x, n)[:4], rtol=1e-4, atol=1e-3)


@pytest.mark.cuda
def test_a_cuda_graph_reads_the_number_at_every_replay() -> None:
    model, x, n = _Two().cuda(), torch.randn(700, 48, device="cuda"), _count(700, "cuda")
    want = model(x, n)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x, n)
    for rows in (700, 130, 1, 0, 699):
        n.fill_(rows)
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y[:rows], want[:rows])
        assert y[rows + 256 :].isnan().all()
