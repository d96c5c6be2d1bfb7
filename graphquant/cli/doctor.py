"""This machine, which kernels run on it and why others do not: paste it into a bug report.

    python -m graphquant doctor
    python -m graphquant doctor --json doctor.json

Versions, processor and GPU; the CPU kernels, which it builds if need be; each op's kernels, run on
this CPU and this GPU and compared with the op's reference; a small encoder layer compiled in int8,
on the CPU with its time; the caches with their sizes; the environment variables of graphquant,
Inductor and Triton. No paths are printed but those of the caches.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

import graphquant
from graphquant._torch import TorchDispatchMode, inductor_cache_dir, tree_map
from graphquant.backend import graphquant as backend
from graphquant.cli.arguments import add_output, page, write_json
from graphquant.errors import KernelBuildError
from graphquant.exporters.program import unpack_weights
from graphquant.metrics import Error
from graphquant.ops import OPS, cpu, pack_weight, token_index
from graphquant.ops.attention.hopper_tiles import TILES
from graphquant.ops.cpu import ISA_VARIABLE
from graphquant.ops.define import Kernel, Op, load_cpu_kernels
from graphquant.ops.define import missing as missing_kernels
from graphquant.ops.runtime import build, cache, nvrtc
from graphquant.ops.runtime.chips import OLDEST, RAN, never_ran, slow_int8
from graphquant.ops.runtime.device import gpu_properties, processor
from graphquant.passes.notes import without_kernels
from graphquant.passes.policy.speed import slow_on_cpu

PACKAGES = (
    "torch", "triton", "transformers", "numpy", "safetensors", "onnx", "onnxruntime", "peft",
    "torchao", "torch-tensorrt",
)  # fmt: skip
VARIABLES = ("GRAPHQUANT_", "TORCHINDUCTOR_", "TRITON_", "TORCH_LOGS", "CUDA_VISIBLE_DEVICES")
INT8_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")  # of /proc/cpuinfo
NO_GPU = "no NVIDIA GPU"
NOT_TRIED = "not tried"
RUNS = "runs"
WIDTH, TOKENS, HEADS = 128, 64, 2  # of the layer that is compiled
WIDE, ROUNDS = 512, 7  # width and tokens of the layer that is timed
CLOSE = 2e-2  # of the largest value: kernels sum in another order than the reference


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--no-trial", action="store_true", help="compile nothing, run no kernel")
    add_output(p, 120)


def run(args: argparse.Namespace) -> int:
    """Print the report. Returns 1 if a kernel or the layer failed, else 0."""
    found = examine(trial=not args.no_trial)
    with page(args) as console:
        for title, facts in found.items():
            table = Table(title=title, title_justify="left", show_header=False, min_width=60)
            table.add_column(no_wrap=True)
            table.add_column(overflow="fold")
            for name, value in facts.items():
                table.add_row(escape(name), escape(value))
            console.print(table)
    write_json(args, json.dumps(found, indent=2))
    tried = (text for facts in found.values() for text in facts.values())
    return int(any(text.startswith(("FAILS", "WRONG")) for text in tried))


def examine(*, trial: bool = True) -> dict[str, dict[str, str]]:
    """Tables of facts, by title. trial: also run kernels and compile a layer."""
    found = {"machine": environment() | _builds(), "CPU kernels": cpu_library(trial=trial)}
    found["ops on the CPU"] = cpu_kernels(trial=trial)
    found["kernels"] = kernels(trial=trial)
    if trial:
        found["a layer in int8"] = {d: _compiled(d) for d in _devices()} | {"cpu, time": _timed()}
    found["caches"] = {_at_home(p): size for p, size in caches()}
    found["variables"] = {n: _shown(v) for n, v in sorted(os.environ.items()) if _counts(n)}
    return found


def _at_home(place: Path) -> str:
    return str(place).replace(str(Path.home()), "~", 1)


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


# --- the machine ----------------------------------------------------------------------------------


def environment(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions, processor and GPU."""
    found = {"graphquant": graphquant.__version__, "python": platform.python_version()}
    found["system"] = platform.platform()
    found |= {name: version(name) for name in packages}
    found["torch"] = torch.__version__  # with the CUDA build, which the package's metadata may lack
    found["processor"] = f"{processor()}, {os.cpu_count()} threads"
    found["device"] = _device()
    found["driver"] = _driver()
    return found | _of_gpus()


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device() -> str:
    if not torch.cuda.is_available():
        return NO_GPU
    names = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        names.append(f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")
    return f"{', '.join(names)}; CUDA {torch.version.cuda}"


def _of_gpus() -> dict[str, str]:
    """What is known of each kind of GPU here (docs/hardware.md)."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    found = {}
    for sm in sorted({gpu_properties(torch.device("cuda", i)).sm for i in devices}):
        if sm >= OLDEST:
            why = slow_int8(sm)
            expected = "" if why is None else f", and rarely the faster one: {why}"
            found[f"int8 on sm_{sm}"] = f"is measured{expected}"
        found[f"kernels on sm_{sm}"] = never_ran(sm) or f"all tests have run on {RAN[sm]}"
    return found


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "none found (no nvidia-smi)"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    asked = subprocess.run(command, capture_output=True, text=True)
    answer = asked.stdout.strip().splitlines()
    return answer[0] if asked.returncode == 0 and answer else "nvidia-smi does not answer"


def _builds() -> dict[str, str]:
    """Instruction sets and compilers for the processor and the GPU."""
    int8 = [n for n in INT8_FLAGS if n in _flags()]
    compilers = [n for n in ("g++", "clang++", "gcc", "clang") if shutil.which(n)]
    return {
        "int8 instructions": ", ".join(int8) or "none known",
        "torch for the CPU": torch.backends.cpu.get_cpu_capability(),
        "threads of torch": str(torch.get_num_threads()),
        "C and C++ compilers": ", ".join(compilers) or "none: Inductor needs one",
        "NVRTC": why if (why := nvrtc.missing()) else ".".join(map(str, nvrtc.version())),
    }


def _flags() -> frozenset[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(flags, "").split())


# --- kernels on the CPU ---------------------------------------------------------------------------


def cpu_library(*, trial: bool = True) -> dict[str, str]:
    """The CPU kernels: the instruction set that they are for, better ones, compiler and file.
    trial: build them."""
    found = {"compiler": _compiler()}
    if not trial:
        return found | {"kernels": NOT_TRIED}
    start = time.perf_counter()
    if (why := cpu.missing()) is not None:
        found |= {"kernels": f"none: {why}", "instead": without_kernels()}
    else:
        library = cpu.library()
        took = time.perf_counter() - start
        found["kernels"] = f"for {library.isa.name}, ready in {took:.1f} s"
        found |= _better(library.isa)
        file = Path(str(library.module.__file__))
        found["cached"] = _at_home(file) if file.exists() else "no: every process builds them"
    slow = slow_on_cpu()
    found["int8"] = f'{slow}: int8 stays float unless select="always"' if slow else "is measured"
    return found


def _compiler() -> str:
    try:
        command = build.compiler(build.CPP, "graphquant's CPU kernels")
        asked = subprocess.run([*command, "--version"], capture_output=True, text=True)
    except (KernelBuildError, OSError) as why:
        return f"none: {why}"
    first = next(iter(asked.stdout.splitlines()), "")
    return f"{Path(command[0]).name}: {first or 'does not say its version'}"


def _better(used: cpu.InstructionSet) -> dict[str, str]:
    """Why each better instruction set is not used."""
    named = os.environ.get(ISA_VARIABLE)
    found = {}
    for isa in cpu.INSTRUCTION_SETS[: cpu.INSTRUCTION_SETS.index(used)]:
        if isa.missing:
            why = f"the processor lacks {', '.join(isa.missing)}"
        elif named:
            why = f"{ISA_VARIABLE} asks for {named}"
        else:
            why = "its kernels cannot be built here, or are wrong"
        found[f"not {isa.name}"] = why
    return found


def cpu_kernels(*, trial: bool = True) -> dict[str, str]:
    """ "op: kernel" -> "runs", or why it does not. trial: run them."""
    load_cpu_kernels()
    tried = {
        f"{op.name}: {kernel.name}": (op, kernel)
        for op in OPS.values()
        if op.has_cpu_kernel
        for kernel in (Kernel("cpu", op, op.cpu_refusal), *op.torch_kernels)
    }
    if not trial:
        return dict.fromkeys(tried, NOT_TRIED)
    calls = _calls("cpu")
    found = {n: _tried(op, kernel, calls.get(op.name)) for n, (op, kernel) in tried.items()}
    if cpu.missing() is None:
        xq, x_scale, x_shift, wq, *rest = calls["int8_linear"]
        args = (xq, x_scale, x_shift, pack_weight(wq), *rest)
        op, kernel = tried["int8_linear: cpu"]
        found["int8_linear: cpu, packed weight"] = _tried(op, kernel, args)
    return found


# --- kernels on the GPU ---------------------------------------------------------------------------


def kernels(*, trial: bool = True) -> dict[str, str]:
    """ "op: kernel" -> "runs", or why it does not. trial: run them."""
    why = NO_GPU if not torch.cuda.is_available() else missing_kernels()
    if why is None and not trial:
        why = NOT_TRIED
    if why is not None:
        names = (f"{op.name}: {file}" for op in OPS.values() for file in op.files)
        return dict.fromkeys(names, why)
    calls = _calls("cuda")
    return {
        f"{op.name}: {kernel.name}": _tried(op, kernel, calls.get(op.name))
        for op in OPS.values()
        for kernel in op.kernels
    }


def _tried(op: Op, kernel: Kernel, args: Sequence[Any] | None) -> str:
    if args is None:
        return "not tried: the layer does not call it"
    if (why := kernel.refuses(*args)) is not None:
        return why
    try:
        got, want = kernel.fn(*args), op.reference(*args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - reported in its row
        return _fails(error)
    pairs = zip(_tensors(got), _tensors(want), strict=True)
    return RUNS if all(_close(g, w) for g, w in pairs) else "WRONG: differs from the reference"


def _tensors(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _close(got: Tensor, want: Tensor) -> bool:
    if got.shape != want.shape:
        return False
    got, want = got.double(), want.double()
    most = 1.0 if got.dtype == torch.int8 else CLOSE * float(want.abs().max())
    return float((got - want).abs().max()) <= most


def _fails(error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"FAILS: {type(error).__name__}: {first}"


class _Layer(nn.Module):
    """A layer that uses every op of graphquant: both norms, attention, a plain and a gated MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (
            linear(y).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        x = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        y = self.rms(x)
        mixed: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return mixed


def _layer(device: str, width: int = WIDTH, tokens: int = TOKENS) -> tuple[nn.Module, Tensor]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, x = _Layer(width).eval().requires_grad_(False), torch.randn(2, tokens, width)
    return model.to(device, dtype), x.to(device, dtype)


class _Calls(TorchDispatchMode):
    """Records the arguments of the first call of each op of graphquant."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.args: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "graphquant":
            name = func._schema.name.partition("::")[2]
            self.args.setdefault(name, OPS[name].full(args))
        return func(*args, **(kwargs or {}))


def _calls(device: str) -> dict[str, tuple[Any, ...]]:
    """Arguments of one call of each op, on this device, as the layer calls them, or would."""
    model, x = _layer(device)
    program = unpack_weights(graphquant.export(model.cpu(), (x.cpu(),), select="always"))
    with torch.no_grad(), _Calls() as calls:
        program.module()(x.cpu())
    heads = [torch.randn(1, HEADS, TOKENS, 64, dtype=x.dtype) for _ in range(3)]
    calls.args.setdefault("attention", (*heads, 64**-0.5, next(iter(TILES))))
    valid = torch.ones(1, TOKENS, dtype=torch.bool)
    calls.args.setdefault("token_index", (valid, True))
    _, _, position, cu_seqlens, tiles, _ = token_index(valid)
    packed = (*heads, cu_seqlens, position, tiles, 64**-0.5, TOKENS)
    calls.args.setdefault("varlen_attention", OPS["varlen_attention"].full(packed))
    norm, linear = calls.args["norm_quantize"], calls.args["int8_linear"]
    calls.args.setdefault("norm_quantize_keep", (*norm[:5], x.dtype, *norm[5:]))
    calls.args.setdefault("pack_weight", (linear[3],))
    found: dict[str, tuple[Any, ...]] = tree_map(
        lambda a: a.to(device) if isinstance(a, Tensor) else a, calls.args
    )
    return found


def _compiled(device: str) -> str:
    """Coverage and error of the layer compiled in int8, or how that failed."""
    model, x = _layer(device)
    reports: list[graphquant.Report] = []
    options: dict[str, Any] = {"select": "always", "on_report": reports.append}
    start = time.perf_counter()
    try:
        with torch.inference_mode():
            want = model.float()(x.float()) if device == "cpu" else model(x)
            got = torch.compile(model, backend=backend, options=options)(x)
    except Exception as error:  # noqa: BLE001 - reported in its row
        return _fails(error)
    took = time.perf_counter() - start
    report = graphquant.Report.merge(reports)
    relative = Error.of(got, want).relative
    verdict = "" if relative < 0.1 else "WRONG: "  # also for nan
    return (
        f"{verdict}{report.coverage:.0%} of the linears' FLOPs, relative error {relative:.2g}, "
        f"{took:.1f} s to compile and run"
    )


def _timed() -> str:
    """Time of the layer on the CPU in float and in int8, both compiled."""
    model, x = _layer("cpu", WIDE, WIDE // 2)
    try:
        with torch.inference_mode():
            float_ms, int8_ms = _milliseconds(
                torch.compile(copy.deepcopy(model)),
                torch.compile(model, backend=backend, options={"select": "always"}),
                x,
            )
    except Exception as error:  # noqa: BLE001 - reported in its row
        return _fails(error)
    shape = f"{tuple(x.shape)}, {torch.get_num_threads()} threads"
    return (
        f"float {float_ms:.2f} ms, int8 {int8_ms:.2f} ms ({float_ms / int8_ms:.2f}x): the layer on "
        f"{shape}"
    )


def _milliseconds(
    a: Callable[[Tensor], object], b: Callable[[Tensor], object], x: Tensor
) -> tuple[float, float]:
    """The least time of each of two functions, which take turns."""
    seen: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for run, times in zip((a, b), seen, strict=True):
            start = time.perf_counter()
            run(x)
            times.append(1000 * (time.perf_counter() - start))
    return min(seen[0]), min(seen[1])  # the first calls compile


# --- caches and variables -------------------------------------------------------------------------


def caches() -> list[tuple[Path, str]]:
    """Directories of cached kernels, compiled graphs and measured times, with their sizes."""

    inductor = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or inductor_cache_dir())
    found = [(inductor, f"Inductor: {_size(inductor)}")]
    with contextlib.suppress(FileNotFoundError):  # no home, no cache
        ours = cache.directory()
        found += [
            (ours, f"graphquant: {_size(ours)}"),
            (ours.parent, f"Triton: {_size(ours.parent)}"),
        ]
    return found


def _size(folder: Path) -> str:
    if not folder.is_dir():
        return "does not exist yet"
    count, total = 0, 0
    for place, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.lstat(os.path.join(place, file)).st_size
                count += 1
            except OSError:  # deleted in the meantime
                continue
    return f"{total / 2**20:.1f} MiB in {count} files"


def _counts(variable: str) -> bool:
    return variable.startswith(VARIABLES)


def _shown(value: str) -> str:
    return "(a path)" if "/" in value else value
