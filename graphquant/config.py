"""All options in one frozen value. Nothing else in the library reads `options=`."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
import os
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from graphquant.errors import OptionError
from graphquant.utils.serialization import as_float

INNERS = ("inductor", "eager", "aot_eager", "torch_tensorrt")
SELECTS = ("faster", "always")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
ACTIVATIONS = ("dynamic", "static")
WEIGHT_SCALES = ("absmax", "mse")


@runtime_checkable
class Statistics(Protocol):
    """What a calibration knows of the inputs of linears, by the linear's module path, as in the
    report. None for one that it has not seen.

    A calibration may also have `sample(path)`: some rows, [n, K] float32, for smooth="auto" and for
    `min_sqnr`.
    """

    def absmax(self, path: str) -> Tensor | None:
        """[K] float32: the largest magnitude in each input channel."""
        ...

    def range(self, path: str) -> tuple[float, float] | None:
        """(low, high): the range of the whole input that static scales shall cover."""
        ...


@dataclass(frozen=True)
class Config:
    """What `torch.compile(model, backend="graphquant", options={...})` accepts.

    Patterns in `include` and `exclude` are module paths such as `encoder.layers.0.mlp.fc1`: globs,
    in which `*` also crosses dots, or regular expressions behind `re:`. A pattern must match the
    whole path.
    """

    inner: str = "inductor"
    """What runs the rewritten graph: "inductor", "eager" (as it stands), "aot_eager", or
    "torch_tensorrt": engines around the int8 ops, which stay with PyTorch."""
    mode: str | None = None
    """Inductor's mode: torch.compile's own `mode=` cannot be given next to `options=`."""
    select: str = ""
    """On CUDA, "faster" (default): a linear runs in int8 only if that was measured to be faster
    than the float chain it replaces. "always": without measuring. Elsewhere nothing is measured.
    The environment variable GRAPHQUANT_SELECT changes the default."""
    quantize: bool = True
    """False: float only. Linears that read one value (q/k/v) become one; nothing is int8."""
    include: tuple[str, ...] = ()
    """Only linears whose module path matches one of these are rewritten; empty means all."""
    exclude: tuple[str, ...] = ()
    """Linears whose module path matches one of these are left alone."""
    free_weights: bool | str = False
    """True: give up the float values of every weight of the module that only int8 linears read,
    after the first call. From then on the eager module, saving its state_dict and in-place updates
    of those weights raise; `load_state_dict(..., assign=True)` works. "host": move them to host
    memory, where all of that works. On the CPU they are there already, and stay."""
    activation: str = "dynamic"
    """With "dynamic" every row (token) of a linear's input has a scale and a shift of its own, with
    "static" all have the same, from the range in `calibration`. A linear that the calibration does
    not know stays dynamic; the report says so."""
    clip_range: float | None = None
    """Nothing that a linear reads in int8 is further from zero than this."""
    weight_scale: str = "absmax"
    """The scale of a weight's output channel: "absmax", or "mse", which makes its squared rounding
    error least."""
    wbits: int = 8
    """Bits of a weight. There are no products of other widths than 8."""
    smooth: float | str | None = None
    """SmoothQuant: what an int8 linear reads is divided, channel by channel, by the channel's
    absmax^smooth / its weights' size^(1 - smooth), and the weights multiplied: exact but for int8.
    0 < smooth < 1 (0.5 is usual) and "auto" need `calibration`; with "auto" the exponent, or not to
    smooth, is searched for each linear of which the calibration keeps a sample of rows. "norm":
    only linears behind a norm, by its parameters, without data."""
    min_sqnr: float | None = None
    """In dB. A linear whose int8 product is less exact than this, on the rows that `calibration`
    has of its input, stays in float; q/k/v that are one product all do if one of them is. Without
    rows it is int8. Judged when the model is compiled, not again when weights change."""
    calibration: Statistics | None = None
    """What calibration data has shown, for activation="static", `smooth` and `min_sqnr`."""
    on_report: Callable[[Any], object] | None = None
    """Called with the Report of each graph that is compiled, e.g. `print`."""
    inductor: Mapping[str, Any] = field(default_factory=dict)
    """Options handed to Inductor for this compilation, e.g. {"max_autotune": True}."""
    tensorrt: Mapping[str, Any] = field(default_factory=dict)
    """Options handed to Torch-TensorRT with inner="torch_tensorrt", e.g. {"min_block_size": 1}."""

    def __post_init__(self) -> None:
        _one_of("inner", self.inner, INNERS)
        if self.mode is not None:
            _one_of("mode", self.mode, MODES)
        if not self.select:
            object.__setattr__(self, "select", os.environ.get("GRAPHQUANT_SELECT") or "faster")
        _one_of("select", self.select, SELECTS)
        if not isinstance(self.quantize, bool):
            raise OptionError(f"quantize must be True or False, got {self.quantize!r}")
        if not isinstance(self.free_weights, bool) and self.free_weights != "host":
            raise OptionError(
                f"free_weights must be True or False, got {self.free_weights!r}; "
                'the one word that it knows is "host"'
            )
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("weight_scale", self.weight_scale, WEIGHT_SCALES)
        if self.wbits != 8 or isinstance(self.wbits, bool):
            raise OptionError(
                f"wbits={self.wbits!r}: weights have 8 bits; graphquant has no products of others"
            )
        if self.clip_range is not None:
            object.__setattr__(self, "clip_range", _positive("clip_range", self.clip_range))
        if self.calibration is not None and not isinstance(self.calibration, Statistics):
            raise OptionError(
                "calibration must have the methods absmax(path) and range(path), as what "
                f"graphquant.calibrate returns, got {self.calibration!r}"
            )
        if self.activation == "static" and self.calibration is None:
            raise OptionError(
                'activation="static" takes its ranges from calibration data: give '
                "calibration=graphquant.calibrate(model, batches)"
            )
        if self.smooth is not None:
            self._check_smooth()
        if self.min_sqnr is not None:
            object.__setattr__(self, "min_sqnr", _positive("min_sqnr", self.min_sqnr))
            if not hasattr(self.calibration, "sample"):
                raise OptionError(
                    f"min_sqnr={self.min_sqnr:g} is judged on rows of calibration data: give "
                    "calibration=graphquant.calibrate(model, batches)"
                )
        if self.on_report is not None and not callable(self.on_report):
            raise OptionError(f"on_report must be callable, got {self.on_report!r}")
        if not isinstance(self.inductor, Mapping):
            raise OptionError(f"inductor must be a dict of Inductor options, got {self.inductor!r}")
        if not isinstance(self.tensorrt, Mapping):
            raise OptionError(
                f"tensorrt must be a dict of Torch-TensorRT's options, got {self.tensorrt!r}"
            )

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

    @classmethod
    def of_file(cls, options: Mapping[str, Any], **given: Any) -> Config:
        """As `of`, for options that a file brings, beside those that are `given` by the program.

        A file is data: it may hold numbers, True and False, one of the words an option knows, and
        patterns of module paths; for Inductor and Torch-TensorRT numbers, True and False alone.
        Some of their other options name programs that they run.

        Raises OptionError for anything else.
        """
        for name, value in options.items():
            if not _is_data(name, value):
                raise OptionError(
                    f"the option {name}={reprlib.repr(value)} cannot come from a file, which may "
                    "hold numbers, true, false, words that the option knows and patterns of paths"
                    + f"; give it beside them: {{**options, {name!r}: ...}}"
                )
        return cls.of({**options, **given})

    def _check_smooth(self) -> None:
        smooth = self.smooth
        if self.clip_range is not None:
            raise OptionError(
                f"smooth={smooth!r} beside clip_range: what is smoothed has other units than what "
                "it is clipped to"
            )
        if smooth == "norm":
            if self.activation == "static":
                raise OptionError("smooth='norm' knows no range for activation='static'")
            return
        if smooth != "auto" and not (isinstance(smooth, float) and 0.0 < smooth < 1.0):
            raise OptionError(
                f"smooth={smooth!r} is no number between 0 and 1, nor one of 'auto', 'norm'"
            )
        if self.calibration is None:
            raise OptionError(
                f"smooth={smooth!r} takes its channels from calibration data: give "
                "calibration=graphquant.calibrate(model, batches), or smooth='norm'"
            )

    def wants(self, path: str) -> str | None:
        """None if the linear at this module path may be rewritten, else why not."""
        if self.include and not any(matches(p, path) for p in self.include):
            return "not named by include"
        if (hit := next((p for p in self.exclude if matches(p, path)), None)) is not None:
            return f"excluded by {hit!r}"
        return None


def strict() -> bool:
    """GRAPHQUANT_STRICT=1: what fails in graphquant raises, and is not run in float instead."""
    return os.environ.get("GRAPHQUANT_STRICT", "") not in ("", "0")


def verifying() -> bool:
    """Is every graph verified after every pass? (passes/verify.py)"""
    return os.environ.get("GRAPHQUANT_VERIFY") == "1"


def literally(path: str) -> str:
    """A pattern that matches this module path alone, whatever characters are in it."""
    pattern = re.sub(r"[*?[]", r"[\g<0>]", path)
    return f"[{pattern[0]}]{pattern[1:]}" if pattern.startswith("re:") else pattern


_PATTERNS = ("include", "exclude")
_OTHERS = ("inductor", "tensorrt")  # options of other programs
_OBJECTS = ("calibration", "on_report")


def _is_data(name: object, value: object) -> bool:
    """May a file hold this? Whether the option knows the word or number is for Config to say."""
    if name in _OBJECTS:
        return False
    if name in _OTHERS:
        return isinstance(value, Mapping) and all(
            isinstance(key, str) and _is_number(one) for key, one in value.items()
        )
    if name in _PATTERNS and not isinstance(value, str):
        return isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value)
    return value is None or _is_number(value) or isinstance(value, str)


def _is_number(value: object) -> bool:
    number = as_float(value)
    return isinstance(value, bool) or (number is not None and math.isfinite(number))


def _one_of(name: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise OptionError(f"{name}={value!r} is not one of {', '.join(map(repr, valid))}")


def _positive(name: str, value: object) -> float:
    number = as_float(value)
    if number is None or not 0.0 < number < math.inf:
        raise OptionError(f"{name} must be a number above 0, got {reprlib.repr(value)}")
    return number


def _patterns(name: str, value: object) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, (list, tuple)) or not all(isinstance(p, str) for p in given):
        raise OptionError(f"{name} must be a pattern or a list of patterns, got {value!r}")
    for pattern in given:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except (re.error, RecursionError, OverflowError) as bad:
                shown = pattern if len(pattern) <= 200 else f"{pattern[:200]}..."
                raise OptionError(f"{name}: {shown!r} is not a regular expression: {bad}") from bad
    return tuple(given)


def matches(pattern: str, path: str) -> bool:
    """Does a pattern of `include` or `exclude` match this module path?"""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], path) is not None
    return fnmatch.fnmatchcase(path, pattern)
