"""python -m graphquant compare: what it prints, writes and refuses."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import graphquant
from graphquant import cli
from tests import zoo

WIDE = ["--width", "200"]  # no line is folded

USERS = """
import torch
from torch import nn

def make(batch=1):
    return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 8)), (torch.randn(batch, 5, 32),), {}

def batches():
    return [torch.ones(1, 5, 32), (torch.ones(7, 5, 32),)]

def wrong():
    return [3]
"""


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["compare", *argv, *WIDE], named=zoo.TABLES) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["compare", *argv], named=zoo.TABLES) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "accuracy_test_model"
    (tmp_path / f"{name}.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # undone afterwards
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def test_every_linear_and_output_of_a_zoo_model_has_a_row(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "accuracy.json"
    out = shown(capsys, "timm_block", "--batches", "2", "--json", str(file))
    assert "8 int8 linears on 2 batches; the worst, " in out
    data = json.loads(file.read_text())
    assert data["batches"] == 2 and len(data["sites"]) == 8
    for site in data["sites"]:
        row = next(line for line in out.splitlines() if f"│ {site['path']} " in line)
        assert f"{site['local']['sqnr_db']:.1f}" in row
    worst = min(data["sites"], key=lambda s: s["local"]["sqnr_db"])
    first = next(line for line in out.splitlines() if line.startswith("│ "))
    assert worst["path"] in first


def test_random_batches_differ_and_are_the_same_each_time() -> None:
    entry = zoo.load("vit")
    one, two, again = (entry.inputs(2, draw)[0][0] for draw in (0, 1, 1))
    assert two.equal(again) and not one.equal(two)
    assert one.equal(entry.inputs(2)[0][0])


def test_options_are_spelled_as_for_show_graph(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "timm_block", "--config", "exclude=*.fc2", "select=always")
    assert "in float: 0.mlp.fc2: excluded by '*.fc2'" in out
    said = refused(capsys, "vit", "--config", "quantise=False")
    assert "unknown option 'quantise', did you mean 'quantize'?" in said
    assert "--config takes name=value" in refused(capsys, "vit", "--config", "quantize")


def test_a_model_and_batches_of_the_user_are_compared(
    capsys: pytest.CaptureFixture[str], users: str
) -> None:
    out = shown(capsys, "--model", f"{users}:make", "--data", f"{users}:batches")
    assert "1 int8 linear on 2 batches; the worst, 1: " in out
    random = shown(capsys, "--model", f"{users}:make", "--batch", "3", "--batches", "2")
    assert "on 2 batches" in random and random != out


def test_a_budget_is_fitted_shown_and_saved(
    capsys: pytest.CaptureFixture[str], users: str, tmp_path: Path
) -> None:
    file = tmp_path / "budget.json"
    given = ("--model", f"{users}:make", "--batch", "3", "--batches", "2")
    options = ("--budget", "0.99999999", "--save", str(file), "--config", "weight_scale=mse")
    out = shown(capsys, *given, *options)
    assert "1 linear left in float; 100.0% of all linears' FLOPs are" in out
    assert "in float: 1: excluded by '1'" in out and f"wrote {file}" in out
    saved = graphquant.Budget.load(file)
    assert saved.options == {"weight_scale": "mse", "exclude": ["1"]}
    assert saved.goal == 0.99999999
    assert "0 linears left in float; 0.0%" in shown(capsys, *given, "--budget", "0.9")
    assert "cosine=2.0 must be a number above 0, at most 1" in refused(
        capsys, *given, "--budget", "2"
    )
    assert "--save writes what --budget finds" in refused(capsys, *given, "--save", str(file))


def test_a_chart_is_written(capsys: pytest.CaptureFixture[str], users: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "accuracy.png"
    assert f"wrote {file}" in shown(capsys, "--model", f"{users}:make", "--plot", str(file))
    assert file.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_no_chart_is_promised(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = refused(capsys, "vit", "--plot", "accuracy.png")
    assert said == "--plot needs matplotlib: pip install matplotlib\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "name one model"),
        (["vitt"], "unknown model 'vitt', did you mean 'vit'?"),
        (["vit", "--batches", "0"], "argument --batches: 0 is not a whole number of at least 1"),
        (["vit", "--data", "nothing"], "--data takes module:callable, got 'nothing'"),
        (["vit", "--data", "no_such_module:make"], "cannot load 'no_such_module:make'"),
        (["vit", "--data", "accuracy_test_model:none"], "'none'"),
        (["vit", "--data", "accuracy_test_model:wrong"], "batch 0 is a int, needs a tensor"),
    ],
)
def test_what_has_no_meaning_is_refused(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str], users: str
) -> None:
    assert said in refused(capsys, *argv)
