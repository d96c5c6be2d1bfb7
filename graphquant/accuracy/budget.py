"""Budget, the result of `graphquant.fit_budget`: options that reach an accuracy goal."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from graphquant.accuracy.report import OutputAccuracy
from graphquant.config import Config
from graphquant.errors import FileError, OptionError, UnsupportedInputError
from graphquant.utils import serialization
from graphquant.utils.serialization import Field, as_float

FORMAT, VERSION = "graphquant.budget", 1
_NOT_SAVED = ("calibration", "on_report")  # objects of the user's program


@dataclass(frozen=True)
class Metric:
    """The accuracy of a model's outputs in one number; higher is better.

    of    its value for one output
    loss  converts it to a number proportional to the error's power
    """

    name: str
    label: str
    unit: str
    of: Callable[[OutputAccuracy], float]
    loss: Callable[[float], float]

    def __call__(self, outputs: Sequence[OutputAccuracy]) -> float:
        """Its value for the worst output; -inf if one is nan.

        Raises UnsupportedInputError if there are no outputs.
        """
        if not outputs:
            raise UnsupportedInputError("the model returns no floating-point tensor to compare")
        found = [self.of(output) for output in outputs]
        return -math.inf if any(map(math.isnan, found)) else min(found)

    def shown(self, value: float) -> str:
        return f"{value:.1f} dB" if self.unit else f"{value:.5f}"


def _one_minus(cosine: float) -> float:
    return 1 - cosine


METRICS = {
    metric.name: metric
    for metric in (
        Metric("cosine", "mean cosine", "", lambda o: o.cosines.mean, _one_minus),
        Metric("worst_cosine", "worst cosine", "", lambda o: o.cosines.worst, _one_minus),
        Metric("sqnr", "SQNR", "dB", lambda o: o.error.sqnr, lambda db: 10 ** (-db / 10)),
    )
}


def goal(**given: float | None) -> tuple[Metric, float]:
    """(metric, its least value) of the one keyword, the metric's name, that is not None.

    Raises OptionError if that is not exactly one, or its value is out of range.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) != 1:
        got = ", ".join(chosen) or "none"
        raise OptionError(f"a budget is one of {', '.join(METRICS)}, got {got}")
    ((name, value),) = chosen.items()
    number = as_float(value)
    most = math.inf if name == "sqnr" else 1.0
    if number is None or not 0.0 < number <= most or math.isinf(number):
        raise OptionError(
            f"{name}={value!r} must be a number above 0" + ", at most 1" * (most == 1.0)
        )
    return METRICS[name], number


@dataclass(frozen=True)
class LeftInFloat:
    """A linear that the budget leaves in float.

    path   its module path
    alone  the outputs' metric with only this linear in int8
    share  its share of all linears' FLOPs, 0 to 1, at the sizes of the first batch
    """

    path: str
    alone: float
    share: float


