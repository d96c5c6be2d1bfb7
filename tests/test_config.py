"""Options: patterns over module paths, errors that name what is valid, and no way to change one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from graphquant import Config, GraphquantError, OptionError
from graphquant.config import WEIGHT_SCALES
from graphquant.ops.quantize_weight.op import METHODS
from tests.seen import Seen

PATH = "encoder.layers.0.mlp.fc1"


@pytest.mark.parametrize(
    "pattern",
    [
        PATH,
        "*.fc1",
        "encoder.*",
        "*",
        "encoder.layers.?.mlp.fc[12]",
        "*.mlp.*",
        "re:encoder\\.layers\\.[0-9]+\\.mlp\\.fc[12]",
        "re:.*fc1",
        "re:.*",
    ],
)
def test_a_pattern_matches_the_whole_path(pattern: str) -> None:
    assert Config(include=pattern).wants(PATH) is None
    assert Config(exclude=pattern).wants(PATH) == f"excluded by {pattern!r}"


@pytest.mark.parametrize(
    "pattern", ["fc1", "encoder", "ENCODER.*", "*.fc2", "re:fc1", "re:encoder", "", "layers.0.*"]
)
def test_a_part_of_a_path_or_another_one_does_not_match(pattern: str) -> None:
    assert Config(include=pattern).wants(PATH) == "not matched by include"
    assert Config(exclude=pattern).wants(PATH) is None


def test_several_patterns_are_alternatives() -> None:
    config = Config(include=["*.fc1", "*.fc2"], exclude=("*.0.*", "re:.*\\.1\\..*"))
    assert config.wants("layers.2.fc1") is None
    assert config.wants("layers.2.fc2") is None
    assert config.wants("layers.2.q") == "not matched by include"
    assert config.wants("layers.0.fc1") == "excluded by '*.0.*'"
    assert config.wants("layers.1.fc1") == "excluded by 're:.*\\\\.1\\\\..*'"


def test_without_patterns_every_linear_is_wanted() -> None:
    assert Config().wants(PATH) is None and Config().wants("") is None


@pytest.mark.parametrize("given", ["a.*", ["a.*"], ("a.*",)])
def test_one_pattern_may_stand_alone(given: Any) -> None:
    assert Config(include=given).include == Config(exclude=given).exclude == ("a.*",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclud": "a"}, r"unknown option 'exclud', did you mean 'exclude'\? Valid: inner, mode,"),
        ({"quantise": False}, r"unknown option 'quantise', did you mean 'quantize'\?"),
        ({"zzz": 1}, r"unknown option 'zzz'\. Valid: inner, .*quantize.*on_report.*inductor"),
        ({"inner": "tvm"}, r"inner='tvm' is not one of 'inductor', 'eager', 'aot_eager'"),
        ({"mode": "fast"}, r"mode='fast' is not one of 'default', 'reduce-overhead'"),
        ({"select": "fast"}, r"select='fast' is not one of 'faster', 'always'"),
        ({"quantize": 1}, r"quantize must be True or False, got 1"),
        ({"free_weights": None}, r"free_weights must be True or False, got None"),
        ({"include": 3}, r"include must be a pattern or a list of patterns, got 3"),
        ({"exclude": ["a", 3]}, r"exclude must be a pattern or a list of patterns"),
        ({"include": "re:["}, r"include: 're:\[' is not a regular expression: "),
        ({"activation": "int8"}, r"activation='int8' is not one of 'dynamic', 'static'"),
        ({"activation": "static"}, r'activation="static" takes its ranges from calibration data'),
        (
            {"attention_dtype": "bfloat16"},
            r"attention_dtype='bfloat16' is not one of 'auto', 'float32'",
        ),
        ({"weight_scale": "max"}, r"weight_scale='max' is not one of 'absmax', 'mse'"),
        (
            {"wbits": 4},
            r"wbits=4: only 8-bit weights are supported",
        ),
        ({"wbits": "8"}, r"wbits='8': only 8-bit"),
        ({"clip_range": 0}, r"clip_range must be a number above 0, got 0"),
        ({"clip_range": -1.5}, r"clip_range must be a number above 0, got -1.5"),
        ({"clip_range": float("inf")}, r"clip_range must be a number above 0, got inf"),
        ({"clip_range": float("nan")}, r"clip_range must be a number above 0, got nan"),
        ({"clip_range": True}, r"clip_range must be a number above 0, got True"),
        ({"clip_range": "5"}, r"clip_range must be a number above 0, got '5'"),
        (
            {"calibration": {"fc1": (0, 1)}},
            r"calibration must have the methods absmax\(path\)",
        ),
        ({"on_report": "print"}, r"on_report must be callable, got 'print'"),
        ({"inductor": ["max_autotune"]}, r"inductor must be a dict of Inductor options"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_with_what_is_valid(options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        Config.of(options)
    assert isinstance(caught.value, GraphquantError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("environment", "option", "select"),
    [
        (None, None, "faster"),
        ("", None, "faster"),
        ("always", None, "always"),
        ("always", "faster", "faster"),
        ("nonsense", "always", "always"),
    ],
)
def test_the_environment_changes_the_default_of_select(
    environment: str | None, option: str | None, select: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRAPHQUANT_SELECT", raising=False)
    if environment is not None:
        monkeypatch.setenv("GRAPHQUANT_SELECT", environment)
    assert Config.of({} if option is None else {"select": option}).select == select


def test_a_wrong_default_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHQUANT_SELECT", "sometimes")
    with pytest.raises(OptionError, match="select='sometimes' is not one of 'faster', 'always'"):
        Config()


def test_the_methods_of_weights_are_those_of_the_op() -> None:
    assert WEIGHT_SCALES == METHODS


def test_a_clip_range_becomes_a_float() -> None:
    """The ops' graphs hold it as it is, and a kernel takes no int in its place."""
    assert isinstance(Config(clip_range=5).clip_range, float)


