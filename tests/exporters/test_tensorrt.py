"""Static programs with quantize and dequantize nodes: what TensorRT gets, computed by torch."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import ExportedProgram

import graphquant
from graphquant import MissingPackageError, OptionError, UnsupportedInputError
from graphquant.exporters.tensorrt import _Floats, _Torch
from graphquant.ops import (
    attention,
    int8_linear,
    norm_quantize,
    norm_quantize_keep,
    quantize,
    quantize_weight,
)
from graphquant.ops.numerics import ACTIVATIONS
from graphquant.tensorrt import qdq
from tests.seen import Seen, seen
from tests.small import NEAR, error, seeded

DIM = 32
FUSED = [
    *(("act", name) for name in ACTIVATIONS),
    *(("glu", name) for name in ACTIVATIONS),
    *((kind, None) for kind in ("plain", "layer_norm", "rms_norm", "keep")),
]


class Layer(nn.Module):
    """Attention behind a post-norm, and a gated MLP behind a pre-norm: every quantizer there is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.RMSNorm(DIM, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(4))
        self.fc1, self.gate, self.fc2 = nn.Linear(DIM, 48), nn.Linear(DIM, 48), nn.Linear(48, DIM)
        self.up, self.down = nn.Linear(DIM, 48), nn.Linear(48, DIM)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = h + self.out(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))
        h = self.norm2(x)
        x = x + self.fc2(F.silu(self.gate(h)) * self.fc1(h))
        return x + self.down(F.gelu(self.up(x)))


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return seeded(lambda: nn.Sequential(Layer())).eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(3, 7, DIM, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def program(encoder: nn.Module, x: Tensor) -> ExportedProgram:
    sizes = {"input": {0: torch.export.Dim("batch")}}
    options: dict[str, Any] = {"activation": "static", "calibration": seen(encoder, x)}
    return graphquant.export(encoder, (x,), dynamic_shapes=sizes, **options)


@pytest.fixture(scope="module")
def converted(program: ExportedProgram) -> ExportedProgram:
    return qdq(program, ops="torch")


def targets(program: ExportedProgram) -> Counter[str]:
    return Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")


def run(program: ExportedProgram, *args: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = program.module()(*args)
    return result


@pytest.mark.parametrize(("kind", "act"), FUSED)
@settings(max_examples=settings.default.max_examples // 3)  # of 16 kinds
@given(data=st.data(), seed=st.integers(0, 2**31), residual=st.booleans())
def test_nodes_and_op_differ_by_half_a_step_of_each(
    kind: str, act: str, data: st.DataObject, seed: int, residual: bool
) -> None:
    """Both round v, what is quantized, to their own steps; in the range, so by at most half of one:

    |y_op - y_nodes|[n] <= (s_op + s_nodes) / 2 * sum_k |W[n, k]|

    with s = (high - low) / 254 and max(|low|, |high|) / 127; and float32's rounding of v, of the
    products and of their sum: 1e-5 of the terms.
    """
    M, K, N = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 20)))
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, M, K, generator=g) * data.draw(st.sampled_from([1e-3, 1.0, 50.0]))
    gamma, beta = torch.randn(2, K, generator=g)
    wq, w_scale, w_sum = quantize_weight(torch.randn(N, K, generator=g))
    bias, also = torch.randn(N, generator=g), torch.randn(M, N, generator=g)
    op, args, v = {
        "plain": lambda: (quantize, (a, None, None), a),
        "act": lambda: (quantize, (a, None, act), ACTIVATIONS[act](a)),
        "glu": lambda: (quantize, (a, b, act), ACTIVATIONS[act](a) * b),
        "layer_norm": lambda: (
            norm_quantize,
            (a, gamma, beta, 1e-5, False),
            F.layer_norm(a, (K,), gamma, beta, 1e-5),
        ),
        "rms_norm": lambda: (
            norm_quantize,
            (a, gamma, None, 1e-5, True),
            F.rms_norm(a, (K,), gamma, 1e-5),
        ),
        "keep": lambda: (
            norm_quantize_keep,
            (a, gamma, beta, 1e-5, False, torch.float32),
            F.layer_norm(a, (K,), gamma, beta, 1e-5),
        ),
    }[kind]()
    factor = None
    if data.draw(st.booleans(), label="smoothed"):
        factor = torch.rand(K, generator=g) + 0.5
        v = v * factor
    wider = data.draw(st.tuples(st.floats(0, 3), st.floats(0, 3)), label="wider than the data by")
    low, high = float(v.min()), float(v.max())
    low, high = low - wider[0] * abs(low), high + wider[1] * abs(high)
    num_rows = torch.tensor([M], dtype=torch.int32)
    qparams = (factor, low, high, None, num_rows)

    def linear(rows: Any, int8_linear: Any) -> Tensor:
        rest = (also if residual else None, torch.float32, num_rows)
        result: Tensor = int8_linear(*rows[-3:], wq, w_scale, w_sum, bias, *rest)
        return result

    table = _Floats(_Torch()).table()
    want = linear(op(*args, *qparams), int8_linear)
    got = linear(table[op.target](*args, *qparams), table[int8_linear.target])
    w = wq.double().abs().sum(-1) * w_scale.double()
    step = (high - low) / 254 + max(-low, high) / 127
    size = max(-low, high) * w + bias.abs() + also.abs()
    assert ((got - want).abs() <= step / 2 * w + 1e-5 * size).all()
    if kind == "keep":
        assert torch.allclose(
            table[op.target](*args, *qparams)[0], op(*args, *qparams)[0], atol=1e-5
        )


