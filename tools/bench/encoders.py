"""Models x batch x variants, in one process."""

from __future__ import annotations

import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphquant import Report
from tools.bench.models import MODELS, Model, build, inputs, widened
from tools.bench.records import LATE, SKIPPED, Encoder, reason, short
from tools.bench.timing import PEAK_CALLS, Sample, Timer, interleaved, spread
from tools.bench.variants import CPU_USUAL, MissingError, prepare, settings_kept, weight_bytes

CHUNK = 8  # of a batch, for the model in float32


@dataclass(frozen=True)
class Row:
    """What is measured together, in turns. layers: what the model is cut to, or None."""

    model: str
    batch: int
    variants: tuple[str, ...]
    layers: int | None = None


_BASE = ("bf16-max-autotune", "graphquant")
_ALL = ("bf16-max-autotune", "torchao-int8", "graphquant")
_PACKED = ("float-packed", "graphquant-packed")
_FULL = ("graphquant-reduce-overhead", "graphquant-packed-reduce-overhead")
_RAGGED = ("graphquant", *_PACKED)
_GRAPHS = ("bf16-reduce-overhead", "graphquant-reduce-overhead")

GRID = (
    *("siglip-so400m", "clip-l-336", "internvit-300m", "vit-b-16", "dinov2-l"),
    *("bert-base-128", "bert-base-512"),
)

# Twenty published encoders, with a batch for throughput; what does not fit into the time is cut.
ENCODERS: tuple[tuple[str, int, int | None], ...] = (
    ("siglip-so400m", 64, None),
    ("clip-l-336", 64, None),
    ("internvit-300m", 64, None),
    ("internvit-6b", 16, 4),
    ("dinov2-l", 64, None),
    ("dinov3-l", 64, None),
    ("sam-vit-b", 8, None),
    ("vit-b-16", 64, None),
    ("beit-b", 64, None),
    ("swin-b", 32, None),
    ("deit-tiny", 256, None),
    ("whisper-large-v3", 8, None),
    ("bert-base", 64, None),
    ("minilm-l6-256", 256, None),
    ("bge-large", 32, None),
    ("e5-large", 32, None),
    ("xlm-r-base", 64, None),
    ("mpnet-base", 64, None),
    ("modernbert-base", 32, None),
    ("t5-large", 16, None),
)

# In order of interest: a time limit cuts the end off.
PRESETS: dict[str, tuple[Row, ...]] = {
    "headline": (
        Row("siglip-so400m", 64, _ALL),
        Row("siglip-so400m", 1, _GRAPHS),
        Row("vit-b-16", 64, _BASE),
        Row("bert-base-512", 64, _BASE),
        Row("clip-l-336", 64, _BASE),
        Row("siglip-so400m", 8, _GRAPHS),
        Row("internvit-300m", 64, _BASE),
        Row("dinov2-l", 64, _BASE),
        Row("clip-l-336", 1, _GRAPHS),
    ),
    "grid": tuple(
        Row(model, batch, ("bf16-default", "graphquant"))
        for batch in (64, 8, 1)
        for model in MODELS
        if model in GRID
    ),
    "ragged": (
        Row("bert-base-ragged", 256, ("bf16-default", *_RAGGED)),
        Row("minilm-l6-ragged", 1024, (*_GRAPHS, "graphquant-packed-reduce-overhead")),
        Row("bge-large-ragged", 256, ("bf16-default", *_PACKED)),
        Row("modernbert-ragged", 32, ("bf16-default", *_PACKED)),
        Row("bert-base-full", 64, ("bf16-default", "graphquant", "graphquant-packed", *_FULL)),
    ),
    "encoders": tuple(
        row
        for model, batch, layers in ENCODERS
        for row in (Row(model, batch, _BASE, layers), Row(model, 1, _GRAPHS, layers))
    ),
    "cpu-ragged": (
        Row("bert-base-ragged-128", 32, ("bf16-default", *_RAGGED), 4),
        Row("minilm-l6-ragged", 64, ("bf16-default", *_RAGGED)),
    ),
    "cpu": (
        Row("bert-base-128", 8, CPU_USUAL, 4),
        Row("minilm-l6", 32, CPU_USUAL),
        Row("vit-b-16", 8, CPU_USUAL, 4),
        Row("bert-base-32", 1, CPU_USUAL, 4),
    ),
}
PRESET_LIMIT = 480.0  # seconds, on a GPU


@dataclass(frozen=True)
class Limit:
    """When to stop starting anything. until: time.monotonic(), or None for never."""

    until: float | None = None

    @classmethod
    def after(cls, seconds: float | None) -> Limit:
        return cls(None if seconds is None else time.monotonic() + seconds)

    @property
    def left(self) -> float | None:
        """Seconds, 0 at least; None for ever."""
        return None if self.until is None else max(0.0, self.until - time.monotonic())

    @property
    def passed(self) -> bool:
        return self.left == 0.0


