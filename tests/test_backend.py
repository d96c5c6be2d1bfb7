"""The torch.compile entry: how it is found, what it accepts, leaves alone and reports."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import graphquant
from graphquant import Config, OptionError, Report, UnsupportedInputError
from tests import zoo
from tests.small import NEAR, Mlp, error, int8, seeded

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Block(nn.Module):
    """Every kind of site: three siblings behind a norm, layer scales, residuals, an activation."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.scale = nn.Parameter(torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.scale * self.o(y)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


BLOCK_COUNTS = {
    "stack_siblings + norm_linear": 3,
    "linear + layer_scale + residual": 1,
    "norm_linear": 1,
    "act_linear + residual": 1,
}


@pytest.fixture
def tokens(device: str) -> Tensor:
    return seeded(lambda: torch.randn(2, 6, 64)).to(device)


# Found by name -----------------------------------------------------------------------------------

USER = """
import sys, torch
assert "graphquant" in torch._dynamo.list_backends()
assert not any(m.split(".")[0] == "graphquant" for m in sys.modules)
model, x = torch.nn.Linear(32, 32), torch.randn(4, 32)
with torch.inference_mode():
    got = torch.compile(model, backend="graphquant", options={"inner": "eager"})(x)
    want = model(x)
error = float((got - want).norm() / want.norm())
assert 0 < error < 0.03, error
assert "graphquant" in torch._dynamo.list_backends()
"""