def test_beyond_the_range_is_cut_off_at_tensorrts_ends() -> None:
    """-128 and 127 steps of the larger bound, where the op stops at both bounds."""
    x = torch.tensor([[-9.0, -2.0, 9.0]])
    rows, _, _ = _Floats(_Torch()).table()[quantize.target](x, None, None, None, -1.0, 2.0)
    assert torch.allclose(rows, torch.tensor([[-128.0, -127.0, 127.0]]) * 2 / 127)


def test_a_program_keeps_its_numbers_as_near_to_float_as_a_linear_does(
    encoder: nn.Module, x: Tensor, program: ExportedProgram, converted: ExportedProgram
) -> None:
    with torch.no_grad():
        want = encoder(x)
    assert error(run(program, x), want) < 2 * NEAR
    assert error(run(converted, x), want) < 2 * NEAR


def test_every_quantizer_is_one_pair_and_every_weight_one_node(
    program: ExportedProgram, converted: ExportedProgram
) -> None:
    before, after = targets(program), targets(converted)
    ours = {name: n for name, n in before.items() if name.startswith("graphquant.")}
    linears = ours.pop("graphquant.int8_linear.default")
    assert set(ours) == {
        f"graphquant.{name}.default" for name in ("quantize", "norm_quantize", "norm_quantize_keep")
    }
    assert not [name for name in after if name.startswith("graphquant.")]
    pair = "quantized_decomposed.quantize_per_tensor.default"
    assert after[pair] == after[pair.replace(".q", ".deq")] == sum(ours.values())
    assert after["quantized_decomposed.dequantize_per_channel.default"] == linears
    assert after["aten.linear.default"] == linears


def test_it_takes_other_batches_and_can_be_saved(
    program: ExportedProgram, converted: ExportedProgram
) -> None:
    file = io.BytesIO()
    torch.export.save(converted, file)
    file.seek(0)
    x = torch.randn(5, 7, DIM, generator=torch.Generator().manual_seed(2))
    want = run(converted, x)
    assert torch.equal(run(torch.export.load(file), x), want)
    assert error(run(program, x), want) < NEAR
    weights = {n: t for n, t in converted.state_dict.items() if n.endswith("wq")}
    assert weights and all(t.dtype == torch.int8 for t in weights.values())


def test_half_precision_stays_half_precision(encoder: nn.Module, x: Tensor) -> None:
    model = seeded(lambda: nn.Sequential(Layer())).eval().bfloat16()
    half = x.bfloat16()
    known = seen(model, half)
    static = graphquant.export(model, (half,), activation="static", calibration=known, smooth=0.5)
    got = run(qdq(static, ops="torch"), half)
    with torch.no_grad():
        want = encoder(x)
    assert got.dtype == torch.bfloat16
    # bfloat16 rounds to 2^-9 after each of a dozen ops
    assert error(got, want) < 2 * NEAR + 12 * 2**-9


