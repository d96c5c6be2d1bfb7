"""Reader of calibration files that does not trust them.

A SHA-256 detects damage. It does not stop a file written on purpose, so the tensors and numbers are
checked against each other as well.
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
from graphquant.utils.serialization import MAX_COUNT, Field, parse

NUMBERS = ("rows", "calls", "left_out")


def sha256(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the JSON header and of all tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), [*tensor.shape]]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_file(path: str | Path, entry: str) -> tuple[Field, dict[str, Tensor]]:
    """The JSON in this entry of the file's header, and all tensors.

    Raises FileError if it is not a calibration, OSError if it cannot be read.
    """
    with open(path, "rb"):
        pass  # raises OSError if it cannot be read; safetensors raises errors of its own
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(entry)
            if header is None:
                raise FileError(f"{path} is not a calibration: its header has no {entry!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileError:
        raise
    except Exception as bad:  # safetensors does not document all of its errors
        raise FileError(f"{path} is not a calibration: {bad}") from bad
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.int64):
            raise FileError(f"{path} is damaged: the tensor {name} is {tensor.dtype}")
    return parse(header, f"{path} is damaged"), tensors


def read_record(
    entry: Field, prefix: str, tensors: dict[str, Tensor]
) -> tuple[tuple[Site, ...], Record]:
    """The record of a header entry; its tensors are popped from `tensors`. Raises FileError."""
    entry.only(("sites", "exponent", *NUMBERS))
    low, high, sample, counts = (
        _take(entry, prefix + name, tensors) for name in ("low", "high", "sample", "counts")
    )
    K = len(low)
    _require(K > 0, entry, f"{prefix}low is empty")
    for name, tensor, shape, dtype in (
        ("low", low, [K], torch.float32),
        ("high", high, [K], torch.float32),
        ("sample", sample, [min(len(sample), ROWS), K], torch.float32),
        ("counts", counts, [BINS], torch.int64),
    ):
        valid = tensor.dtype == dtype and [*tensor.shape] == shape
        message = f"{prefix}{name} has {tensor.dtype} {[*tensor.shape]}, not {dtype} {shape}"
        _require(valid, entry, message)
    rows, calls, left_out = (entry[name].integer() for name in NUMBERS)
    exponent = entry["exponent"].integer(MIN_EXPONENT, MAX_EXPONENT)
    _check_range(entry, prefix, low, high, sample, exponent)
    _require(bool((counts >= 0).all()), entry, f"{prefix}counts has negative values")
    values = sum(counts.tolist())  # Python's: they cannot overflow
    _require(
        values <= MAX_COUNT, entry, f"{prefix}counts has {values} values, more than there can be"
    )
    _require(
        values == rows * K - left_out,
        entry,
        f"{prefix}counts has {values} values, but {rows} rows of {K} channels without {left_out} "
        f"have {rows * K - left_out}",
    )
    paths = entry["sites"].texts()
    _require(len(paths) > 0, entry, "it has no sites")
    _require(len(set(paths)) == len(paths), entry, "a site is named twice")
    record = Record(low, high, Histogram(counts, exponent), sample, rows, calls, left_out)
    return tuple(Site(path, K) for path in paths), record


def _take(entry: Field, name: str, tensors: dict[str, Tensor]) -> Tensor:
    if name not in tensors:
        _fail(entry, f"there is no tensor {name}")
    tensor = tensors.pop(name)
    _require(tensor.dim() > 0, entry, f"{name} has no dimensions")
    return tensor


def _check_range(
    entry: Field, prefix: str, low: Tensor, high: Tensor, sample: Tensor, exponent: int
) -> None:
    """Check that low and high are finite or those of an empty channel, with the sample between."""
    empty = (low == math.inf) & (high == -math.inf)
    finite = low.isfinite() & high.isfinite() & (low <= high)
    _require(bool((empty | finite).all()), entry, f"{prefix}low and high are not ranges")
    absmax = float(torch.stack([-low[finite], high[finite]]).max()) if finite.any() else 0.0
    _require(absmax <= 2.0**exponent, entry, f"{absmax:g} is beyond the histogram, 2^{exponent}")
    inside = (sample >= low) & (sample <= high)
    _require(bool(inside.all()), entry, f"{prefix}sample has values outside low to high")


def _require(condition: bool, entry: Field, message: str) -> None:
    if not condition:
        _fail(entry, message)


def _fail(entry: Field, why: str) -> NoReturn:
    raise FileError(f"{entry.prefix}: {entry.path}: {why}")