def test_backend_is_found_without_an_import() -> None:
    done = subprocess.run([sys.executable, "-c", USER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


SNAPSHOT = """
import copy, json, os, sys, torch
import torch._inductor.config, torch._dynamo.config, torch._functorch.config
import torch.fx.experimental._config

def text(v):
    return repr(sorted(map(repr, v))) if isinstance(v, set) else repr(v)

def state():
    configs = [torch._inductor.config, torch._dynamo.config, torch._functorch.config,
               torch.fx.experimental._config]
    found = {f"{c.__name__}.{k}": text(v) for c in configs for k, v in c.to_dict().items()}
    flags = {
        "matmul": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "mkldnn": (torch.backends.mkldnn.enabled, torch.backends.mkldnn.allow_tf32),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark),
        "sdp": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
        "quantized": torch.backends.quantized.engine,
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "environment": dict(os.environ),
        "rng": torch.get_rng_state().tolist()[:100],
    }
    return {**found, **{k: repr(v) for k, v in flags.items()}}

class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = torch.nn.LayerNorm(16), torch.nn.Linear(16, 16)
    def forward(self, x):
        return self.fc(self.norm(x))

def differences(a, b):
    return {k: (a.get(k), b.get(k)) for k in {*a, *b} if a.get(k) != b.get(k)}

model, x = Tiny(), torch.randn(4, 16)
with torch.inference_mode():  # what torch.compile itself sets up
    torch.compile(lambda x: x.sin(), backend="inductor")(x)
before = state()
import graphquant, graphquant.backend
assert not differences(before, state()), differences(before, state())
with torch.inference_mode():
    run = torch.compile(model, backend="graphquant")
    got = run(x)
    want = model(x)
assert not differences(before, state()), differences(before, state())
assert 0 < float((got - want).norm() / want.norm()) < 0.03
"""


def test_import_and_compile_change_no_global_setting() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SNAPSHOT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


class Methods(Mlp):
    """As CLIP has `get_image_features`."""

    def embed(self, x: Tensor) -> dict[str, Tensor]:
        return {"embedding": self(x)}

    def width(self) -> int:
        return self.fc1.in_features


@pytest.fixture
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphquant.bypass._told", set())


@pytest.mark.usefixtures("_nothing_said")
def test_a_method_that_torch_compile_does_not_reach_is_a_warning_once(
    x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = seeded(Methods).to(x.device).eval()
    want = model(x)
    fast = int8(model)
    with caplog.at_level(logging.WARNING, logger="graphquant"):
        assert fast.width() == 64
        assert not caplog.messages
        for _ in range(2):
            assert torch.equal(fast.embed(x)["embedding"], want)
        assert fast.embed == model.embed  # the method itself again
    (said,) = caplog.messages
    assert said.startswith("Methods.embed ran eagerly, in float")
    assert "graphquant.optimize_(model)" in said


@pytest.mark.usefixtures("_nothing_said")
def test_methods_of_other_compilations_and_the_module_itself_are_left_alone(
    x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = seeded(Methods).to(x.device).eval()
    fast, theirs = int8(model), torch.compile(model, backend="eager")
    with caplog.at_level(logging.WARNING, logger="graphquant"):
        assert theirs.embed == model.embed
        for call in (theirs.embed, model.embed, model, fast, fast.forward):
            call(x)
        fast.eval().state_dict()
        both = torch.compile(lambda x: fast.embed(x)["embedding"], backend="eager", fullgraph=True)
        assert error(both(x), model(x)) < NEAR
    assert not [m for m in caplog.messages if "eagerly" in m]


# Options -----------------------------------------------------------------------------------------


def test_unknown_option_lists_the_valid_ones(x: Tensor) -> None:
    with pytest.raises(BackendCompilerFailed) as seen:
        int8(Mlp().to(x.device), exclud="fc1")(x)
    assert isinstance(seen.value.inner_exception, OptionError)
    message = str(seen.value)
    assert "unknown option 'exclud', did you mean 'exclude'?" in message
    assert f"Valid: {', '.join(f.name for f in dataclasses.fields(Config))}" in message


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("inner", "tvm", "inner='tvm' is not one of 'inductor', 'eager', 'aot_eager'"),
        ("mode", "fast", "mode='fast' is not one of 'default', 'reduce-overhead'"),
        ("quantize", 1, "quantize must be True or False, got 1"),
        ("free_weights", "yes", "free_weights must be True or False, got 'yes'"),
        ("include", 3, "include must be a pattern or a list of patterns, got 3"),
        ("exclude", ["a", None], "exclude must be a pattern or a list of patterns"),
        ("exclude", "re:(", "exclude: 're:(' is not a regular expression"),
        ("on_report", 7, "on_report must be callable, got 7"),
        ("inductor", ["x"], "inductor must be a dict of Inductor options"),
    ],
)
def test_ill_typed_option_says_what_it_needs(
    option: str, value: object, message: str, x: Tensor
) -> None:
    with pytest.raises(BackendCompilerFailed) as seen:
        int8(Mlp().to(x), **{option: value})(x)
    assert isinstance(seen.value.inner_exception, OptionError)
    assert message in str(seen.value)


def test_explain_rejects_the_same_options(x: Tensor) -> None:
    with pytest.raises(OptionError, match="unknown option 'inner_'"):
        graphquant.explain(Mlp(), x, options={"inner_": "eager"})


def test_mode_is_passed_on_to_inductor(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def compile_(gm: Any, inputs: Any, options: dict[str, Any]) -> Any:
        seen.append(options)
        return gm.forward

    monkeypatch.setattr(torch._inductor, "compile", compile_)
    model = Mlp().to(x)
    torch.compile(model, backend="graphquant")(x)
    torch._dynamo.reset()
    torch.compile(model, backend="graphquant", mode="max-autotune-no-cudagraphs")(x)
    torch._dynamo.reset()
    options = {"mode": "reduce-overhead", "inductor": {"max_fusion_size": 7}}
    torch.compile(model, backend="graphquant", options=options)(x)
    assert seen[0] == {}
    assert seen[1].items() >= {"max_autotune": True}.items()
    assert seen[2].items() >= {"triton.cudagraphs": True, "max_fusion_size": 7}.items()


def test_misspelled_mode_is_an_error(x: Tensor) -> None:
    with pytest.raises(BackendCompilerFailed, match="mode='max-autotun' is not one of"):
        torch.compile(Mlp().to(x), backend="graphquant", mode="max-autotun")(x)


def test_quantize_false_only_stacks_siblings(tokens: Tensor) -> None:
    model = seeded(Block).to(tokens)
    reports: list[Report] = []
    got = int8(model, reports, quantize=False)(tokens)
    assert reports[0].counts() == {"stack_siblings": 3}
    assert reports[0].coverage == 0
    torch.testing.assert_close(got, model(tokens), rtol=1e-5, atol=1e-5)


ALL = ["fc1", "fc2", "k", "o", "q", "v"]


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"include": "fc*"}, ["fc1", "fc2"]),
        ({"include": ["fc1", "o"]}, ["fc1", "o"]),
        ({"include": "re:[qkv]"}, ["k", "q", "v"]),
        ({"exclude": "re:fc"}, ALL),  # a pattern must match the whole path
        ({"exclude": "re:fc.*"}, ["k", "o", "q", "v"]),
        ({"exclude": ["fc?", "o"]}, ["k", "q", "v"]),
        ({"exclude": "q"}, ["fc1", "fc2", "k", "o", "v"]),
        ({"include": "fc*", "exclude": "fc1"}, ["fc2"]),
        ({"include": ["nothing"]}, []),
    ],
    ids=str,
)
def test_include_and_exclude_choose_linears(
    options: dict[str, Any], taken: list[str], tokens: Tensor
) -> None:
    model = seeded(Block).to(tokens)
    reports: list[Report] = []
    got = int8(model, reports, **options)(tokens)
    assert sorted(o.path for o in reports[0].linears if o.int8) == taken
    reasons = {o.refused.split(" by ")[0] for o in reports[0].linears if not o.int8}
    assert reasons <= {"not matched", "excluded"}
    assert error(got, model(tokens)) < NEAR


