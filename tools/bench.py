"""How fast whole encoders run, beside what one would use instead.

    python -m tools.bench siglip-so400m --batch 8 64 --variants bf16-default graphquant

All variants of a model run in one process, on the same random bfloat16 weights and inputs, in turn
(A B C A B C ...), for `--seconds` each; the median of CUDA event times counts, and ratios are
within one run. A variant whose cosine to the eager model is under 0.999 gets no speed-up printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

MIN_COSINE = 0.999


@dataclass(frozen=True)
class Model:
    """A published encoder's dimensions. tokens: of one image or text."""

    config: str
    cls: str
    sizes: dict[str, Any]
    tokens: int


def _vit(hidden: int, mlp: int, layers: int, heads: int, image: int, patch: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image,
        "patch_size": patch,
    }


def _bert(tokens: int) -> Model:
    return Model("BertConfig", "BertModel", {"max_position_embeddings": 512}, tokens)


_DINOV2_L = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_INTERN = {"image_size": [448, 448], "patch_size": [14, 14]}

MODELS = {
    "siglip-so400m": Model(
        "SiglipVisionConfig", "SiglipVisionModel", _vit(1152, 4304, 27, 16, 378, 14), 729
    ),
    "clip-l-336": Model(
        "CLIPVisionConfig", "CLIPVisionModel", _vit(1024, 4096, 24, 16, 336, 14), 577
    ),
    "internvit-300m": Model(
        "InternVLVisionConfig",
        "InternVLVisionModel",
        {**_vit(1024, 4096, 24, 16, 448, 14), **_INTERN},
        1025,
    ),
    "vit-b-16": Model("ViTConfig", "ViTModel", _vit(768, 3072, 12, 12, 224, 16), 197),
    "bert-base-128": _bert(128),
    "bert-base-512": _bert(512),
    "dinov2-l": Model(
        "Dinov2Config", "Dinov2Model", {**_DINOV2_L, "image_size": 224, "patch_size": 14}, 257
    ),
}

VARIANTS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "bf16-default": {},
    "bf16-max-autotune": {"mode": "max-autotune-no-cudagraphs"},
    "bf16-reduce-overhead": {"mode": "reduce-overhead"},
    "graphquant": {"backend": "graphquant"},
    "graphquant-reduce-overhead": {"backend": "graphquant", "mode": "reduce-overhead"},
}


@dataclass(frozen=True)
class Record:
    model: str
    batch: int
    tokens: int
    variant: str
    ms: float
    cosine: float
    peak_bytes: int
    compile_s: float


def build(model: Model, device: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, model.config)(**model.sizes)
    with torch.device(device):
        built: nn.Module = getattr(transformers, model.cls)(config)
    return built.to(torch.bfloat16).eval()


def inputs(name: str, model: Model, batch: int, device: str) -> dict[str, Tensor]:
    random = torch.Generator(device).manual_seed(batch)
    if name.startswith("bert"):
        size = (batch, model.tokens)
        return {"input_ids": torch.randint(0, 30_000, size, device=device, generator=random)}
    side = model.sizes["image_size"]
    side = side if isinstance(side, int) else side[0]
    pixels = torch.randn(batch, 3, side, side, device=device, generator=random)
    return {"pixel_values": pixels.to(torch.bfloat16)}


@torch.inference_mode()
def run(name: str, batch: int, variants: list[str], seconds: float, device: str) -> list[Record]:
    model = MODELS[name]
    eager, kwargs = build(model, device), inputs(name, model, batch, device)
    want = eager(**kwargs)[0].double().flatten()
    calls: dict[str, Callable[[], Any]] = {}
    facts: dict[str, tuple[float, int, float]] = {}
    for variant in variants:
        options = VARIANTS[variant]
        torch._dynamo.reset()
        compiled = eager if options is None else torch.compile(eager, fullgraph=True, **options)
        call = calls[variant] = lambda compiled=compiled: compiled(**kwargs)
        start = time.perf_counter()
        got = call()[0].double().flatten()
        call(), call()  # CUDA graphs warm up, then record
        torch.cuda.synchronize()
        took = time.perf_counter() - start
        torch.cuda.reset_peak_memory_stats()
        call()
        cosine = float(torch.nn.functional.cosine_similarity(got, want, 0))
        facts[variant] = cosine, torch.cuda.max_memory_allocated(), took
        print(f"{name} x {batch} {variant}: compiled in {took:.0f} s", file=sys.stderr, flush=True)
    times = _interleaved(calls, seconds)
    return [
        Record(name, batch, model.tokens, v, statistics.median(times[v]), c, peak, took)
        for v, (c, peak, took) in facts.items()
    ]


def _interleaved(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every call, in rounds, until each variant has run for `seconds`."""
    times: dict[str, list[float]] = {v: [] for v in calls}
    while min(sum(t) for t in times.values()) < 1000 * seconds:
        for variant, call in calls.items():
            call()  # what another variant left in the caches is not its fault
            for _ in range(5):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                times[variant].append(start.elapsed_time(end))
    return times


def show(records: list[Record]) -> Table:
    """Speed-ups are against the first variant named."""
    table = Table(title="median of CUDA event times; ratios within one run")
    for column in (
        "model",
        "batch",
        "variant",
        "ms",
        "speed-up",
        "cosine",
        "peak MiB",
        "compile s",
    ):
        table.add_column(column, justify="left" if column in ("model", "variant") else "right")
    base: dict[tuple[str, int], float] = {}
    for r in records:
        against = base.setdefault((r.model, r.batch), r.ms)
        ratio = f"{against / r.ms:.2f}" if r.cosine >= MIN_COSINE else "-"
        table.add_row(
            r.model, str(r.batch), r.variant, f"{r.ms:.3f}", ratio, f"{r.cosine:.5f}",
            f"{r.peak_bytes / 2**20:.0f}", f"{r.compile_s:.0f}",
        )  # fmt: skip
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("models", nargs="*", default=["siglip-so400m"], metavar="MODEL")
    parser.add_argument("--batch", nargs="+", type=int, default=[8])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each variant")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if unknown := [m for m in args.models if m not in MODELS]:
        parser.error(f"no model {', '.join(unknown)}: there are {', '.join(MODELS)}")
    if not torch.cuda.is_available():
        print("NOTHING WAS TIMED: torch sees no NVIDIA GPU on this machine", file=sys.stderr)
        return 3
    machine = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    records: list[Record] = []
    for name in args.models:
        for batch in args.batch:
            new = run(name, batch, args.variants, args.seconds, "cuda")
            records += new
            Console(width=120).print(show(new))
            if args.json:  # after each, so that an interrupted run leaves what it has
                data = {**machine, "records": [asdict(r) for r in records]}
                args.json.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
