"""Inductor's code calls sites that fill its buffers. On a CPU too here, with sites in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphquant import ops
from graphquant.lowering import inductor
from graphquant.ops import cpu, define
from graphquant.ops.define import Op
from graphquant.ops.numerics import padded, row_stride
from tests.ops.qparams import RECIPES
from tests.processes import in_a_new_process
from tests.small import NEAR, error, seeded

K, N = 40, 24


@dataclass
class Call:
    """One call of one site: what its kernel would be given."""

    site: int
    op: str
    constants: tuple[Any, ...]
    given: tuple[Tensor | None, ...]
    results: tuple[Tensor, ...]


@dataclass
class Sites:
    """Stand for Op.site: each runs the op's reference into the buffers that it is given."""

    made: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def site(self, op: Op, *constants: Any) -> Callable[..., None]:
        number, n_inputs = len(self.made), sum(op.tensors)
        self.made.append(op.name)

        def run(stream: int, *tensors: Tensor | None) -> None:
            given, results = tensors[:n_inputs], tensors[n_inputs:]
            left, rest = iter(given), iter(constants)
            found = op.reference(*(next(left if is_ else rest) for is_ in op.tensors))
            for buffer, value in zip(results, define._as_tuple(found), strict=True):
                assert buffer is not None
                assert (buffer.shape, buffer.dtype) == (value.shape, value.dtype)
                if is_over(buffer, given[0]):
                    buffer.as_strided(
                        (*buffer.shape[:-1], 2 * buffer.shape[-1]), buffer.stride()
                    ).fill_(99)
                else:
                    assert buffer.stride() == value.stride()
                    whole_rows(buffer).fill_(99)
                buffer.copy_(value)
            self.calls.append(Call(number, op.name, constants, given, results))  # type: ignore[arg-type]

        run.copy = lambda: run  # type: ignore[attr-defined]
        return run

    def shared(
        self, op: Op, constants: tuple[Any, ...], tensors: tuple[Any, ...]
    ) -> Callable[..., None]:
        """Stands for Op.shared_site."""
        return self.site(op, *constants)


def is_over(xq: Tensor, x: Tensor | None) -> bool:
    """Do the rows xq lie at the start of the rows x?"""
    return x is not None and xq.data_ptr() == x.data_ptr() and x.numel() > 0


def whole_rows(buffer: Tensor) -> Tensor:
    """A result with the pads of its int8 rows. Raises if they are not in its storage."""
    if buffer.dtype != torch.int8:
        return buffer
    wide = (*buffer.shape[:-1], padded(buffer.shape[-1]))
    return buffer.as_strided(wide, buffer.stride(), buffer.storage_offset())


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    inductor.register()
    # what is on disk was lowered without our sites, and what we lower needs them
    with torch.inference_mode(), torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


@pytest.fixture
def sites(monkeypatch: pytest.MonkeyPatch) -> Sites:
    made = Sites()
    monkeypatch.setattr(inductor, "_has_sites", lambda device: True)
    without_cpu_kernels(monkeypatch)
    monkeypatch.setattr(Op, "site", lambda op, *constants: made.site(op, *constants))
    monkeypatch.setattr(Op, "shared_site", lambda *args: made.shared(*args))
    return made


class Layer(nn.Module):
    """A layer whose rows have pads, in width and in hidden width."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(K), nn.RMSNorm(K, eps=1e-3)
        self.q, self.k, self.v, self.out = (nn.Linear(K, K) for _ in range(4))
        self.fc1, self.gate, self.fc2 = nn.Linear(K, 72), nn.Linear(K, 72), nn.Linear(72, K)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.out(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))
        h = self.norm2(x)
        return x + self.fc2(F.silu(self.gate(h)) * self.fc1(h))


def encoder() -> nn.Module:
    return seeded(lambda: nn.Sequential(Layer(), Layer(), nn.Linear(K, N, bias=False)))


PER_LAYER = [
    "norm_quantize", "int8_linear", "quantize", "int8_linear",
    "norm_quantize", "int8_linear", "quantize", "int8_linear",
]  # fmt: skip


def without_cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for a GPU: ops are references."""
    monkeypatch.setattr(Op, "on_cpu", lambda *_: None)
    monkeypatch.setattr("graphquant.passes.pack_weights.is_packed_for", lambda linear: False)
    monkeypatch.setattr("graphquant.passes.attention.dtype.has_bfloat16", lambda: False)


