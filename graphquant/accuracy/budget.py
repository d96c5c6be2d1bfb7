"""Which linears stay in float so that a model's outputs are exact enough: `graphquant.fit_budget`.

A Budget is options for torch.compile, and what they were found to cost and to reach.
"""

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
    """How exact a model's outputs are in one number, the more the better.

    of    of one output
    loss  what grows with the power of its error
    """

    name: str
    label: str
    unit: str
    of: Callable[[OutputAccuracy], float]
    loss: Callable[[float], float]

    def __call__(self, outputs: Sequence[OutputAccuracy]) -> float:
        """Of the worst of these outputs; -inf if one of them is nan.

        Raises UnsupportedInputError if there are none.
        """
        if not outputs:
            raise UnsupportedInputError("the model returns no floating-point tensor to compare")
        found = [self.of(output) for output in outputs]
        return -math.inf if any(map(math.isnan, found)) else min(found)

    def shown(self, value: float) -> str:
        return f"{value:.1f} dB" if self.unit else f"{value:.5f}"


def _off(cosine: float) -> float:
    return 1 - cosine


METRICS = {
    metric.name: metric
    for metric in (
        Metric("cosine", "mean cosine", "", lambda o: o.cosines.mean, _off),
        Metric("worst_cosine", "worst cosine", "", lambda o: o.cosines.worst, _off),
        Metric("sqnr", "SQNR", "dB", lambda o: o.error.sqnr, lambda db: 10 ** (-db / 10)),
    )
}


def goal(**given: float | None) -> tuple[Metric, float]:
    """The one that is given, by the metric's name.

    Raises OptionError if it is not one, and for a number that it cannot be.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) != 1:
        got = ", ".join(chosen) or "none"
        raise OptionError(f"a budget is one of {', '.join(METRICS)}, got {got}")
    ((name, value),) = chosen.items()
    number = as_float(value)
    most = math.inf if name == "sqnr" else 1.0
    if number is None or not 0.0 < number <= most or math.isinf(number):
        raise OptionError(f"{name}={value!r} is no number above 0" + " up to 1" * (most == 1.0))
    return METRICS[name], number


@dataclass(frozen=True)
class LeftInFloat:
    """A linear that the budget leaves in float.

    alone  what the outputs reach with nothing else in int8 than this one
    share  of all linears' FLOPs, 0 to 1, at the sizes of the first batch
    """

    path: str
    alone: float
    share: float


@dataclass(frozen=True)
class Budget:
    """Options under which a model's outputs are as exact as was asked, on the batches given.

    options      for torch.compile(model, backend="graphquant", options=...): those that were given,
                 `exclude` with the exact paths of what stays in float, and `smooth` if it was found
                 to help
    metric       "cosine", "worst_cosine" or "sqnr" (dB), and `goal`, the least it may be
    before       what the outputs reach with the options that were given
    after        and with these
    left         the linears left in float for it, the one that costs the outputs most first
    float_share  of all linears' FLOPs, 0 to 1, at the sizes of the first batch, what is in float,
                 for whatever reason
    """

    metric: str
    goal: float
    before: float
    after: float
    left: tuple[LeftInFloat, ...]
    float_share: float
    options: Mapping[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        """One line: what was asked, what is reached, and how much is left in float for it."""
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
        """The table without colour, wide enough for its longest row."""
        longest = max((len(site.path) for site in self.left), default=0)
        width = min(max(100, longest + 60), 200)
        page = Console(file=io.StringIO(), width=width, color_system=None)
        page.print(self)
        text: str = page.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())

    # Files --------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold. A calibration and on_report are left out; numbers that are not finite
        are text.

        Raises OptionError for an option that cannot come from a file: for Inductor and
        Torch-TensorRT those may be numbers, True and False.
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
            **{name: _told(getattr(self, name)) for name in _NUMBERS},
            "left": [{**asdict(site), "alone": _told(site.alone)} for site in self.left],
            "calibration": self.options.get("calibration") is not None,
            "options": json.loads(json.dumps(_plain(options))),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, calibration: Any = None) -> Budget:
        """What `to_dict` gave, with the calibration that it was fitted with, if there was one.

        Raises FileError for what is no budget, and for options that cannot come from a file (see
        `to_dict`); OptionError without that calibration.
        """
        return cls._from(Field(data, "this is no budget"), calibration)

    def save(self, path: str | Path) -> None:
        """A JSON file of `to_dict`. A calibration has a file of its own: Calibration.save.

        A file that is there is replaced as a whole, or stays as it was.
        """
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        serialization.write(path, text.encode())

    @classmethod
    def load(cls, path: str | Path, *, calibration: Any = None) -> Budget:
        """What `save` wrote; as `from_dict`."""
        return cls._from(serialization.read_json(path, "budget"), calibration)

    @classmethod
    def _from(cls, data: Field, calibration: Any) -> Budget:
        data.only(("format", "version", "metric", *_NUMBERS, "left", "calibration", "options"))
        data["format"].one_of((FORMAT,))
        data["version"].integer(VERSION, VERSION)
        metric = data["metric"].one_of(METRICS)
        share = data["float_share"].number(0.0, 1.0)
        goal, before, after = (_number(data[name]) for name in ("goal", "before", "after"))
        left = tuple(_left(one) for one in data["left"].list())
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


def _left(data: Field) -> LeftInFloat:
    data.only(("path", "alone", "share"))
    share = data["share"].number(0.0, 1.0)
    return LeftInFloat(data["path"].text(), _number(data["alone"]), share)


def _number(data: Field) -> float:
    """What `_told` wrote."""
    return float(data.value) if data.value in _INFINITE else data.number()


def _told(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)


def _plain(value: Any) -> Any:
    """Mappings as dicts, which JSON knows."""
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value
