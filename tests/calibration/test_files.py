"""A calibration on disk, and the model that it belongs to."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graphquant import Calibration, CalibrationError, FileError
from graphquant.calibration import Record
from graphquant.calibration.fingerprint import ParameterFingerprint
from graphquant.calibration.histogram import BINS, Histogram
from graphquant.calibration.saved import sha256
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
        assert merged.record("out").left_out == 4  # type: ignore[union-attr]


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
    assert ParameterFingerprint.of(t) == ParameterFingerprint.of(t.contiguous())
    for changed in ((0, 0), (-1, -1)):
        other = t.clone()
        other[changed] += 1
        assert ParameterFingerprint.of(other).values != ParameterFingerprint.of(t).values


def damage(file: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
    """As a program would that signs what it writes."""
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        header = dict(opened.metadata())
    about = json.loads(header["graphquant.calibration"])
    signed = about.pop("sha256")
    assert signed == sha256(about, tensors)
    change(tensors, about)
    about.setdefault("sha256", sha256(about, tensors))
    save_file(tensors, file, {"graphquant.calibration": json.dumps(about)})


def set_value(name: str, at: Any, value: float) -> Callable[[Any, Any], None]:
    def change(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        tensors[name][at] = value

    return change


def set_entry(name: str, value: Any) -> Callable[[Any, Any], None]:
    return lambda tensors, about: about["records"][0].update({name: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, a: a.update(version=2), "has version 2, this graphquant reads 1"),
        (lambda t, a: t.pop("0.high"), r"is damaged: records\[0\]: there is no tensor 0\.high"),
        (lambda t, a: t.update({"2.low": torch.ones(3)}), r"tensors without a record: 2\.low"),
        (lambda t, a: t.update({"0.high": torch.ones(3)}), r"0\.high has torch\.float32 \[3\]"),
        (lambda t, a: t.update({"0.low": torch.ones(())}), r"0\.low has no dimensions"),
        (lambda t, a: t.update({"0.low": torch.ones(0)}), r"0\.low is empty"),
        (lambda t, a: t.update({"0.low": t["0.low"].half()}), r"tensor 0\.low is torch\.float16"),
        (lambda t, a: t.update({"0.sample": torch.ones(3, 5)}), r"0\.sample has .* \[3, 5\]"),
        (lambda t, a: t.update({"0.sample": torch.zeros(65, 6)}), r"0\.sample has .* \[65, 6\]"),
        (lambda t, a: t.update({"0.counts": torch.ones(8192)}), r"counts has torch\.float32"),
        (set_value("0.counts", 4000, -1), r"0\.counts has negative values"),
        (set_value("0.counts", 4000, 2**50), r"counts has \d+ values, but 9 rows of 6 channels"),
        (set_value("0.counts", 4000, 2**62), "values, more than there can be"),
        (set_value("0.low", 2, torch.nan), r"0\.low and high are not ranges"),
        (set_value("0.high", 2, torch.inf), r"0\.low and high are not ranges"),
        (set_value("0.low", 2, 99.0), r"0\.low and high are not ranges"),
        (set_value("0.high", 2, 99.0), r"99 is beyond the histogram, 2\^"),
        (set_value("0.sample", (1, 1), torch.nan), r"0\.sample has values outside low"),
        (set_value("0.sample", (1, 1), -99.0), r"0\.sample has values outside low to high"),
        (set_entry("exponent", 10**9), r"records\[0\]\.exponent must be a whole number from -66"),
        (set_entry("exponent", 10**400), r"records\[0\]\.exponent must be a whole number"),
        (set_entry("exponent", 2.0), r"records\[0\]\.exponent must be a whole number"),
        (set_entry("rows", -9), r"records\[0\]\.rows must be a whole number from 0"),
        (set_entry("rows", 10), r"counts has 54 values, but 10 rows"),
        (set_entry("calls", True), r"records\[0\]\.calls must be a whole number .*, got True"),
        (set_entry("left_out", 2**63), r"records\[0\]\.left_out must be a whole number"),
        (set_entry("sites", []), r"records\[0\]: it has no sites"),
        (set_entry("sites", "qk"), r"records\[0\]\.sites must be a list, got 'qk'"),
        (set_entry("sites", ["q", "q"]), r"records\[0\]: a site is named twice"),
        (set_entry("sites", [["q"]]), r"records\[0\]\.sites\[0\] must be text, got \['q'\]"),
        (set_entry("more", 1), r"an unknown field 'records\[0\]\.more'"),
        (lambda t, a: a.pop("records"), r"is damaged: it has no records"),
        (lambda t, a: a.update(records={}), r"records must be a list"),
        (lambda t, a: a["records"].append(a["records"][0]), "there is no tensor 2.low"),
        (lambda t, a: a["records"][0].pop("rows"), r"is damaged: it has no records\[0\]\.rows"),
        (lambda t, a: a.update(method="magic"), r"is damaged: method must be one of .*magic"),
        (lambda t, a: a.update(percentile=0.0), "percentile must be above 0"),
        (lambda t, a: a.update(percentile="high"), "percentile must be a finite number"),
        (lambda t, a: a.update(batches=[7]), "batches must be a whole number"),
        (lambda t, a: a.update(model=[1]), "model must be an object"),
        (lambda t, a: a["model"].update(table=3), r"model\.table must be a list"),
        (lambda t, a: a["model"].update(table=["float32", [-1], None]), r"model\.table\[1\]\[0\]"),
        (lambda t, a: a.update(sha256="0" * 64), "does not match its SHA-256"),
        (lambda t, a: a.update(sha256=None), "sha256 must be text"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(change: Any, said: str, file: Path) -> None:
    damage(file, change)
    with pytest.raises(FileError, match=said):
        Calibration.load(file)


def test_two_records_of_one_site_are_refused(file: Path) -> None:
    def twice(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        tensors |= {
            f"2.{n}": tensors[f"0.{n}"].clone() for n in ("low", "high", "sample", "counts")
        }
        about["records"].append({**about["records"][0], "sites": ["v", "q"]})

    damage(file, twice)
    with pytest.raises(FileError, match=r"records\[2\]: 'q' is named twice"):
        Calibration.load(file)


def test_a_file_without_a_checksum_is_refused(file: Path) -> None:
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["graphquant.calibration"])
    del about["sha256"]
    save_file(tensors, file, {"graphquant.calibration": json.dumps(about)})
    with pytest.raises(FileError, match="it has no sha256"):
        Calibration.load(file)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        "[" * 10**5,
        '{"a":' * 10**5,
        '{"version": 1, "version": 1}',
        "NaN",
    ],
)
def test_headers_that_are_no_json_are_refused(header: str, file: Path) -> None:
    save_file(load_file(file), file, {"graphquant.calibration": header})
    with pytest.raises(FileError, match="is damaged"):
        Calibration.load(file)


def same(a: Calibration, b: Calibration) -> bool:
    both = [(site, a._records[site], b._records[site]) for site in a._records]
    return (
        (a.batches, a.method, a.percentile, a._model, a.groups, list(a._records))
        == (b.batches, b.method, b.percentile, b._model, b.groups, list(b._records))
    ) and all(
        torch.equal(x.low, y.low)
        and torch.equal(x.high, y.high)
        and torch.equal(x.sample, y.sample)
        and torch.equal(x.histogram.counts, y.histogram.counts)
        and (x.histogram.exponent, x.rows, x.calls) == (y.histogram.exponent, y.rows, y.calls)
        for _, x, y in both
    )


@settings(suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_one_bit_that_flipped_is_noticed(
    data: st.DataObject, calibration: Calibration, file: Path
) -> None:
    """Everywhere; and as often in the header and in what is not zero as in all the rest."""
    content = bytearray(whole(calibration, file))
    header = 8 + int.from_bytes(content[:8], "little")
    used = [i for i, byte in enumerate(content) if byte]
    at = data.draw(
        st.integers(0, len(content) - 1) | st.integers(0, header) | st.sampled_from(used)
    )
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    refused_or_equal(content, calibration, file)


@settings(suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_part_of_a_file_is_refused(
    data: st.DataObject, calibration: Calibration, file: Path
) -> None:
    content = whole(calibration, file)
    cut = data.draw(st.integers(0, len(content) - 1))
    file.write_bytes(content[:cut])
    with pytest.raises(FileError):
        Calibration.load(file)


@settings(suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(FileError):
        Calibration.load(file)


def whole(calibration: Calibration, file: Path) -> bytes:
    calibration.save(file)
    return file.read_bytes()


def refused_or_equal(content: bytes, calibration: Calibration, file: Path) -> None:
    file.write_bytes(content)
    try:
        loaded = Calibration.load(file)
    except FileError:
        return
    assert same(loaded, calibration)


def test_a_save_that_fails_leaves_what_was_there(
    calibration: Calibration, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_bytes()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    calibration.batches = 8
    with pytest.raises(OSError, match="No space left"):
        calibration.save(file)
    assert file.read_bytes() == before and [*file.parent.iterdir()] == [file]


def test_other_files_are_refused(file: Path, tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(FileError, match=r"header has no 'graphquant\.calibration'"):
        Calibration.load(tmp_path / "model.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(FileError, match="is not a calibration: "):
        Calibration.load(file)
    torch.save({}, tmp_path / "pickle.pt")
    with pytest.raises(FileError, match="is not a calibration: "):
        Calibration.load(tmp_path / "pickle.pt")
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "nothing.safetensors")
    with pytest.raises(IsADirectoryError):
        Calibration.load(tmp_path)


def test_what_loads_can_be_added_quickly_whatever_its_exponent(model: nn.Module) -> None:
    """Past log2(BINS) - 1 steps nothing changes any more."""
    counts = torch.arange(BINS)
    far, farther = (Histogram(counts, 0).widen(e) for e in (64, 10**12))
    assert torch.equal(far.counts, farther.counts) and farther.exponent == 10**12
    assert far.counts.nonzero().flatten().tolist() == [BINS // 2 - 1, BINS // 2]
    assert int(far.counts.sum()) == int(counts.sum())