def measure(
    row: Row,
    timer: Timer,
    *,
    seconds: float,
    layers: int | None = None,
    limit: Limit | None = None,
    models: Mapping[str, Model] = MODELS,
    gpu: Callable[[], AbstractContextManager[None]] = nullcontext,
    machine: Callable[[], AbstractContextManager[None]] | None = None,
) -> list[Encoder]:
    """One record for each variant of the row, in order. A variant that fails says so in its own.

    gpu, machine: where other processes measure too, what keeps them off the GPU, and off the whole
    machine.
    """
    layers = layers or row.layers
    model = models[row.model].cut(layers)
    facts: dict[str, dict[str, Any]] = {v: {} for v in row.variants}
    timer.forget()  # sizes seen in another row would make Dynamo's shapes dynamic
    try:
        with gpu():
            net, kwargs = build(model, timer.device), inputs(model, row.batch, timer.device)
            want = in_float32(net, kwargs)
    except Exception as error:  # noqa: BLE001 - recorded
        facts = {v: {"failed": reason(error)} for v in row.variants}
    else:
        calls: dict[str, Callable[[], Any]] = {}
        with compiling():
            for variant in row.variants:
                if limit and limit.passed:
                    facts[variant] = {"failed": LATE}
                    continue
                calls[variant], facts[variant] = _ready(variant, net, kwargs, want, timer)
                took = f"compiled in {facts[variant].get('compile_s', 0):.0f} s"
                said = facts[variant].get("failed", took)
                print(f"{row.model} x {row.batch} {variant}: {said}", file=sys.stderr, flush=True)
                if "failed" in facts[variant]:
                    del calls[variant]
                gc.collect()  # what a traceback held
            before = _counted("stats", "unique_graphs")
            with (machine or nullcontext)():
                times = interleaved(timer, calls, seconds)
            if _counted("stats", "unique_graphs") > before:
                print(f"{row.model} x {row.batch}: COMPILED AGAIN WHILE TIMED", file=sys.stderr)
        for variant, samples in times.items():
            if isinstance(samples, Exception):
                facts[variant] = {"failed": reason(samples)}
            else:
                facts[variant] |= _times(samples, timer)
                if machine:  # others compiled at the same time, or had stopped this process
                    facts[variant]["compile_s"] = None
        del calls
    timer.forget()
    more: dict[str, Any] = {"layers": layers, "threads": timer.threads}
    return [
        Encoder(row.model, row.batch, model.tokens, v, **more, **facts[v]) for v in row.variants
    ]


def failed(row: Row, why: str) -> list[Encoder]:
    """Records without numbers, one for each variant."""
    tokens = MODELS[row.model].tokens
    return [
        Encoder(row.model, row.batch, tokens, v, layers=row.layers, failed=why)
        for v in row.variants
    ]


@contextmanager
def compiling() -> Iterator[None]:
    """As every variant is compiled and called."""
    # variants are told apart by guards, so one row may compile one forward once for each
    with torch._dynamo.config.patch(recompile_limit=64), torch.inference_mode():
        yield


def _ready(
    variant: str, net: nn.Module, kwargs: dict[str, Tensor], want: Tensor, timer: Timer
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """A call of a variant that is compiled and has given a result, and what is known of it."""

    def call() -> Any:
        return prepared.run(**given)

    try:
        with settings_kept():
            prepared = prepare(variant, net)
            given = prepared.given(kwargs)
            timer.wait()
            hits, start = _counted("inductor", "fxgraph_cache_hit"), time.perf_counter()
            got = call()[0]
            timer.wait()
            took = time.perf_counter() - start
            if (mask := kwargs.get("attention_mask")) is not None:
                got, want = got[mask.bool()], want[mask.bool()]
            cosine, worst = cosines(got, want)
            del got
            peaks = [timer.peak(call) for _ in range(PEAK_CALLS)]
    except MissingError as error:
        return call, {"failed": f"{SKIPPED}{error}"}
    except Exception as error:  # noqa: BLE001 - recorded
        return call, {"failed": reason(error)}
    cached = True if _counted("inductor", "fxgraph_cache_hit") > hits else None
    facts: dict[str, Any] = {"cosine": cosine, "worst_cosine": worst, "cached": cached}
    facts["peak_bytes"] = max((p for p in peaks if p is not None), default=None)
    facts |= {"weight_bytes": weight_bytes(prepared), "compile_s": short(took)}
    if prepared.reports:
        report = Report.merge(prepared.reports)
        int8 = sum(o.int8 for o in report.linears)
        linears = len(report.linears)
        facts |= {"linears": linears, "int8": int8, "coverage": short(report.coverage)}
    return call, facts


def _times(samples: Sequence[Sample], timer: Timer) -> dict[str, Any]:
    facts: dict[str, Any] = {"spread": short(spread([s.ms for s in samples]))}
    for name in ("ms", "host_ms", "cpu_ms", "back_to_back_ms"):
        values = [v for s in samples if (v := getattr(s, name)) is not None]
        typical = min if timer.fastest else statistics.median
        facts[name] = short(typical(values)) if values else None
    return {**facts, "calls": len(samples)}


def _counted(kind: str, name: str) -> int:
    """By Dynamo, in this process."""
    return int(torch._dynamo.utils.counters[kind][name])


@torch.inference_mode()
def in_float32(net: nn.Module, kwargs: dict[str, Tensor]) -> Tensor:
    """The result [batch, tokens, hidden] of the same weights in float32, CHUNK inputs at a time."""
    wide = copy.deepcopy(net).float()
    parts = zip(*(v.split(CHUNK) for v in widened(kwargs).values()), strict=True)
    return torch.cat([wide(**dict(zip(kwargs, part, strict=True)))[0] for part in parts])


def cosines(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Of the whole tensors, and of the worst last dim. 0 where anything is not finite."""
    if got.shape != want.shape or not bool(got.isfinite().all()):
        return 0.0, 0.0
    got, want = got.float(), want.float()
    dot, a, b = (x.mul(y).sum(-1).double() for x, y in ((got, want), (got, got), (want, want)))
    whole = dot.sum() / (a.sum() * b.sum()).sqrt()
    worst = (dot / (a * b).sqrt().clamp(min=1e-30)).min()
    return round(float(whole), 6), round(float(worst), 6)
