"""ONNX files say what the ops say, in onnxruntime, whatever it fuses."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx  # noqa: TID253
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper  # noqa: TID253
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

import graphquant
import graphquant.onnx
from graphquant import MissingPackageError, OptionError, UnsupportedInputError, ops
from graphquant.exporters.onnx import _overflows_here
from graphquant.exporters.onnx_ops import QMAX7
from graphquant.exporters.program import unpack_weights
from graphquant.ops.numerics import ACTIVATIONS
from tests import zoo
from tests.small import Model, error, seeded

K = 48


def session(path: Path, *, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    """As onnxruntime is by default, all its optimizations on. On x86 without VNNI its uint8 x int8
    products overflow unless an option is set, which int8 x int8 products do not need."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if _overflows_here():
        graph = onnx.load(path, load_external_data=False).graph
        if any(n.op_type == "DequantizeLinear" for n in graph.node):
            pytest.skip("NOT RUN: with session.x64quantprecision onnxruntime 1.32 refuses Q/DQ")
        if any(t.data_type == onnx.TensorProto.UINT8 for t in graph.initializer):
            weights = [n.input[1] for n in graph.node if n.op_type == "MatMulInteger"]
            if len({*weights}) < len(weights):
                pytest.skip("NOT RUN: nor does it load two products that read one weight")
            options.add_session_config_entry("session.x64quantprecision", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(path: Path, *args: Tensor, **kwargs: Tensor) -> list[Tensor]:
    made = session(path)
    feed = dict(zip([i.name for i in made.get_inputs()], args, strict=False)) | kwargs
    return [torch.from_numpy(y) for y in made.run(None, {k: v.numpy() for k, v in feed.items()})]


def weights(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    found = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    return {n: w for n, w in found.items() if w.ndim == 2 and w.dtype == np.int8}


# --- models --------------------------------------------------------------------------------------

# The same numbers up to float32 rounding, and what that rounds to another step. If as much as one
# value in a hundred did, by one step, that would be sqrt(1/100) steps, where rounding to int8 makes
# an error of sqrt(1/12) steps: 0.35 of what int8 costs at all.
FLIPS = 0.35

BATCH = Dim("batch", max=64)
TEXT = {0: BATCH, 1: Dim("length", max=40)}
MODELS: dict[str, dict[str, dict[int, Any]]] = {
    "siglip": {"pixel_values": {0: BATCH}},
    "clip_vision": {"pixel_values": {0: BATCH}},
    "dinov2_swiglu": {"pixel_values": {0: BATCH}},
    "internvl_rms": {"pixel_values": {0: BATCH}},
    "bert": {"input_ids": TEXT, "attention_mask": TEXT},
}
CASES = [
    *(("clip_vision", "cpu"), ("bert", "cpu"), ("siglip", "portable")),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            *((name, "cpu") for name in MODELS if name not in ("clip_vision", "bert")),
            ("bert", "portable"),
        )
    ),
]
_programs: dict[str, tuple[nn.Module, ExportedProgram]] = {}


def program_of(name: str) -> tuple[nn.Module, ExportedProgram]:
    if name not in _programs:
        args, kwargs = zoo.SMALL[name].inputs(2)
        model = zoo.SMALL[name].build("sdpa")
        shapes = MODELS[name]
        _programs[name] = model, graphquant.export(model, args, kwargs, dynamic_shapes=shapes)
    return _programs[name]


