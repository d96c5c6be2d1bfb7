"""A calibration's file, read without trusting it.

Its SHA-256 shows damage. That is no proof against a program that writes files of its own, so what
the tensors and numbers must be to each other is checked as well.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from torch import Tensor

from graphquant.calibration.histogram import BINS, MAX_EXPONENT, MIN_EXPONENT, Histogram
from graphquant.calibration.record import Record, Site
from graphquant.calibration.sample import ROWS
from graphquant.errors import FileError
from graphquant.utils.serialization import MOST, Field, parse

NUMBERS = ("rows", "calls", "left_out")


def sha256(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Of the JSON in the header, and of all tensors' names, types, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), [*tensor.shape]]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def saved(path: str | Path, entry: str) -> tuple[Field, dict[str, Tensor]]:
    """The JSON of this entry of the header, and all tensors. Raises FileError."""
    with open(path, "rb"):
        pass  # OSError if it cannot be read, whatever safetensors makes of that
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(entry)
            if header is None:
                raise FileError(f"{path} is no calibration: its header has no {entry!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileError:
        raise
    except Exception as bad:  # safetensors does not name all of its errors
        raise FileError(f"{path} is no calibration: {bad}") from bad
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.int64):
            raise FileError(f"{path} is damaged: the tensor {name} is {tensor.dtype}")
    return parse(header, f"{path} is damaged"), tensors


def read_record(
    entry: Field, prefix: str, tensors: dict[str, Tensor]
) -> tuple[tuple[Site, ...], Record]:
    """One of the records, whose tensors are taken out of `tensors`. Raises FileError."""
    entry.only(("sites", "exponent", *NUMBERS))
    low, high, sample, counts = (
        _take(entry, prefix + name, tensors) for name in ("low", "high", "sample", "counts")
    )
    K = len(low)
    _must(K > 0, entry, f"{prefix}low is empty")
    for name, tensor, shape, dtype in (
        ("low", low, [K], torch.float32),
        ("high", high, [K], torch.float32),
        ("sample", sample, [min(len(sample), ROWS), K], torch.float32),
        ("counts", counts, [BINS], torch.int64),
    ):
        right = tensor.dtype == dtype and [*tensor.shape] == shape
        has = f"{prefix}{name} has {tensor.dtype} {[*tensor.shape]}, not {dtype} {shape}"
        _must(right, entry, has)
    rows, calls, left_out = (entry[name].integer() for name in NUMBERS)
    exponent = entry["exponent"].integer(MIN_EXPONENT, MAX_EXPONENT)
    _check_range(entry, prefix, low, high, sample, exponent)
    _must(bool((counts >= 0).all()), entry, f"{prefix}counts has negative ones")
    values = sum(counts.tolist())  # Python's: they cannot overflow
    _must(values <= MOST, entry, f"{prefix}counts has {values} values, more than there can be")
    _must(
        values == rows * K - left_out,
        entry,
        f"{prefix}counts has {values} values, but {rows} rows of {K} channels without {left_out} "
        f"have {rows * K - left_out}",
    )
    paths = entry["sites"].texts()
    _must(len(paths) > 0, entry, "it has no sites")
    _must(len(set(paths)) == len(paths), entry, "a site is named twice")
    record = Record(low, high, Histogram(counts, exponent), sample, rows, calls, left_out)
    return tuple(Site(path, K) for path in paths), record


def _take(entry: Field, name: str, tensors: dict[str, Tensor]) -> Tensor:
    if name not in tensors:
        _fail(entry, f"there is no tensor {name}")
    tensor = tensors.pop(name)
    _must(tensor.dim() > 0, entry, f"{name} has no dimensions")
    return tensor


def _check_range(
    entry: Field, prefix: str, low: Tensor, high: Tensor, sample: Tensor, exponent: int
) -> None:
    """low and high are finite, or those of a channel without values; the sample is between."""
    unseen = (low == math.inf) & (high == -math.inf)
    seen = low.isfinite() & high.isfinite() & (low <= high)
    _must(bool((unseen | seen).all()), entry, f"{prefix}low and high are no ranges")
    absmax = float(torch.stack([-low[seen], high[seen]]).max()) if seen.any() else 0.0
    _must(absmax <= 2.0**exponent, entry, f"{absmax:g} is beyond the histogram, 2^{exponent}")
    inside = (sample >= low) & (sample <= high)
    _must(bool(inside.all()), entry, f"{prefix}sample has values outside low to high")


def _must(holds: bool, entry: Field, else_: str) -> None:
    if not holds:
        _fail(entry, else_)


def _fail(entry: Field, why: str) -> NoReturn:
    raise FileError(f"{entry.said}: {entry.at}: {why}")
