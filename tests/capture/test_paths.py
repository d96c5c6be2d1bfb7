"""One module path for each linear, the same from every entry."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import graphquant
from graphquant import Report
from graphquant.ir.paths import Places, linear_path, moved_path, weight_path
from tests.small import Model

D = 16


pytestmark = pytest.mark.usefixtures("seeded_dynamo")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, D)


def compiled(model: Any, *args: Any, **options: Any) -> list[Report]:
    reports: list[Report] = []
    given = {"inner": "eager", "on_report": reports.append, **options}
    with torch.no_grad():
        torch.compile(model, backend="graphquant", options=given)(*args)
    return reports


def paths(*reports: Report) -> list[str]:
    return sorted({o.path for r in reports for o in r.linears})


def by_entry(model: nn.Module, *args: Any) -> dict[str, list[str]]:
    """The paths that each entry knows."""
    with torch.no_grad():
        found = {"explain": paths(graphquant.explain(model, *args))}
        torch._dynamo.reset()
        found["compile"] = paths(*compiled(model, *args))
        found["compare"] = sorted({s.path for s in graphquant.compare(model, [args]).sites})
        found["calibrate"] = sorted(graphquant.calibrate(model, [args], progress=False).sites)
        reports: list[Report] = []
        graphquant.export(model, args, on_report=reports.append)
        found["export"] = paths(*reports)
        live = graphquant.optimize_(model, inner="eager")
        model(*args)
        found["optimize_"] = paths(live)
        graphquant.restore_(model)
    return found


def agree(model: nn.Module, *args: Any, want: set[str]) -> None:
    found = by_entry(model, *args)
    assert found == dict.fromkeys(found, sorted(want))


# Words ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "weights", "path"),
    [
        ("a.fc", ["a.fc.weight"], "a.fc"),
        ("attn", ["attn.in_proj_weight"], "attn.in_proj"),
        ("attn", ["attn.out_proj.weight"], "attn.out_proj"),
        ("block", ["block.w"], "block.w"),
        ("head", ["embed.weight"], "head"),
        ("fc", ["fc1.weight"], "fc"),  # fc1 is not inside fc
        ("", ["embed.weight"], "embed"),
        ("fc", ["fc.parametrizations.weight.original1", "fc.parametrizations.weight.0._u"], "fc"),
        ("fc", ["fc.weight_mask", "fc.weight_orig"], "fc"),
        ("fc", ["fc.weight_v", "fc.weight_g"], "fc"),
        ("attn", ["attn.weight_v"], "attn.weight_v"),  # the weight of v, and no norm's
        ("fc", [], "fc"),
    ],
)
def test_a_path_is_the_weights_place_inside_the_module_that_calls(
    module: str, weights: list[str], path: str
) -> None:
    assert linear_path(module, weights) == path


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("L['self']._modules['a']._parameters['weight']", "a.weight"),
        ("L['self'].__dict__['_modules']['a']._modules['0']._buffers['w']", "a.0.w"),
        ("L['self']._modules[\"it's\"]._parameters['weight']", "it's.weight"),
        ("L['self']._modules['x[0]']._parameters['a b']", "x[0].a b"),
        ("L['self'].layers[2]._parameters['weight']", "layers.2.weight"),
        ("L['fn'].__self__._modules['fc']._parameters['weight']", "fc.weight"),
        ("L['fn'].__closure__[0].cell_contents._modules['f']._parameters['w']", "f.w"),
        ("L['x']", "L['x']"),
    ],
)
def test_dynamos_spelling_is_read(text: str, name: str) -> None:
    assert Places(None).tensor(torch.empty(0), text) == name


def test_a_path_moves_to_another_instance_of_the_same_code() -> None:
    old, new = "layers.0.fc.weight", "layers.11.fc.weight"
    assert moved_path("layers.0.fc", old, new) == "layers.11.fc"
    assert moved_path("layers.0.fc", "layers.0.fc.weight_v", "x.fc.weight_v") == "x.fc"
    assert moved_path("head", "layers.0.fc.weight", new) == "head"
    assert weight_path("root.parametrizations.in_proj_weight.original") == "root.in_proj"


# Entries ----------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """As PEFT's and sentence-transformers' do: what it does not have itself the inner one has."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


