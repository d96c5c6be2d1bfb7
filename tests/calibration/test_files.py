"""A calibration on disk, and the model that it belongs to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graphquant import Calibration, CalibrationError
from graphquant.calibration import Record
from graphquant.calibration.fingerprint import Parameter
from tests.small import Mlp, int8, seeded


class Siblings(nn.Module):
    """Two linears that a calibration may say read one value, and one that reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(5, 6)
        self.table = nn.Parameter(torch.ones(()))


@pytest.fixture
def model() -> nn.Module:
    made: nn.Module = seeded(Siblings)
    return made


@pytest.fixture
def calibration(model: nn.Module) -> Calibration:
    made = Calibration(model, method="percentile", percentile=99.5)
    made.add(["q", "k"], Record.of(torch.randn(9, 6)))
    made.add(["out"], Record.of(torch.tensor([[1e30, -1e-3, 0.0, torch.nan, torch.inf]])))
    made.batches = 7
    return made


@pytest.fixture
def file(calibration: Calibration, tmp_path: Path) -> Path:
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    return path


def test_what_was_saved_is_loaded(calibration: Calibration, file: Path, model: nn.Module) -> None:
    for loaded in (Calibration.load(file), Calibration.load(str(file), model)):
        assert repr(loaded) == repr(calibration) and "percentile 99.5" in repr(loaded)
        assert (loaded.batches, loaded.groups) == (7, (("k", "q"),))
        assert loaded.sites == ("k", "out", "q")
        for path in loaded.sites:
            assert loaded.range(path) == calibration.range(path)
            got, want = loaded.absmax(path), calibration.absmax(path)
            assert got is not None and want is not None and torch.equal(got, want)
            assert (loaded.sample(path) is None) == (path == "out")
            assert vars(loaded.record(path)).keys() >= {"rows", "calls", "left_out"}
        assert loaded.record("q") is loaded.record("k")
        merged = loaded.merge(calibration)  # which checks the model
        assert merged.batches == 14 and merged.record("q").rows == 18  # type: ignore[union-attr]


def test_the_file_is_safetensors_with_json(file: Path) -> None:
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    about = json.loads(header["graphquant.calibration"])
    assert about["version"] == 1
    assert [r["sites"] for r in about["records"]] == [["k", "q"], ["out"]]
    assert len(load_file(file)) == 8  # low, high, sample and counts, once for q and k


def test_one_data_is_one_file(calibration: Calibration, file: Path, tmp_path: Path) -> None:
    Calibration.load(file).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_a_calibration_that_saw_nothing(model: nn.Module, tmp_path: Path) -> None:
    Calibration(model).save(tmp_path / "none.safetensors")
    loaded = Calibration.load(tmp_path / "none.safetensors", model)
    assert (loaded.sites, loaded.batches) == ((), 0)


def test_a_compiled_model_is_the_model(calibration: Calibration, file: Path, model: Any) -> None:
    assert Calibration.load(file, int8(model)).batches == 7
    assert Calibration(int8(model)).merge(calibration).batches == 7


def narrow(model: Any) -> None:
    model.q = nn.Linear(6, 3)


def rename(model: Any) -> None:
    model.key = model.k
    del model.k


def train(model: Any) -> None:
    model.out.weight.data *= 1.01


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (narrow, r"q\.bias was float32 \[4\], is float32 \[3\]; q\.weight .*concerned: q$"),
        (rename, r"k\.bias is missing; k\.weight is missing; key\.bias is new; .*concerned: k$"),
        (train, r"calibrated: out\.weight has other values\. .*concerned: out$"),
        (lambda m: m.table.data.add_(1), r"table has other values\. .*concerned: none$"),
        (
            lambda m: m.half(),
            r"k\.bias was float32 \[4\], is float16 \[4\].*; and 2 more parameters",
        ),
    ],
    ids=["shape", "name", "values", "scalar", "dtype"],
)
def test_another_model_is_refused_by_what_differs(
    change: Callable[[Any], None], said: str, file: Path, model: nn.Module
) -> None:
    Calibration.load(file, model)
    change(model)
    with pytest.raises(CalibrationError, match=said):
        Calibration.load(file, model)
    assert Calibration.load(file).batches == 7


def test_what_the_values_cannot_be_read_of_is_known_by_shape(file: Path, model: nn.Module) -> None:
    assert Calibration.load(file, model.to("meta")).batches == 7
    mlp = seeded(lambda: Mlp()).eval()
    before = Calibration(mlp)
    with torch.no_grad():
        int8(mlp, free_weights=True)(torch.randn(2, 64))
    Calibration(mlp).merge(before)  # its weights' storages are gone


@pytest.mark.parametrize("view", [lambda t: t, lambda t: t.t(), lambda t: t[:, ::2]])
def test_samples_are_the_same_however_a_parameter_lies_in_memory(
    view: Callable[[Tensor], Tensor],
) -> None:
    t = view(torch.randn(40, 30))
    assert Parameter.of(t) == Parameter.of(t.contiguous())
    for changed in ((0, 0), (-1, -1)):
        other = t.clone()
        other[changed] += 1
        assert Parameter.of(other).values != Parameter.of(t).values


def damage(file: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        header = dict(opened.metadata())
    about = json.loads(header["graphquant.calibration"])
    change(tensors, about)
    save_file(tensors, file, {"graphquant.calibration": json.dumps(about)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, a: a.update(version=2), "has version 2, this graphquant reads 1"),
        (lambda t, a: t.pop("0.high"), r"is damaged: KeyError\('0\.high'\)"),
        (lambda t, a: t.update({"2.low": torch.ones(3)}), r"tensors without a record: 2\.low"),
        (lambda t, a: t.update({"0.high": torch.ones(3)}), r"is damaged: .*0 has torch\.float32 "),
        (lambda t, a: t.update({"0.sample": torch.ones(3, 5)}), r"0 has torch\.float32 \[3, 5\]"),
        (lambda t, a: t.update({"0.counts": torch.ones(8192)}), r"0 has torch\.float32 \[8192\]"),
        (lambda t, a: a.pop("records"), r"is damaged: KeyError\('records'\)"),
        (lambda t, a: a["records"][0].pop("rows"), r"is damaged: KeyError\('rows'\)"),
        (lambda t, a: a.update(method="magic"), r"is damaged: OptionError\(.*magic"),
        (lambda t, a: a.update(model=[1]), "is damaged"),
    ],
)
def test_damaged_files_are_refused(change: Any, said: str, file: Path) -> None:
    damage(file, change)
    with pytest.raises(CalibrationError, match=said):
        Calibration.load(file)


def test_other_files_are_refused(file: Path, tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CalibrationError, match=r"header has no 'graphquant\.calibration'"):
        Calibration.load(tmp_path / "model.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CalibrationError, match="is no calibration: "):
        Calibration.load(file)
    torch.save({}, tmp_path / "pickle.pt")
    with pytest.raises(CalibrationError, match="is no calibration: "):
        Calibration.load(tmp_path / "pickle.pt")
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "nothing.safetensors")
