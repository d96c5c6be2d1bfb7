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

from graphquant.accuracy import OutputAccuracy
from graphquant.config import Config
from graphquant.errors import OptionError, UnsupportedInputError

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
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    most = math.inf if name == "sqnr" else 1.0
    if not number or not 0.0 < value <= most or math.isinf(value):
        raise OptionError(f"{name}={value!r} is no number above 0" + " up to 1" * (most == 1.0))
    return METRICS[name], float(value)


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

        Raises OptionError for an Inductor option that JSON cannot hold.
        """
        options = {k: v for k, v in self.options.items() if k not in _NOT_SAVED}
        try:
            options = json.loads(json.dumps(options))
        except TypeError as bad:
            raise OptionError(f"these options cannot be saved: {bad}") from bad
        return {
            "format": FORMAT,
            "version": VERSION,
            "metric": self.metric,
            **{name: _told(getattr(self, name)) for name in _NUMBERS},
            "left": [{**asdict(site), "alone": _told(site.alone)} for site in self.left],
            "calibration": self.options.get("calibration") is not None,
            "options": options,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, calibration: Any = None) -> Budget:
        """What `to_dict` gave, with the calibration that it was fitted with, if there was one.

        Raises OptionError for what is no budget, and without that calibration.
        """
        try:
            if (data["format"], data["version"]) != (FORMAT, VERSION):
                raise ValueError(f"{data['format']} {data['version']}, not {FORMAT} {VERSION}")
            numbers = {name: float(data[name]) for name in _NUMBERS}
            left = tuple(
                LeftInFloat(s["path"], float(s["alone"]), s["share"]) for s in data["left"]
            )
            metric, options = METRICS[data["metric"]].name, dict(data["options"])
            fitted_with = data["calibration"]
        except (KeyError, TypeError, ValueError) as bad:
            raise OptionError(f"this is no budget: {bad!r}") from bad
        if fitted_with and calibration is None:
            raise OptionError(
                "this budget was fitted with a calibration: give it as calibration=..., such as "
                "graphquant.Calibration.load(path, model)"
            )
        if fitted_with:
            options["calibration"] = calibration
        Config.of(options)
        return cls(metric, left=left, options=options, **numbers)

    def save(self, path: str | Path) -> None:
        """A JSON file of `to_dict`. A calibration has a file of its own: Calibration.save."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path, *, calibration: Any = None) -> Budget:
        """What `save` wrote; as `from_dict`."""
        try:
            data = json.loads(Path(path).read_text())
        except ValueError as bad:
            raise OptionError(f"{path} is no budget: {bad}") from bad
        return cls.from_dict(data, calibration=calibration)


_NUMBERS = ("goal", "before", "after", "float_share")


def _told(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)
