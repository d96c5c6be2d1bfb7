"""Files that others may have written: read without trusting them, written whole or not at all.

Whatever a file holds, a loader gives a valid value or raises FileError, which names the file and
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

LARGEST = 64 * 2**20  # bytes of a JSON file; the largest real ones have some hundred KiB
MOST = 2**53  # of a count: sums of a thousand such fit in int64

T = TypeVar("T")


def write(path: str | Path, data: bytes) -> None:
    """Replace the file's content by `data`, all of it or, if that fails, nothing.

    The data is on the disk before the file has its name. A link stays a link; what is no regular
    file, such as /dev/stdout, is written to.
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
    """The permissions the file has or, if it is new, would be given; None if it is none."""
    try:
        found = os.stat(target).st_mode
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask
    return stat.S_IMODE(found) if stat.S_ISREG(found) else None


def read_json(path: str | Path, what: str) -> Field:
    """The JSON in a file. Raises FileError for what is none, OSError if it cannot be read."""
    said = f"{path} is no {what}"
    with open(path, "rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise FileError(f"{said}: it is larger than {LARGEST >> 20} MiB")
    try:
        text = data.decode()
    except UnicodeDecodeError as bad:
        raise FileError(f"{said}: it is not UTF-8 text: {bad.reason} at {bad.start}") from bad
    return parse(text, said)


def parse(text: str, said: str) -> Field:
    """JSON, strictly: no key twice, no NaN and no Infinity. `said` begins the error's message."""
    try:
        return Field(json.loads(text, object_pairs_hook=_once, parse_constant=_refused), said)
    except RecursionError as deep:
        raise FileError(f"{said}: it is nested too deeply") from deep
    except (ValueError, TypeError) as bad:  # TypeError: what was given is no text
        raise FileError(f"{said}: {bad}") from bad


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {reprlib.repr(twice)} twice")
    return made


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number in JSON")


@dataclass(frozen=True)
class Field:
    """A value that was read, and where it stands: each method returns it if it is what it must be.

    All raise FileError.
    """

    value: Any
    said: str  # what the error's message begins with: "budget.json is no budget"
    at: str = ""  # "left[3].path"

    def refuse(self, wants: str) -> NoReturn:
        got = reprlib.repr(self.value)
        raise FileError(f"{self.said}: {self.at or 'it'} must be {wants}, got {got}")

    def object(self) -> Mapping[str, Any]:
        if not isinstance(self.value, Mapping) or not all(isinstance(k, str) for k in self.value):
            self.refuse("an object")
        return self.value

    def only(self, names: Collection[str]) -> Field:
        """Itself, an object that has none but these keys."""
        for name in self.object():
            if name not in names:
                raise FileError(f"{self.said}: it has an unknown field {self._below(name)!r}")
        return self

    def has(self, name: str) -> bool:
        return name in self.object()

    def __getitem__(self, name: str) -> Field:
        if name not in self.object():
            raise FileError(f"{self.said}: it has no {self._below(name)}")
        return Field(self.value[name], self.said, self._below(name))

    def _below(self, name: str) -> str:
        name = name if len(name) <= 100 else f"{name[:100]}..."
        return f"{self.at}.{name}" if self.at else name

    def items(self) -> Iterator[tuple[str, Field]]:
        for name in self.object():
            yield Field(name, self.said, f"a name in {self.at or 'it'}").text(), self[name]

    def list(self) -> tuple[Field, ...]:
        if not isinstance(self.value, (list, tuple)):
            self.refuse("a list")
        return tuple(Field(v, self.said, f"{self.at}[{i}]") for i, v in enumerate(self.value))

    def text(self) -> str:
        if not isinstance(self.value, str):
            self.refuse("text")
        try:
            self.value.encode()
        except UnicodeEncodeError:  # a half of a surrogate pair: it could not be printed
            self.refuse("text that UTF-8 can hold")
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

    def integer(self, least: int = 0, most: int = MOST) -> int:
        whole = isinstance(self.value, int) and not isinstance(self.value, bool)
        if not whole or not least <= self.value <= most:
            self.refuse(f"a whole number from {least} to {most}")
        return int(self.value)

    def number(self, least: float = -math.inf, most: float = math.inf) -> float:
        """A finite one."""
        value = as_float(self.value)
        if value is None or not math.isfinite(value) or not least <= value <= most:
            between = "" if math.isinf(least) else f" from {least:g}"
            between += "" if math.isinf(most) else f" to {most:g}"
            self.refuse(f"a finite number{between}")
        return value

    def record(self, cls: Callable[..., T]) -> T:
        """A flat frozen dataclass, by the types of its fields. What has a default may be absent."""
        known = fields(cls)  # type: ignore[arg-type]
        self.only([one.name for one in known])
        given = {
            one.name: _READ[str(one.type)](self[one.name])
            for one in known
            if self.has(one.name) or one.default is MISSING
        }
        return cls(**given)


_READ: dict[str, Callable[[Field], Any]] = {
    "str": Field.text,
    "int": Field.integer,
    "float": Field.number,
    "bool": Field.boolean,
    "tuple[str, ...]": Field.texts,
}


def as_float(value: object) -> float | None:
    """What is a number as a float; None for anything else, and for what is too large for one."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
