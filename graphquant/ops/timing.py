"""Times of candidate implementations on this machine: measured once, then read from disk.

Answers are cached (runtime/cache.py) in one file per question and combination of GPU, or processor,
its threads and what computes int8 on it, torch, Triton and the sources of graphquant's kernels:
times of an older kernel are never used.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from graphquant.ops import cpu
from graphquant.ops.runtime import cache
from graphquant.ops.runtime.device import processor
from graphquant.ops.runtime.launch import unwatched
from graphquant.utils.progress import measured
from graphquant.utils.serialization import as_float

log = logging.getLogger(__name__)

FILE = "times.json"
KERNELS = Path(__file__).parent  # with the code that tiles, compiles and launches them

ROUNDS = 3  # at least on a GPU; the result is their minimum, since others use the machine too
MOST_ROUNDS = 30
AGREEMENT = 1.02  # of the two fastest rounds of each candidate, which ends them
CPU_ROUNDS = 7
ROUND_US = 300.0  # at least, of one candidate's calls in one round
MAX_CALLS = 50
LONGEST = 20.0  # seconds that another process's measurement may be waited for


def times(
    question: str, device: torch.device, candidates: Mapping[str, Callable[[], object]]
) -> dict[str, float] | None:
    """Microseconds of each candidate, or None while a CUDA graph records and nothing is known.

    question    what is asked, shapes and dtypes included: the same words mean the same answer
    candidates  called with their tensors bound, host time not counted; one that raises an
                exception or is missing from an earlier answer is left out
    """
    known = recall(question, device)
    if known is not None and set(candidates) <= set(known):
        return {name: known[name] for name in candidates if known[name] >= 0}
    if device.type == "cpu":
        found = _time_on_cpu(candidates)
    elif torch.cuda.is_current_stream_capturing():
        return None
    else:
        with torch.cuda.device(device), unwatched():
            found = _time(candidates)
    measured()
    log.info("%s: %s", question, ", ".join(f"{n} {t:.1f} us" for n, t in found.items()))
    failed = {name: -1.0 for name in candidates if name not in found}
    _store(question, device, {**(known or {}), **found, **failed})
    return found


def recall(question: str, device: torch.device) -> dict[str, float] | None:
    """The cached answer: microseconds, negative for a candidate that failed; None if unknown."""
    data = cache.get(_key(question, device), FILE)
    return None if data is None else _answer(data, question, device)


def _answer(data: bytes, question: str, device: torch.device) -> dict[str, float] | None:
    """Parse what `_store` wrote; None for anything else."""
    try:
        held = json.loads(data)
        asked = held["question"], held["on"]
        found = {str(name): as_float(us) for name, us in held["times"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as bad:
        log.debug("%s: cannot read the cached times: %r", question, bad)
        return None
    answer = {n: us for n, us in found.items() if us is not None and math.isfinite(us)}
    if asked != (question, machine(device)) or len(answer) != len(found):
        log.debug("%s: the cached times are for another question", question)
        return None
    return answer


def _store(question: str, device: torch.device, answer: Mapping[str, float]) -> None:
    data = json.dumps({"question": question, "on": machine(device), "times": dict(answer)})
    cache.put(_key(question, device), FILE, data.encode())


def _key(question: str, device: torch.device) -> str:
    return hashlib.sha256(f"{question}\n{machine(device)}".encode()).hexdigest()


def machine(device: torch.device) -> str:
    """What an answer depends on besides the question."""
    return f"{_on(device)}, {_versions()}"


def _on(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{processor()}, {torch.get_num_threads()} threads, {cpu.in_use()}, {capability}"


@functools.cache
def _versions() -> str:
    versions = [f"{p} {_version(p)}" for p in ("torch", "triton")]
    kernels = cache.source_digest(KERNELS, ".py", ".cu", ".cuh", ".c", ".cpp", ".h")
    return ", ".join((*versions, f"kernels {kernels}"))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _time(candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Microseconds of each candidate, in turn (A B C A B C): a slower clock affects all of them.

    Processes that share a GPU take turns, since beside each other they would choose at random. What
    else they run makes rounds longer, so rounds go on until the two fastest ones agree.
    """
    replays: dict[str, tuple[Callable[[], object], int]] = {}
    for name, call in candidates.items():
        try:
            replays[name] = _recorded(call)
        except Exception as error:  # noqa: BLE001 - compilers raise anything
            log.debug("%s cannot be timed: %s", name, error)
    seen: dict[str, list[float]] = {name: [] for name in replays}
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    with cache.lock(f"gpu-{gpu}", LONGEST):
        for n in range(MOST_ROUNDS):
            for name, (replay, calls) in replays.items():
                seen[name].append(_microseconds(replay) / calls)
            if n + 1 >= ROUNDS and all(map(_agree, seen.values())):
                break
    return {name: min(us) for name, us in seen.items()}


def _agree(us: list[float]) -> bool:
    fastest, second, *_ = sorted(us)
    return second <= AGREEMENT * fastest


def _time_on_cpu(candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """As `_time`, wall time."""
    calls: dict[str, int] = {}
    for name, call in candidates.items():
        try:
            call()
            calls[name] = min(max(int(ROUND_US / max(_wall_us(call, 1), 0.1)), 1), MAX_CALLS)
        except Exception as error:  # noqa: BLE001 - an op may raise anything
            log.debug("%s cannot be timed: %s", name, error)
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(CPU_ROUNDS):
        for name, n in calls.items():
            seen[name].append(_wall_us(candidates[name], n))
    return {name: min(us) for name, us in seen.items()}


def _wall_us(call: Callable[[], object], n: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(n):
        call()
    return (time.perf_counter_ns() - start) / n / 1000.0


def _recorded(call: Callable[[], object]) -> tuple[Callable[[], object], int]:
    """(replay of a CUDA graph of several calls, enough for ROUND_US; their number)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    replay = _graph_of(call, 1)
    once = min(_microseconds(replay) for _ in range(ROUNDS))
    calls = min(max(int(ROUND_US / max(once, 1.0)), 1), MAX_CALLS)
    return (replay if calls == 1 else _graph_of(call, calls)), calls


def _graph_of(call: Callable[[], object], calls: int) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            call()
    graph.replay()
    return graph.replay


def _microseconds(replay: Callable[[], object]) -> float:
    """Of the second of two replays: its launch waits for nothing but the first one's end."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    replay()
    start.record()
    replay()
    end.record()
    end.synchronize()
    return 1000.0 * float(start.elapsed_time(end))
