"""A Budget: its file, its table, and that what is loaded is what was saved."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphquant
from graphquant import Budget, FileError, LeftInFloat, OptionError, OutputAccuracy
from graphquant.accuracy.budget import METRICS, goal
from graphquant.config import Config, escape
from graphquant.metrics import Error, RowCosines
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
    text = json.dumps(budget.to_dict(), allow_nan=False)
    assert Budget.from_dict(json.loads(text)) == budget


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
    config = Config(exclude=escape(path))
    assert config.wants(path) is not None
    assert (config.wants(other) is None) == (other != path)


def test_usual_paths_are_patterns_as_they_stand() -> None:
    assert escape("encoder.layers.0.self_attn.q-proj") == "encoder.layers.0.self_attn.q-proj"


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
    ("change", "said"),
    [
        (
            {"format": "graphquant.calibration"},
            "format must be one of 'graphquant.budget', got",
        ),
        ({"version": 2}, "version must be a whole number from 1 to 1, got 2"),
        ({"metric": "mae"}, "metric must be one of 'cosine', "),
        ({"metric": ["cosine"]}, "metric must be one of "),
        ({"goal": None}, "goal must be a finite number, got None"),
        ({"goal": 10**400}, "goal must be a finite number"),
        ({"before": math.nan}, "before must be a finite number"),
        ({"after": "much"}, "after must be a finite number"),
        ({"float_share": 2}, "float_share must be a finite number from 0 to 1"),
        ({"left": {"path": "a"}}, "left must be a list"),
        ({"left": [3]}, r"left\[0\] must be an object, got 3"),
        ({"left": [{"path": "a"}]}, r"it has no left\[0\]\.share"),
        ({"left": [{"path": 1, "alone": 1, "share": 1}]}, r"left\[0\]\.path must be text"),
        ({"left": [{"path": "\ud800", "alone": 1, "share": 1}]}, ".* valid UTF-8 text"),
        ({"calibration": 1}, "calibration must be true or false"),
        ({"options": 3}, "options must be an object"),
        ({"options": {"quantise": True}}, "options: unknown option 'quantise'"),
        ({"options": {"exclude": "re:("}}, "options: exclude: 're:\\(' is not a regular"),
        ({"options": {"exclude": "re:" + "(" * 10**4}}, r"options: exclude: 're:\(+.*' is not a"),
        (
            {"options": {"include": "re:a{" + "9" * 30 + "}"}},
            "options: include: 're:a{9+}' is not a",
        ),
        ({"options": {"exclude": [["a"]]}}, r"options: the option exclude=\[\['a'\]\] cannot come"),
        ({"options": {"clip_range": 10**400}}, "options: the option clip_range=100+.* cannot come"),
        ({"options": {"smooth": {}}}, "options: the option smooth={} cannot come"),
        ({"options": {"smooth": 0.5}}, "options: smooth=0.5 needs calibration"),
        ({"options": {"calibration": 1}}, "options: the option calibration=1 cannot come"),
        ({"options": {"on_report": "print"}}, "options: the option on_report='print' cannot come"),
        ({"more": 1}, "it has an unknown field 'more'"),
    ],
)
def test_what_is_no_budget_is_refused_by_its_field(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    data = {**BUDGET.to_dict(), **change}
    with pytest.raises(FileError, match=f"this is no budget: {said}"):
        Budget.from_dict(data)
    file = tmp_path / "budget.json"
    file.write_text(json.dumps(data))
    with pytest.raises(FileError, match=r"budget\.json is not a budget: "):
        Budget.load(file)


@pytest.mark.parametrize("name", ["inductor", "tensorrt"])
@pytest.mark.parametrize(
    "value",
    [
        {"cpp.cxx": ["/bin/sh"]},
        {"cpp.cxx": "/bin/sh"},
        {"aot_inductor.output_path": "/etc/x"},
        {"post_grad_custom_pre_pass": {}},
        {"max_autotune": None},
        {"max_autotune": True, "joint_custom_post_pass": [1]},
        {"workspace_size": 10**400},
        "max_autotune",
        ["max_autotune"],
        1,
    ],
)
def test_a_file_cannot_name_programs_and_paths_for_other_compilers(name: str, value: Any) -> None:
    """`cpp.cxx` is run by Inductor."""
    with pytest.raises(FileError, match=f"the option {name}=.* cannot come from a file"):
        Budget.from_dict({**BUDGET.to_dict(), "options": {name: value}})
    budget = dataclasses.replace(BUDGET, options={name: value})
    with pytest.raises(OptionError, match="cannot be saved"):
        budget.to_dict()


@pytest.mark.parametrize(
    "options",
    [
        {"inductor": {"max_autotune": True, "cpp.min_chunk_size": 1}, "mode": "reduce-overhead"},
        {"tensorrt": {"min_block_size": 1}, "inner": "torch_tensorrt", "select": "always"},
        {"include": ["encoder.*", r"re:a\.\d+"], "exclude": "head", "smooth": "norm"},
        {"quantize": False, "clip_range": 6.0, "wbits": 8, "weight_scale": "mse", "mode": None},
    ],
)
def test_numbers_words_and_patterns_come_from_a_file(
    options: dict[str, Any], tmp_path: Path
) -> None:
    budget = dataclasses.replace(BUDGET, options=options)
    budget.save(tmp_path / "budget.json")
    assert Budget.load(tmp_path / "budget.json") == budget


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b"\xff\xfe",
        b"[" * 10**5,
        b'{"options":' * 10**5,
        b"1" * 5000,
        b"NaN",
        b'{"format": 1, "format": 2}',
    ],
)
def test_files_that_are_no_budget_are_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "budget.json"
    file.write_bytes(content)
    with pytest.raises(FileError, match=r"budget\.json is not a budget: "):
        Budget.load(file)


def test_a_field_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "budget.json"
    BUDGET.save(file)
    file.write_text(file.read_text().replace('"goal":', '"goal": 0.5, "goal":'))
    with pytest.raises(FileError, match="it has 'goal' twice"):
        Budget.load(file)


def test_a_file_that_never_ends_is_refused() -> None:
    with pytest.raises(FileError, match="/dev/zero is not a budget: it is larger than 64 MiB"):
        Budget.load("/dev/zero")


anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


@given(budgets, st.data())
def test_any_value_anywhere_is_taken_or_refused(budget: Budget, data: st.DataObject) -> None:
    saved = json.loads(json.dumps(budget.to_dict()))
    places = list(holders(saved))
    holder, key = data.draw(st.sampled_from(places))
    holder[key] = data.draw(anything)
    try:
        loaded = Budget.from_dict(saved)
    except OptionError:  # FileError, or that a calibration is missing
        return
    assert str(loaded) and loaded == Budget.from_dict(loaded.to_dict())


def holders(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in JSON where a value stands."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield value, key
        yield from holders(value[key])


@settings(suppress_health_check=list(HealthCheck))
@given(budget=budgets, data=st.data())
def test_a_file_with_a_flipped_bit_or_cut_is_a_budget_or_refused(
    tmp_path: Path, budget: Budget, data: st.DataObject
) -> None:
    file = tmp_path / "budget.json"
    budget.save(file)
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 2))
    if data.draw(st.booleans()):
        del content[at:]
        file.write_bytes(content)
        with pytest.raises(FileError):
            Budget.load(file)
        return
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    with contextlib.suppress(OptionError):
        loaded = Budget.load(file)
        assert Budget.from_dict(loaded.to_dict()) == loaded


def test_a_save_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "budget.json"
    BUDGET.save(file)
    before = file.read_bytes()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        dataclasses.replace(BUDGET, goal=0.5).save(file)
    assert file.read_bytes() == before and [*tmp_path.iterdir()] == [file]


def test_a_saved_file_keeps_its_permissions_and_a_link_its_target(tmp_path: Path) -> None:
    file, link = tmp_path / "budget.json", tmp_path / "link.json"
    umask = os.umask(0o027)
    try:
        BUDGET.save(file)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640  # as any new file
    file.chmod(0o604)
    link.symlink_to(file)
    dataclasses.replace(BUDGET, goal=0.5).save(link)
    assert link.is_symlink() and stat.S_IMODE(file.stat().st_mode) == 0o604
    assert Budget.load(file).goal == 0.5


@pytest.mark.parametrize("value", [10**400, -(10**400), math.nan, math.inf, True, "1"])
def test_numbers_that_no_float_holds_are_no_goal_and_no_option(value: Any) -> None:
    with pytest.raises(OptionError, match="must be a number above 0"):
        goal(sqnr=value)
    with pytest.raises(OptionError, match="clip_range must be a number above 0"):
        Config(clip_range=value)


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