@pytest.mark.parametrize(("name", "profile"), CASES)
def test_a_model_gives_what_graphquant_gives(name: str, profile: str, tmp_path: Path) -> None:
    """At another batch, and for texts at another length, than those of the export."""
    model, program = program_of(name)
    path = tmp_path / "model.onnx"
    graphquant.onnx.save(program, path, profile=profile)
    onnx.checker.check_model(path, full_check=True)

    args, kwargs = zoo.SMALL[name].inputs(5)
    kwargs = {k: v[:, :13] for k, v in kwargs.items()}
    with torch.no_grad():
        floats, own = model(*args, **kwargs), program.module()(*args, **kwargs)
    made = session(path, optimized=tmp_path / "optimized.onnx")
    names = Counter(o for n in onnx.load(path).graph.node for o in n.output)
    assert set(names.values()) == {1}
    assert [i.name for i in made.get_inputs()] == list(MODELS[name])
    assert [o.name for o in made.get_outputs()] == list(own)
    for got, ours, want in zip(
        run(path, *args, **kwargs), tree_leaves(own), tree_leaves(floats), strict=True
    ):
        assert got.shape == want.shape
        assert error(got, ours) <= FLIPS * error(ours, want)

    products = len(program.graph.find_nodes(op="call_function", target=ops.int8_linear.target))
    fused = Counter(n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert fused["MatMulIntegerToFloat"] == products  # every one in onnxruntime's own kernel
    assert not fused["MatMulInteger"]


def test_a_file_holds_each_weight_once_as_int8(tmp_path: Path) -> None:
    _, program = program_of("clip_vision")
    path = tmp_path / "model.onnx"
    graphquant.onnx.save(program, path)
    text = path.read_bytes()
    assert __file__.encode() not in text and b".py" not in text  # no lines of this machine's code
    held = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    nodes = 1000 * len(onnx.load(path).graph.node)  # bytes; operators and their names
    assert path.stat().st_size < held + nodes

    weights_of = unpack_weights(program).state_dict
    packed = {f"{n}.T": t for n, t in weights_of.items() if n.endswith(".wq")}
    found = weights(path)
    assert packed.keys() == found.keys()
    for name, wq in packed.items():
        assert np.array_equal(found[name], wq.numpy().T), name  # [K, N], as MatMulInteger wants it


def test_weights_can_stand_in_a_file_of_their_own(tmp_path: Path) -> None:
    model = seeded(lambda: Model(lambda m, x: m.fc(x), fc=nn.Linear(256, 256)))
    x = torch.randn(4, 256)
    program, path = graphquant.export(model, (x,)), tmp_path / "model.onnx"
    graphquant.onnx.save(program, path, external_data=True)
    assert path.stat().st_size < 256 * 256 <= (tmp_path / "model.onnx.data").stat().st_size
    (got,) = run(path, x)
    own = program.module()(x)
    assert error(got, own) <= FLIPS * error(own, model(x))


def test_outputs_are_named_after_what_the_model_returns(tmp_path: Path) -> None:
    forms: dict[str, Callable[..., Any]] = {
        "one": lambda y, z: y,
        "two": lambda y, z: (y, z),
        "fields": lambda y, z: {"y": y, "more": [z, y + z]},
        "an input's": lambda y, z: {"args_0": y},
    }
    wanted = {
        "one": ["output"],
        "two": ["output_0", "output_1"],
        "fields": ["y", "more.0", "more.1"],
        "an input's": ["args_0_out"],
    }
    path = tmp_path / "model.onnx"
    for form, build in forms.items():
        model = Model(lambda m, x, build=build: build(m.fc(x), x + 1), fc=nn.Linear(K, K))
        graphquant.onnx.save(graphquant.export(model, (torch.randn(3, K),)), path)
        onnx.checker.check_model(path, full_check=True)
        graph = onnx.load(path).graph
        assert [i.name for i in graph.input] == ["args_0"]
        assert [o.name for o in graph.output] == wanted[form]


# --- ops -----------------------------------------------------------------------------------------


class Quantized(nn.Module):
    """What every op that quantizes, with whatever qparams, makes of x, in float again: multiplied
    by the unit matrix."""

    one: Tensor

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.register_buffer("one", (127 * torch.eye(K)).to(torch.int8))
            self.register_buffer("scale", torch.full((K,), 1 / 127))
            self.register_buffer("sum", torch.ones(K))
            self.register_buffer("factor", torch.rand(K) + 0.5)
            self.register_buffer("gamma", torch.randn(K))
            self.register_buffer("beta", torch.randn(K))
            self.register_buffer("rows", torch.tensor([10**6], dtype=torch.int32))
            constant = ops.quantize(torch.randn(1, K) + 1)
            for name, value in zip(("cq", "c_scale", "c_shift"), constant, strict=True):
                self.register_buffer(name, value.contiguous())

    def calls(self, x: Tensor) -> dict[str, tuple[Tensor, ...]]:
        up = x.flip(-1)
        qparams: dict[str, tuple[Any, ...]] = {
            "plain": (),
            "factor": (self.factor,),
            "static": (None, -0.5, 2.0),
            "factor, static": (self.factor, -1.0, 1.0),
            "clip": (None, None, None, 0.7),
            "num_rows": (None, None, None, None, self.rows),
        }
        norms: dict[str, tuple[Any, ...]] = {
            "layer norm": (self.gamma, self.beta, 1e-5, False),
            "layer norm, bare": (None, None, 1e-5, False),
            "rms norm": (self.gamma, None, 1e-6, True),
            "rms norm, bare": (None, self.beta, 1e-6, True),
        }
        return {
            **{
                f"quantize, {name}": ops.quantize(x, None, None, *given)
                for name, given in qparams.items()
            },
            **{name: ops.norm_quantize(x, *args) for name, args in norms.items()},
            **{act: ops.quantize(x, None, act) for act in ACTIVATIONS},
            "silu, clip": ops.quantize(x, None, "silu", clip=0.5),
            "glu": ops.quantize(x, up, "gelu"),
            "glu, static": ops.quantize(x, up, "silu", low=-0.9, high=3.1),
            "product": ops.quantize(x, up),
            "transposed": tuple(t.transpose(0, 1) for t in ops.quantize(x.transpose(0, 1))),
        }

    def keep(self, x: Tensor) -> tuple[Tensor, ...]:
        y: tuple[Tensor, ...] = ops.norm_quantize_keep(
            x, self.gamma, self.beta, 1e-5, False, torch.float32
        )
        return y

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        weight = self.one, self.scale, self.sum
        out = {
            name: ops.int8_linear(*quantized, *weight, None, None, torch.float32)
            for name, quantized in self.calls(x).items()
        }
        y, *kept = self.keep(x)
        out["kept"] = y
        out["kept, residual"] = ops.int8_linear(
            *kept, *weight, self.beta, x, torch.float32, self.rows
        )
        constant = self.cq, self.c_scale, self.c_shift
        out["constant"] = x + ops.int8_linear(*constant, *weight, self.beta, None, torch.float32)
        return out


@pytest.fixture(scope="module", params=["cpu", "portable"])
def quantized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Quantized, onnxruntime.InferenceSession]:
    model = Quantized().eval()
    shapes = {"x": {0: Dim("batch"), 1: Dim("length")}}
    program = torch.export.export(model, (torch.randn(2, 3, K),), dynamic_shapes=shapes)
    path = tmp_path_factory.mktemp("ops") / "ops.onnx"
    graphquant.onnx.save(program, path, profile=request.param)
    onnx.checker.check_model(path, full_check=True)
    return model, session(path)


