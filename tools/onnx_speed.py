"""How fast ONNX files of int8 encoders are in onnxruntime on this CPU, against float32's.

    python -m tools.onnx_speed vit-b-16 --batch 8
    python -m tools.onnx_speed bert-base-128 --layers 4 --profiles cpu portable --threads 2

Models are those of tools.bench, with random weights, from float32. All files run in turn, round
after round, and a speed-up is the median over the rounds of float32's time by the file's: what
else the machine does falls on both. "CPU" counts the processor's time of all threads, which
neighbors hardly change, "wall" the clock's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import graphquant
import graphquant.onnx
from graphquant.metrics import Error
from tools.bench.models import MODELS, build, inputs

FLOAT = "float32"


def session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # threads that spin while they wait would count as busy
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options)


def files(
    model: torch.nn.Module, feed: dict[str, torch.Tensor], profiles: Sequence[str], folder: Path
) -> dict[str, Path]:
    """The model as ONNX files, by name."""
    paths = {name: folder / f"{name}.onnx" for name in (FLOAT, *profiles)}
    torch.onnx.export(
        torch.export.export(model, (), feed), f=paths[FLOAT], dynamo=True, verbose=False
    )
    program = graphquant.export(model, (), feed)
    for name in profiles:
        profile, _, bits = name.partition("-")
        graphquant.onnx.save(program, paths[name], profile=profile, weight_bits=int(bits or 8))
    return paths


def measure(sessions: dict[str, Any], feed: dict[str, Any], rounds: int) -> dict[str, list[Any]]:
    """[(seconds, seconds of CPU time)] of each, a pair for each round."""
    times: dict[str, list[Any]] = {name: [] for name in sessions}
    for _ in range(rounds):
        for name, each in sessions.items():
            wall, busy = time.perf_counter(), time.process_time()
            each.run(None, feed)
            times[name].append((time.perf_counter() - wall, time.process_time() - busy))
    return times


def size(path: Path) -> int:
    """With weights that stand in a file of their own."""
    return sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*"))


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m tools.onnx_speed", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("model", nargs="?", default="vit-b-16", choices=MODELS)
    p.add_argument("--profiles", nargs="+", default=["cpu", "cpu-7", "portable"], metavar="P")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--layers", type=int, help="fewer than the model has")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--rounds", type=int, default=9)
    args = p.parse_args(argv)

    chosen = MODELS[args.model].cut(args.layers)
    model = build(chosen, "cpu").float()
    feed = inputs(chosen, args.batch, "cpu")
    feed = {k: v.float() if v.is_floating_point() else v for k, v in feed.items()}
    arrays = {k: v.numpy() for k, v in feed.items()}
    with tempfile.TemporaryDirectory() as folder:
        paths = files(model, feed, args.profiles, Path(folder))
        sizes = {name: size(path) for name, path in paths.items()}
        sessions = {name: session(path, args.threads) for name, path in paths.items()}
        results = {name: each.run(None, arrays)[0] for name, each in sessions.items()}
        times = measure(sessions, arrays, args.rounds)

    print(f"{args.model}, batch {args.batch} x {chosen.tokens} tokens, {args.threads} threads")
    print(f"{'file':10}{'MB':>8}{'ms':>9}{'wall':>8}{'CPU':>8}{'cosine':>10}")
    for name, each in times.items():
        wall, busy = (
            median(f[i] / t[i] for f, t in zip(times[FLOAT], each, strict=True)) for i in (0, 1)
        )
        ms = 1e3 * median(t[0] for t in each)
        near = Error.of(*(torch.from_numpy(results[n]) for n in (name, FLOAT))).cosine
        print(f"{name:10}{sizes[name] / 1e6:8.1f}{ms:9.1f}{wall:7.2f}x{busy:7.2f}x{near:10.5f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
