"""graphquant.export: the rewritten model as a program with int8 weights, saved and loaded."""

from __future__ import annotations

import copy
import operator
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

import graphquant
from graphquant import OptionError, Report, UnsupportedInputError
from graphquant.exporters.program import unpack_weights
from graphquant.ir.paths import weight_path
from graphquant.ops import cpu, int8_linear, pack_weight, quantize, quantize_weight
from tests import zoo
from tests.models import BREAKS, error, pairs, run_entry, same_structure
from tests.models import on as moved
from tests.processes import in_a_new_process
from tests.small import Mlp, Model, again, seeded

TABLE = [p for p in pairs(zoo.SMALL) if p[0] not in BREAKS]  # those torch.export refuses as well
SOME = {("clip_vision", "eager"), ("siglip", "sdpa"), ("bert", "sdpa"), ("internvl_rms", "sdpa")}


def some(table: list[tuple[str, str]]) -> list[Any]:
    """All of them, most marked slow."""
    return [pytest.param(*p, marks=() if p in SOME else pytest.mark.slow) for p in table]


def tensors(program: ExportedProgram) -> dict[str, Tensor]:
    held = {**program.state_dict, **program.constants}
    return {n: t for n, t in held.items() if isinstance(t, Tensor)}


def bytes_of(held: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.itemsize for t in held.values())


def equal(got: Any, want: Any) -> bool:
    both = zip(tree_leaves(got), tree_leaves(want), strict=True)
    return all(torch.equal(g, w) if isinstance(w, Tensor) else g == w for g, w in both)


@torch.no_grad()
def called(program: ExportedProgram, *args: Any, **kwargs: Any) -> Any:
    return program.module()(*args, **kwargs)


@pytest.mark.parametrize(("name", "attn"), some(TABLE))
def test_a_program_computes_what_torch_compile_computes(name: str, attn: str, device: str) -> None:
    entry = zoo.SMALL[name]
    args, kwargs = moved(device, entry.inputs(2))
    model = entry.build(attn).to(device)
    reports: list[Report] = []
    program = graphquant.export(model, args, kwargs, on_report=reports.append)
    compiled = run_entry(entry, attn, device, attention_dtype="float32")  # as an export has it
    got = called(program, *args, **kwargs)
    same_structure(got, compiled.float)
    if device == "cuda" and name.startswith("nn_transformer_encoder"):
        # torch.compile sees one fused op here and export its parts: attention of q, k, v that lie
        # otherwise rounds otherwise on a GPU, and int8 turns that into steps
        assert error(got, compiled.int8) < 2e-3
    else:
        assert equal(got, compiled.int8)
    (report,) = reports
    assert report.coverage == 1.0
    packed = {weight_path(n) for n in model.state_dict() if n.endswith("weight")}
    packed &= {o.path for o in report.linears}
    left = [n for n in program.state_dict if n.endswith("weight") and weight_path(n) in packed]
    assert packed and not left


def test_bert_takes_any_batch_and_length() -> None:
    entry = zoo.SMALL["bert"]
    _, kwargs = entry.inputs(3)
    model = entry.build("sdpa")
    sizes = {0: Dim("batch"), 1: Dim("length", max=40)}
    program = graphquant.export(model, (), kwargs, dynamic_shapes=dict.fromkeys(kwargs, sizes))
    for batch, length in ((1, 20), (5, 7), (2, 19)):
        _, kwargs = entry.inputs(batch)
        kwargs = {n: v[:, :length] for n, v in kwargs.items()}
        with torch.no_grad():
            want = model(**kwargs)
        got = called(program, **kwargs)
        same_structure(got, want)
        assert error(got, want) < 0.04


