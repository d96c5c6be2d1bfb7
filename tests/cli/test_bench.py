"""python -m graphquant bench: every variant runs, in turns, and ratios are of these times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from graphquant import cli
from graphquant.cli import bench
from graphquant.cli.bench import USUAL, VARIANTS, Time, ratios

SHORT = ["--seconds", "0.02", "--width", "200"]


def test_a_model_is_timed_in_every_variant(
    users: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "times.json"
    argv = ["bench", f"{users}:mlp", "--variants", *VARIANTS, "--json", str(file), *SHORT]
    assert cli.main([*argv, "--config", "inner=eager"]) == 0  # Inductor is not what is tested
    out, data = capsys.readouterr().out, json.loads(file.read_text())
    assert [v["variant"] for v in data["variants"]] == list(VARIANTS)
    assert data["dtype"] == "float32" and data["environment"]["torch"]
    fastest = min(v["ms"] for v in data["variants"] if "graphquant" not in v["variant"])
    for v in data["variants"]:
        assert v["ms"] > 0 and len(v["turns"]) >= 3 and v["cosine"] > 0.999
        assert v["over_eager"] == pytest.approx(data["variants"][0]["ms"] / v["ms"])
        assert v["over_fastest"] == pytest.approx(fastest / v["ms"])
        assert (v["coverage"] == 1.0) == ("graphquant" in v["variant"])
        assert f"│ {v['variant']} " in out and f" {v['over_eager']:.2f}x " in out
    assert data["variants"][0]["over_eager"] == data["variants"][0]["cosine"] == 1.0
    assert "graphquant: 100.0% of the linears' FLOPs in int8" in out


def test_a_model_in_bfloat16_is_not_narrowed_again(
    users: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["bench", f"{users}:mlp", "--dtype", "bfloat16", "--variants", "bf16-eager", *SHORT]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "│ eager " in out and "bf16-eager" not in out and "bfloat16 on " in out


def test_a_variant_that_fails_is_a_line_and_exit_code_1(
    users: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = bench._compiled

    def compiled(model: nn.Module, inputs: bench.Inputs, how: str, *more: object) -> object:
        if how == "inductor":
            raise_later = torch.OutOfMemoryError("no memory\nat all")

            def call() -> None:
                raise raise_later

            return call
        return real(model, inputs, how, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(bench, "_compiled", compiled)
    assert cli.main(["bench", f"{users}:mlp", "--variants", "compile", *SHORT]) == 1
    out = capsys.readouterr().out
    assert "compile: OutOfMemoryError: no memory" in out and "│ eager " in out


def test_outputs_that_are_not_the_models_are_said() -> None:
    x = torch.arange(1.0, 5.0)
    assert bench._cosine(x, x) == 1.0 and bench._cosine(x, x[:3]) is None
    times = [Time("eager", 2.0, 0.1, 0.0, 1.0), Time("graphquant", 1.0, 0.1, 0.0, float("nan"))]
    assert ratios(times[1], times) == {"over_eager": 2.0, "over_fastest": 2.0}
    assert "graphquant: ITS OUTPUTS ARE NOT THE MODEL'S" in str(bench.table("m", times).caption)
    assert ratios(Time("compile", failed="x"), times)["over_eager"] is None


def test_what_is_measured_by_default_has_a_baseline() -> None:
    assert USUAL[0] == "eager" and set(USUAL) < set(VARIANTS)
