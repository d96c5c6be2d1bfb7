"""Config: all options, validated. The only place that reads `options=`."""

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
PADDINGS = ("keep", "remove")
ATTENTION_DTYPES = ("auto", "float32")


@runtime_checkable
class Statistics(Protocol):
    """Protocol of a calibration: statistics of linear inputs by module path, None if unknown.

    It may also have `sample(path)`: some rows, [n, K] float32, for smooth="auto" and `min_sqnr`.
    """

    def absmax(self, path: str) -> Tensor | None:
        """max |x| of each input channel, [K] float32."""
        ...

    def range(self, path: str) -> tuple[float, float] | None:
        """(low, high), the per-tensor range that a static scale covers."""
        ...


@dataclass(frozen=True)
class Config:
    """Options of `torch.compile(model, backend="graphquant", options={...})`.

    Patterns in `include` and `exclude` are module paths such as `encoder.layers.0.mlp.fc1`: globs,
    in which `*` also matches dots, or regular expressions after `re:`. A pattern must match the
    whole path.
    """

    inner: str = "inductor"
    """Compiler of the rewritten graph: "inductor", "eager" (none), "aot_eager" or "torch_tensorrt",
    which builds engines for all but the int8 ops."""
    mode: str | None = None
    """Inductor's mode; torch.compile does not accept `mode=` together with `options=`."""
    select: str = ""
    """"faster" (default): a linear runs in int8 only if measured to be faster than the float chain
    it replaces, which is not tried on a CPU without an int8 dot product. "always": without
    measuring. The environment variable GRAPHQUANT_SELECT changes the default."""
    quantize: bool = True
    """False: float only. Linears that read the same value (q/k/v) become one; nothing is int8."""
    include: tuple[str, ...] = ()
    """Only linears whose module path matches one of these are rewritten; empty means all."""
    exclude: tuple[str, ...] = ()
    """Linears whose module path matches one of these are not rewritten."""
    free_weights: bool | str = False
    """True: free the float values of all weights that only int8 linears read, after the first
    call. From then on the eager module, saving its state_dict and in-place updates of those weights
    raise; `load_state_dict(..., assign=True)` works. "host": move them to host memory, where all of
    that works; no effect on a CPU."""
    activation: str = "dynamic"
    """Quantization of a linear's input: "dynamic" has a scale and a shift per row (token), "static"
    one of each for all rows, from the range in `calibration`. A linear without such a range stays
    dynamic; the report says so."""
    clip_range: float | None = None
    """Clip the inputs of int8 linears to [-clip_range, clip_range]."""
    weight_scale: str = "absmax"
    """Scales of weights per output channel: "absmax", or "mse" (least squared rounding error)."""
    wbits: int = 8
    """Bits of a weight. Only 8 is supported."""
    padding: str = "keep"
    """"remove": compute the tokens that the attention mask marks as valid only, where the results
    for them stay the same; results at padding are zero. "keep": compute padding as the model
    does."""
    size_buckets: bool = True
    """With padding="remove" and CUDA graphs: pad dynamic batch sizes and lengths up to 1, 2, 3, 4,
    6, 8, 12, ..., so that few graphs are recorded. Results have the sizes of the inputs. False:
    a CUDA graph for every size."""
    attention_dtype: str = "auto"
    """Of attention in a float32 model, between int8 linears on a CPU: "auto" is bfloat16 where the
    processor multiplies it and it was measured to be faster, "float32" never bfloat16."""
    smooth: float | str | None = None
    """SmoothQuant: divide each input channel of an int8 linear by its absmax^smooth / its weights'
    size^(1 - smooth), and multiply the weights by it, which is equivalent in float. 0 < smooth < 1
    (0.5 is usual) and "auto" need `calibration`; "auto" searches the exponent, or not to smooth,
    for each linear with sampled rows. "norm": only linears after a norm, from its parameters,
    without data."""
    min_sqnr: float | None = None
    """Minimum SQNR in dB: a linear whose int8 product is below it, on the sampled rows in
    `calibration`, stays in float; stacked q/k/v all do if one of them is below. A linear without
    rows is int8. Checked when the model is compiled, not again when weights change."""
    calibration: Statistics | None = None
    """Result of `calibrate`, for activation="static", `smooth` and `min_sqnr`."""
    on_report: Callable[[Any], object] | None = None
    """Called with the Report of each compiled graph, e.g. `print`."""
    progress: bool | None = None
    """Show the phase of a compilation on stderr, in a line that is erased at its end. None: if
    stderr is a terminal."""
    inductor: Mapping[str, Any] = field(default_factory=dict)
    """Options for Inductor, e.g. {"max_autotune": True}."""
    tensorrt: Mapping[str, Any] = field(default_factory=dict)
    """Options for Torch-TensorRT, with inner="torch_tensorrt", e.g. {"min_block_size": 1}."""

    def __post_init__(self) -> None:
        _one_of("inner", self.inner, INNERS)
        if self.mode is not None:
            _one_of("mode", self.mode, MODES)
        if not self.select:
            object.__setattr__(self, "select", os.environ.get("GRAPHQUANT_SELECT") or "faster")
        _one_of("select", self.select, SELECTS)
        _one_of("padding", self.padding, PADDINGS)
        for name in ("quantize", "size_buckets"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.free_weights, bool) and self.free_weights != "host":
            raise OptionError(
                f"free_weights must be True or False, got {self.free_weights!r}; "
                'the only word it accepts is "host"'
            )
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("weight_scale", self.weight_scale, WEIGHT_SCALES)
        _one_of("attention_dtype", self.attention_dtype, ATTENTION_DTYPES)
        if self.wbits != 8 or isinstance(self.wbits, bool):
            raise OptionError(f"wbits={self.wbits!r}: only 8-bit weights are supported")
        if self.clip_range is not None:
            object.__setattr__(self, "clip_range", _positive("clip_range", self.clip_range))
        if self.calibration is not None and not isinstance(self.calibration, Statistics):
            raise OptionError(
                "calibration must have the methods absmax(path) and range(path), like the result "
                f"of graphquant.calibrate, got {self.calibration!r}"
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
                    f"min_sqnr={self.min_sqnr:g} needs sampled rows of calibration data: give "
                    "calibration=graphquant.calibrate(model, batches)"
                )
        if self.progress is not None and not isinstance(self.progress, bool):
            raise OptionError(f"progress must be True, False or None, got {self.progress!r}")
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
        """The Config for these options. Raises OptionError for unknown or invalid ones."""
        valid = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in valid:
                close = difflib.get_close_matches(str(name), valid, n=1)
                hint = f", did you mean {close[0]!r}?" if close else "."
                raise OptionError(f"unknown option {name!r}{hint} Valid: {', '.join(valid)}")
        return cls(**options)

    @classmethod
    def of_file(cls, options: Mapping[str, Any], **given: Any) -> Config:
        """As `of`, for untrusted options from a file together with those `given` by the program.

        A file may contain numbers, booleans, words and patterns of module paths; for Inductor and
        Torch-TensorRT only numbers and booleans, since other options name programs that they run.
        Raises OptionError for anything else.
        """
        for name, value in options.items():
            if not _is_data(name, value):
                raise OptionError(
                    f"the option {name}={reprlib.repr(value)} cannot come from a file, which may "
                    "contain numbers, true, false, words and patterns of paths; add it in code: "
                    f"{{**options, {name!r}: ...}}"
                )
        return cls.of({**options, **given})

    def _check_smooth(self) -> None:
        smooth = self.smooth
        if self.clip_range is not None:
            raise OptionError(
                f"smooth={smooth!r} with clip_range: smoothing changes the units of what is clipped"
            )
        if smooth == "norm":
            if self.activation == "static":
                raise OptionError("smooth='norm' has no range for activation='static'")
            return
        if smooth != "auto" and not (isinstance(smooth, float) and 0.0 < smooth < 1.0):
            raise OptionError(
                f"smooth={smooth!r} is not a number between 0 and 1, 'auto' or 'norm'"
            )
        if self.calibration is None:
            raise OptionError(
                f"smooth={smooth!r} needs calibration data: give "
                "calibration=graphquant.calibrate(model, batches), or smooth='norm'"
            )

    def wants(self, path: str) -> str | None:
        """Why `include` or `exclude` rule out the linear at this path; None if they do not."""
        if self.include and not any(matches(p, path) for p in self.include):
            return "not matched by include"
        if (hit := next((p for p in self.exclude if matches(p, path)), None)) is not None:
            return f"excluded by {hit!r}"
        return None


def strict() -> bool:
    """GRAPHQUANT_STRICT=1: internal failures raise, instead of falling back to float."""
    return os.environ.get("GRAPHQUANT_STRICT", "") not in ("", "0")


def verifying() -> bool:
    """GRAPHQUANT_VERIFY=1: every graph is verified after every pass (passes/verify.py)."""
    return os.environ.get("GRAPHQUANT_VERIFY") == "1"


def escape(path: str) -> str:
    """A pattern that matches only this module path, with special characters escaped."""
    pattern = re.sub(r"[*?[]", r"[\g<0>]", path)
    return f"[{pattern[0]}]{pattern[1:]}" if pattern.startswith("re:") else pattern


_PATTERNS = ("include", "exclude")
_FORWARDED = ("inductor", "tensorrt")  # options of other libraries
_OBJECTS = ("calibration", "on_report")


def _is_data(name: object, value: object) -> bool:
    """May a file contain this? Whether the value is valid for the option is up to Config."""
    if name in _OBJECTS:
        return False
    if name in _FORWARDED:
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
