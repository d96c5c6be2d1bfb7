"""A Budget: its file, its table, and that what is loaded is what was saved."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphquant
from graphquant import Budget, LeftInFloat, OptionError, OutputAccuracy
from graphquant.accuracy import Error, RowCosines
from graphquant.budget import METRICS
from graphquant.config import Config, literally
from tests.seen import Seen
from tests.small import Mlp, seeded

text = st.text(max_size=12)
unit = st.floats(0, 1)
numbers = st.floats(allow_nan=False)
sites = st.builds(LeftInFloat, text, numbers, unit)
options = st.fixed_dictionaries(
    {},
    optional={
        "exclude": st.lists(text.filter(lambda p: not p.startswith("re:")), max_size=3),
        "smooth": st.sampled_from(["norm", None]),
        "weight_scale": st.sampled_from(["absmax", "mse"]),
        "clip_range": st.none(),
        "inductor": st.dictionaries(text, st.integers(), max_size=2),
    },
)
budgets = st.builds(
    Budget,
    st.sampled_from(sorted(METRICS)),
    unit,
    numbers,
    numbers,
    st.lists(sites, max_size=4).map(tuple),
    unit,
    options,
)


@given(budgets)
def test_json_brings_back_an_equal_budget(budget: Budget) -> None:
    told = json.dumps(budget.to_dict(), allow_nan=False)
    assert Budget.from_dict(json.loads(told)) == budget


@given(budgets)
def test_any_budget_can_be_shown(budget: Budget) -> None:
    assert METRICS[budget.metric].label in str(budget)


def outputs(**noise: float) -> list[OutputAccuracy]:
    made = []
    for name, size in noise.items():
        y = torch.ones(4, 3)
        y8 = y + size * torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
        made.append(OutputAccuracy(name, Error.of(y8, y), RowCosines.of(y8, y)))
    return made


def test_a_metric_is_that_of_the_worst_output() -> None:
    both = outputs(a=0.1, b=0.5)
    cosine = (3 + 3.5 / math.sqrt(3 * 4.25)) / 4
    assert METRICS["cosine"](both) == pytest.approx(cosine)
    assert METRICS["worst_cosine"](both) == pytest.approx(3.5 / math.sqrt(3 * 4.25))
    assert METRICS["sqnr"](both) == pytest.approx(10 * math.log10(12 / 0.25), abs=1e-5)
    assert METRICS["sqnr"](outputs(a=0.0)) == math.inf
    for metric in METRICS.values():
        assert metric(outputs(a=0.1, b=math.nan)) == -math.inf
        assert metric.loss(metric(both)) > metric.loss(metric(outputs(a=0.1))) > 0


characters = st.sampled_from([*"ab.*?[]!-:", "re:", "re:a"])
module_paths = st.lists(characters, max_size=5).map("".join)


@given(module_paths, module_paths)
def test_a_literal_pattern_matches_its_path_alone(path: str, other: str) -> None:
    config = Config(exclude=literally(path))
    assert config.wants(path) is not None
    assert (config.wants(other) is None) == (other != path)


def test_usual_paths_are_patterns_as_they_stand() -> None:
    assert literally("encoder.layers.0.self_attn.q-proj") == "encoder.layers.0.self_attn.q-proj"


BUDGET = Budget(
    "cosine",
    0.999,
    0.99,
    0.9995,
    (LeftInFloat("layers[0].fc", 0.995, 0.125),),
    0.25,
    {"exclude": ["layers[[]0].fc"], "on_report": print},
)


def test_a_table_names_what_is_left_and_what_it_costs() -> None:
    shown = str(BUDGET)
    (row,) = [line for line in shown.splitlines() if "layers[0].fc" in line]
    assert "12.5%" in row and "0.99500" in row
    assert BUDGET.summary() == (
        "mean cosine 0.99950 (0.99000 before, at least 0.99900): 1 linear left in float; 25.0% of "
        "all linears' FLOPs are"
    )
    assert "left in float │" not in str(Budget("sqnr", 30.0, 31.0, 31.0, (), 0.0))


def test_objects_of_the_program_are_not_saved(tmp_path: Path) -> None:
    file = tmp_path / "budget.json"
    BUDGET.save(file)
    loaded = Budget.load(file)
    assert loaded.options == {"exclude": ["layers[[]0].fc"]} and loaded.left == BUDGET.left
    other = Budget("sqnr", 30.0, 31.0, 31.0, (), 0.0, {"inductor": {"x": object()}})
    with pytest.raises(OptionError, match="cannot be saved"):
        other.save(file)
    assert Budget.load(file) == loaded  # what was there is not destroyed


def test_a_calibration_is_referred_to(tmp_path: Path) -> None:
    file, known = tmp_path / "budget.json", Seen()
    budget = Budget("cosine", 0.9, 0.8, 0.9, (), 0.0, {"smooth": 0.5, "calibration": known})
    budget.save(file)
    with pytest.raises(OptionError, match="fitted with a calibration: give it as calibration="):
        Budget.load(file)
    assert Budget.load(file, calibration=known) == budget
    BUDGET.save(file)
    assert "calibration" not in Budget.load(file, calibration=known).options


@pytest.mark.parametrize(
    "change",
    [
        {"format": "graphquant.calibration"},
        {"version": 2},
        {"metric": "mae"},
        {"goal": None},
        {"left": [{"path": "a"}]},
        {"options": 3},
        {"options": {"quantise": True}},
    ],
)
def test_what_is_no_budget_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(OptionError):
        Budget.from_dict({**BUDGET.to_dict(), **change})
    file = tmp_path / "budget.json"
    file.write_text("{")
    with pytest.raises(OptionError, match=r"budget\.json is no budget"):
        Budget.load(file)
    with pytest.raises(OptionError, match="this is no budget"):
        Budget.from_dict({})


def test_a_loaded_budget_gives_the_same_report(tmp_path: Path) -> None:
    model: nn.Module = seeded(Mlp).eval()
    x: Tensor = seeded(lambda: torch.randn(6, 5, 64))
    calibration = graphquant.calibrate(model, [x], progress=False)
    given = {"calibration": calibration, "smooth": 0.5, "weight_scale": "mse"}
    plain = graphquant.compare(model, [x], options=given).outputs[0].error.sqnr
    budget = graphquant.fit_budget(model, [x], sqnr=plain + 1, options=given, progress=False)
    assert len(budget.left) == 1
    budget.save(tmp_path / "budget.json")
    calibration.save(tmp_path / "calibration.safetensors")
    known = graphquant.Calibration.load(tmp_path / "calibration.safetensors", model)
    loaded = Budget.load(tmp_path / "budget.json", calibration=known)
    one, two = (
        graphquant.compare(model, [x], options=b.options).to_json() for b in (budget, loaded)
    )
    assert one == two