def compiled(model: Any, **options: Any) -> Any:
    settings = {"force_disable_caches": True, **options.pop("inductor", {})}
    return torch.compile(
        model, backend="graphquant", fullgraph=True, options={"inductor": settings}, **options
    )


def by_inductor(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(fn, backend="inductor", fullgraph=True, **options)


# Calls -------------------------------------------------------------------------------------------


def test_an_encoder_computes_what_it_does_without_sites(
    sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same references on the same values; around them the same code of Inductor."""
    model, x = encoder(), torch.randn(3, 5, K)
    run = compiled(model)
    got = run(x)
    assert [c.op for c in sites.calls] == [*PER_LAYER, *PER_LAYER, "quantize", "int8_linear"]
    other = torch.randn(3, 5, K)
    of_other = run(other)
    torch._dynamo.reset()
    monkeypatch.setattr(inductor, "_has_sites", lambda device: False)
    usual = compiled(model)
    assert error(got, usual(x)) < 1e-5
    assert error(of_other, usual(other)) < 1e-5
    assert error(got, model(x)) < 2 * NEAR


def test_every_call_in_the_graph_has_a_site_of_its_own(sites: Sites) -> None:
    """Two equal calls too: that their tensors stay the same is then up to the memory plan alone."""
    run, x = compiled(encoder()), torch.randn(3, 5, K)
    for _ in range(3):
        run(x)
    one, two, three = (sites.calls[i : i + 18] for i in (0, 18, 36))
    assert len(sites.made) == 18 and len(sites.calls) == 54
    assert sorted(c.site for c in one) == list(range(18))
    assert [c.site for c in one] == [c.site for c in two] == [c.site for c in three]


def test_arguments_arrive_in_the_order_of_the_schema(sites: Sites) -> None:
    model = encoder()
    compiled(model)(torch.randn(3, 5, K))
    layer_norm, qkv, attended, out, rms_norm, _, gated, *_ = sites.calls
    dynamic = (None, None, None)  # low, high, clip
    assert layer_norm.constants == (1e-5, False, *dynamic)
    assert rms_norm.constants == (1e-3, True, *dynamic)
    assert attended.constants == (None, *dynamic) and attended.given[1] is None
    assert gated.constants == ("silu", *dynamic)
    gate, up, factor, num_rows = gated.given
    assert gate is not None and up is not None and factor is None and num_rows is None
    assert gate.shape == up.shape == (3, 5, 72) and gate.data_ptr() != up.data_ptr()
    assert qkv.constants == out.constants == (torch.float32,)
    _, gamma, beta, factor, num_rows = layer_norm.given
    assert factor is None and num_rows is None
    assert gamma is not None and torch.equal(gamma, model[0].norm1.weight)
    assert beta is not None and torch.equal(beta, model[0].norm1.bias)
    assert rms_norm.given[2] is None
    xq, x_scale, _, wq, _, _, bias, residual, num_rows = out.given
    assert xq is not None and xq.shape == (3, 5, K) and xq.dtype == torch.int8
    assert x_scale is not None and x_scale.shape == (3, 5, 1)
    assert wq is not None and wq.shape == (K, K)
    assert bias is not None and torch.equal(bias, model[0].out.bias)
    assert residual is not None and residual.shape == (3, 5, K)
    assert qkv.given[7] is None and num_rows is None
    last = sites.calls[-1]
    assert last.given[6] is None and last.given[7] is None


@pytest.mark.parametrize("name", RECIPES)
def test_qparams_arrive(sites: Sites, name: str) -> None:
    factor, *numbers, _ = RECIPES[name].on(K, "cpu")
    factor = None if factor is None else factor.contiguous()  # strided ones are copied

    def fn(x: Tensor, factor: Tensor | None, n: Tensor) -> Any:
        kept = ops.norm_quantize_keep(x, None, None, 1e-5, True, x.dtype, factor, *numbers, n)
        return *kept, *ops.quantize(x, None, "gelu", factor, *numbers, n)

    x, n = torch.randn(3, 5, K), torch.tensor([15], dtype=torch.int32)
    got = by_inductor(fn)(x, factor, n)
    norm, act = sites.calls
    assert norm.constants == (1e-5, True, torch.float32, *numbers)
    assert act.constants == ("gelu", *numbers)
    for *_, given, num_rows in (norm.given, act.given):
        assert num_rows is not None and num_rows.data_ptr() == n.data_ptr()
        assert (given is None) == (factor is None)
        assert given is None or factor is None or given.data_ptr() == factor.data_ptr()
    assert all(map(torch.allclose, got, fn(x, factor, n)))


# Layouts -----------------------------------------------------------------------------------------


def quantize_and_more(x: Tensor) -> Any:
    xq, x_scale, x_shift = ops.quantize(x + x)  # exact, so that no step is another
    return xq, x_scale, x_shift, xq.float() * x_scale + x_shift


@pytest.mark.parametrize("shape", [(3, 5, K), (7, 33), (2, 64), (K,), (0, K), (1, 1)])
def test_int8_results_have_the_traced_strides_and_their_pads(
    sites: Sites, shape: tuple[int, ...]
) -> None:
    """`Sites` writes to the pads; here the caller gets the buffers themselves."""
    x = torch.randn(shape)
    xq, x_scale, x_shift, y = by_inductor(quantize_and_more)(x)
    assert [c.op for c in sites.calls] == ["quantize"]
    want = ops.quantize(x + x)
    for got, eager in zip((xq, x_scale, x_shift), want, strict=True):
        assert (got.shape, got.stride(), got.dtype) == (eager.shape, eager.stride(), eager.dtype)
    whole_rows(xq)
    assert torch.allclose(y, want[0].float() * want[1] + want[2])
    assert error(y, x + x) < NEAR or not x.numel()


def test_pads_reach_the_linear_with_the_rows(sites: Sites) -> None:
    def fn(x: Tensor, wq: Tensor, w_scale: Tensor, w_sum: Tensor) -> Tensor:
        return ops.int8_linear(*ops.quantize(x), wq, w_scale, w_sum, None, None, torch.float32)

    x, weight = torch.randn(3, 5, K), ops.quantize_weight(torch.randn(N, K))
    got = by_inductor(fn)(x, *weight)
    quantize, linear = sites.calls
    assert linear.given[0] is not None and linear.given[3] is not None
    assert linear.given[0].data_ptr() == quantize.results[0].data_ptr()
    assert linear.given[3].data_ptr() == weight[0].data_ptr()  # packed weights are read in place
    assert linear.given[3].stride() == (padded(K), 1)
    whole_rows(linear.given[0])
    assert torch.equal(got, fn(x, *weight))


LAYOUTS: dict[str, tuple[Callable[[], Tensor], bool]] = {
    "contiguous": (lambda: torch.randn(3, 5, K), True),
    "part of a wider row": (lambda: torch.randn(3, 5, 3 * K)[..., K : 2 * K], True),
    "columns": (lambda: torch.randn(3, K, 5).transpose(1, 2), False),
    "heads": (lambda: torch.randn(3, 4, 5, K).transpose(1, 2), False),
    "tokens first": (lambda: torch.randn(5, 3, K).transpose(0, 1), False),
    "every other column": (lambda: torch.randn(3, 5, 2 * K)[..., ::2], False),
    "one row, expanded": (lambda: torch.randn(1, 1, K).expand(3, 5, K), True),
    "rows of a batch, expanded": (lambda: torch.randn(1, 5, K).expand(3, 5, K), False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_are_read_in_place_and_all_else_is_made_contiguous(sites: Sites, name: str) -> None:
    make, in_place = LAYOUTS[name]
    x = make()
    got = by_inductor(lambda x: ops.quantize(x))(x)
    (call,) = sites.calls
    given, *others = call.given
    assert others == [None] * 3
    assert given is not None and row_stride(given) is not None
    assert (given.data_ptr() == x.data_ptr()) == in_place
    assert given.is_contiguous() or (in_place and given.stride() == x.stride())
    assert torch.equal(given, x)
    assert all(map(torch.equal, got, ops.quantize(x)))


def test_the_first_op_that_a_process_lowers_reads_part_of_a_row_in_place() -> None:
    """What a CPU kernel reads in place is known before one is called."""
    if (why := cpu.missing()) is not None:
        pytest.skip(f"NOT RUN: {why}")
    done = in_a_new_process(
        """
import torch, graphquant
from torch._inductor.utils import run_and_get_code
torch._inductor.config.force_disable_caches = True  # code of an earlier process proves nothing
fn = torch.compile(lambda x: graphquant.ops.quantize(x[..., 40:80]))
print("\\n".join(run_and_get_code(fn, torch.randn(3, 5, 120))[1]))
"""
    )
    assert done.returncode == 0, done.stderr
    assert "graphquant_quantize(" in done.stdout  # called as a kernel
    assert "reinterpret_tensor(arg0_1, (3, 5, 40), (600, 120, 1), 40)" in done.stdout
    assert "cpp_fused" not in done.stdout and "copy" not in done.stdout


def test_attention_reads_heads_in_place_and_writes_them_side_by_side(sites: Sites) -> None:
    """q, k and v are views of one product, and the next linear reads tokens."""

    def fn(qkv: Tensor) -> Any:
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in qkv.split(64, -1))
        return ops.attention(q, k, v, 0.25, "128x128").transpose(1, 2).flatten(2)

    qkv = torch.randn(3, 5, 192)
    got = by_inductor(fn)(qkv)
    (call,) = sites.calls
    assert call.constants == (0.25, "128x128", False, None)
    for i, given in enumerate(call.given[:3]):
        assert given is not None and given.data_ptr() == qkv[..., 64 * i :].data_ptr()
        assert given.stride() == (5 * 192, 16, 192, 1)
    assert got.data_ptr() == call.results[0].data_ptr()
    assert torch.equal(got, fn(qkv))


def test_attention_takes_masks_and_a_bias(sites: Sites) -> None:
    """The mask is computed in the graph; the bias is expanded, and read in place."""

    def fn(x: Tensor, valid: Tensor, bias: Tensor) -> Any:
        added = bias[None].expand(1, 3, 5, 5)
        return ops.attention(x, x, x + 1, 0.25, "64x64", valid != 0, False, 2, added)

    x, valid, bias = (
        torch.randn(2, 3, 5, 16),
        torch.tensor([[1] * 5, [0, 1, 1, 0, 0]]),
        torch.randn(1, 5, 5),
    )
    got = by_inductor(fn)(x, valid, bias)
    (call,) = sites.calls
    assert call.constants == (0.25, "64x64", False, 2)
    *_, keys, given = call.given
    assert keys is not None and torch.equal(keys, valid != 0)
    assert given is not None and given.data_ptr() == bias.data_ptr() and given.stride(1) == 0
    assert torch.equal(got, fn(x, valid, bias))


def test_heads_whose_columns_are_apart_are_copied(sites: Sites) -> None:
    x = torch.randn(2, 3, 16, 5)
    by_inductor(lambda x: ops.attention(*[x.transpose(2, 3)] * 3, 0.25, "128x128"))(x)
    (call,) = sites.calls
    assert all(given is not None and given.is_contiguous() for given in call.given[:3])


def test_a_value_that_inductor_would_lay_out_otherwise_is_laid_out_as_traced(sites: Sites) -> None:
    """A result of a transposed product, say, in which Inductor is free to choose."""

    def fn(a: Tensor, b: Tensor) -> Any:
        y = (a @ b).transpose(0, 1) + 1
        return ops.quantize(y)

    a, b = torch.randn(6, 8), torch.randn(8, K)
    got = by_inductor(fn)(a, b)
    given, *_ = sites.calls[0].given
    assert given is not None and given.is_contiguous()
    want = ops.quantize((a @ b).transpose(0, 1).contiguous() + 1)
    assert (got[0].int() - want[0].int()).abs().max() <= 1  # products in another order
    assert error(got[1], want[1]) < 1e-5


def test_a_sum_that_two_ops_read_is_written_once(sites: Sites) -> None:
    """The residual stream: a norm reads it, and the layer's last linear adds it."""
    weight = ops.quantize_weight(torch.randn(K, K))

    def fn(x: Tensor, y: Tensor) -> Tensor:
        h = (x + y.transpose(0, 1)).flatten(0, 1)
        xq = ops.norm_quantize(h.view(3, 5, K), None, None, 1e-5, False)
        return ops.int8_linear(*xq, *weight, None, h.view(3, 5, K), torch.float32)

    x, y = torch.randn(3, 5, K), torch.randn(5, 3, K)
    assert torch.allclose(by_inductor(fn)(x, y), fn(x, y), atol=1e-4)
    norm, linear = sites.calls
    assert norm.given[0] is not None and linear.given[7] is not None
    assert norm.given[0].data_ptr() == linear.given[7].data_ptr()


def test_buffers_that_are_reused_hold_what_was_written_last(sites: Sites) -> None:
    """Inductor gives the memory of what is no longer read to what comes next."""

    def fn(x: Tensor) -> Any:
        for _ in range(4):
            xq, scale, shift = ops.quantize(x)
            x = xq.float() * scale + shift + 1
        return x

    x = torch.randn(64, 64)
    assert torch.allclose(by_inductor(fn)(x), fn(x), atol=1e-5)
    assert len(sites.calls) == 4


def test_a_result_that_is_written_to_afterwards_is_not_what_the_op_read(sites: Sites) -> None:
    def fn(x: Tensor) -> Any:
        xq, scale, shift = ops.quantize(x)
        again = ops.quantize(x + shift)
        scale.mul_(2)
        return xq, scale, again[1]

    x = torch.randn(4, K)
    assert all(map(torch.allclose, by_inductor(fn)(x), fn(x)))


# Int8 rows over the floats that they come from ---------------------------------------------------

WIDE = 2048


class Mlp(nn.Module):
    def __init__(self, wide: int = WIDE) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(K, wide), nn.Linear(wide, K)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(x)))


