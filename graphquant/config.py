"""All options in one frozen value. Nothing else in the library reads `options=`."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from graphquant.errors import OptionError

INNERS = ("inductor", "eager", "aot_eager")
SELECTS = ("faster", "always")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Config:
    """What `torch.compile(model, backend="graphquant", options={...})` accepts.

    Patterns in `include` and `exclude` are module paths such as `encoder.layers.0.mlp.fc1`: globs,
    in which `*` also crosses dots, or regular expressions behind `re:`. A pattern must match the
    whole path.
    """

    inner: str = "inductor"
    """What runs the rewritten graph: "inductor", "eager" (as it stands) or "aot_eager"."""
    mode: str | None = None
    """Inductor's mode: torch.compile's own `mode=` cannot be given next to `options=`."""
    select: str = ""
    """On CUDA, "faster" (default): a linear runs in int8 only if that was measured to be faster
    than the float chain it replaces. "always": without measuring. Elsewhere nothing is measured.
    The environment variable GRAPHQUANT_SELECT changes the default."""
    quantize: bool = True
    """False: float only. Linears that read one value (q/k/v) become one; nothing is int8."""
    calibration: Any = None
    smooth: float | str | None = None
    """SmoothQuant: size moves from an int8 linear's activation to its weight, channel by channel,
    by the activation's absmax^smooth / the weight's absmax^(1 - smooth). 0 < smooth < 1; 0.5 is
    usual. It needs `calibration`. "auto": the exponent, or none, that promises the least error is
    searched for each linear, where the calibration kept rows to search on. "norm": without a
    calibration, for linears behind a norm alone, by its parameters. Exact but for int8."""
    include: tuple[str, ...] = ()
    """Only linears whose module path matches one of these are rewritten; empty means all."""
    exclude: tuple[str, ...] = ()
    """Linears whose module path matches one of these are left alone."""
    free_weights: bool = False
    """Release the float storage of every weight that only int8 linears read. From then on the eager
    module, its state_dict and in-place updates of those weights do not work (torch may crash on
    them); `load_state_dict(..., assign=True)` does."""
    on_report: Callable[[Any], object] | None = None
    """Called with the Report of each graph that is compiled, e.g. `print`."""
    inductor: Mapping[str, Any] = field(default_factory=dict)
    """Options handed to Inductor for this compilation, e.g. {"max_autotune": True}."""

    def __post_init__(self) -> None:
        _one_of("inner", self.inner, INNERS)
        if self.mode is not None:
            _one_of("mode", self.mode, MODES)
        if not self.select:
            object.__setattr__(self, "select", os.environ.get("GRAPHQUANT_SELECT") or "faster")
        _one_of("select", self.select, SELECTS)
        for name in ("quantize", "free_weights"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._check_smooth()
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        if self.on_report is not None and not callable(self.on_report):
            raise OptionError(f"on_report must be callable, got {self.on_report!r}")
        if not isinstance(self.inductor, Mapping):
            raise OptionError(f"inductor must be a dict of Inductor options, got {self.inductor!r}")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Config:
        """The Config for these options. Raises OptionError for one that does not exist."""
        valid = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in valid:
                close = difflib.get_close_matches(str(name), valid, n=1)
                hint = f", did you mean {close[0]!r}?" if close else "."
                raise OptionError(f"unknown option {name!r}{hint} Valid: {', '.join(valid)}")
        return cls(**options)

    def _check_smooth(self) -> None:
        smooth = self.smooth
        if smooth is None or smooth == "norm":
            return
        if smooth != "auto" and not (isinstance(smooth, float) and 0.0 < smooth < 1.0):
            raise OptionError(
                f"smooth={smooth!r} is no number between 0 and 1, nor one of 'auto', 'norm'"
            )
        if self.calibration is None:
            raise OptionError(f"smooth={smooth!r} needs calibration=; 'norm' does without")

    def wants(self, path: str) -> str | None:
        """None if the linear at this module path may be rewritten, else why not."""
        if self.include and not any(_matches(p, path) for p in self.include):
            return "not named by include"
        if hit := next((p for p in self.exclude if _matches(p, path)), None):
            return f"excluded by {hit!r}"
        return None


def _one_of(name: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise OptionError(f"{name}={value!r} is not one of {', '.join(map(repr, valid))}")


def _patterns(name: str, value: object) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, (list, tuple)) or not all(isinstance(p, str) for p in given):
        raise OptionError(f"{name} must be a pattern or a list of patterns, got {value!r}")
    for pattern in given:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as bad:
                raise OptionError(
                    f"{name}: {pattern!r} is not a regular expression: {bad}"
                ) from bad
    return tuple(given)


def _matches(pattern: str, path: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], path) is not None
    return fnmatch.fnmatchcase(path, pattern)
