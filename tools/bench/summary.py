"""The page of encoders: one line and one bar for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from tools.bench.encoders import ENCODERS
from tools.bench.models import MODELS
from tools.bench.records import MIN_COSINE, Encoder, Line, Run, latest
from tools.bench.write import COLORS, NONE, markdown, mib, milliseconds, number

TEMPLATE = Path(__file__).with_name("encoders.template.md")
NAMES = {
    "siglip-so400m": "SigLIP and SigLIP 2 so400m/14, 378 px",
    "clip-l-336": "CLIP ViT-L/14, 336 px",
    "internvit-300m": "InternViT-300M, 448 px",
    "internvit-6b": "InternViT-6B, 448 px",
    "dinov2-l": "DINOv2-L/14, 224 px",
    "dinov3-l": "DINOv3-L/16, 224 px",
    "sam-vit-b": "SAM ViT-B, 1024 px",
    "vit-b-16": "ViT-B/16, 224 px",
    "beit-b": "BEiT-B/16, 224 px",
    "swin-b": "Swin-B, 224 px",
    "deit-tiny": "DeiT-tiny, 224 px",
    "whisper-large-v3": "Whisper-large-v3, encoder",
    "bert-base": "BERT-base",
    "minilm-l6-256": "MiniLM-L6",
    "bge-large": "BGE-large",
    "e5-large": "multilingual-E5-large",
    "xlm-r-base": "XLM-RoBERTa-base",
    "mpnet-base": "MPNet-base",
    "modernbert-base": "ModernBERT-base",
    "t5-large": "T5-large, encoder",
}
COLUMNS = (
    *("encoder", "batch x tokens", "bfloat16 ms", "int8 ms", "speed-up", "back to back", "cosine"),
    *("batch 1: bfloat16 ms", "int8 ms", "speed-up", "back to back", "weights MiB", "activations"),
)


@dataclass(frozen=True)
class Pair:
    """graphquant and the fastest bfloat16 variant of the same run."""

    line: Line
    base: Encoder

    @property
    def int8(self) -> Encoder:
        found: Encoder = self.line.record
        return found

    def speedup(self, clock: str = "ms") -> float | None:
        return self.line.run.speedup(self.int8, clock)

    def told(self, clock: str = "ms") -> str:
        ratio = self.speedup(clock)
        return NONE if ratio is None else f"{ratio:.2f}x"


def encoders(runs: Sequence[Run]) -> Iterator[tuple[str, Pair | None, Pair | None]]:
    """(model, the pair at its batch, the pair at batch 1) of each encoder that was measured."""
    lines = latest([r for r in runs if not r.machine], "encoders")
    for model, batch, layers in ENCODERS:
        large = _pair(lines, (model, batch, layers, None), "graphquant")
        single = _pair(lines, (model, 1, layers, None), "graphquant-reduce-overhead")
        if large or single:
            yield model, large, single


def _pair(lines: Sequence[Line], row: tuple[object, ...], variant: str) -> Pair | None:
    for line in lines:
        if line.record.row == row and line.record.variant == variant and not line.record.failed:
            base = line.run.baseline(row)
            return Pair(line, base) if base else None
    return None


def page(runs: Sequence[Run], chart: str | None = None) -> str | None:
    """encoders.md, or None if no encoder of it was measured."""
    found = list(encoders(runs))
    if not found:
        return None
    used = {p.line.number: p.line.run for _, *pairs in found for p in pairs if p}
    commands = "\n".join(f"- {_said(run)}" for _, run in sorted(used.items()))
    sides = ["---", *["---:"] * (len(COLUMNS) - 1)]
    return Template(TEMPLATE.read_text()).substitute(
        picture=f"![speed-ups of encoders over bfloat16]({chart})\n\n" if chart else "",
        table=markdown([COLUMNS, sides, *(_row(*one) for one in found)]),
        commands=commands,
        min_cosine=MIN_COSINE,
    )


def _said(run: Run) -> str:
    card, torch, date, command = (
        run.header.get(k, NONE) for k in ("card", "torch", "date", "command")
    )
    return f"{card}, torch {torch}, {date}: `{command}`"


def _row(model: str, large: Pair | None, single: Pair | None) -> list[str]:
    name = _name(model)
    some = large or single
    assert some is not None
    return [
        name,
        f"{some.int8.batch} x {some.int8.tokens}" if large else NONE,
        *_times(large),
        number(".5f", some.int8.cosine),
        *_times(single),
        f"{mib(some.base.weight_bytes)} to {mib(some.int8.weight_bytes)}",
        f"{mib(some.base.peak_bytes)} to {mib(some.int8.peak_bytes)}",
    ]


def _name(model: str) -> str:
    layers = next(n for name, _, n in ENCODERS if name == model)
    return NAMES[model] + (f", {layers} of {_depth(model)} layers" if layers else "")


def _depth(model: str) -> int:
    return int(getattr(MODELS[model].settings, MODELS[model].layers))


def _times(pair: Pair | None) -> list[str]:
    if pair is None:
        return [NONE] * 4
    base, int8 = pair.base.ms, pair.int8.ms
    return [
        milliseconds(base),
        milliseconds(int8),
        pair.told(),
        pair.told("back_to_back_ms"),
    ]


def draw(runs: Sequence[Run], file: Path) -> bool:
    """A bar for each encoder at its batch, and a mark for batch 1. Needs matplotlib."""
    from matplotlib.figure import Figure

    found = [
        (_name(model), large and large.speedup(), single and single.speedup())
        for model, large, single in encoders(runs)
    ]
    if not found:
        return False
    figure = Figure(figsize=(9, 1.2 + 0.32 * len(found)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(
        range(len(found)),
        [large or 0 for _, large, _ in found],
        color=COLORS["graphquant"],
        label="the table's batch",
    )
    axes.bar_label(bars, [f"{n:.2f}x" if n else "" for _, n, _ in found], padding=3, fontsize=8)
    marks = [(n, i) for i, (_, _, n) in enumerate(found) if n]
    at, rows = [n for n, _ in marks], [i for _, i in marks]
    axes.plot(at, rows, "D", color=COLORS["torchao-int8"], label="batch 1, CUDA graphs")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(found)), [name for name, *_ in found], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.01)
    axes.set_xlabel("speed-up over the fastest bfloat16 variant of the same run (single calls)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, metadata={"Software": None})
    return True


def write(runs: Sequence[Run], folder: Path) -> list[Path]:
    """encoders.md and encoders.png in this folder, if there is something to tell."""
    chart = folder / "encoders.png"
    text = page(runs, chart.name if draw(runs, chart) else None)
    if text is None:
        return []
    (folder / "encoders.md").write_text(text)
    return [folder / "encoders.md", chart]
