"""How long graphquant takes to compile a model, step by step, without Inductor.

    python -m tools.compile_time                  the vision tower of SigLIP so400m, 27 layers
    python -m tools.compile_time vit --profile 15 a model of tools.zoo, with the costliest functions

    dynamo   torch.compile's own tracing, for comparison: graphquant has no part in it
    capture  Dynamo's graph to pre-dispatch ATen
    rewrite  normalise, recognise, all rules
    pack     weight expressions out of the graph, int8 weights computed

The model is never run: the compiled graph returns zeros in the shapes that the model would.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import platform
import pstats
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from graphquant.capture.aten import from_dynamo
from graphquant.config import Config
from graphquant.ir.captured import Captured
from graphquant.ir.graph import hint
from graphquant.passes.pipeline import rewrite
from graphquant.passes.prepack import prepack
from graphquant.report import Report
from graphquant.weights.packed import PackedInputs
from tools import zoo

TARGET_S = 15.0  # capture + rewrite + pack of SO400M on two slow CPU cores
STEPS = ("capture", "rewrite", "pack")

SO400M = zoo.hf(
    "siglip-so400m-27",
    "siglip:SiglipVisionConfig:SiglipVisionModel",
    {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "image_size": 378,  # 27 x 27 patches: 729 tokens
        "patch_size": 14,
    },
    zoo.image(378),
)


@dataclass
class Clock:
    """Seconds per step, and where they went if asked to profile.

    busy  CPU seconds of all threads: far below `seconds`, something else had the cores
    """

    profiling: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    busy: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    profiles: dict[str, cProfile.Profile] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        profile = self.profiles.setdefault(name, cProfile.Profile()) if self.profiling else None
        start, busy = time.perf_counter(), time.process_time()
        if profile:
            profile.enable()
        try:
            yield
        finally:
            if profile:
                profile.disable()
            self.seconds[name] += time.perf_counter() - start
            self.busy[name] += time.process_time() - busy


def measure(
    model: torch.nn.Module, inputs: zoo.Inputs, config: Config, *, profiling: bool = False
) -> tuple[Clock, Report]:
    """Compile one call of the model step by step. `Report.graphs` says how many graphs it has."""
    clock, reports = Clock(profiling), []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        with clock.step("capture"):
            captured = from_dynamo(gm, example_inputs)
        if captured is None:  # a graph of numbers only
            return gm.forward
        zeros = _zeros(captured)
        with clock.step("rewrite"):
            reports.append(rewrite(captured, config).report)
        with clock.step("pack"):
            _pack(captured, example_inputs)
        return zeros

    args, kwargs = inputs
    torch.compiler.reset()
    start = time.perf_counter()
    with torch.inference_mode():
        torch.compile(model, backend=backend)(*args, **kwargs)
    whole = time.perf_counter() - start
    clock.seconds["dynamo"] = whole - sum(clock.seconds[step] for step in STEPS)
    return clock, Report.merge(reports)


def _pack(captured: Captured, example_inputs: Sequence[Any]) -> None:
    """As the backend does it before it hands the graph over."""
    graph = captured.gm.graph
    given = graph.find_nodes(op="placeholder")
    index = {node: i for i, node in enumerate(given)}
    last = given[-1]

    def new_input(name: str) -> torch.fx.Node:
        nonlocal last
        with graph.inserting_after(last):
            last = graph.placeholder(name)
        return last

    packings = prepack(captured, new_input)
    jobs = [(p.recipe, tuple(index[r] for r in p.roots)) for p in packings]
    PackedInputs(jobs, [n.name for n in given].__getitem__)(example_inputs)


def _zeros(captured: Captured) -> Callable[..., Any]:
    """A function with the graph's results in shape, dtype and device, but not in value."""
    (end,) = captured.gm.graph.find_nodes(op="output")
    specs = tree_map(_spec, end.args[0])
    return lambda *_: tree_map(lambda s: s() if callable(s) else s, specs)


def _spec(node: Any) -> Any:
    value = node.meta["val"] if isinstance(node, torch.fx.Node) else node
    if isinstance(value, Tensor):
        size, dtype, device = [hint(s) for s in value.shape], value.dtype, value.device
        return lambda: torch.zeros(size, dtype=dtype, device=device)
    return hint(value) if isinstance(value, torch.SymInt) else value


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m tools.compile_time", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("model", nargs="?", default=SO400M.name, help=f"({SO400M.name})")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--device", default="cpu")
    p.add_argument("--profile", type=int, default=0, metavar="N", help="the N costliest functions")
    p.add_argument("--json", metavar="FILE")
    args = p.parse_args(argv)
    try:
        entry = SO400M if args.model == SO400M.name else zoo.load(args.model)
    except KeyError as unknown:
        print(f"{unknown.args[0]}, or {SO400M.name}", file=sys.stderr)
        return 2
    model = entry.build("sdpa").to(args.device)
    inputs = tree_map(
        lambda x: x.to(args.device) if isinstance(x, Tensor) else x, entry.inputs(args.batch)
    )
    clock, report = measure(model, inputs, Config(), profiling=args.profile > 0)
    _tell(entry.name, model, clock, report)
    for name, profile in clock.profiles.items():
        print(f"\n{name}, by the time inside each function and what it calls:")
        print(_top(profile, "cumulative", args.profile))
        print(f"{name}, by the time inside each function:")
        print(_top(profile, "tottime", args.profile))
    if args.json:
        result = {
            "model": entry.name,
            "seconds": dict(clock.seconds),
            "busy": dict(clock.busy),
            "graphs": report.graphs,
        }
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _tell(name: str, model: torch.nn.Module, clock: Clock, report: Report) -> None:
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"{name}: {size / 1e9:.2f} GB of weights, {len(report.linears)} linears, ", end="")
    print(f"{report.graphs} graph{'s' * (report.graphs != 1)}, {report.coverage:.1%} in int8")
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, ", end=""
    )
    print(f"torch {torch.__version__}, python {platform.python_version()}")
    print(f"{'dynamo':8} {clock.seconds['dynamo']:7.2f} s")
    for step in STEPS:
        print(f"{step:8} {clock.seconds[step]:7.2f} s, {clock.busy[step]:6.2f} s of CPU time")
    total = sum(clock.seconds[step] for step in STEPS)
    goal = ""
    if name == SO400M.name and not clock.profiling:
        goal = f", target {TARGET_S:.0f} s: {'met' if total < TARGET_S else 'MISSED'}"
    print(f"{'sum':8} {total:7.2f} s without dynamo{goal}")


def _top(profile: cProfile.Profile, key: str, count: int) -> str:
    page = io.StringIO()
    pstats.Stats(profile, stream=page).sort_stats(key).print_stats(count)
    lines = page.getvalue().splitlines()
    start = next(i for i, line in enumerate(lines) if "ncalls" in line)
    return "\n".join(line for line in lines[start:] if line.strip())


if __name__ == "__main__":
    sys.exit(main())
