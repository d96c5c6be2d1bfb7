"""Which models the command line takes, and in how few words it refuses."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from graphquant import cli
from graphquant.cli import models


def loaded(spec: Any, **given: Any) -> models.Loaded:
    usual = {"model": None, "attn": "sdpa", "batch": 2, "tokens": None, "dtype": None}
    args = {**usual, "name": str(spec), "device": None, "named": {}, **given}
    return models.load(argparse.Namespace(**args))


def test_a_callable_may_take_a_batch(users: str) -> None:
    _, model, inputs = loaded(f"{users}:mlp", batch=7)
    ((x,), kwargs) = inputs(0)
    assert x.shape == (7, 5, 32) and not kwargs and not model.training
    assert torch.equal(x, inputs(0)[0][0]) and not torch.equal(x, inputs(1)[0][0])


def test_weights_and_inputs_are_the_same_each_time(users: str) -> None:
    one, two = loaded(f"{users}:fixed"), loaded(f"{users}:fixed")
    assert one.inputs(0)[0][0].shape == (3, 32)
    assert torch.equal(one.inputs(0)[0][0], two.inputs(0)[0][0])
    assert torch.equal(one.model.fc1.weight, two.model.fc1.weight)  # type: ignore[union-attr, arg-type]


def test_dtype_is_that_of_weights_and_of_inputs(users: str, folders: Path) -> None:
    for spec in (f"{users}:mlp", folders / "vit"):
        _, model, inputs = loaded(spec, dtype="bfloat16")
        args, kwargs = inputs(0)
        floats = [*args, *kwargs.values(), *model.parameters()]
        assert {t.dtype for t in floats} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("bert", {"input_ids": (2, 39), "attention_mask": (2, 39)}),
        ("roberta", {"input_ids": (2, 38), "attention_mask": (2, 38)}),
        ("vit/config.json", {"pixel_values": (2, 3, 32, 32)}),
        ("t5", {"input_ids": (2, 128), "attention_mask": (2, 128)}),
        ("clip", {"pixel_values": (2, 3, 32, 32), "input_ids": (2, 38), "attention_mask": (2, 38)}),
    ],
)
def test_inputs_of_a_folder_are_made_from_its_config(
    name: str, shapes: dict[str, tuple[int, ...]], folders: Path
) -> None:
    _, _, inputs = loaded(folders / name)
    args, kwargs = inputs(0)
    assert not args and {k: tuple(v.shape) for k, v in kwargs.items()} == shapes


def test_a_folder_with_weights_has_these(folders: Path) -> None:
    from transformers import ViTConfig, ViTModel

    model = loaded(folders / "vit").model
    torch.manual_seed(0)
    saved = ViTModel(ViTConfig.from_pretrained(folders / "vit")).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_a_text_has_as_many_tokens_as_asked_for(folders: Path) -> None:
    _, _, inputs = loaded(folders / "bert", tokens=7)
    assert inputs(0)[1]["input_ids"].shape == (2, 7)


WRONG = [
    ([], "name one model"),
    (["a:b", "--model", "a:b"], "name one model"),
    (["no_such_module:make"], "cannot load 'no_such_module:make': No module named"),
    (["{users}:nothing"], "has no attribute 'nothing'"),
    (["{users}:broken"], "{users}:broken failed: FileNotFoundError: no weights"),
    (["{users}:text"], "returned (int), needs a torch.nn.Module: return (model, args, kwargs)"),
    (["{users}:loose"], "returned (Mlp, Tensor), needs"),
    (["{users}:wide"], "{users}:wide cannot be called: RuntimeError: Given normalized_shape"),
    (["{users}:bare"], "no inputs can be made for Mlp"),
    (["{users}:kept"], "no inputs can be made for Mlp"),
    (["nothing"], "unknown model 'nothing': neither module:callable nor a folder"),
    (["{folders}/empty"], "empty has no config.json"),
    (["{folders}/broken"], "is not a valid JSON file"),
    (["{folders}/wav2vec2"], "no inputs can be made for Wav2Vec2Model"),
    (["{users}:mlp", "--batch", "0"], "argument --batch: 0 is not a whole number of at least 1"),
    (["{users}:mlp", "--dtype", "int8"], "argument --dtype: invalid choice"),
    (["{users}:mlp", "--device", "toaster"], "'toaster' is not a torch device"),
    (["{users}:mlp", "--device", "mps"], "graphquant runs on cpu and cuda"),
    (["{users}:mlp", "--device", "cuda:99"], "torch sees "),
    (["{users}:mlp", "--config", "quantise=1"], "unknown option 'quantise', did you mean"),
    (["{users}:mlp", "--config", "quantize"], "--config takes name=value"),
    (["{users}:mlp", "--out", "no/such/folder"], "--out: [Errno 2]"),
    (["{users}:mlp", "--json", "no/such/folder"], "--json: [Errno 2]"),
    (["{users}:mlp", "--nonsense"], "unrecognized arguments: --nonsense"),
]


@pytest.mark.parametrize(("argv", "said"), WRONG, ids=lambda v: " ".join(v) if v != str(v) else "")
def test_what_is_wrong_is_one_line_and_exit_code_2(
    argv: list[str],
    said: str,
    users: str,
    folders: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"users": users, "folders": str(folders)}
    assert cli.main(["explain", *(word.format(**names) for word in argv)]) == 2
    err = capsys.readouterr().err
    assert said.format(**names) in err
    if "quantise" not in err:  # that one lists what there is
        assert err.count("\n") == 1


def test_without_transformers_a_folder_is_refused(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["explain", str(folders / "bert")]) == 2
    assert capsys.readouterr().err == "a folder needs transformers: pip install transformers\n"


@pytest.mark.parametrize("argv", [[], ["tune"]])
def test_an_unknown_command_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert "COMMAND" in capsys.readouterr().err
