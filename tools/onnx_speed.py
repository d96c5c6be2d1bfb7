"""How fast exports of int8 encoders are on this CPU, against float32's.

    python -m tools.onnx_speed vit-b-16 --batch 8
    python -m tools.onnx_speed bert-base-128 --layers 4 --profiles cpu portable --threads 2
    python -m tools.onnx_speed bert-base-128 --layers 4 --tokens 32 --batch 1 --threads 1 --exits

Models are those of tools.bench, with random weights, from float32. ONNX files run in onnxruntime,
`--exits` adds what runs in torch. All run in turn, round after round, and a speed-up is the median
over the rounds of float32's time in onnxruntime by the other's: what else the machine does falls on
both. "CPU" counts the processor's time of all threads, which neighbors hardly change, "wall" the
clock's; "ms" is the median, "best" the least.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import graphquant
import graphquant.onnx
from graphquant.exporters.standalone import PRODUCTS
from graphquant.metrics import Error
from tools.bench.models import MODELS, build, inputs

FLOAT, DYNAMIC = "float32", "dynamic"
Run = Callable[[], Any]  # its first tensor is compared


def session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # threads that spin while they wait would count as busy
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options)


def files(
    model: torch.nn.Module, feed: dict[str, Tensor], names: Sequence[str], folder: Path
) -> dict[str, Path]:
    """The model as ONNX files, by name: a profile and its bits, or DYNAMIC for onnxruntime's own
    dynamic quantization of the float32 file."""
    paths = {name: folder / f"{name}.onnx" for name in (FLOAT, *names)}
    torch.onnx.export(
        torch.export.export(model, (), feed), f=paths[FLOAT], dynamo=True, verbose=False
    )
    program = graphquant.export(model, (), feed)
    for name in names:
        if name == DYNAMIC:
            from onnxruntime.quantization import quantize_dynamic

            quantize_dynamic(paths[FLOAT], paths[name])
            continue
        profile, _, bits = name.partition("-")
        graphquant.onnx.save(program, paths[name], profile=profile, weight_bits=int(bits or 8))
    return paths


def exits(model: torch.nn.Module, feed: dict[str, Tensor], folder: Path) -> dict[str, Run]:
    """What runs in torch, by name."""
    program = graphquant.export(model, (), feed)
    alone = {how: graphquant.standalone(program, products=how) for how in PRODUCTS}

    def package(name: str, program: torch.export.ExportedProgram) -> Callable[..., Any]:
        path = str(folder / f"{name}.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        run: Callable[..., Any] = torch._inductor.aoti_load_package(path)
        return run

    made: dict[str, Callable[..., Any]] = {
        "torch.compile, float32": torch.compile(model),
        "torch.compile, graphquant": torch.compile(model, backend="graphquant"),
        "program": program.module(),
        "program, torch.compile": torch.compile(program.module()),
        "program, AOTInductor": package("program", program),
        "torchscript": graphquant.torchscript(program),
    }
    for how, each in alone.items():
        made[f"standalone {how}"] = each.module()
        made[f"standalone {how}, AOTInductor"] = package(how, each)
    return {name: partial(run, **feed) for name, run in made.items()}


def measure(runs: Mapping[str, Run], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """[(seconds, seconds of CPU time)] of each, a pair for each round."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            wall, busy = time.perf_counter(), time.process_time()
            run()
            times[name].append((time.perf_counter() - wall, time.process_time() - busy))
    return times


def size(path: Path) -> int:
    """With weights that stand in a file of their own."""
    return sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*"))


def first(result: Any) -> Tensor:
    """The first tensor of a result."""
    return torch.as_tensor(tree_leaves(result)[0])


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m tools.onnx_speed", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("model", nargs="?", default="vit-b-16", choices=MODELS)
    p.add_argument(
        "--profiles",
        nargs="+",
        default=["cpu", "cpu-7", "portable"],
        metavar="P",
        help=f"profiles of graphquant.onnx.save, or {DYNAMIC}: onnxruntime's quantize_dynamic",
    )
    p.add_argument("--exits", action="store_true", help="also what runs in torch")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--tokens", type=int, help="of a text, instead of the model's")
    p.add_argument("--layers", type=int, help="fewer than the model has")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--rounds", type=int, default=9)
    args = p.parse_args(argv)

    chosen = MODELS[args.model].cut(args.layers)
    chosen = replace(chosen, tokens=args.tokens or chosen.tokens)
    torch.set_num_threads(args.threads)
    model = build(chosen, "cpu").float()
    feed = inputs(chosen, args.batch, "cpu")
    feed = {k: v.float() if v.is_floating_point() else v for k, v in feed.items()}
    arrays = {k: v.numpy() for k, v in feed.items()}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        paths = files(model, feed, args.profiles, Path(folder))
        sizes = {name: size(path) for name, path in paths.items()}
        runs: dict[str, Run] = {
            name: partial(session(path, args.threads).run, None, arrays)
            for name, path in paths.items()
        }
        if args.exits:
            runs |= exits(model, feed, Path(folder))
        results = {name: first(run()) for name, run in runs.items()}
        times = measure(runs, args.rounds)

    print(f"{args.model}, batch {args.batch} x {chosen.tokens} tokens, {args.threads} threads")
    print(f"{'':34}{'MB':>8}{'ms':>9}{'best':>9}{'wall':>8}{'CPU':>8}{'cosine':>10}")
    for name, each in times.items():
        wall, busy = (
            median(f[i] / t[i] for f, t in zip(times[FLOAT], each, strict=True)) for i in (0, 1)
        )
        ms, best = (1e3 * of(t[0] for t in each) for of in (median, min))
        near = Error.of(results[name], results[FLOAT]).cosine
        mb = f"{sizes[name] / 1e6:8.1f}" if name in sizes else 8 * " "
        print(f"{name:34}{mb}{ms:9.1f}{best:9.2f}{wall:7.2f}x{busy:7.2f}x{near:10.5f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
