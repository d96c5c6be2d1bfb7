"""What was measured once is known from then on, to this machine and to this question alone."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graphquant.ops import cpu, timing
from graphquant.ops.runtime import launch
from graphquant.ops.timing import recall, times

GPU = torch.device("cuda", 0)
QUESTION = "linear 128x64x32"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


class Measured:
    """Stands for the GPU: a candidate takes as many microseconds as it returns."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.watched: list[object] = []

    def __call__(self, candidates: dict[str, Callable[[], Any]]) -> dict[str, float]:
        self.asked.append(list(candidates))
        self.watched.append(getattr(launch._watching, "now", None))
        found = {}
        for name, call in candidates.items():
            with contextlib.suppress(RuntimeError):
                found[name] = float(call())
        return found


@pytest.fixture
def measured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Measured:
    monkeypatch.setattr(timing, "machine", lambda device: "a GPU, torch 1, triton 2")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    stand_in = Measured()
    monkeypatch.setattr(timing, "_time", stand_in)
    return stand_in


def fails() -> Any:
    raise RuntimeError("no kernel for this GPU")


def only(cache: Path) -> Path:
    (file,) = cache.rglob("times.json")
    return file


def test_a_known_answer_is_not_measured_again(measured: Measured) -> None:
    first = times(QUESTION, GPU, {"a": lambda: 3, "b": lambda: 5})
    again = times(QUESTION, GPU, {"a": lambda: 30, "b": lambda: 50})
    assert first == again == {"a": 3.0, "b": 5.0}
    assert times(QUESTION, GPU, {"b": lambda: 50}) == {"b": 5.0}  # fewer were asked for
    assert measured.asked == [["a", "b"]]
    assert recall(QUESTION, GPU) == first


def test_a_new_candidate_is_measured_next_to_the_others(measured: Measured) -> None:
    times(QUESTION, GPU, {"a": lambda: 3, "b": lambda: 5})
    assert times(QUESTION, GPU, {"a": lambda: 4, "c": lambda: 6}) == {"a": 4.0, "c": 6.0}
    assert measured.asked == [["a", "b"], ["a", "c"]]
    assert recall(QUESTION, GPU) == {"a": 4.0, "b": 5.0, "c": 6.0}


def test_a_candidate_that_failed_is_left_out_and_not_tried_again(measured: Measured) -> None:
    both: dict[str, Callable[[], Any]] = {"a": lambda: 3, "b": fails}
    assert times(QUESTION, GPU, both) == {"a": 3.0}
    assert times(QUESTION, GPU, both) == {"a": 3.0}
    assert times(QUESTION, GPU, {"b": fails}) == {}
    assert measured.asked == [["a", "b"]]
    known = recall(QUESTION, GPU)
    assert known is not None and known["b"] < 0