def test_patterns_see_the_whole_path_and_star_crosses_dots(tokens: Tensor) -> None:
    model = nn.Sequential(seeded(Block), nn.Sequential(seeded(Block))).to(tokens)
    reports: list[Report] = []
    int8(model, reports, include="*.0.fc1")(tokens)
    assert [o.path for o in reports[0].linears if o.int8] == ["1.0.fc1"]


# Reports -----------------------------------------------------------------------------------------


def test_on_report_is_called_once_per_graph(tokens: Tensor) -> None:
    reports: list[Report] = []
    model = seeded(Block).to(tokens)
    run = int8(model, reports)
    run(tokens)
    run(tokens)
    assert len(reports) == 1
    assert reports[0].counts() == BLOCK_COUNTS
    assert {(o.M, o.N, o.K) for o in reports[0].linears if o.path == "fc1"} == {(12, 128, 64)}


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Mlp(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        torch._dynamo.graph_break()
        return self.b(y)


def test_graph_breaks_give_one_report_each_and_explain_merges_them(x: Tensor) -> None:
    model = seeded(Broken).to(x)
    reports: list[Report] = []
    got = int8(model, reports)(x)
    assert error(got, model(x)) < 2 * NEAR
    assert len(reports) == 2
    merged = graphquant.explain(model, x)
    assert merged.graphs == 2
    assert merged == Report.merge(reports)
    assert [o.path for o in merged.linears] == ["a.fc1", "a.fc2", "b.fc1", "b.fc2"]
    assert "4 of 4 linears in 2 graphs in int8" in merged.summary()


@pytest.mark.parametrize("name", ["bert", "siglip", "dinov2_swiglu", "nn_mha"])
def test_explain_says_what_compile_does(name: str) -> None:
    entry = zoo.load(name)
    model = entry.build("sdpa")
    args, kwargs = entry.inputs(2)
    reports: list[Report] = []
    int8(model, reports)(*args, **kwargs)
    assert graphquant.explain(model, *args, **kwargs) == Report.merge(reports)


def test_explain_packs_nothing_and_leaves_compiled_code_alone(x: Tensor) -> None:
    model = seeded(Mlp).to(x)
    graphquant.explain(model, x)
    assert not any("graphquant" in key for p in model.parameters() for key in p.__dict__)
    reports: list[Report] = []
    run = int8(model, reports)
    run(x)
    for _ in range(20):  # more than Dynamo's limit of recompilations
        assert graphquant.explain(model, x).coverage == 1.0
    run(x)
    run(x[:3])
    assert len(reports) == 2


def test_explain_respects_options_and_grad_mode(x: Tensor) -> None:
    model = seeded(Mlp).to(x)
    report = graphquant.explain(model, x, options={"exclude": "fc2"})
    assert [o.path for o in report.linears if o.int8] == ["fc1"]
    with torch.enable_grad():
        assert graphquant.explain(model, x).coverage == 0.0


@pytest.mark.parametrize("thing", [None, 3, "model"])
def test_explain_of_what_cannot_be_called_raises(thing: Any) -> None:
    with pytest.raises(UnsupportedInputError, match=type(thing).__name__):
        graphquant.explain(thing, torch.ones(1))


def test_explain_without_tensors_raises() -> None:
    with pytest.raises(graphquant.GraphquantError, match="no tensor code in function"):
        graphquant.explain(lambda n: n + 1, 3)


# How it runs -------------------------------------------------------------------------------------


class Constants(Mlp):
    """Constants that are made in the forward."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y[:, :2] = 0
        y = self.fc1(y) * torch.tensor(3.0)
        y[:, 5] = 1.5
        return self.fc2(y)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_constants_of_the_forward(inner: str, x: Tensor) -> None:
    """AOTAutograd wants to know where each of a graph's constants comes from."""
    model = seeded(Constants).to(x)
    assert error(int8(model, inner=inner)(x), model(x)) < NEAR


class Data(nn.Module):
    """`.data` in the forward, of a weight and of a value that is then written to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x.data, self.fc.weight.data, self.fc.bias)
        y.data.mul_(3)
        return y


def test_data_in_the_forward(x: Tensor) -> None:
    model = seeded(Data).to(x)
    reports: list[Report] = []
    assert error(int8(model, reports)(x), model(x)) < NEAR
    assert reports[0].coverage == 1.0


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_inner_compilers_agree(inner: str, tokens: Tensor) -> None:
    model = seeded(Block).to(tokens)
    want = int8(model)(tokens)
    torch._dynamo.reset()
    assert error(int8(model, inner=inner)(tokens), want) < 2e-3  # a value may round the other way


def test_fullgraph(tokens: Tensor) -> None:
    model = seeded(Block).to(tokens)
    run = torch.compile(model, backend="graphquant", fullgraph=True, options={"inner": "eager"})
    assert error(run(tokens), model(tokens)) < NEAR


SHAPES = [(2, 6), (3, 9), (5, 4), (2, 17)]


def dynamic_by_flag(model: nn.Module, reports: list[Report], inner: str) -> Callable[..., Tensor]:
    options = {"inner": inner, "on_report": reports.append}
    return torch.compile(model, backend="graphquant", dynamic=True, options=options)


def dynamic_by_mark(model: nn.Module, reports: list[Report], inner: str) -> Callable[..., Tensor]:
    run = int8(model, reports, inner=inner)

    def call(x: Tensor) -> Tensor:
        for dim in range(2):
            torch._dynamo.mark_dynamic(x, dim)
        return run(x)

    return call


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("make", [dynamic_by_flag, dynamic_by_mark])
def test_dynamic_shapes_compile_once(make: Callable[..., Any], inner: str, device: str) -> None:
    model = seeded(Block).to(device)
    reports: list[Report] = []
    run = make(model, reports, inner)
    for shape in SHAPES:
        x = torch.randn(*shape, 64, device=device)
        assert error(run(x), model(x)) < NEAR
    assert len(reports) == 1
    assert reports[0].counts() == BLOCK_COUNTS


def test_growing_batches_become_dynamic_by_themselves(device: str) -> None:
    model = seeded(Block).to(device)
    reports: list[Report] = []
    run = int8(model, reports)
    for batch in (2, 3, 4, 5, 6):
        x = torch.randn(batch, 6, 64, device=device)
        assert error(run(x), model(x)) < NEAR
    assert len(reports) == 2


def test_empty_batch_and_single_row(device: str) -> None:
    model = seeded(Mlp).to(device)
    run = int8(model)
    assert run(torch.randn(0, 64, device=device)).shape == (0, 64)
    x = torch.randn(64, device=device)
    assert error(run(x), model(x)) < NEAR


# Types -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype, tokens: Tensor) -> None:
    model = seeded(Block).to(tokens)
    want = model(tokens)
    reports: list[Report] = []
    got = int8(model.to(dtype), reports)(tokens.to(dtype))
    assert got.dtype == dtype
    assert error(got, want) < NEAR
    assert reports[0].counts() == BLOCK_COUNTS


@pytest.mark.parametrize("enabled", [True, False])
def test_ambient_autocast_gives_eagers_types(enabled: bool, tokens: Tensor) -> None:
    model = seeded(Block).to(tokens)
    reports: list[Report] = []
    run = int8(model, reports)
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=enabled):
        got, want = run(tokens), model(tokens)
    assert got.dtype == want.dtype
    assert error(got, want) < NEAR
    assert reports[0].coverage == 1.0
    plain = run(tokens)  # and outside again
    assert plain.dtype == torch.float32
    assert error(plain, model(tokens)) < NEAR


class Region(nn.Module):
    """A region in bfloat16 between two in float32, and one switched off inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> list[Tensor]:
        a = self.a(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            b = self.b(a)
            with torch.autocast(x.device.type, enabled=False):
                c = self.c(b.float())
        return [a, b, c, self.d(c)]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_autocast_region_inside_the_model_gives_eagers_types(inner: str, x: Tensor) -> None:
    model = seeded(Region).to(x)
    reports: list[Report] = []
    got, want = int8(model, reports, inner=inner)(x), model(x)
    assert [t.dtype for t in got] == [t.dtype for t in want]
    assert torch.bfloat16 in {t.dtype for t in want}
    assert reports[0].coverage == 1.0
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 2 * NEAR


def test_float64_is_refused_with_a_reason(x: Tensor) -> None:
    model = seeded(Mlp).to(x).double()
    reports: list[Report] = []
    got = int8(model, reports)(x.double())
    assert reports[0].reasons() == {"computes in float64": 2}
    assert torch.equal(got, model(x.double()))


def test_graph_without_tensors_still_runs() -> None:
    reports: list[Report] = []
    run = torch.compile(
        lambda n: n * 2 + 1,
        backend="graphquant",
        dynamic=True,
        options={"inner": "eager", "on_report": reports.append},
    )
    assert [run(3), run(5)] == [7, 11]


def test_weights_that_are_arguments_are_refused(x: Tensor) -> None:
    reports: list[Report] = []
    weight = torch.randn(64, 64, device=x.device)
    got = int8(F.linear, reports)(x, weight)
    assert reports[0].reasons() == {"its weight is not a parameter": 1}
    torch.testing.assert_close(got, F.linear(x, weight))


# In-place operations of the model ----------------------------------------------------------------


class AddInPlace(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        y += super().forward(y)
        y += super().forward(y)
        return y


class AddToInput(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        x += super().forward(x)
        return x


class ReluInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(inplace=True), nn.Linear(96, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class SiluReadBefore(nn.Module):
    """The linear's result is read, then overwritten by its activation, and read again."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        before = y.abs()
        F.silu(y, inplace=True)
        return self.fc2(y) + before + y


class ScaledAfterNorm(Mlp):
    """A norm has read the value that is then scaled in place."""

    def forward(self, x: Tensor) -> Tensor:
        h = x + 1
        y = self.norm(h)
        h.mul_(3)
        return self.fc2(F.gelu(self.fc1(y))) + h


class NormOverwritten(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        a = self.fc1(y)
        y.mul_(-2)
        return a + self.fc1(y)


class SliceOverwritten(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y[:, :8] = 0
        return self.fc2(F.gelu(self.fc1(y)))


class ResidualOverwritten(nn.Module):
    """The residual is written to after the linear has run and before it is added."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = x + 1
        y = self.fc(h)
        h[:, :32].mul_(5)
        return y + h


class OutOfALinear(nn.Module):
    """A linear's result is written to through a view, between linear and layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(64, 64), nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y.view(-1)[:64].zero_()
        return self.scale * y + x


class SiblingOverwritten(nn.Module):
    """One of two siblings is read by a norm, then written to through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.fc = (nn.Linear(64, 64) for _ in range(3))
        self.norm = nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        y = self.norm(q)
        q[:, :32] = 7
        return torch.cat([self.fc(y), q, k], -1)


class SiblingFlattened(SiblingOverwritten):
    """A slice of stacked linears could not be viewed like this."""

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        q.view(-1)[:64].zero_()
        return torch.cat([q, k], -1)


class ReadBeforeOverwritten(Mlp):
    """One linear reads the norm before, one after it is written to."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        before = self.fc1(y)
        y[:, :32] = 0
        return before - 0.1 * self.fc1(y)


class WeightWrittenInside(nn.Module):
    """The model changes its own weight in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.register_buffer("scale", torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) * self.scale
        self.scale.add_(1)
        return y + self.fc(x) * self.scale


@pytest.mark.parametrize(
    "make",
    [
        AddInPlace,
        AddToInput,
        ReluInPlace,
        SiluReadBefore,
        ScaledAfterNorm,
        NormOverwritten,
        SliceOverwritten,
        ResidualOverwritten,
        OutOfALinear,
        SiblingOverwritten,
        SiblingFlattened,
        ReadBeforeOverwritten,
        WeightWrittenInside,
    ],
)
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_in_place_operations_are_respected(make: type[nn.Module], inner: str, x: Tensor) -> None:
    model, twin = seeded(make).to(x), seeded(make).to(x)
    reports: list[Report] = []
    run = int8(model, reports, inner=inner)
    for _ in range(2):
        mine, eagers = x.clone(), x.clone()
        got, want = run(mine), twin(eagers)
        assert error(got, want) < NEAR
        assert error(mine, eagers) < NEAR  # what the model does to its input
    assert reports[0].linears


class MaskUnderVmap(nn.Module):
    """make_fx cannot follow values that vmap makes of constants."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1], device=x.device)
        rows = torch.vmap(lambda q, k: q >= k, (None, 0))
        mask = torch.vmap(rows, (0, None))(at, at)
        q = self.fc(x)[:, None]
        return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask[None, None])


def test_a_graph_that_cannot_be_followed_runs_as_it_is_and_says_so(device: str) -> None:
    model, x = MaskUnderVmap().eval().to(device), torch.randn(2, 8, 64, device=device)
    reports: list[Report] = []
    torch._dynamo.reset()
    run = torch.compile(model, backend="graphquant", options={"on_report": reports.append})
    with torch.inference_mode():
        torch.testing.assert_close(run(x), model(x))
        explained = graphquant.explain(model, x)
    for report in (Report.merge(reports), explained):
        assert "a graph was left in float: " in report.notes[0] and "torch.vmap" in report.notes[0]