@given(
    batch=st.integers(1, 5),
    length=st.integers(1, 9),
    size=st.sampled_from([0.0, 1e-4, 1e-2, 1.0, 30.0]),
    middle=st.sampled_from([0.0, 1.0, -3.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_op_means_the_same(
    quantized: tuple[Quantized, onnxruntime.InferenceSession],
    batch: int,
    length: int,
    size: float,
    middle: float,
    seed: int,
) -> None:
    """Both round one value to one of 254 steps between the row's ends. Float32 errors of some 1e-5
    may make that the next step, seldom; nothing makes it another."""
    model, made = quantized
    generator = torch.Generator().manual_seed(seed)
    x = size * (torch.randn(batch, length, K, generator=generator) + middle)
    got = made.run(None, {"x": x.numpy()})
    with torch.no_grad():
        want = model(x)
        steps = {name: x_scale for name, (_, x_scale, _) in model.calls(x).items()}
        steps["kept, residual"] = model.keep(x)[2]
    for output, g in zip(made.get_outputs(), got, strict=True):
        name = output.name
        off = (torch.from_numpy(g) - want[name]).abs()
        # of float32, in x, in a norm of almost equal values, or in what is not quantized here
        noise = 2e-5 * (want[name].abs().amax() + size * (1 + abs(middle)))
        step = steps.get(name, torch.zeros(1))
        assert (off <= 1.001 * step + noise).all(), name
        if size >= 1e-2:  # below, a norm's eps leaves few steps, and ties are not rare
            assert (off > 0.5 * step + noise).float().mean() < 0.05, name


# --- onnxruntime's traps -------------------------------------------------------------------------


def _product(path: Path, *, bias_last: bool) -> tuple[Tensor, Tensor]:
    """(what onnxruntime gives, what is right) for a product with a scale for each row, to which a
    constant bias is added next, or else before."""
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (5, 64), np.uint8)
    w = generator.integers(-127, 128, (64, 32), np.int8)
    rows = generator.uniform(0.5, 4, (5, 1)).astype(np.float32)
    columns, bias = generator.uniform(0.5, 1, (2, 32)).astype(np.float32) * [[1e-4], [3]]
    given = {"x": x, "rows": rows}
    kept = {
        "w": w,
        "zero": np.uint8(128),
        "columns": columns.astype(np.float32),
        "bias": bias.astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMulInteger", ["x", "w", "zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["acc"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["rows", "columns"], ["scales"]),
        helper.make_node("Mul", ["acc", "scales"], ["scaled"]),
    ]
    if bias_last:
        nodes.append(helper.make_node("Add", ["scaled", "bias"], ["y"]))
    else:
        nodes.append(helper.make_node("Mul", ["rows", "columns"], ["shifted"]))
        nodes.append(helper.make_node("Add", ["shifted", "bias"], ["added"]))
        nodes.append(helper.make_node("Add", ["scaled", "added"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "product",
        [
            helper.make_tensor_value_info("x", TensorProto.UINT8, [None, 64]),
            helper.make_tensor_value_info("rows", TensorProto.FLOAT, [None, 1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in kept.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(made, path)
    (got,) = session(path).run(None, given)
    acc = (x.astype(np.float64) - 128) @ w.astype(np.float64)
    want = acc * rows * columns + bias + (0 if bias_last else rows * columns)
    return torch.from_numpy(got), torch.from_numpy(want)


def test_onnxruntime_spoils_a_bias_that_is_added_last(tmp_path: Path) -> None:
    """If this fails, onnxruntime is mended, and the bias may be added where it belongs."""
    got, want = _product(tmp_path / "last.onnx", bias_last=True)
    assert error(got, want) > 0.1


def test_onnxruntime_keeps_a_bias_that_is_added_to_the_shifts(tmp_path: Path) -> None:
    got, want = _product(tmp_path / "first.onnx", bias_last=False)
    assert error(got, want) < 1e-6


def test_a_large_bias_survives_the_fusion(tmp_path: Path) -> None:
    """Rows of unlike sizes, a bias that is larger than the product."""

    def make() -> nn.Module:
        return Model(lambda m, x: m.fc(x), fc=nn.Linear(64, 32))

    model = seeded(make)
    with torch.no_grad():
        model.fc.bias.mul_(100)
    x = torch.randn(6, 64) * torch.logspace(-2, 1, 6)[:, None]
    program, path = graphquant.export(model, (x,)), tmp_path / "model.onnx"
    graphquant.onnx.save(program, path)
    optimized = tmp_path / "optimized.onnx"
    session(path, optimized=optimized)
    assert "MatMulIntegerToFloat" in {n.op_type for n in onnx.load(optimized).graph.node}
    (got,) = run(path, x)
    assert error(got, program.module()(x)) < 1e-4


def test_seven_bits_cannot_overflow_16(tmp_path: Path) -> None:
    """vpmaddubsw adds two products of uint8 and int8 in an int16. In a file of 8 bits such a pair
    can pass 2^15, in one of 7 bits none can; and the weights are half as exact, no worse."""
    model = seeded(lambda: Model(lambda m, x: m.fc(x), fc=nn.Linear(64, 32)))
    x = torch.randn(200, 64)
    program, errors = graphquant.export(model, (x,)), {}
    for bits in (8, 7):
        path = tmp_path / f"{bits}.onnx"
        graphquant.onnx.save(program, path, weight_bits=bits)
        ((name, w),) = weights(path).items()
        assert name == "fc.wq.T"
        pairs = np.abs(w.astype(np.int32)).reshape(32, 2, 32).sum(1)  # rows k and k + 1
        assert (255 * pairs.max() < 2**15) == (bits == 7)
        (got,) = run(path, x)
        errors[bits] = error(got, model(x))
        assert not {"Round", "Transpose"} & {n.op_type for n in onnx.load(path).graph.node}
    assert np.abs(w).max() == QMAX7
    # rounding errors of x (1 step), of w (1 step), and of w again to 127 / 64 steps: uncorrelated,
    # so 8 bits make sqrt(1 + r), 7 bits sqrt(1 + r (1 + 2^2)) where w's are r of x's, squared
    assert errors[8] < errors[7] < 5**0.5 * errors[8]


@pytest.mark.parametrize(("machine", "vnni", "warns"), [
    ("x86_64", False, True), ("x86_64", True, False), ("aarch64", False, False),
])  # fmt: skip
def test_a_machine_that_overflows_gets_a_warning(
    machine: str,
    vnni: bool,
    warns: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: vnni)
    program = graphquant.export(
        Model(lambda m, x: m.fc(x), fc=nn.Linear(32, 32)), (torch.randn(2, 32),)
    )
    with caplog.at_level(logging.WARNING, "graphquant"):
        graphquant.onnx.save(program, tmp_path / "8.onnx")
        assert ("overflow" in caplog.text) == warns
        caplog.clear()
        graphquant.onnx.save(program, tmp_path / "7.onnx", weight_bits=7)
        assert "overflow" not in caplog.text


# --- static scales -------------------------------------------------------------------------------


class Symmetric:
    """A calibration that has seen ranges around zero, the same in both branches."""

    def absmax(self, path: str) -> None:
        return None

    def range(self, path: str) -> tuple[float, float] | None:
        return {"a": (-3.0, 3.0), "b": (-3.0, 3.0), "out": (-2.0, 2.0)}.get(path)


def branches(**options: Any) -> tuple[nn.Module, ExportedProgram, Tensor]:
    model = seeded(
        lambda: Model(
            lambda m, x: m.out(F.gelu(m.a(x)) + m.b(x.flip(-1))),
            a=nn.Linear(64, 48),
            b=nn.Linear(64, 48),
            out=nn.Linear(48, 32, bias=False),
        )
    )
    x = seeded(lambda: torch.randn(7, 5, 64))
    return model, graphquant.export(model, (x,), **options), x


def test_qdq_with_ranges_around_zero_is_graphquants_own(tmp_path: Path) -> None:
    """No shift, the same steps: the same numbers. In float between the two nodes."""
    model, program, x = branches(activation="static", calibration=Symmetric())
    path = tmp_path / "qdq.onnx"
    graphquant.onnx.save(program, path, profile="qdq")
    onnx.checker.check_model(path, full_check=True)
    (got,) = run(path, x)
    own = program.module()(x)
    assert error(got, own) <= FLIPS * error(own, model(x))

    graph = onnx.load(path).graph
    count = Counter(n.op_type for n in graph.node)
    assert (count["QuantizeLinear"], count["DequantizeLinear"]) == (3, 6)
    assert count["MatMul"] + count["Gemm"] == 3
    made = {o: n for n in graph.node for o in n.output}
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm"):  # both operands straight from int8
            assert [made[i].op_type for i in node.input[:2]] == ["DequantizeLinear"] * 2
    scales = [n.input[1] for n in graph.node if n.op_type == "QuantizeLinear"]
    assert len(set(scales)) == 2  # a's and b's is one, as in the calibration
    values = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    values |= {
        n.output[0]: numpy_helper.to_array(n.attribute[0].t)
        for n in graph.node
        if n.op_type == "Constant"
    }
    assert sorted({float(values[s]) for s in scales}) == pytest.approx([2 / 127, 3 / 127])
    assert all(values[s].shape == () for s in scales)


def test_qdq_of_a_calibrated_model_is_as_exact_as_a_scale_can_make_it(tmp_path: Path) -> None:
    """Ranges that are not around zero: steps of max(-low, high) / 127 instead of
    (high - low) / 254, at most twice as wide, so at most twice the error of each activation."""
    entry = zoo.SMALL["siglip"]
    model = entry.build("sdpa")
    args, _ = entry.inputs(2)
    calibration = graphquant.calibrate(
        model, [entry.inputs(2, draw=d)[0] for d in range(3)], progress=False
    )
    program = graphquant.export(
        model, args, calibration=calibration, activation="static", dynamic_shapes=MODELS["siglip"]
    )
    path = tmp_path / "qdq.onnx"
    graphquant.onnx.save(program, path, profile="qdq")
    onnx.checker.check_model(path, full_check=True)
    (x,), _ = entry.inputs(5)
    with torch.no_grad():
        floats, own = model(x), program.module()(x)
    for got, ours, want in zip(run(path, x), own.values(), floats.values(), strict=True):
        assert error(got, want) <= 2 * error(ours, want)


def test_qdq_names_what_is_dynamic(tmp_path: Path) -> None:
    class Partial(Symmetric):
        def range(self, path: str) -> tuple[float, float] | None:
            return None if path == "out" else super().range(path)

    _, program, _ = branches(activation="static", calibration=Partial())
    with pytest.raises(UnsupportedInputError, match="those of out are dynamic"):
        graphquant.onnx.save(program, tmp_path / "qdq.onnx", profile="qdq")
    _, program, x = branches(activation="static", calibration=Partial(), exclude=["out"])
    graphquant.onnx.save(program, tmp_path / "qdq.onnx", profile="qdq")
    assert run(tmp_path / "qdq.onnx", x)[0].shape == (7, 5, 32)


# --- what is refused, what is needed -------------------------------------------------------------


def test_half_floats_are_for_profile_portable(tmp_path: Path) -> None:
    """Sums and scales are float32 all the same, and rounded to half where the op does it."""
    model = seeded(lambda: Model(lambda m, x: m.fc(F.gelu(x)), fc=nn.Linear(64, 32))).half()
    x = torch.randn(20, 64).half()
    program, path = graphquant.export(model, (x,)), tmp_path / "half.onnx"
    for profile in ("cpu", "qdq"):
        with pytest.raises(UnsupportedInputError, match=f"'{profile}' needs a float32 model"):
            graphquant.onnx.save(program, path, profile=profile)
    graphquant.onnx.save(program, path, profile="portable")
    onnx.checker.check_model(path, full_check=True)
    (got,) = run(path, x)
    assert got.dtype == torch.float16
    own = program.module()(x)
    assert error(got, own) <= FLIPS * error(own, model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "gpu"}, r"profile='gpu' is not one of 'cpu', 'portable', 'qdq'"),
        ({"weight_bits": 4}, "weight_bits=4 is neither 7 nor 8"),
        ({"weight_bits": 7, "profile": "portable"}, "weight_bits=7 is for profile 'cpu'"),
    ],
)
def test_an_option_without_meaning_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        graphquant.onnx.save(None, "never.onnx", **options)  # type: ignore[arg-type]
    assert not Path("never.onnx").exists()


def test_without_onnxscript_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, program, _ = branches()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingPackageError, match=r"pip install graphquant\[onnx\]"):
        graphquant.onnx.save(program, tmp_path / "never.onnx")


def test_importing_it_imports_no_onnx() -> None:
    code = "import sys, graphquant.onnx; assert not {'onnx', 'onnxscript'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(_overflows_here(), reason="the speed claimed is that of VNNI or ARM's dot")
def test_profile_cpu_is_faster_than_float32(capsys: pytest.CaptureFixture[str]) -> None:
    """2.3 to 2.5 times, with four layers as with twelve; a busy machine may halve that."""
    from tools import onnx_speed

    arguments = ["vit-b-16", "--layers", "4", "--batch", "4", "--profiles", "cpu", "--threads", "1"]
    assert onnx_speed.main(arguments) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[0] == "cpu"
    assert float(row[5].removesuffix("x")) > 1.3  # of CPU time


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_has_its_masks(
    bias: bool, window: int | None, causal: bool, tmp_path: Path
) -> None:
    """With heads in groups, at another batch and length than those of the export."""

    def attend(m: nn.Module, x: Tensor, valid: Tensor, added: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (-1, 8)).transpose(1, 2) for t in m.fc(x).split([32, 16, 16], 2))
        given = added if bias else None
        y = ops.attention(q, k, v, 0.3, "64x64", valid, causal, window, given)
        return y.transpose(1, 2).flatten(2)

    def inputs(batch: int, length: int) -> tuple[Tensor, ...]:
        valid = torch.rand(batch, length) < 0.6
        valid[0] = False
        return torch.randn(batch, length, K), valid, torch.randn(1, 4, length, length)

    model = seeded(lambda: Model(attend, fc=nn.Linear(K, 64)))
    batch, length = Dim("batch", max=64), Dim("length", min=2, max=64)
    shapes = {"args": ({0: batch, 1: length}, {0: batch, 1: length}, {2: length, 3: length})}
    program = graphquant.export(model, inputs(2, 7), dynamic_shapes=shapes, quantize=False)
    path = tmp_path / "model.onnx"
    graphquant.onnx.save(program, path)
    args = inputs(3, 11)
    made = session(path)
    feed = {i.name: a.numpy() for i, a in zip(made.get_inputs(), args, strict=False)}
    (got,) = made.run(None, feed)
    torch.testing.assert_close(torch.from_numpy(got), model(*args), rtol=1e-4, atol=1e-5)
