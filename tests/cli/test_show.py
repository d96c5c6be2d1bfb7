"""python -m graphquant show: what it prints, draws and refuses. tools.show_graph is the same."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from graphquant import cli
from graphquant.passes.pipeline import INT8_RULES
from graphquant.visualize import svg
from tests import zoo
from tools import accuracy, show_graph

WIDE = ["--width", "400"]  # no line is folded

USERS = """
import torch
from torch import nn

class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.first = nn.LayerNorm(32), nn.Linear(32, 48)
        self.second = nn.Linear(48, 16, bias=False)

    def forward(self, x):
        x = self.first(self.norm(x))
        torch._dynamo.graph_break()
        return self.second(torch.relu(x))

def make(batch=1):
    return Broken(), (torch.randn(batch, 5, 32),), {}
"""


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["show", *argv, *WIDE], named=zoo.TABLES) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["show", *argv], named=zoo.TABLES) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_rules_shapes_and_coverage_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "vit")
    line = "linear(layer_norm, q_proj.weight, q_proj.bias)  [2, 17, 64] float32"
    assert f"- linear = {line}" in out
    assert "+ int8_linear = int8_linear(xq, x_scale, x_shift, int8({q,k,v}_proj.weight)," in out
    for rule in ("stack_siblings", "norm_linear", "act_linear", "linear", "residual"):
        assert f"<{rule}>" in out
    assert "coverage: 100.0% of the linears' FLOPs in int8" in out
    assert "read by select, the output" in out  # why the last norm stays


def test_smoothing_stands_inside_what_it_scales(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "vit", "--config", "smooth=norm")
    assert "norm_quantize(add, layernorm_before.weight * 1/s, layernorm_before.bias * 1/s," in out
    assert "int8({q,k,v}_proj.weight * s)" in out
    assert "stack_siblings + norm_linear, smoothed (norm, alpha 0.5)" in out
    assert "linear + residual, not smoothed: there is no norm with parameters in front of it" in out


def test_layer_scale_is_named_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert "layer_scale" in shown(capsys, "dinov2")


def test_without_quantize_there_is_no_int8_op(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "vit", "--config", "quantize=False")
    assert "int8_linear" not in out and "quantize(" not in out
    assert "<stack_siblings>" in out
    assert "coverage: 0.0%" in out


def test_text_options_need_no_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "vit", "--config", "exclude=*.fc2")
    assert "excluded by '*.fc2'" in out
    assert "- linear_5" not in out  # fc2 of the first layer


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "vit", "--config", "quantise=False")
    assert "unknown option 'quantise', did you mean 'quantize'?" in said
    assert "exclude" in said  # what is valid


def test_an_option_without_a_value_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--config takes name=value, got 'quantize'" in refused(
        capsys, "vit", "--config", "quantize"
    )


def test_an_unknown_model_is_refused_with_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "vitt")
    assert "unknown model 'vitt', did you mean 'vit'?" in said
    for entries in zoo.TABLES.values():
        assert all(name in said for name in entries)


def test_no_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "name one model: a module:callable or a folder" in refused(capsys)


def test_the_tool_names_every_model_of_tests(capsys: pytest.CaptureFixture[str]) -> None:
    assert show_graph.main(["--list"]) == accuracy.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for entries in zoo.TABLES.values() for name in entries)


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "show_graph_test_model"
    (tmp_path / f"{name}.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # undone afterwards
    return name


def test_a_model_of_the_user_is_shown_graph_by_graph(
    capsys: pytest.CaptureFixture[str], user_module: str
) -> None:
    out = shown(capsys, "--model", f"{user_module}:make", "--batch", "3")
    assert "graph 1 of 2" in out and "graph 2 of 2" in out
    assert "x = input  [3, 5, 32] float32" in out
    assert "int8(first.weight)" in out and "int8(second.weight)" in out
    assert "coverage: 100.0%" in out


@pytest.mark.parametrize(
    ("spec", "missing"),
    [("no_such_module:make", "no_such_module"), ("show_graph_test_model:nothing", "nothing")],
)
def test_a_model_of_the_user_that_is_not_there_is_refused(
    spec: str, missing: str, capsys: pytest.CaptureFixture[str], user_module: str
) -> None:
    said = refused(capsys, "--model", spec)
    assert said.startswith(f"cannot load {spec!r}: ") and f"'{missing}'" in said


def test_json_holds_lines_and_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shown(capsys, "timm_block", "--json", str(tmp_path / "graph.json"))
    data = json.loads((tmp_path / "graph.json").read_text())
    (graph,) = data["graphs"]
    assert data["model"] == "timm_block"
    assert {line["rule"] for line in graph["before"]} == {""}
    assert "norm_linear" in {line["rule"] for line in graph["after"]}
    assert graph["report"]["coverage"] == 1.0


def test_svg_names_every_rule(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if not svg.can_draw():
        pytest.skip(f"NOT CHECKED: the picture. {svg.NO_DOT}")
    file = tmp_path / "graph.svg"
    shown(capsys, "dinov2", "--svg", str(file))
    root = ET.parse(file).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    words = " ".join(root.itertext())
    for rule in INT8_RULES:
        assert f"{rule.name}: " in words
    assert "encoder.layer.0" in words


def test_svg_without_graphviz_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refused(capsys, "vit", "--svg", str(tmp_path / "graph.svg"))
    assert "apt-get install graphviz" in said
    assert not list(tmp_path.iterdir())


def test_compare_is_printed_and_stands_in_the_page_and_in_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page, data = tmp_path / "graph.html", tmp_path / "graph.json"
    out = shown(capsys, "timm_block", "--compare", "--html", str(page), "--json", str(data))
    assert f"wrote {page}" in out
    sites = json.loads(data.read_text())["accuracy"]["sites"]
    assert len(sites) == 8
    text = page.read_text(encoding="utf-8")
    for site in sites:
        assert f"{site['local']['sqnr_db']:.1f} dB local" in text
        assert f"│ {site['path']} " in out


def test_a_page_can_be_had_without_errors(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, user_module: str
) -> None:
    page = tmp_path / "graph.html"
    argv = ["--model", f"{user_module}:make", "--html", str(page), "--config", "quantize=False"]
    shown(capsys, *argv)
    text = page.read_text(encoding="utf-8")
    assert "graph 2 of 2" in text and "quantize=False" in text
    assert "dB" not in text.partition("<script>")[0].partition("<header>")[2]