class Narrow(nn.Module):
    """Its program holds for batches above 4 alone; y is twice as long as x."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor, y: Tensor, *, times: float = 1.0) -> Tensor:
        z = torch.cat([self.fc(x), self.fc(x)]) + times * y
        return z if x.shape[0] > 4 else -z


def test_sizes_that_torch_narrowed_stay_narrow() -> None:
    auto = {0: Dim.AUTO}
    inputs = torch.randn(8, 16), torch.randn(16, 16)
    shapes = {"x": auto, "y": auto, "times": None}
    model = Narrow().eval()
    program = graphquant.export(model, inputs, {"times": 2.0}, dynamic_shapes=shapes)
    x, y = torch.randn(5, 16), torch.randn(10, 16)
    with torch.no_grad():
        assert error(called(program, x, y, times=2.0), model(x, y, times=2.0)) < 0.03
    with pytest.raises((AssertionError, RuntimeError)):
        called(program, x[:3], y[:6], times=2.0)  # the other branch
    with pytest.raises((AssertionError, RuntimeError)):
        called(program, x, y[:9], times=2.0)


def test_a_program_does_not_follow_the_model_nor_change_it() -> None:
    model, x = seeded(Mlp).eval(), torch.randn(3, 64)
    before = copy.deepcopy(model.state_dict())
    program = graphquant.export(model, (x,))
    want = called(program, x)
    assert equal(model.state_dict(), before) and list(model.state_dict()) == list(before)
    assert not any(hasattr(m, "wq") for m in model.modules())
    assert not any(t.requires_grad for t in tensors(program).values())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert equal(called(program, x), want)


def test_names_of_packed_weights_say_where_they_come_from() -> None:
    entry = zoo.SMALL["siglip"]
    program = graphquant.export(entry.build("sdpa"), *entry.inputs(2))
    held = tensors(unpack_weights(program))
    assert held.keys() == tensors(program).keys()
    stacked = "encoder.layers.0.self_attn.q_proj_k_proj_v_proj"
    assert held[f"{stacked}.wq"].dtype == torch.int8
    assert held[f"{stacked}.w_scale"].shape == (3 * 64,)
    assert held["encoder.layers.1.mlp.fc2.wq"].shape == (64, 240)
    # the pooling head's query is a parameter: with a fixed batch its int8 is a weight as well
    assert held["head.attention.in_proj.xq"].dtype == torch.int8


def test_tied_weights_stay_one() -> None:
    embedding = nn.Embedding(50, 64)
    model = Model(
        lambda m, i: m.fc(m.a(i)) + m.b(i), a=embedding, b=embedding, fc=nn.Linear(64, 64)
    )
    held = tensors(graphquant.export(model, (torch.arange(7),)))
    assert sum(t.shape == (50, 64) for t in held.values()) == 1
    tables = [t for n, t in held.items() if n in ("a.weight", "b.weight")]
    assert len({t.data_ptr() for t in tables}) == 1


def test_exporting_again_gives_the_same() -> None:
    model, x = seeded(Mlp).eval(), torch.randn(3, 64)
    first, second = (graphquant.export(m, (x,)) for m in (model, again(model)))
    assert list(first.state_dict) == list(second.state_dict)
    assert equal(called(first, x), called(second, x))


def test_under_inference_mode_as_well() -> None:
    model, x = seeded(Mlp).eval(), torch.randn(3, 64)
    with torch.inference_mode():
        program = graphquant.export(model, (x,))
    assert not any(t.is_inference() for t in tensors(program).values())
    assert equal(called(program, x), called(graphquant.export(model, (x,)), x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_their_type(dtype: torch.dtype) -> None:
    entry = zoo.SMALL["vit"]
    model = entry.build("sdpa").to(dtype)
    args, kwargs = tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, entry.inputs(2))
    with torch.no_grad():
        want = model(*args, **kwargs)
    got = called(graphquant.export(model, args, kwargs), *args, **kwargs)
    same_structure(got, want)
    assert error(got, want) < 0.06  # as in tests/test_models.py


def test_an_autocast_region_of_the_model_stays_as_it_is() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.mlp(x)

    reports: list[Report] = []
    model, x = Model(forward, mlp=seeded(Mlp)), torch.randn(3, 64)
    program = graphquant.export(model, (x,), on_report=reports.append)
    assert reports[0].coverage == 0.0
    with torch.no_grad():
        assert equal(called(program, x), model(x))


def test_exported_under_autocast_it_computes_in_those_dtypes() -> None:
    model, x = seeded(Mlp).eval(), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        program = graphquant.export(model, (x,))
        with torch.no_grad():
            want = model(x)
    got = called(program, x)
    assert got.dtype == want.dtype == torch.bfloat16
    assert error(got, want) < 0.03


def test_float_stays_float_with_quantize_false() -> None:
    entry = zoo.SMALL["clip_vision"]
    args, kwargs = entry.inputs(2)
    model = entry.build("sdpa")
    reports: list[Report] = []
    program = graphquant.export(model, args, kwargs, quantize=False, on_report=reports.append)
    assert reports[0].counts() == {"stack_siblings": 6}
    assert not any(t.dtype == torch.int8 for t in tensors(program).values())
    with torch.no_grad():
        assert error(called(program, *args, **kwargs), model(*args, **kwargs)) < 1e-5


def test_options_of_the_rewrite_count() -> None:
    model, x = seeded(Mlp).eval(), torch.randn(64, 64)
    calibration = graphquant.calibrate(model, [x], progress=False)
    ways: list[dict[str, Any]] = [
        {},
        {"calibration": calibration, "activation": "static"},
        {"calibration": calibration, "smooth": 0.5},
        {"calibration": calibration, "smooth": "auto"},
        {"weight_scale": "mse"},
        {"exclude": ["fc1"]},
    ]
    results = []
    for options in ways:
        compiled = torch.compile(model, backend="graphquant", options={"inner": "eager", **options})
        torch._dynamo.reset()
        with torch.no_grad():
            want = compiled(x)
        results.append(called(graphquant.export(model, (x,), **options), x))
        assert equal(results[-1], want), options
    assert not any(equal(results[0], other) for other in results[1:4])


def test_what_cannot_be_exported_is_refused() -> None:
    model, x = seeded(Mlp), torch.randn(3, 64)
    with pytest.raises(UnsupportedInputError, match=r"in training mode: call model\.eval\(\)"):
        graphquant.export(model, (x,))
    with pytest.raises(UnsupportedInputError, match=r"needs a torch\.nn\.Module, got builtin"):
        graphquant.export(F.gelu, (x,))  # type: ignore[arg-type]
    model.eval()
    for option in ("inner", "mode", "inductor", "free_weights"):
        with pytest.raises(OptionError, match=f"{option} is an option of torch.compile"):
            graphquant.export(model, (x,), **{option: None})
    with pytest.raises(OptionError, match="unknown option 'exlude', did you mean 'exclude'"):
        graphquant.export(model, (x,), exlude=["fc1"])
    # what torch.compile returned is the module behind it
    assert equal(
        called(graphquant.export(torch.compile(model), (x,)), x),  # type: ignore[arg-type]
        called(graphquant.export(model, (x,)), x),
    )


# Packed weights ---------------------------------------------------------------------------------

kernels = pytest.mark.skipif(cpu.missing() is not None, reason="NOT RUN: needs the CPU kernels")


def without_kernels(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cpu, "missing", lambda: "no kernels here")


def weights(program: ExportedProgram) -> dict[str, Tensor]:
    return {n: t for n, t in program.state_dict.items() if n.endswith(".wq")}


@kernels
def test_on_a_cpu_weights_are_packed_for_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = seeded(lambda: Mlp(60, 76)).eval(), torch.randn(3, 60)
    program = graphquant.export(model, (x,))
    without_kernels(monkeypatch)
    plain = graphquant.export(model, (x,))
    assert plain.state_dict["fc1.wq"].shape == (76, 60)
    assert equal(weights(program), {n: pack_weight(t) for n, t in weights(plain).items()})
    unpacked = unpack_weights(program)
    assert equal(weights(unpacked), weights(plain))
    assert unpack_weights(plain) is plain
    assert program.state_dict["fc1.wq"].shape != (76, 60), "it stays as it was"


class Named(Mlp):
    """Its input has the name of a function of Python's."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