def test_an_error_in_the_question_itself_is_raised_and_nothing_kept(
    measured: Measured, cache: Path
) -> None:
    with pytest.raises(ZeroDivisionError):
        times(QUESTION, GPU, {"a": lambda: 1 // 0})
    assert recall(QUESTION, GPU) is None and not list(cache.rglob("times.json"))


def test_another_question_or_machine_is_another_answer(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    times(QUESTION, GPU, {"a": lambda: 3})
    assert times(QUESTION + " ", GPU, {"a": lambda: 4}) == {"a": 4.0}
    monkeypatch.setattr(timing, "machine", lambda device: "another GPU, torch 1, triton 2")
    assert recall(QUESTION, GPU) is None
    assert times(QUESTION, GPU, {"a": lambda: 5}) == {"a": 5.0}
    monkeypatch.setattr(timing, "machine", lambda device: "a GPU, torch 1, triton 2")
    assert times(QUESTION, GPU, {"a": lambda: 6}) == {"a": 3.0}
    assert len(measured.asked) == 3


def test_the_machine_is_gpu_versions_and_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    versions = {"torch": "2.1", "triton": "3.2"}

    def version(package: str) -> str:
        if package not in versions:
            raise timing.importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(timing.importlib.metadata, "version", version)
    monkeypatch.setattr(timing, "_versions", timing._versions.__wrapped__)
    of = timing.machine
    monkeypatch.setattr(timing.cache, "source_digest", lambda folder, *suffixes: "ab12")
    assert of(GPU) == "GPU 0, torch 2.1, triton 3.2, kernels ab12"
    assert of(torch.device("cuda", 1)).startswith("GPU 1, ")
    del versions["triton"]
    assert of(GPU) == "GPU 0, torch 2.1, triton unknown, kernels ab12"


def test_a_processor_is_known_by_what_computes_int8_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the variable that asks for an instruction set: without a compiler it changes nothing,
    and the best one may not be the one that is used."""
    here = torch.device("cpu")
    monkeypatch.setattr(cpu, "missing", lambda: None)
    found = {}
    for isa in cpu.INSTRUCTION_SETS[:2]:
        library = cpu.Library(isa, timing)
        monkeypatch.setattr(cpu, "library", lambda library=library: library)
        found[isa.name] = timing.machine(here)
        assert f"kernels for {isa.name}, " in found[isa.name]
    before = found[isa.name]
    monkeypatch.setenv(cpu.ISA_VARIABLE, "amx")
    assert timing.machine(here) == before
    monkeypatch.setattr(cpu, "missing", lambda: "no compiler")
    found["none"] = timing.machine(here)
    assert ", oneDNN, " in found["none"] and len(set(found.values())) == 3


def test_a_question_to_a_gpu_builds_no_cpu_kernels(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(cpu, "missing", lambda: pytest.fail("asked for them"))
    assert recall(QUESTION, GPU) is None


@pytest.mark.parametrize(
    "source", ["int8_linear/hopper.cu", "triton_rows.py", "runtime/launch.c", "attention/new.cu"]
)
def test_times_of_a_kernel_before_it_was_edited_are_not_found(
    source: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = cache / "ops"
    shutil.copytree(timing.KERNELS, copied)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")

    def key() -> str:
        timing._versions.cache_clear()
        timing.cache.source_digest.cache_clear()
        return timing._key(QUESTION, GPU)

    try:
        before = key()
        monkeypatch.setattr(timing, "KERNELS", copied)
        assert key() == before  # wherever it is installed
        (copied / "README.md").write_text("no kernel")
        assert key() == before
        with (copied / source).open("a") as file:
            file.write("\n")
        assert key() != before
    finally:
        timing._versions.cache_clear()
        timing.cache.source_digest.cache_clear()


def held(times: str) -> str:
    on = "a GPU, torch 1, triton 2"
    return f'{{"question": "{QUESTION}", "on": "{on}", "times": {times}}}'


@pytest.mark.parametrize(
    "broken",
    [
        *(
            "",
            "{",
            "[]",
            "null",
            "3",
            '"times"',
            "{}",
            '{"times": null}',
            '{"times": [1]}',
            "\0\xff",
        ),
        *("[" * 10**5, '{"times":' * 10**5, "1" * 5000, "NaN", '{"times": {"a": 3}}'),
        *map(held, ("null", "[3]", '{"a": null}', '{"a": "3"}', '{"a": true}', '{"a": [3]}')),
        *map(held, ('{"a": NaN}', '{"a": Infinity}', '{"a": 1e999}', f'{{"a": {10**400}}}')),
        held('{"a": 3}').replace("128x64", "128x65"),
        held('{"a": 3}').replace("torch 1", "torch 2"),
    ],
)
def test_a_broken_file_is_as_good_as_none(measured: Measured, cache: Path, broken: str) -> None:
    times(QUESTION, GPU, {"a": lambda: 3})
    only(cache).write_text(held('{"a": 5}'))
    assert recall(QUESTION, GPU) == {"a": 5.0}
    only(cache).write_text(broken, encoding="latin-1")
    assert recall(QUESTION, GPU) is None
    assert times(QUESTION, GPU, {"a": lambda: 4}) == {"a": 4.0}
    assert recall(QUESTION, GPU) == {"a": 4.0}


def test_without_a_cache_it_is_measured_each_time(
    measured: Measured, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    (cache / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache / "file"))
    with caplog.at_level("DEBUG", "graphquant"):
        for us in (3.0, 4.0):
            assert times(QUESTION, GPU, {"a": lambda us=us: us}) == {"a": us}
    assert len(measured.asked) == 2
    said = [r for r in caplog.records if "no cache: " in r.message]
    assert said and all(r.levelname == "DEBUG" for r in said)


def test_a_file_says_what_was_asked_and_where(measured: Measured, cache: Path) -> None:
    times(QUESTION, GPU, {"a": lambda: 3})
    assert json.loads(only(cache).read_text()) == {
        "question": QUESTION,
        "on": "a GPU, torch 1, triton 2",
        "times": {"a": 3.0},
    }


def test_while_a_graph_records_only_what_is_known_is_said(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    times(QUESTION, GPU, {"a": lambda: 3})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert times("another", GPU, {"a": lambda: 3}) is None
    assert times(QUESTION, GPU, {"a": lambda: 3, "b": lambda: 4}) is None
    assert times(QUESTION, GPU, {"a": lambda: 4}) == {"a": 3.0}
    assert measured.asked == [["a"]]


def test_a_kernel_that_measures_its_tiles_is_not_watched_doing_so(measured: Measured) -> None:
    launch.prepare(lambda: times(QUESTION, GPU, {"a": lambda: 3}) and None, ())
    assert measured.watched == [None]


class Rounds:
    """Stands for a GPU that others use too: microseconds of the candidates, round by round."""

    def __init__(self, **us: list[float]) -> None:
        self.left = {name: iter(values) for name, values in us.items()}
        self.locks: list[str] = []
        self.inside = 0

    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(timing, "_recorded", self.recorded)
        monkeypatch.setattr(timing, "_microseconds", self.microseconds)
        monkeypatch.setattr(timing.cache, "lock", self.lock)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        about = SimpleNamespace(uuid="00000000-1111")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)

    def recorded(self, call: Callable[[], object]) -> tuple[Callable[[], object], int]:
        assert not self.inside, "kernels are compiled without keeping others waiting"
        return call, 2

    def microseconds(self, replay: Callable[[], object]) -> float:
        assert self.inside, "others could be measuring"
        return next(self.left[str(replay())])

    @contextlib.contextmanager
    def lock(self, name: str, seconds: float) -> Iterator[None]:
        self.locks.append(name)
        self.inside += 1
        yield
        self.inside -= 1


@pytest.mark.parametrize(
    ("a", "b", "found"),
    [
        ([20.0] * 3, [30.0] * 3, {"a": 10.0, "b": 15.0}),
        # the third time that others are not there
        ([90.0, 20.0, 95.0, 99.0, 20.2], [30.0, 80.0, 30.0, 80.0, 80.0], {"a": 10.0, "b": 15.0}),
        ([20.0, 90.0, 90.0, 20.0], [80.0, 50.0, 30.0, 30.1], {"a": 10.0, "b": 15.0}),
    ],
)
def test_rounds_that_others_made_longer_do_not_count(
    a: list[float], b: list[float], found: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Rounds(a=a, b=b)
    gpu.stand_in(monkeypatch)
    assert timing._time({"a": lambda: "a", "b": lambda: "b"}) == found
    assert not any(list(left) for left in gpu.left.values()), "no round more, and no round less"
    assert gpu.locks == ["gpu-00000000-1111"], "processes that see the GPU by another number too"


def test_rounds_that_never_agree_end(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Rounds(a=[100.0 / n for n in range(1, 100)])
    gpu.stand_in(monkeypatch)
    assert timing._time({"a": lambda: "a"}) == {"a": 50.0 / timing.MOST_ROUNDS}


# --- on a GPU -----------------------------------------------------------------------------------


def matmuls(*sizes: int) -> dict[str, Callable[[], object]]:
    def of(n: int) -> Callable[[], object]:
        x = torch.randn(n, n, device="cuda", dtype=torch.float16)
        return lambda: x @ x

    return {str(n): of(n) for n in sizes}


@pytest.mark.cuda
def test_a_large_matmul_takes_longer_than_a_small_one(cache: Path) -> None:
    """64 times the work, and enough that neither a launch nor what else is on the GPU weighs:
    8192^3 is 1.1 TFLOP, 1.1 ms at an H100's 989 TFLOP/s, and 2048^3 is 17 us."""
    for context in (torch.inference_mode, torch.no_grad, contextlib.nullcontext):
        with context():
            found = times(f"matmul {context}", GPU, matmuls(2048, 8192))
        assert found is not None and found["8192"] > 8 * found["2048"] > 0


@pytest.mark.cuda
def test_host_time_does_not_count(cache: Path) -> None:
    """Ten launches of next to nothing: the host takes longer to ask for them than the GPU."""
    x = torch.zeros(16, device="cuda")

    def ten() -> None:
        for _ in range(10):
            x.add_(1)

    found = times("ten launches", GPU, {"ten": ten})
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(100):
        ten()
    torch.cuda.synchronize()
    host = 1e6 * (time.perf_counter() - start) / 100
    assert found is not None and 0 < found["ten"] < host


@pytest.mark.cuda
def test_measuring_leaves_random_numbers_alone(cache: Path) -> None:
    candidates = matmuls(256)
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    times("random", GPU, candidates)
    after = torch.get_rng_state(), torch.cuda.get_rng_state()
    assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))


@pytest.mark.cuda
def test_what_cannot_run_is_left_out_and_the_rest_measured(cache: Path) -> None:
    small = matmuls(256)["256"]

    def waits() -> None:
        small()
        torch.cuda.synchronize()  # allowed, but not in a graph that is recorded

    found = times("fails", GPU, {"fails": fails, "waits": waits, "small": small})
    assert found is not None and set(found) == {"small"}
    torch.cuda.synchronize()
    assert times("fails", GPU, {"fails": fails, "waits": waits, "small": small}) == found


@pytest.mark.cuda
def test_nothing_is_measured_while_a_graph_records(cache: Path) -> None:
    candidates = matmuls(256)
    candidates["256"]()
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert times("recording", GPU, candidates) is None
    assert times("recording", GPU, candidates) is not None