def test_whatever_has_the_two_methods_is_a_calibration() -> None:
    class Seen:
        def absmax(self, path: str) -> None:
            return None

        def range(self, path: str) -> tuple[float, float]:
            return 0.0, 1.0

    assert Config(calibration=Seen(), activation="static").activation == "static"


def test_every_field_is_an_option_with_a_default() -> None:
    default = Config()
    fields = {f.name: getattr(default, f.name) for f in dataclasses.fields(Config)}
    assert Config.of({}) == Config.of(fields) == default


def test_a_config_cannot_be_changed() -> None:
    config = Config()
    for field in dataclasses.fields(Config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, None)


def test_a_config_does_not_share_the_list_it_was_given() -> None:
    patterns = ["a"]
    config = Config(exclude=patterns)  # type: ignore[arg-type]
    patterns.append("*")
    assert config.wants("b") is None


@pytest.mark.parametrize("smooth", [0.01, 0.5, 0.99, "auto"])
def test_smoothing_by_channels_needs_a_calibration(smooth: Any) -> None:
    with pytest.raises(OptionError, match=rf"smooth={smooth!r} needs calibration data"):
        Config(smooth=smooth)
    assert Config(smooth=smooth, calibration=Seen()).smooth == smooth


def test_smoothing_by_norms_needs_nothing() -> None:
    assert Config(smooth="norm").calibration is None
    assert Config().smooth is None


@pytest.mark.parametrize(
    "smooth", [0.0, 1.0, -0.5, 1, True, False, "0.5", "gptq", "", float("nan")]
)
def test_smooth_is_a_number_between_0_and_1_or_a_name(smooth: Any) -> None:
    with pytest.raises(OptionError, match="is not a number between 0 and 1, 'auto' or 'norm'"):
        Config(smooth=smooth, calibration=Seen())


def test_smoothing_goes_with_no_clip_and_by_norms_with_no_static_range() -> None:
    with pytest.raises(OptionError, match=r"smooth=0\.5 with clip_range"):
        Config(smooth=0.5, calibration=Seen(), clip_range=3)
    with pytest.raises(OptionError, match="smooth='norm' has no range for activation='static'"):
        Config(smooth="norm", calibration=Seen(), activation="static")