def test_an_unpacked_program_can_be_saved_and_computes_the_same(tmp_path: Path) -> None:
    model = seeded(Named).eval()
    program = graphquant.export(model, (torch.randn(3, 64),), dynamic_shapes=({0: Dim("batch")},))
    torch.export.save(unpack_weights(program), tmp_path / "model.pt2")
    x = torch.randn(7, 64)
    assert equal(called(torch.export.load(tmp_path / "model.pt2"), x), called(program, x))


@kernels
def test_a_machine_without_kernels_computes_the_same_from_packed_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = seeded(Mlp).eval(), torch.randn(3, 64)
    program = graphquant.export(model, (x,))
    fast = called(program, x)
    without_kernels(monkeypatch)
    got = called(program, x)
    assert equal(got, called(graphquant.export(model, (x,)), x))
    # kernels and references round norms apart: at most a few values fall one int8 step aside
    assert error(got, fast) < 2e-3


@kernels
def test_a_compiled_program_is_the_compiled_model() -> None:
    """Its weights are packed once."""
    model, x = seeded(Mlp).eval(), torch.randn(3, 64)
    module = graphquant.export(model, (x,)).module()
    with torch.no_grad():
        want = torch.compile(model, backend="graphquant")(x)
        assert equal(torch.compile(module)(x), want)
        torch._dynamo.reset()
        assert equal(torch.compile(module, backend="graphquant")(x), want)


