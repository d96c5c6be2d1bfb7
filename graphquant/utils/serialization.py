"""Atomic writes, and validated reads of untrusted JSON.

Whatever a file holds, a loader returns a valid value or raises FileError, which names the file and
the field.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import reprlib
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from graphquant.errors import FileError

MAX_BYTES = 64 * 2**20  # of a JSON file; the largest real ones have a few hundred KiB
MAX_COUNT = 2**53  # sums of a thousand counts fit in int64

T = TypeVar("T")


def write(path: str | Path, data: bytes) -> None:
    """Replace the content of a file atomically.

    The data is flushed to disk before the file is renamed into place. Symbolic links are followed;
    what is not a regular file, such as /dev/stdout, is written to directly.
    """
    target = Path(os.path.realpath(path))
    mode = _mode(target)
    if mode is None:
        target.write_bytes(data)
        return
    handle, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _mode(target: Path) -> int | None:
    """Permissions of the file, or of a new one; None if it is not a regular file."""
    try:
        found = os.stat(target).st_mode
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask
    return stat.S_IMODE(found) if stat.S_ISREG(found) else None


def read_json(path: str | Path, what: str) -> Field:
    """Read a JSON file. Raises FileError if it is not JSON, OSError if it cannot be read."""
    prefix = f"{path} is not a {what}"
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise FileError(f"{prefix}: it is larger than {MAX_BYTES >> 20} MiB")
    try:
        text = data.decode()
    except UnicodeDecodeError as bad:
        raise FileError(f"{prefix}: it is not UTF-8 text: {bad.reason} at {bad.start}") from bad
    return parse(text, prefix)


def parse(text: str, prefix: str) -> Field:
    """Parse strict JSON: no duplicate keys, no NaN, no Infinity.

    Raises FileError, whose message begins with `prefix`.
    """
    try:
        return Field(json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse), prefix)
    except RecursionError as deep:
        raise FileError(f"{prefix}: it is nested too deeply") from deep
    except (ValueError, TypeError) as bad:  # TypeError: `text` is not a string
        raise FileError(f"{prefix}: {bad}") from bad


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {reprlib.repr(twice)} twice")
    return result


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number in JSON")


@dataclass(frozen=True)
class Field:
    """A value of a JSON file and its path in it.

    Each method returns the value if it is valid, else raises FileError.
    """

    value: Any
    prefix: str  # of error messages: "budget.json is not a budget"
    path: str = ""  # "left[3].path"

    def refuse(self, wants: str) -> NoReturn:
        got = reprlib.repr(self.value)
        raise FileError(f"{self.prefix}: {self.path or 'it'} must be {wants}, got {got}")

    def object(self) -> Mapping[str, Any]:
        if not isinstance(self.value, Mapping) or not all(isinstance(k, str) for k in self.value):
            self.refuse("an object")
        return self.value

    def only(self, names: Collection[str]) -> Field:
        """Self, if it is an object with no other keys than these."""
        for name in self.object():
            if name not in names:
                raise FileError(f"{self.prefix}: it has an unknown field {self._below(name)!r}")
        return self

    def has(self, name: str) -> bool:
        return name in self.object()

    def __getitem__(self, name: str) -> Field:
        if name not in self.object():
            raise FileError(f"{self.prefix}: it has no {self._below(name)}")
        return Field(self.value[name], self.prefix, self._below(name))

    def _below(self, name: str) -> str:
        name = name if len(name) <= 100 else f"{name[:100]}..."
        return f"{self.path}.{name}" if self.path else name

    def items(self) -> Iterator[tuple[str, Field]]:
        for name in self.object():
            yield Field(name, self.prefix, f"a name in {self.path or 'it'}").text(), self[name]

    def list(self) -> tuple[Field, ...]:
        if not isinstance(self.value, (list, tuple)):
            self.refuse("a list")
        return tuple(Field(v, self.prefix, f"{self.path}[{i}]") for i, v in enumerate(self.value))

    def text(self) -> str:
        if not isinstance(self.value, str):
            self.refuse("text")
        try:
            self.value.encode()
        except UnicodeEncodeError:  # a lone surrogate, which cannot be printed
            self.refuse("valid UTF-8 text")
        return self.value

    def texts(self) -> tuple[str, ...]:
        return tuple(one.text() for one in self.list())

    def one_of(self, valid: Collection[str]) -> str:
        if not isinstance(self.value, str) or self.value not in valid:
            self.refuse(f"one of {', '.join(map(repr, valid))}")
        return self.value

    def boolean(self) -> bool:
        if not isinstance(self.value, bool):
            self.refuse("true or false")
        return self.value

    def integer(self, least: int = 0, most: int = MAX_COUNT) -> int:
        whole = isinstance(self.value, int) and not isinstance(self.value, bool)
        if not whole or not least <= self.value <= most:
            self.refuse(f"a whole number from {least} to {most}")
        return int(self.value)

    def number(self, least: float = -math.inf, most: float = math.inf) -> float:
        """A finite number."""
        value = as_float(self.value)
        if value is None or not math.isfinite(value) or not least <= value <= most:
            between = "" if math.isinf(least) else f" from {least:g}"
            between += "" if math.isinf(most) else f" to {most:g}"
            self.refuse(f"a finite number{between}")
        return value

    def record(self, cls: Callable[..., T]) -> T:
        """A flat dataclass, by the types of its fields. Fields with a default may be absent."""
        known = fields(cls)  # type: ignore[arg-type]
        self.only([one.name for one in known])
        values = {
            one.name: _READERS[str(one.type)](self[one.name])
            for one in known
            if self.has(one.name) or one.default is MISSING
        }
        return cls(**values)


_READERS: dict[str, Callable[[Field], Any]] = {
    "str": Field.text,
    "int": Field.integer,
    "float": Field.number,
    "bool": Field.boolean,
    "tuple[str, ...]": Field.texts,
}


def as_float(value: object) -> float | None:
    """A number as a float; None for anything else, and if it does not fit."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
