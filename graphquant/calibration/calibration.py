"""Calibration: statistics of all linear inputs of a model, merged, synchronized and saved."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from graphquant._torch import original
from graphquant.calibration.fingerprint import (
    MAX_NAMED,
    Fingerprint,
    ParameterFingerprint,
    differences,
    fingerprint,
)
from graphquant.calibration.record import METHODS, Record, Site
from graphquant.calibration.saved import NUMBERS, read_file, read_record, sha256
from graphquant.calibration.sync import all_gather, all_reduce_records
from graphquant.errors import CalibrationError, FileError, OptionError
from graphquant.ir.paths import weight_path
from graphquant.utils import serialization
from graphquant.utils.serialization import Field

FORMAT, VERSION = "graphquant.calibration", 1


class Calibration:
    """Statistics of all linear inputs of a model, made by `graphquant.calibrate`.

    A site is the input of a linear, named by the linear's module path as in a Report. Linears that
    read the same value (q/k/v) share one Record. A linear that is called several times, or whose
    weight several modules share, has one Record of all its calls.

    method      how `range` is chosen: "absmax", "percentile" or "mse"; `using` changes it
    percentile  of |x|, for method "percentile"
    batches     number of batches seen

    `Calibration(model)` is empty, for a rank without data that calls `sync`.
    Its size does not grow with the data: for each value of K channels, 64 KiB of counts, 8 K bytes
    of ranges and 64 sampled rows of 4 K bytes.
    """

    def __init__(
        self, model: nn.Module, *, method: str = "absmax", percentile: float = 99.99
    ) -> None:
        self._set(method, percentile)
        self.batches = 0
        self._records: dict[Site, Record] = {}  # the same object for sites that share it
        self._model = fingerprint(original(model))

    def _set(self, method: str, percentile: float) -> None:
        if method not in METHODS:
            valid = ", ".join(map(repr, METHODS))
            raise OptionError(f"method={method!r} is not one of {valid}")
        if not 0 < percentile <= 100:
            raise OptionError(f"percentile must be above 0 and at most 100, got {percentile!r}")
        self.method, self.percentile = method, float(percentile)

    # Statistics ---------------------------------------------------------------------------------

    @property
    def sites(self) -> tuple[str, ...]:
        """The module paths of all linears that were called, sorted."""
        return tuple(sorted({site.path for site in self._records}))

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The paths of linears that read the same value, such as q, k and v: two or more each."""
        every = (tuple(sorted({s.path for s in sites})) for sites, _ in self._shared())
        return tuple(sorted(paths for paths in every if len(paths) > 1))

    def record(self, path: str) -> Record | None:
        """The statistics of the input of the linear at this path.

        None if it had no finite value, or has two widths because one weight is used both ways.
        """
        found = [record for site, record in self._records.items() if site.path == path]
        return found[0] if len(found) == 1 and found[0].seen else None

    def absmax(self, path: str) -> Tensor | None:
        """max |x| of each channel of this linear's input, [K] float32 on the CPU; None as `record`.

        inf and nan are left out: a channel that held nothing else has 0.
        """
        record = self.record(path)
        return None if record is None else record.absmax

    def sample(self, path: str) -> Tensor | None:
        """Up to 64 distinct rows of this linear's input, [n, K] float32 on the CPU.

        They do not depend on the order of the data. None as `record`, and if no row was finite.
        """
        record = self.record(path)
        return None if record is None or not len(record.sample) else record.sample

    def range(self, path: str) -> tuple[float, float] | None:
        """(low, high) for a static per-tensor scale of this linear's input; None as `record`.

        low <= 0 <= high: the range includes 0, as those of dynamic quantization do.

        absmax      the lowest and the highest value seen
        percentile  the same, clipped to the value that `percentile` % of all |x| do not exceed
        mse         the range of least expected squared error (Histogram.error)
        """
        record = self.record(path)
        return None if record is None else record.range(self.method, self.percentile)

    def using(self, method: str, *, percentile: float | None = None) -> Calibration:
        """A new Calibration of the same data with another method for `range`."""
        other = self._copy()
        other._set(method, self.percentile if percentile is None else percentile)
        return other

    def warnings(self) -> Iterator[str]:
        """Warnings for the user about this data."""
        if not self._records:
            yield "calibrate saw no linear"
        for sites, record in self._shared():
            if record.left_out:
                every = record.rows * record.K
                yield (
                    f"{record.left_out} of {every} values that {sites[0].path} read were inf or "
                    "nan and are left out"
                )

    def __repr__(self) -> str:
        how = f" {self.percentile:g}" if self.method == "percentile" else ""
        return (
            f"<Calibration of {len(self.sites)} linears on {self.batches} "
            f"batch{'es' * (self.batches != 1)}, {self.method}{how}>"
        )

    # More data ----------------------------------------------------------------------------------

    def add(self, paths: Iterable[str], record: Record) -> None:
        """Add an input that the linears at these paths have in common; they share a record then."""
        sites = {Site(path, record.K) for path in paths}
        had = {id(r): r for s in sites if (r := self._records.get(s)) is not None}
        record = sum(had.values(), record)
        sites |= {site for site, old in self._records.items() if id(old) in had}
        self._records |= dict.fromkeys(sorted(sites), record)

    def merge(self, other: Calibration) -> Calibration:
        """A new Calibration of the data of both, with this one's method.

        Exactly equal to one of all the data. Raises CalibrationError if the models differ.
        """
        _check_same_model("the other calibration's model", self._model, other._model, self.sites)
        merged = self._copy()
        merged.batches += other.batches
        for sites, record in other._shared():
            merged.add([site.path for site in sites], record)
        return merged

    def sync(self, group: Any = None) -> Calibration:
        """All-reduce this calibration in place over the ranks of a torch.distributed group.

        Every rank of the group must call it, once: a second call counts all data again. A rank
        without data calls it on `Calibration(model)`. Lows and highs are reduced with MAX, counts
        with SUM over a common histogram range. Without an initialized process group it does
        nothing. Returns self.

        Raises CalibrationError, on all ranks, if their models differ.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for rank, model in enumerate(all_gather(self._model, group)):
                _check_same_model(f"rank {rank}'s model", self._model, model, self.sites)
            self.batches, shared = all_reduce_records(self.batches, self._shared(), group)
            self._records = {site: record for sites, record in shared for site in sites}
        return self

    def _shared(self) -> list[tuple[tuple[Site, ...], Record]]:
        """Every distinct record with its sites, sorted."""
        sites: dict[int, list[Site]] = {}
        for site in sorted(self._records):
            sites.setdefault(id(self._records[site]), []).append(site)
        return [(tuple(group), self._records[group[0]]) for group in sites.values()]

    def _copy(self) -> Calibration:
        other = copy.copy(self)
        other._records = dict(self._records)
        return other

    # Files --------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Save as a safetensors file, atomically.

        It holds the tensors of each record, the rest as JSON in the header, and the SHA-256 of
        both.
        """
        tensors: dict[str, Tensor] = {}
        records = []
        for i, (sites, record) in enumerate(self._shared()):
            tensors |= {f"{i}.low": record.low, f"{i}.high": record.high}
            tensors |= {f"{i}.sample": record.sample, f"{i}.counts": record.histogram.counts}
            numbers = {name: getattr(record, name) for name in NUMBERS}
            exponent = record.histogram.exponent
            records.append({"sites": [s.path for s in sites], "exponent": exponent, **numbers})
        header = {
            "version": VERSION,
            "method": self.method,
            "percentile": self.percentile,
            "batches": self.batches,
            "records": records,
            "model": self._model,
        }
        text = json.dumps({**header, "sha256": sha256(header, tensors)})
        entries = {FORMAT: text}  # a single entry: the order of several is random
        serialization.write(path, serialize(tensors, entries))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Calibration:
        """Load what `save` wrote. With `model`, check that it is the model that was calibrated.

        Names, shapes, dtypes and sampled values of its parameters must match (see `fingerprint`).

        Raises FileError, a CalibrationError, for a file that is not a calibration, is damaged or
        has another version; CalibrationError for another model, naming what differs and the sites
        concerned.
        """
        header, tensors = read_file(path, FORMAT)
        if (version := header["version"].integer()) != VERSION:
            raise FileError(f"{path} has version {version}, this graphquant reads {VERSION}")
        loaded = cls._from(header, tensors)
        if model is not None:
            _check_same_model(
                "the model given", loaded._model, fingerprint(original(model)), loaded.sites
            )
        return loaded

    @classmethod
    def _from(cls, header: Field, tensors: dict[str, Tensor]) -> Calibration:
        header.only(("version", "method", "percentile", "batches", "records", "model", "sha256"))
        if header["sha256"].text() != sha256(_without(header.object(), "sha256"), tensors):
            raise FileError(f"{header.prefix}: its content does not match its SHA-256")
        new = cls.__new__(cls)
        method, percentile = header["method"].one_of(METHODS), header["percentile"]
        if not percentile.number(0.0, 100.0):
            percentile.refuse("above 0")
        new._set(method, percentile.number())
        new.batches = header["batches"].integer()
        new._model = {name: ParameterFingerprint.read(one) for name, one in header["model"].items()}
        new._records = {}
        for i, entry in enumerate(header["records"].list()):
            sites, record = read_record(entry, f"{i}.", tensors)
            if twice := new._records.keys() & set(sites):
                raise FileError(
                    f"{header.prefix}: {entry.path}: {min(twice).path!r} is named twice"
                )
            new._records |= dict.fromkeys(sites, record)
        if tensors:
            raise FileError(
                f"{header.prefix}: tensors without a record: {', '.join(sorted(tensors))}"
            )
        return new


def _without(entries: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if key != name}


def _check_same_model(
    who: str, ours: Fingerprint, theirs: Fingerprint, sites: Sequence[str]
) -> None:
    """Raise CalibrationError if the fingerprints differ."""
    found = sorted(differences(ours, theirs))
    if not found:
        return
    listed = "; ".join(f"{name} {what}" for name, what in found[:MAX_NAMED])
    more = f"; and {len(found) - MAX_NAMED} more parameters" if len(found) > MAX_NAMED else ""
    concerned = sorted({weight_path(name) for name, _ in found} & set(sites))
    paths = ", ".join(concerned) or "none"
    raise CalibrationError(
        f"{who} is not the one that was calibrated: {listed}{more}. Calibrated linears concerned: "
        f"{paths}"
    )