def mlps(wide: int = WIDE) -> nn.Module:
    return seeded(lambda: nn.Sequential(Mlp(wide), Mlp(wide))).to(torch.bfloat16)


def overlaid(sites: Sites) -> list[bool]:
    return [is_over(c.results[0], c.given[0]) for c in sites.calls if c.constants[0] == "gelu"]


def test_large_floats_are_written_over_by_their_int8(
    sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Sites` fills whole rows before it writes int8: who read the floats later would see it."""
    monkeypatch.setattr(inductor, "LARGE", 0)
    model, x = mlps(), torch.randn(3, 5, K, dtype=torch.bfloat16)
    run = compiled(model)
    got, again = run(x), run(x)
    assert overlaid(sites) == [True] * 4
    fc2 = sites.calls[3]
    assert fc2.op == "int8_linear" and fc2.given[0] is not None
    assert fc2.given[0].stride() == (5 * 2 * WIDE, 2 * WIDE, 1)
    torch._dynamo.reset()
    monkeypatch.setattr(inductor, "_has_sites", lambda device: False)
    want = compiled(model)(x)
    assert torch.equal(got, want) and torch.equal(again, want)


def test_int8_rows_have_memory_of_their_own_unless_all_is_right(
    sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 5, K, dtype=torch.bfloat16)
    compiled(mlps())(x)  # not large
    monkeypatch.setattr(inductor, "LARGE", 0)
    torch._dynamo.reset()
    compiled(mlps(WIDE + 8))(x)  # rows would not start at cache lines
    torch._dynamo.reset()
    compiled(mlps().float())(x.float())
    assert overlaid(sites) == [False] * 6


def test_a_static_range_leaves_the_floats_alone(
    sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No program waits until its whole row is read: it would write over what others still read."""
    monkeypatch.setattr(inductor, "LARGE", 0)
    quantized = ops.quantize(torch.randn(3, 5, K))
    w1, w2 = ops.quantize_weight(torch.randn(WIDE, K)), ops.quantize_weight(torch.randn(N, WIDE))

    def mlp(*qparams: Any) -> Callable[..., Tensor]:
        def fn(*q: Tensor) -> Tensor:
            x = ops.int8_linear(*q[:6], None, None, torch.bfloat16)
            x = ops.quantize(x, None, "gelu", *qparams)
            return ops.int8_linear(*x, *q[6:], None, None, torch.bfloat16)

        return fn

    for qparams in ((), (None, None, None, 3.0), (None, -0.2, 3.0)):
        torch._dynamo.reset()
        by_inductor(mlp(*qparams))(*quantized, *w1, *w2)
    assert overlaid(sites) == [True, True, False]


def test_floats_that_are_read_again_are_not_written_over(
    sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "LARGE", 0)

    class Both(Mlp):
        def forward(self, x: Tensor) -> Any:
            h = self.fc1(x)
            return self.fc2(F.gelu(h)), h

    model = seeded(Both).to(torch.bfloat16)
    x = torch.randn(3, 5, K, dtype=torch.bfloat16)
    _, h = compiled(model)(x)
    assert error(h, model(x)[1]) < NEAR

    def of_an_input(x: Tensor) -> Any:
        return ops.quantize(x, act="gelu")

    mine = torch.randn(4, WIDE, dtype=torch.bfloat16)
    before = mine.clone()
    by_inductor(of_an_input)(mine)
    assert torch.equal(mine, before)
    assert overlaid(sites) == [False] * 2


# Symbolic sizes ----------------------------------------------------------------------------------


def test_symbolic_sizes_have_a_site_for_each_combination(sites: Sites) -> None:
    run, model = compiled(encoder(), dynamic=True), encoder()
    sizes = [(3, 5), (4, 5), (2, 9), (4, 5), (3, 5)]
    for batch, tokens in sizes:
        x = torch.randn(batch, tokens, K)
        torch._dynamo.mark_dynamic(x, 0)
        assert error(run(x), model(x)) < 2 * NEAR
    per_call = [[c.site for c in sites.calls[i : i + 18]] for i in range(0, 5 * 18, 18)]
    assert len(sites.calls) == 5 * 18 and len(sites.made) == 3 * 18
    assert per_call[3] == per_call[1] and per_call[4] == per_call[0]
    first = sites.calls[18:36]
    assert [c.op for c in first] == [*PER_LAYER, *PER_LAYER, "quantize", "int8_linear"]
    assert first[0].constants == (1e-5, False, None, None, None)


def test_only_so_many_sizes_are_kept(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(define, "MAX_SIZES", 2)
    run = by_inductor(quantize_and_more, dynamic=True)
    for batch in (3, 4, 3, 5, 3):  # 5 makes room, so 3 is made anew
        x = torch.randn(batch, 5, K)
        assert all(map(torch.allclose, run(x), quantize_and_more(x)))
    assert [c.site for c in sites.calls] == [0, 1, 0, 2, 3]


def test_a_symbolic_batch_is_not_specialized(sites: Sites) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    run = torch.compile(quantize_and_more, backend=counter, fullgraph=True)
    for batch in (3, 4, 9, 2):
        x = torch.randn(batch, 5, 2 * K)[..., :K]
        torch._dynamo.mark_dynamic(x, 0)
        assert all(map(torch.allclose, run(x), quantize_and_more(x)))
    assert counter.frame_count == 1 and len(sites.made) == 4


def test_rows_whose_number_depends_on_values_have_a_site_for_each_number(sites: Sites) -> None:
    def fn(x: Tensor, keep: Tensor) -> Any:
        return ops.quantize(x[keep.nonzero().squeeze(1)] + 1)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run, x = by_inductor(fn), torch.randn(6, K)
        for n in (2, 5, 2):
            keep = torch.arange(6) < n
            assert all(map(torch.allclose, run(x, keep), ops.quantize(x[:n] + 1)))
    assert [c.site for c in sites.calls] == [0, 1, 0]


def test_a_size_among_the_constants_reaches_the_op(sites: Sites) -> None:
    """`max_length` of attention, where the length of sentences is symbolic."""

    def fn(q: Tensor, valid: Tensor) -> Tensor:
        index, _, position, cu_seqlens, tiles, _ = ops.token_index(valid, True)
        one = q.flatten(0, 1)[index].unflatten(1, (2, 16)).transpose(0, 1)[None]
        rest = cu_seqlens, position, tiles, 0.25, valid.shape[1]
        return ops.varlen_attention(one, one, one, *rest)

    run = by_inductor(fn, dynamic=True)
    for S in (5, 9):
        q, valid = torch.randn(3, S, 32), torch.ones(3, S, dtype=torch.bool)
        torch.testing.assert_close(run(q, valid), fn(q, valid))
        assert sites.calls[-1].op == "varlen_attention"
        assert sites.calls[-1].constants == (0.25, S, False, None)


# The usual way -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_wrapper_in_cpp_takes_the_usual_way(sites: Sites) -> None:
    x = torch.randn(3, 5, K)
    got = by_inductor(quantize_and_more, options={"cpp_wrapper": True})(x)
    assert not sites.calls
    assert all(map(torch.allclose, got, quantize_and_more(x)))


def test_a_cpu_takes_the_usual_way() -> None:
    def refuses(*_: Any) -> Any:
        raise AssertionError("a site on a CPU")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Op, "site", refuses)
        x = torch.randn(3, 5, K)
        assert all(map(torch.allclose, by_inductor(quantize_and_more)(x), quantize_and_more(x)))


# On a GPU ----------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_after_the_first_call_no_launch_goes_through_python(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}
    real = define.site

    def spy(name: str, *constants: Any) -> Any:
        site = made[f"{len(made)} {name} {constants}"] = real(name, *constants)
        return site

    monkeypatch.setattr(define, "site", spy)
    monkeypatch.setenv("GRAPHQUANT_SELECT", "always")
    model = encoder().to("cuda", dtype)
    run, x = compiled(model), torch.randn(3, 64, K, device="cuda", dtype=dtype)
    first = run(x)
    assert len(made) == 18
    assert not [name for name, site in made.items() if not site.ready]
    for _ in range(3):
        other = torch.randn_like(x)
        assert error(run(other), model(other)) < 2 * NEAR
    assert torch.equal(run(x), first)