def test_a_value_of_parameters_alone_is_int8_already() -> None:
    """The quantizer of a query that is a parameter has run when the program was packed."""
    xq, x_scale, x_shift = quantize(torch.randn(2, DIM), low=-3.0, high=2.0)
    wq, w_scale, w_sum = quantize_weight(torch.randn(8, DIM))
    args = (xq, x_scale, x_shift, wq, w_scale, w_sum, None, None, torch.float32)
    assert torch.allclose(
        _Floats(_Torch()).table()[int8_linear.target](*args), int8_linear(*args), atol=1e-4
    )


def test_attention_is_torchs() -> None:
    q, k, v = torch.randn(3, 2, 4, 5, 16)
    table = _Floats(_Torch()).table()
    got = table[attention.target](q, k, v, 0.3, "64x128")
    assert torch.allclose(got, F.scaled_dot_product_attention(q, k, v, scale=0.3), atol=1e-6)


def test_scales_for_each_token_are_refused_by_name(encoder: nn.Module, x: Tensor) -> None:
    known = seen(encoder, x)
    partly = Seen({n: r for n, r in known.ranges.items() if n != "0.fc2"})
    static = graphquant.export(encoder, (x,), activation="static", calibration=partly)
    with pytest.raises(UnsupportedInputError, match=r"^1 int8 linears .*\(0\.fc2\).*exclude"):
        qdq(static, ops="torch")
    left = graphquant.export(
        encoder, (x,), activation="static", calibration=partly, exclude="0.fc2"
    )
    assert error(run(qdq(left, ops="torch"), x), run(left, x)) < NEAR
    with pytest.raises(UnsupportedInputError, match=r"6 int8 linears .*, \.\.\."):
        qdq(graphquant.export(encoder, (x,)), ops="torch")


def test_other_ops_are_refused(program: ExportedProgram) -> None:
    with pytest.raises(OptionError, match="'modelopt', 'torch'"):
        qdq(program, ops="onnx")


def test_without_modelopt_it_says_what_to_install(
    program: ExportedProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modelopt", None)
    with pytest.raises(MissingPackageError, match=r'pip install "graphquant\[tensorrt\]"'):
        qdq(program)


@pytest.fixture
def modelopt(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """ModelOpt's op as its own schema and documentation say; the true one runs on CUDA only."""
    if importlib.util.find_spec("modelopt"):
        pytest.skip("NOT RUN: ModelOpt is installed, and its op runs on CUDA only")
    for name in ("modelopt", "modelopt.torch", "modelopt.torch.quantization"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with torch.library._scoped_library("tensorrt", "FRAGMENT") as lib:
        lib.define(
            "quantize_op(Tensor input, Tensor amax, int num_bits, int exponent_bits, "
            "bool unsigned, bool narrow_range) -> Tensor"
        )

        def quantize_op(
            x: Tensor, amax: Tensor, bits: int, exponent: int, unsigned: bool, narrow: bool
        ) -> Tensor:
            assert (bits, exponent, unsigned, narrow) == (8, 0, False, False)
            s = amax / 127
            return ((x / s).round().clamp(-128, 127) * s).to(x.dtype)

        lib.impl("quantize_op", quantize_op, "CPU")
        lib._register_fake("quantize_op", lambda x, *_: torch.empty_like(x))
        yield


@pytest.mark.usefixtures("modelopt")
def test_modelopts_nodes_compute_what_torchs_do(
    x: Tensor, program: ExportedProgram, converted: ExportedProgram
) -> None:
    with_theirs = qdq(program)
    # the scale is rounded to float32 in one and not in the other: now and then a step, of 9
    assert error(run(with_theirs, x), run(converted, x)) < 1e-3
    nodes = [n for n in with_theirs.graph.nodes if str(n.target) == "tensorrt.quantize_op.default"]
    per_channel = [n for n in nodes if n.args[1].meta["val"].numel() > 1]
    weights = targets(converted)["quantized_decomposed.dequantize_per_channel.default"]
    assert len(per_channel) == weights and len(nodes) > weights
    assert all(n.args[1].meta["val"].shape[1:] == (1,) for n in per_channel)
    assert not [name for name in targets(with_theirs) if name.startswith("graphquant.")]