@dataclass(frozen=True)
class Budget:
    """Options with which a model's outputs reach an accuracy goal on the given batches.

    options      for torch.compile(model, backend="graphquant", options=...): the given ones, with
                 the paths of the linears left in float in `exclude`, and `smooth` if that helped
    metric       "cosine", "worst_cosine" or "sqnr" (dB)
    goal         the least value of the metric
    before       the metric with the given options
    after        the metric with `options`
    left         the linears left in float for the goal, the most harmful first
    float_share  share of all linears' FLOPs, 0 to 1, that stays in float for any reason, at the
                 sizes of the first batch
    """

    metric: str
    goal: float
    before: float
    after: float
    left: tuple[LeftInFloat, ...]
    float_share: float
    options: Mapping[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        """One line: the metric before and after, the goal, and how much is in float."""
        metric = METRICS[self.metric]
        now, was, least = map(metric.shown, (self.after, self.before, self.goal))
        linears = f"{len(self.left)} linear{'s' * (len(self.left) != 1)} left in float"
        return (
            f"{metric.label} {now} ({was} before, at least {least}): {linears}; "
            f"{self.float_share:.1%} of all linears' FLOPs are"
        )

    def __rich__(self) -> RenderableType:
        metric = METRICS[self.metric]
        table = Table(title="left in float", title_justify="left", header_style="bold")
        table.add_column("linear", overflow="fold")
        table.add_column("FLOPs", justify="right", no_wrap=True)
        table.add_column(f"{metric.label}, it alone in int8", justify="right")
        for site in self.left:
            table.add_row(escape(site.path), f"{site.share:.1%}", metric.shown(site.alone))
        return Group(*[table] * bool(self.left), escape(self.summary()))

    def __str__(self) -> str:
        """The table without color, wide enough for its longest row."""
        longest = max((len(site.path) for site in self.left), default=0)
        width = min(max(100, longest + 60), 200)
        page = Console(file=io.StringIO(), width=width, color_system=None)
        page.print(self)
        text: str = page.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())

    # Files --------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON, without calibration and on_report. Non-finite numbers become strings.

        Raises OptionError for options that cannot be saved: those for Inductor and Torch-TensorRT
        may only be numbers and bools.
        """
        options = {k: v for k, v in self.options.items() if k not in _NOT_SAVED}
        try:
            Config.of_file(options, **_given(self.options.get("calibration")))
        except OptionError as bad:
            raise OptionError(f"these options cannot be saved: {bad}") from bad
        return {
            "format": FORMAT,
            "version": VERSION,
            "metric": self.metric,
            **{name: _encode(getattr(self, name)) for name in _NUMBERS},
            "left": [{**asdict(site), "alone": _encode(site.alone)} for site in self.left],
            "calibration": self.options.get("calibration") is not None,
            "options": json.loads(json.dumps(_plain(options))),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, calibration: Any = None) -> Budget:
        """The inverse of `to_dict`.

        calibration  the one that the budget was fitted with, if any

        Raises FileError for invalid data or options (see `to_dict`), OptionError if the calibration
        is missing.
        """
        return cls._from(Field(data, "this is no budget"), calibration)

    def save(self, path: str | Path) -> None:
        """Write `to_dict` to a JSON file, atomically. Save a calibration with Calibration.save."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        serialization.write(path, text.encode())

    @classmethod
    def load(cls, path: str | Path, *, calibration: Any = None) -> Budget:
        """Read a file that `save` wrote. Arguments and errors are those of `from_dict`."""
        return cls._from(serialization.read_json(path, "budget"), calibration)

    @classmethod
    def _from(cls, data: Field, calibration: Any) -> Budget:
        data.only(("format", "version", "metric", *_NUMBERS, "left", "calibration", "options"))
        data["format"].one_of((FORMAT,))
        data["version"].integer(VERSION, VERSION)
        metric = data["metric"].one_of(METRICS)
        share = data["float_share"].number(0.0, 1.0)
        goal, before, after = (_decode(data[name]) for name in ("goal", "before", "after"))
        left = tuple(_left_in_float(one) for one in data["left"].list())
        options = dict(data["options"].object())
        fitted_with = data["calibration"].boolean()
        if fitted_with and calibration is None:
            raise OptionError(
                "this budget was fitted with a calibration: give it as calibration=..., such as "
                "graphquant.Calibration.load(path, model)"
            )
        given = _given(calibration if fitted_with else None)
        try:
            Config.of_file(options, **given)
        except OptionError as bad:
            raise FileError(f"{data.prefix}: options: {bad}") from bad
        return cls(metric, goal, before, after, left, share, {**options, **given})


_NUMBERS = ("goal", "before", "after", "float_share")
_INFINITE = ("inf", "-inf")


def _given(calibration: Any) -> dict[str, Any]:
    return {} if calibration is None else {"calibration": calibration}


def _left_in_float(data: Field) -> LeftInFloat:
    data.only(("path", "alone", "share"))
    share = data["share"].number(0.0, 1.0)
    return LeftInFloat(data["path"].text(), _decode(data["alone"]), share)


def _decode(data: Field) -> float:
    """The inverse of `_encode`."""
    return float(data.value) if data.value in _INFINITE else data.number()


def _encode(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)


def _plain(value: Any) -> Any:
    """Nested mappings as dicts, for JSON."""
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value