def test_weights_packed_for_cpus_are_refused_on_cuda() -> None:
    xq, x_scale, x_shift = quantize(torch.randn(2, 64))
    wq, *sums = quantize_weight(torch.randn(8, 64))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        args = [mode.from_tensor(t) for t in (xq, x_scale, x_shift, pack_weight(wq), *sums)]
        on_gpu = [torch.empty_like(t, device="cuda") for t in args]
        with pytest.raises(UnsupportedInputError, match=r"xq is on cuda.*export the model on the"):
            int8_linear(*on_gpu, None, None, torch.float32)


# Files ------------------------------------------------------------------------------------------

LOAD = """
import sys, torch
program = torch.export.load(sys.argv[1])
x, want = torch.load(sys.argv[2])
with torch.no_grad():
    assert torch.equal(program.module()(x), want)
print("equal")
"""


def test_a_file_loads_in_a_new_process_that_has_imported_graphquant(tmp_path: Path) -> None:
    model = seeded(Mlp).eval()
    program = graphquant.export(model, (torch.randn(3, 64),), dynamic_shapes=({0: Dim("batch")},))
    x = torch.randn(7, 64)
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save((x, called(program, x)), tmp_path / "x.pt")
    files = tmp_path / "model.pt2", tmp_path / "x.pt"
    done = in_a_new_process("import graphquant" + LOAD, *files)
    assert done.stdout == "equal\n", done.stderr
    failed = in_a_new_process(LOAD, *files)
    assert failed.returncode
    assert "torch.ops.graphquant.norm_quantize.default" in failed.stderr


def so400m(layers: int) -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=layers,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    with torch.device("meta"):
        model = SiglipVisionModel(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.01) if tensor.is_floating_point() else tensor.zero_()
    return model


def saved(model: nn.Module, path: Path) -> tuple[dict[str, Tensor], int]:
    """What the program holds, and the bytes of its file."""
    program = graphquant.export(model, (torch.zeros(1, 3, 384, 384, dtype=torch.bfloat16),))
    torch.export.save(program, path)
    return tensors(program), path.stat().st_size


AT_MOST = 0.56  # of the model in bfloat16


def test_a_layer_of_so400m_takes_half_of_its_bfloat16(tmp_path: Path) -> None:
    model = so400m(1)
    held, file = saved(model, tmp_path / "1.pt2")
    layer = (
        "vision_model.encoder.layers.0." if hasattr(model, "vision_model") else "encoder.layers.0."
    )
    of_layer = bytes_of({n: t for n, t in held.items() if n.startswith(layer)})
    was = bytes_of({n: t for n, t in model.state_dict().items() if n.startswith(layer)})
    all_of_it = bytes_of(held) + 26 * of_layer
    assert all_of_it / (bytes_of(dict(model.state_dict())) + 26 * was) < AT_MOST
    # the file is the tensors, the pads of int8 rows of 4304, 1 % of them, and a graph of 100 nodes
    assert file < 1.01 * bytes_of(held) + 2**20


@pytest.mark.slow
def test_so400m_takes_half_of_its_bfloat16(tmp_path: Path) -> None:
    model = so400m(27)
    _, file = saved(model, tmp_path / "27.pt2")
    assert file / bytes_of(dict(model.state_dict())) < AT_MOST


@pytest.mark.parametrize(
    ("entry", "given"),
    [
        ("standalone", ()),
        ("torchscript", ()),
        ("onnx.save", ("never.onnx",)),
        ("tensorrt.qdq", ()),
    ],
)
def test_what_is_no_program_is_refused_by_every_entry(entry: str, given: tuple[str, ...]) -> None:
    model = Mlp()
    message = f"^{re.escape(entry)} needs what graphquant.export returned, got Mlp$"
    with pytest.raises(UnsupportedInputError, match=message):
        operator.attrgetter(entry)(graphquant)(model, *given)
    assert not Path("never.onnx").exists()