def linear() -> nn.Linear:
    return nn.Linear(D, D)


def normalized() -> nn.Sequential:
    pruned = prune.l1_unstructured(linear(), "weight", 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = nn.utils.weight_norm(linear())
    new = (parametrizations.weight_norm(linear()), parametrizations.spectral_norm(linear()))
    return nn.Sequential(*new, old, pruned, nn.utils.spectral_norm(linear()))


class Own(nn.Module):
    """Weights of its own, in all the places where torch keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(D, D))
        self.ws = nn.ParameterList([torch.randn(D, D), torch.randn(D, D)])
        self.named = nn.ParameterDict({"it's": torch.randn(D, D), "a b": torch.randn(D, D)})
        self.attn = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        named = [self.named["it's"], self.named["a b"]]
        for w in (self.w, self.ws[0], self.ws[1], *named):  # torch 2.11 cannot trace `*self.ws`
            x = F.linear(x, w)
        return x + self.attn(x, x, x, need_weights=False)[0]


def tied(m: Any, ids: Tensor) -> Tensor:
    return m.head(m.mid(m.embed(ids)))


def make_tied() -> Model:
    model = Model(tied, embed=nn.Embedding(20, D), mid=linear(), head=nn.Linear(D, 20))
    model.head.weight = model.embed.weight
    return model


def test_normalized_and_pruned_weights_have_the_path_of_their_linear(x: Tensor) -> None:
    agree(normalized().eval(), x, want={"0", "1", "2", "3", "4"})


def test_weights_that_are_no_linears_are_distinguished_by_their_names(x: Tensor) -> None:
    names = {"w", "ws.0", "ws.1", "named.it's", "named.a b", "attn.in_proj", "attn.out_proj"}
    agree(nn.Sequential(Own()).eval(), x, want={f"0.{name}" for name in names})


def test_a_tied_head_has_the_path_of_the_module_that_is_called() -> None:
    agree(make_tied(), torch.arange(4)[None], want={"mid", "head"})


def test_no_step_is_missing_in_wrappers_and_in_odd_names(x: Tensor) -> None:
    odd = nn.ModuleDict({"it's": linear(), "x[0]": linear(), "a b": linear()})
    shared = linear()
    inner = Model(
        lambda m, x: m.fc(m.odd["a b"](m.odd["x[0]"](m.odd["it's"](m.fc(x))))), odd=odd, fc=shared
    )
    want = {"inner.inner.fc", *(f"inner.inner.odd.{name}" for name in odd)}
    agree(Wrapper(Wrapper(inner)).eval(), x, want=want)


def broken(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    torch._dynamo.graph_break()
    return m.second(x)


def test_paths_behind_a_graph_break_begin_at_the_model(x: Tensor) -> None:
    block = Model(broken, first=linear(), second=nn.Linear(D, 8))
    agree(nn.Sequential(block).eval(), x, want={"0.first", "0.second"})


def test_a_method_that_is_compiled_has_the_paths_of_its_module(x: Tensor) -> None:
    block = Model(broken, first=linear(), second=nn.Linear(D, 8))
    model = nn.Sequential(block).eval()
    assert paths(*compiled(model.forward, x)) == ["0.first", "0.second"]


def test_paths_begin_at_the_module_that_is_compiled(x: Tensor) -> None:
    model = nn.Sequential(Model(lambda m, x: m.fc(x), fc=linear()), linear()).eval()
    reports: list[Report] = []
    model[0].compile(backend="graphquant", options={"inner": "eager", "on_report": reports.append})
    with torch.no_grad():
        model(x)
    assert paths(*reports) == ["fc"]


# What follows from it ---------------------------------------------------------------------------


def test_a_tied_head_is_excluded_by_its_own_path_and_not_by_the_embeddings() -> None:
    ids = torch.arange(4)[None]
    for pattern, want in (("head", "excluded by 'head'"), ("embed", "")):
        torch._dynamo.reset()
        (report,) = compiled(make_tied(), ids, exclude=[pattern])
        assert {o.path: o.refused for o in report.linears} == {"mid": "", "head": want}


def test_two_modules_with_one_weight_are_excluded_one_by_one(x: Tensor) -> None:
    model = nn.Sequential(linear(), nn.Tanh(), linear()).eval()
    model[2].weight = model[0].weight
    (report,) = compiled(model, x, exclude=["2"])
    assert {o.path: o.int8 for o in report.linears} == {"0": True, "2": False}


def test_a_calibration_is_found_through_wrappers_and_norms_of_weights(x: Tensor) -> None:
    model = Wrapper(normalized()).eval()
    calibration = graphquant.calibrate(model, [x], progress=False)
    (report,) = compiled(model, x, calibration=calibration, smooth="auto")
    assert len(report.linears) == 5 and all(o.smoothed for o in report.linears), report


def test_a_budget_keeps_a_tied_head_in_float() -> None:
    model, ids = make_tied(), torch.arange(4)[None]
    budget = graphquant.fit_budget(model, [ids], sqnr=80.0, progress=False)
    assert {site.path for site in budget.left} == {"mid", "head"}
    (report,) = compiled(model, ids, **budget.options)
    assert report.coverage == 0


def test_buffers_of_an_export_are_named_after_the_linears() -> None:
    program = graphquant.export(make_tied(), (torch.arange(4)[None],))
    packed = {n for n in program.state_dict if n.endswith("wq")}
    assert packed == {"mid.wq", "head.wq"}


# Libraries --------------------------------------------------------------------------------------


def test_berts_head_is_its_decoder() -> None:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=64,
    )
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        report = graphquant.explain(model, torch.arange(6)[None])
    assert [o.path for o in report.linears][-2:] == [
        "cls.predictions.transform.dense",
        "cls.predictions.decoder",
    ]


def test_pefts_layers_have_their_paths_in_the_wrapped_model() -> None:
    peft = pytest.importorskip("peft")
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=64,
    )
    lora = peft.LoraConfig(target_modules=["query"], r=4)
    model = peft.get_peft_model(BertModel(config, add_pooling_layer=False), lora).eval()
    (report,) = compiled(model, torch.arange(6)[None], exclude=["*.query.base_layer"])
    known = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {o.path for o in report.linears} == known
    assert sum("excluded" in o.refused for o in report.linears) == 1


# Notes ------------------------------------------------------------------------------------------


def test_a_pattern_that_matches_no_linear_is_noted(x: Tensor) -> None:
    model = nn.Sequential(Model(lambda m, x: m.fc(x), fc=linear())).eval()
    (report,) = compiled(model, x, include=["0.*"], exclude=["0", "nowhere.*", "re:no[t]"])
    noted = [n for n in report.notes if "no linear has a path" in n]
    assert len(noted) == 3  # "0" is a module, and no linear
    assert all(any(repr(p) in n for n in noted) for p in ("0", "nowhere.*", "re:no[t]"))
    assert [p.matched for p in report.patterns] == [1, 0, 0, 0]


def test_a_pattern_of_another_graph_is_not_noted(x: Tensor) -> None:
    model = Model(broken, first=linear(), second=nn.Linear(D, 8))
    reports = compiled(model, x, exclude=["second", "third"])
    assert len(reports) == 2
    assert not any("'second'" in n for r in reports for n in r.notes)
    merged = Report.merge(reports)
    assert sum("'third'" in n for n in merged.notes) == 1
    assert {p.pattern: p.matched for p in merged.patterns} == {"second": 1, "third": 0}


def test_modules_in_training_mode_are_noted(x: Tensor) -> None:
    model = nn.Sequential(linear(), nn.Sequential(nn.Dropout(0.1), linear()))
    with torch.no_grad():
        assert any("the model is in training mode" in n for n in graphquant.explain(model, x).notes)
        model.eval()
        model[1][0].train()
        (note,) = (n for n in graphquant.explain(model, x).notes if "training" in n)
        assert note.startswith("1 of its modules are in training mode, such as 1.0")
        model.eval()
        assert not any("training" in n for n in graphquant.explain(model, x).notes)
