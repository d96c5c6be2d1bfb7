"""What all linears of a model read, by module path: merged, synchronised, saved and loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from graphquant.calibration.fingerprint import (
    NAMED,
    Fingerprint,
    Parameter,
    differences,
    fingerprint,
)
from graphquant.calibration.record import METHODS, Record, Site
from graphquant.calibration.saved import NUMBERS, read_record, saved, sha256
from graphquant.calibration.sync import all_reduced, gathered
from graphquant.errors import CalibrationError, FileError, OptionError
from graphquant.ir.paths import weight_path
from graphquant.utils import serialization
from graphquant.utils.serialization import Field

FORMAT, VERSION = "graphquant.calibration", 1


class Calibration:
    """What the linears of a model read: `graphquant.calibrate` makes it.

    A site is the input of a linear, known by the linear's module path as in a Report. Linears that
    read one value (q/k/v) share one Record: what is known of one is known of all. A linear that is
    called several times, or whose weight several modules share, has the sum of all its calls.

    method      how `range` is found: "absmax", "percentile" or "mse"; `using` changes it
    percentile  of |x|, for method "percentile"
    batches     how many were seen

    `Calibration(model)` has seen nothing: what a rank without data brings to `sync`.
    What is kept does not grow with the data: for each value that linears read, of K channels, 64
    KiB and 8 K bytes of sums, and 64 of its rows, 256 K bytes.
    """

    def __init__(
        self, model: nn.Module, *, method: str = "absmax", percentile: float = 99.99
    ) -> None:
        self._set(method, percentile)
        self.batches = 0
        self._records: dict[Site, Record] = {}  # one object for all sites that share one
        self._model = fingerprint(_plain(model))

    def _set(self, method: str, percentile: float) -> None:
        if method not in METHODS:
            valid = ", ".join(map(repr, METHODS))
            raise OptionError(f"method={method!r} is not one of {valid}")
        if not 0 < percentile <= 100:
            raise OptionError(f"percentile must be above 0 and at most 100, got {percentile!r}")
        self.method, self.percentile = method, float(percentile)

    # What is known ------------------------------------------------------------------------------

    @property
    def sites(self) -> tuple[str, ...]:
        """The module paths of all linears that were called, sorted."""
        return tuple(sorted({site.path for site in self._records}))

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The paths of linears that read one value, such as q, k and v: two or more each."""
        every = (tuple(sorted({s.path for s in sites})) for sites, _ in self._shared())
        return tuple(sorted(paths for paths in every if len(paths) > 1))

    def record(self, path: str) -> Record | None:
        """All that is known of the input of the linear at this path.

        None if no finite value came there, or if it has two widths: one weight is used both ways.
        """
        found = [record for site, record in self._records.items() if site.path == path]
        return found[0] if len(found) == 1 and found[0].seen else None

    def absmax(self, path: str) -> Tensor | None:
        """max |x| of each channel of this linear's input, [K] float32 on the CPU; None as `record`.

        inf and nan do not count: a channel that held nothing else has 0.
        """
        record = self.record(path)
        return None if record is None else record.absmax

    def sample(self, path: str) -> Tensor | None:
        """Up to 64 rows that this linear read, [n, K] float32 on the CPU, none of them twice and
        whatever the order of the data was the same; None as `record`, and if no row was finite."""
        record = self.record(path)
        return None if record is None or not len(record.sample) else record.sample

    def range(self, path: str) -> tuple[float, float] | None:
        """(low, high) for a static scale of this linear's whole input; None as `record`.

        low <= 0 <= high: like a row of the dynamic quantiser, the range holds 0.

        absmax      the lowest and the highest value seen
        percentile  those, but no further from 0 than `percentile` % of all |x| are
        mse         where the expected squared error of 255 levels is least (Histogram.error)
        """
        record = self.record(path)
        return None if record is None else record.range(self.method, self.percentile)

    def using(self, method: str, *, percentile: float | None = None) -> Calibration:
        """The same data with another method for `range`. A new Calibration."""
        other = self._copy()
        other._set(method, self.percentile if percentile is None else percentile)
        return other

    def warnings(self) -> Iterator[str]:
        """What a user should know before relying on this."""
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
        """What the linears at these paths read, all of it the same; from now on they share."""
        sites = {Site(path, record.K) for path in paths}
        had = {id(r): r for s in sites if (r := self._records.get(s)) is not None}
        record = sum(had.values(), record)
        sites |= {site for site, old in self._records.items() if id(old) in had}
        self._records |= dict.fromkeys(sorted(sites), record)

    def merge(self, other: Calibration) -> Calibration:
        """A new Calibration of the data of both, exactly as if one had seen all; this one's method.

        Raises CalibrationError if the other is of another model.
        """
        _refuse_other("the other calibration's model", self._model, other._model, self.sites)
        merged = self._copy()
        merged.batches += other.batches
        for sites, record in other._shared():
            merged.add([site.path for site in sites], record)
        return merged

    def sync(self, group: Any = None) -> Calibration:
        """Bring this calibration, on every rank of a torch.distributed group, to the data of all.

        Every rank of the group must call it, once: a second call counts all data again. A rank
        without data brings `Calibration(model)`. Lows and highs are all-reduced with MAX, counts
        with SUM after the ranks have agreed on the histograms' ranges. Without an initialised
        process group it does nothing. Returns itself.

        Raises CalibrationError, on all ranks, if their models differ.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for rank, model in enumerate(gathered(self._model, group)):
                _refuse_other(f"rank {rank}'s model", self._model, model, self.sites)
            self.batches, shared = all_reduced(self.batches, self._shared(), group)
            self._records = {site: record for sites, record in shared for site in sites}
        return self

    def _shared(self) -> list[tuple[tuple[Site, ...], Record]]:
        """Every record once, with its sites, sorted."""
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
        """A safetensors file: tensors of each record, and all else as JSON in its header, with the
        SHA-256 of both. A file that is there is replaced as a whole, or stays as it was."""
        tensors: dict[str, Tensor] = {}
        records = []
        for i, (sites, record) in enumerate(self._shared()):
            tensors |= {f"{i}.low": record.low, f"{i}.high": record.high}
            tensors |= {f"{i}.sample": record.sample, f"{i}.counts": record.histogram.counts}
            numbers = {name: getattr(record, name) for name in NUMBERS}
            exponent = record.histogram.exponent
            records.append({"sites": [s.path for s in sites], "exponent": exponent, **numbers})
        about = {
            "version": VERSION,
            "method": self.method,
            "percentile": self.percentile,
            "batches": self.batches,
            "records": records,
            "model": self._model,
        }
        header = json.dumps({**about, "sha256": sha256(about, tensors)})
        entries = {FORMAT: header}  # of several the order is random
        serialization.write(path, serialize(tensors, entries))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Calibration:
        """What `save` wrote. With `model`, only if it is the model that was calibrated.

        That is told by its parameters: names, shapes, types and samples of the values
        (`fingerprint` says what they show and what not). Without a model nothing is checked but the
        file.

        Raises FileError, which is a CalibrationError, for a file that is no calibration, has
        another version or is damaged; CalibrationError for another model: the message names what
        differs and the sites concerned.
        """
        about, tensors = saved(path, FORMAT)
        if (version := about["version"].integer()) != VERSION:
            raise FileError(f"{path} has version {version}, this graphquant reads {VERSION}")
        loaded = cls._from(about, tensors)
        if model is not None:
            _refuse_other(
                "the model given", loaded._model, fingerprint(_plain(model)), loaded.sites
            )
        return loaded

    @classmethod
    def _from(cls, about: Field, tensors: dict[str, Tensor]) -> Calibration:
        about.only(("version", "method", "percentile", "batches", "records", "model", "sha256"))
        if about["sha256"].text() != sha256(_without(about.object(), "sha256"), tensors):
            raise FileError(f"{about.said}: its content does not have the SHA-256 that it names")
        made = cls.__new__(cls)
        method, percentile = about["method"].one_of(METHODS), about["percentile"]
        if not percentile.number(0.0, 100.0):
            percentile.refuse("above 0")
        made._set(method, percentile.number())
        made.batches = about["batches"].integer()
        made._model = {name: Parameter.read(one) for name, one in about["model"].items()}
        made._records = {}
        for i, entry in enumerate(about["records"].list()):
            sites, record = read_record(entry, f"{i}.", tensors)
            if twice := made._records.keys() & set(sites):
                raise FileError(f"{about.said}: {entry.at}: {min(twice).path!r} is named twice")
            made._records |= dict.fromkeys(sites, record)
        if tensors:
            raise FileError(f"{about.said}: tensors without a record: {', '.join(sorted(tensors))}")
        return made


def _without(entries: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if key != name}


def _plain(model: nn.Module) -> nn.Module:
    """What was given to torch.compile, for what it returned."""
    return model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model


def _refuse_other(who: str, ours: Fingerprint, theirs: Fingerprint, sites: Sequence[str]) -> None:
    """Raise CalibrationError unless both are of one model."""
    found = sorted(differences(ours, theirs))
    if not found:
        return
    said = "; ".join(f"{name} {what}" for name, what in found[:NAMED])
    more = f"; and {len(found) - NAMED} more parameters" if len(found) > NAMED else ""
    concerned = sorted({weight_path(name) for name, _ in found} & set(sites))
    paths = ", ".join(concerned) or "none"
    raise CalibrationError(
        f"{who} is not the one that was calibrated: {said}{more}. Calibrated linears concerned: "
        f"{paths}"
    )
