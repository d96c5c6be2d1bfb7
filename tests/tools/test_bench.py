"""tools.bench, on the CPU: everything but CUDA's own clock."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphquant
from graphquant.ops import OPS, cpu
from graphquant.ops.define import Op
from graphquant.ops.pack_weight.op import packed_shape
from tests.ops import float64_checks as checks
from tools.bench import __main__ as bench
from tools.bench import apart, encoders, models, ops, timing, variants, write
from tools.bench.encoders import PRESETS, Limit, Row
from tools.bench.models import MODELS, Model
from tools.bench.records import (
    ISA,
    LATE,
    PROCESSOR,
    SKIPPED,
    Encoder,
    Line,
    OpTime,
    Run,
    header,
    latest,
    load,
    merge,
    reason,
    save,
)
from tools.bench.runtimes import RUNTIMES, Runtime
from tools.bench.timing import Call, Sample, Timer, interleaved
from tools.bench.variants import FLOAT, VARIANTS

TINY = Model("ViTConfig", "ViTModel", models._vit(32, 64, 1, 2, 16, 8), 5)
PNG = b"\x89PNG\r\n\x1a\n"
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


class CpuTimer(Timer):
    device = "cpu"
    cache_bytes = 4096

    def wait(self) -> None: ...

    def sample(self, call: Call) -> Sample:
        start = time.perf_counter()
        call()
        ms = 1000 * (time.perf_counter() - start)
        return Sample(ms, ms)

    def back_to_back(self, call: Call, calls: int) -> float:
        return self.sample(call).ms

    def peak(self, call: Call) -> int:
        call()
        return 1 << 20

    def sequence(self, calls: Sequence[Call]) -> Call:
        def every() -> None:
            for call in calls:
                call()

        return every

    def forget(self) -> None:
        """Nothing here is compiled twice in one test."""


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(MODELS, "tiny", TINY)
    return "tiny"


def measured(*argv: str, check: Callable[[str], list[str]] = lambda _: []) -> int:
    return bench.main([*argv, "--seconds", "0.01"], timer=CpuTimer(), check=check)


def record(variant: str, ms: float | None, cosine: float = 0.9999, **more: Any) -> Encoder:
    facts = {"peak_bytes": 1 << 20, "weight_bytes": 2 << 20, "compile_s": 3.0, "host_ms": 0.5}
    return Encoder("vit-b-16", 64, 197, variant, ms, cosine, **{**facts, **more})


def run_of(*records: Encoder | OpTime, date: str = "2026-01-01", **more: Any) -> Run:
    facts = {"card": "a card", "date": date, "command": "python -m tools.bench"}
    kept = [r for r in records if isinstance(r, Encoder)]
    return Run(facts, encoders=kept, ops=[r for r in records if isinstance(r, OpTime)], **more)


# --- rows in processes of their own -------------------------------------------------------------


@pytest.mark.slow  # two processes that compile
def test_rows_in_processes_of_their_own_give_the_records_of_one(tmp_path: Path) -> None:
    rows = [Row("vit-b-16", n, ("eager", "graphquant"), 1) for n in (1, 2)]
    rows.append(Row("vit-b-16", 3, ("no such variant",), 1))
    got: list[Encoder] = []
    said: list[str] = []
    tasks = [apart.Task(row, 0.01, "cpu") for row in rows]
    apart.measure_all(tasks, 3, Limit(), got.extend, said.append)
    assert [(r.batch, r.variant) for r in got] == [
        *((n, v) for n in (1, 2) for v in ("eager", "graphquant")),
        (3, "no such variant"),
    ]
    for r in got[:4]:
        assert (r.ms is not None, r.layers, r.compile_s, r.failed) == (True, 1, None, "")
        assert r.cosine and r.cosine > 0.999
    assert got[1].int8 and "no variant" in got[4].failed
    assert sum("compiled in" in line for line in said) == 4


def test_a_row_that_is_late_or_fails_says_so(tiny: str) -> None:
    row = Row("vit-b-16", 1, ("eager", "graphquant"), 1)
    task = apart.Task(row, 0.01, "cpu")
    for limit in (Limit(0.0), Limit.after(0.2)):  # not begun, and not ended
        got: list[Encoder] = []
        apart.measure_all([task], 1, limit, got.extend)
        assert [(r.variant, r.failed) for r in got] == [("eager", LATE), ("graphquant", LATE)]
    got = []
    unknown = replace(row, model=tiny)  # to the other process
    apart.measure_all([replace(task, row=unknown)], 1, Limit(), got.extend)
    assert [(r.model, r.ms, r.failed) for r in got] == [(tiny, None, "KeyError: 'tiny'")] * 2


def test_others_are_stopped_while_one_has_the_machine(tmp_path: Path) -> None:
    other = subprocess.Popen(["sleep", "60"], start_new_session=True)
    (tmp_path / f"{other.pid}.group").touch()
    (tmp_path / f"{os.getpgrp()}.group").touch()

    def state() -> str:
        return Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0]

    try:
        with apart.turns(tmp_path) as (gpu, machine):
            with gpu():
                assert state() != "T"
            with contextlib.suppress(ZeroDivisionError), machine():
                seen = state()
                raise ZeroDivisionError
            assert seen == "T" and state() != "T"
        other.kill()
        other.wait()
        with apart.turns(tmp_path) as (_, machine), machine():
            """One that has ended disturbs nothing."""
    finally:
        other.kill()


def test_one_process_at_a_time_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    from torch._inductor.runtime.benchmarking import benchmarker

    from graphquant.ops import timing

    seen = []

    def is_taken(*_: Any) -> float:
        with open(tmp_path / "lock", "w") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                seen.append(True)
            else:
                seen.append(False)
        return 1.0

    def nested(*_: Any) -> float:
        benchmarker.benchmark_gpu(is_taken)
        return is_taken()

    monkeypatch.setattr(benchmarker, "benchmark_gpu", is_taken)
    monkeypatch.setattr(benchmarker, "benchmark", nested)
    monkeypatch.setattr(timing, "_time", is_taken)
    with apart.turns(tmp_path) as (gpu, _):
        is_taken()
        benchmarker.benchmark(is_taken)
        timing._time({})
        with gpu():
            is_taken()
        is_taken()
    benchmarker.benchmark_gpu(is_taken)
    assert seen == [False, True, True, True, True, False, False]


# --- the whole way ------------------------------------------------------------------------------


def test_a_tiny_model_goes_the_whole_way(tiny: str, tmp_path: Path) -> None:
    out, page = tmp_path / "run.json", tmp_path / "page.md"
    names = ["eager", "bf16-default", "graphquant"]
    where = ["--json", str(out), "--markdown", str(page)]
    assert measured(tiny, "--batch", "2", "--variants", *names, *where) == 0
    (run,) = load(out)
    assert [r.variant for r in run.encoders] == names
    for r in run.encoders:
        assert (r.model, r.batch, r.tokens, r.layers, r.failed) == (tiny, 2, 5, None, "")
        assert r.ms and r.host_ms and r.compile_s and r.calls and r.calls >= 15
        assert r.cosine and r.cosine > 0.999 and r.worst_cosine and r.worst_cosine > 0.99
        assert r.peak_bytes == 1 << 20
    eager, default, ours = run.encoders
    assert (ours.linears, ours.int8, ours.coverage) == (7, 7, 1.0)
    assert default.linears is None
    assert eager.weight_bytes == default.weight_bytes
    # beside the float weights: qkv, out, fc1, fc2 and the pooler, a byte for each element or in the
    # order of the CPU kernels, two float32 for each of their output channels, and the stacked
    # bfloat16 bias of qkv
    assert ours.weight_bytes and eager.weight_bytes
    beside = ours.weight_bytes - eager.weight_bytes
    channels = 3 * 32 + 32 + 64 + 32 + 32
    weights = [(3 * 32, 32), (32, 32), (64, 32), (32, 64), (32, 32)]
    if cpu.missing() is None:
        weights = [packed_shape(*of) for of in weights]
    assert beside == sum(N * K for N, K in weights) + 8 * channels + 2 * 3 * 32
    command = run.header["command"]
    command = command[command.index("python") :]  # without the settings that the tests run with
    assert command == f"python -m tools.bench {tiny} --batch 2 --variants " + (
        " ".join(names) + " --seconds 0.01"
    )
    text = page.read_text()
    assert f"| {tiny} | 2 x 5 | graphquant |" in text
    assert "7 of 7" in text


def test_layers_cut_the_model_and_say_so(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    where = ["--json", str(out), "--markdown", str(tmp_path / "page.md")]
    assert measured(tiny, "--variants", "eager", "--layers", "3", *where) == 0
    (run,) = load(out)
    assert run.encoders[0].layers == 3
    text = (tmp_path / "page.md").read_text()
    assert "models cut to 3 layers: no measure of a whole one" in text
    assert "tiny, cut to 3 layers" in text
    assert models.build(TINY.cut(3), "cpu").config.num_hidden_layers == 3  # type: ignore[union-attr]


def test_a_variant_that_fails_is_a_line_and_stops_nothing(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = variants.prepare

    def prepare(variant: str, model: nn.Module) -> variants.Prepared:
        if variant == "bf16-default":
            raise torch.OutOfMemoryError("CUDA out of memory\nmore in /some/where/else")
        return real(variant, model)

    monkeypatch.setattr(encoders, "prepare", prepare)
    out, page = tmp_path / "run.json", tmp_path / "page.md"
    where = ["--json", str(out), "--markdown", str(page)]
    assert measured(tiny, "--variants", "bf16-default", "eager", *where) == 0
    failed, eager = load(out)[0].encoders
    assert failed.ms is None and failed.failed == "OutOfMemoryError: CUDA out of memory"
    assert eager.ms
    assert "- tiny, 8 x 5, bf16-default: OutOfMemoryError" in page.read_text()


def test_a_model_that_cannot_be_built_fails_in_every_variant(tmp_path: Path) -> None:
    broken = {"broken": replace(TINY, cls="NoSuchModel")}
    row = Row("broken", 1, ("eager", "graphquant"))
    got = encoders.measure(row, CpuTimer(), seconds=0.01, models=broken)
    assert [r.variant for r in got] == ["eager", "graphquant"]
    assert all("NoSuchModel" in r.failed for r in got)


def test_nothing_timed_is_exit_code_1(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, tiny, replace(TINY, cls="NoSuchModel"))
    assert measured(tiny, "--variants", "eager") == 1


def test_without_torchao_its_variants_are_skipped(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert measured(tiny, "--variants", "eager", "torchao-int8") == 0
    assert "torchao-int8: skipped: torchao is not installed" in capsys.readouterr().err


def test_torchao_leaves_the_model_and_the_settings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Quantization:
        Int8DynamicActivationInt8WeightConfig = staticmethod(dict)

        @staticmethod
        def quantize_(model: nn.Module, config: Any) -> None:
            torch._inductor.config.coordinate_descent_tuning = True
            torch._inductor.config.epilogue_fusion = False
            torch.set_float32_matmul_precision("high")
            for p in model.parameters():
                p.zero_()

    package = type(sys)("torchao")
    package.quantization = Quantization  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao", package)
    model = nn.Linear(3, 3).requires_grad_(False)
    fusion = torch._inductor.config.epilogue_fusion
    with variants.settings_kept():
        prepared = variants.prepare("torchao-int8", model)
        assert torch._inductor.config.coordinate_descent_tuning is False  # mode "default"
        assert torch._inductor.config.epilogue_fusion is False
    assert torch._inductor.config.epilogue_fusion is fusion is True
    assert torch.get_float32_matmul_precision() == "highest"
    assert model.weight.any() and not prepared.module.weight.any()  # type: ignore[operator]


def test_after_the_time_limit_nothing_new_starts(tiny: str, tmp_path: Path) -> None:
    row, over = Row("tiny", 1, ("eager", "graphquant")), Limit(time.monotonic())
    assert over.passed and not Limit().passed and not Limit.after(100).passed
    got = encoders.measure(row, CpuTimer(), seconds=0.01, limit=over)
    assert [r.failed for r in got] == [LATE] * 2
    out = tmp_path / "run.json"
    assert measured(tiny, "--batch", "1", "2", "--time-limit", "1e-9", "--json", str(out)) == 1
    assert load(out)[0].encoders == []  # but written


def test_json_is_there_after_every_row(tiny: str, tmp_path: Path) -> None:
    out, seen = tmp_path / "run.json", []
    real = encoders.measure

    def spy(*args: Any, **kwargs: Any) -> list[Encoder]:
        seen.append(len(load(out)[0].encoders) if out.exists() else 0)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders, "measure", spy)
        argv = [tiny, "--batch", "1", "2", "3", "--variants", "eager", "--json", str(out)]
        assert measured(*argv) == 0
    assert seen == [0, 1, 2]


def test_rows_that_are_done_are_left_out(tiny: str, tmp_path: Path) -> None:
    done, more = tmp_path / "done.json", tmp_path / "more.json"
    there = [Encoder(tiny, 1, 5, "eager", 1.0, 1.0), Encoder(tiny, 2, 5, "eager", failed="no")]
    save([run_of(*there)], done)
    argv = [tiny, "--batch", "1", "2", "--variants", "eager", "--skip-done", str(done)]
    assert measured(*argv, "--json", str(more)) == 0
    assert [r.batch for r in load(more)[0].encoders] == [2]


def test_cosines_see_one_wrong_token_and_nan() -> None:
    want = torch.randn(2, 100, 8)
    assert encoders.cosines(want.to(torch.bfloat16), want)[1] > 0.999
    got = want.clone()
    got[1, 7] *= -1
    whole, worst = encoders.cosines(got, want)
    assert whole > 0.9 and worst == -1
    got[1, 7, 0] = torch.nan
    assert encoders.cosines(got, want) == (0.0, 0.0)
    assert encoders.cosines(want[:1], want) == (0.0, 0.0)


# --- which speedups are shown ------------------------------------------------------------------


def speedup(run: Run, variant: str) -> str:
    (found,) = (r for r in run.encoders if r.variant == variant)
    return write.speedup_text(Line(found, run, 1))


def test_the_baseline_is_the_fastest_bfloat16_variant_of_the_row() -> None:
    run = run_of(
        record("eager", 4.0),
        record("bf16-default", 3.0),
        record("bf16-max-autotune", 2.0),
        record("torchao-fp8", 1.5),
        record("graphquant", 1.0),
        replace(record("bf16-default", 0.1), batch=1),
        replace(record("bf16-default", 0.1), layers=2),
    )
    base = run.baseline(("vit-b-16", 64, None, None))
    assert base and base.variant == "bf16-max-autotune"
    assert speedup(run, "graphquant") == "2.00x"
    assert speedup(run, "eager") == "0.50x"
    assert speedup(run, "bf16-max-autotune") == "1 (baseline)"


def test_a_wrong_or_failed_baseline_is_none() -> None:
    wrong = record("bf16-reduce-overhead", 0.5, cosine=0.9)
    failed = record("bf16-max-autotune", None, failed="out of memory")
    run = run_of(wrong, failed, record("bf16-default", 3.0), record("graphquant", 1.0))
    assert speedup(run, "graphquant") == "3.00x"
    assert speedup(run_of(wrong, record("graphquant", 1.0)), "graphquant") == "-"


@pytest.mark.parametrize("cosine", [0.9989, 0.0, -1.0, float("nan")])
def test_no_speedup_is_shown_for_a_bad_cosine(cosine: float) -> None:
    run = run_of(record("bf16-default", 3.0), record("graphquant", 1.0, cosine=cosine))
    assert speedup(run, "graphquant") == "-"
    assert "3.00x" not in write.page([run])
    assert write.bars([run]) == []


def test_wrong_ops_silence_every_speedup_and_are_exit_code_1(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    argv = [tiny, "--variants", "eager", "--json", str(out)]
    assert measured(*argv, check=lambda device: [f"quantize on {device}: off"]) == 1
    (run,) = load(out)
    assert run.wrong_ops == ["quantize on cpu: off"] and run.encoders[0].ms
    fast = run_of(record("eager", 3.0), record("graphquant", 1.0), wrong_ops=["x: off"])
    assert speedup(fast, "graphquant") == speedup(fast, "eager") == "-"
    assert "3.00x" not in write.page([fast]) and "x: off" in write.page([fast])
    assert write.bars([fast]) == []


# --- the check of the ops -----------------------------------------------------------------------

SMALL = ((5, 24, 19), (33, 40, 32))


def test_the_references_pass_the_check() -> None:
    assert checks.wrong_ops("cpu", SMALL) == []


def _break(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[..., Any]) -> list[str]:
    op = OPS[name]
    broken = replace(op)
    object.__setattr__(broken, "target", lambda *args: wrong(op, *args))
    monkeypatch.setitem(OPS, name, broken)
    said = checks.wrong_ops("cpu", SMALL)
    assert said and all(s.startswith(f"{name} ") for s in said)
    return said


def _first(op: Op, *args: Any) -> tuple[Tensor, ...]:
    result = op.reference(*args)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", sorted(set(OPS)))
def test_an_unwritten_row_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As poisoned memory leaves it."""

    def wrong(op: Op, *args: Any) -> Any:
        results = _first(op, *args)
        for t in results:
            t[-1] = 127 if t.dtype == torch.int8 else torch.nan
        return results if len(results) > 1 else results[0]

    _break(monkeypatch, name, wrong)


FLOATING = {"int8_linear", "attention", "varlen_attention"}  # of these, results are floats


@pytest.mark.parametrize("name", sorted(set(OPS) - FLOATING - {"token_index"}))
def test_a_value_one_step_off_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(op: Op, *args: Any) -> Any:
        results = _first(op, *args)
        xq = next(t for t in results if t.dtype == torch.int8)
        xq[0, 1] += -1 if xq[0, 1] > 0 else 1
        return results if len(results) > 1 else results[0]

    assert any("xq is off" in s or "wq is off" in s for s in _break(monkeypatch, name, wrong))


def test_a_forgotten_bias_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    said = _break(
        monkeypatch, "int8_linear", lambda op, *args: op.reference(*args[:6], None, *args[7:])
    )
    assert all("bias=True" in s for s in said)


def test_a_call_that_repeats_the_last_result_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a prepared launch does that forgets to take the new addresses."""
    kept: dict[torch.Size, Any] = {}
    _break(
        monkeypatch,
        "quantize",
        lambda op, x: kept.setdefault(x.shape, op.reference(x)),
    )


def test_an_op_that_raises_is_wrong_and_the_others_are_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(op: Op, *args: Any) -> Any:
        raise RuntimeError("no kernel\nat all")

    assert "RuntimeError: no kernel" in _break(monkeypatch, "norm_quantize", wrong)[0]


def test_an_op_that_nobody_can_check_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPS, "new_op", OPS["quantize"])
    assert checks.wrong_ops("cpu", SMALL[:1]) == ["new_op: tools.bench does not know what it means"]


def test_memory_is_poisoned_and_the_setting_comes_back() -> None:
    with checks.poisoned():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


# --- single ops ---------------------------------------------------------------------------------


def test_ops_are_timed_beside_their_alternatives(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "ops.json", tmp_path / "page.md"
    argv = ["ops", tiny, "--batch", "4", "--json", str(out), "--markdown", str(page)]
    assert measured(*argv) == 0
    (run,) = load(out)
    M = 4 * TINY.tokens
    linears = [r for r in run.ops if r.op == "int8_linear"]
    assert {(r.M, r.N, r.K) for r in linears} == {
        (M, 96, 32),
        (M, 32, 32),
        (M, 64, 32),
        (M, 32, 64),
    }
    per_shape = [(r.variant, r.detail) for r in linears if (r.N, r.K) == (32, 64)]
    assert ("graphquant", "bias + residual") in per_shape
    assert {v for v, _ in per_shape} == {
        "graphquant", "bf16 F.linear", "torch._int_mm", "torch._scaled_mm fp8"
    }  # fmt: skip
    rows = [r for r in run.ops if r.N == 0]
    assert {r.op for r in rows} == {"quantize", "norm_quantize"}
    for r in rows:
        assert r.variant in ("graphquant", "copy") and not r.failed
        assert r.us and r.host_us and r.error is not None and r.error <= ops.MAX_STEPS
    (plain,) = (
        r for r in rows if r.op == "quantize" and not r.detail and r.variant == "graphquant"
    )
    details = {r.detail for r in rows if r.op == "quantize"}
    assert details == {"", "gelu", "gelu_tanh", "silu, gated"}
    assert plain.bytes == M * (2 * 32 + 32 + 8)  # bfloat16 in, int8 and two float32 a row out
    text = page.read_text()
    assert "**GEMMs**" in text and "**Quantizers**" in text
    assert "int8_linear" in capsys.readouterr().err


def test_a_wrong_op_is_not_timed() -> None:
    good = ops._linear(20, 32, 32, residual=True)
    off = replace(good.calls[0], run=lambda i: good.calls[0].run(i) * 1.1)
    none = replace(good.calls[1], run=lambda i: good.calls[1].run(i) * torch.nan)
    group = replace(good, calls=(off, none, good.calls[2]))
    wrong, nan, right = ops.measure(group, CpuTimer(), seconds=0.01)
    assert wrong.us is None and wrong.failed == "wrong: off by 0.1, may be 0.01"
    assert nan.us is None and nan.failed.startswith("wrong: off by inf")
    assert right.us and not right.failed


def test_what_rotates_is_larger_than_the_cache() -> None:
    assert ops.sets(10, 100) * 10 >= 300
    assert ops.sets(1000, 100) == 2
    assert ops.sets(1, 10**9) == ops.MOST_SETS


def test_every_shape_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ops.Group] = []
    monkeypatch.setattr(ops, "measure", lambda group, timer, seconds: seen.append(group) or [])
    done: list[Any] = []
    two = [TINY, replace(TINY, cls="another")]
    ops.run(two, [1, 2, 1], CpuTimer(), seconds=0.01, limit=Limit(), done=done.append)
    shapes = [(g.op, g.M, g.N, g.K, g.detail) for g in seen]
    assert len(shapes) == len(set(shapes)) == len(done) == 20


# --- timing -------------------------------------------------------------------------------------


def test_variants_take_turns_and_one_that_breaks_drops_out() -> None:
    calls: list[str] = []

    def broken() -> None:
        calls.append("b")
        if calls.count("b") > 7:
            raise RuntimeError("enough")

    found = interleaved(CpuTimer(), {"a": lambda: calls.append("a"), "b": broken}, 1e-9)
    assert "".join(calls) == "aaaaaaabbbbbbbaaaaaaabaaaaaaa"
    assert isinstance(found["b"], RuntimeError)
    samples = found["a"]
    assert isinstance(samples, list) and len(samples) == 15


# --- on a CPU -----------------------------------------------------------------------------------


class FakeClock(timing.CpuTimer):
    """The n-th call of all takes 10 ms more than n, by the clock, and half of that of the CPU."""

    def sample(self, call: Call) -> Sample:
        call()
        self.calls = getattr(self, "calls", 0) + 1
        return Sample(10.0 + self.calls, cpu_ms=5.0 + self.calls / 2)


CPU = {PROCESSOR: "a processor", ISA: "avx2"}


def cpu_run(*records: Encoder, **facts: str) -> Run:
    run = run_of(*(replace(r, threads=r.threads or 1) for r in records))
    return replace(run, header={**CPU, "date": "2026-01-01", **facts})


def on_cpu(variant: str, ms: float | None, cpu_ms: float | None, **more: Any) -> Encoder:
    return record(variant, ms, cpu_ms=cpu_ms, host_ms=None, peak_bytes=None, **more)


def test_a_call_on_the_cpu_has_two_times() -> None:
    timer = timing.CpuTimer(1)
    asleep = timer.sample(lambda: time.sleep(0.02))
    assert asleep.ms >= 20 and asleep.cpu_ms is not None and asleep.cpu_ms < 15
    assert timer.peak(lambda: None) is None and timer.fastest


def test_the_fastest_call_counts_on_a_cpu(tiny: str) -> None:
    row = Row(tiny, 1, ("eager", "graphquant-fp32"), layers=2)
    got = encoders.measure(row, FakeClock(1), seconds=0.001)
    assert [(r.threads, r.layers, r.failed) for r in got] == [(1, 2, "")] * 2
    # turns of five: the first call of each variant is its fastest
    assert [(r.ms, r.cpu_ms) for r in got] == [(11.0, 5.5), (16.0, 8.0)]
    assert all(r.cosine and r.cosine > 0.999 and r.host_ms is None for r in got)
    narrow, wide = got
    assert (narrow.int8, wide.int8) == (None, 13)
    assert narrow.weight_bytes and wide.weight_bytes
    assert wide.weight_bytes > 2 * narrow.weight_bytes  # float32, and int8 beside it


def test_a_whole_run_on_a_cpu(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    out, page = tmp_path / "run.json", tmp_path / "page.md"
    argv = [
        tiny,
        "--device",
        "cpu",
        "--threads",
        "1",
        "2",
        "1",
        "--batch",
        "2",
        "--seconds",
        "0.01",
    ]
    argv += ["--variants", "eager", "--json", str(out)]
    assert bench.main([*argv, "--markdown", str(page)], check=lambda device: []) == 0
    (run,) = load(out)
    assert asked == [1, 2] == [r.threads for r in run.encoders]
    assert all(r.ms and r.cpu_ms and r.right for r in run.encoders)
    assert run.header[PROCESSOR] and run.header[ISA] and "card" not in run.header
    assert "openvino" in run.header and run.machine in page.read_text()
    assert bench.main([*argv, "--skip-done", str(out)], check=lambda device: []) == 1  # all done
    assert asked == [1, 2]


@pytest.mark.parametrize("variant", [*RUNTIMES, "torchao-int8"])
def test_variants_of_missing_packages_are_left_out(
    variant: str,
    tiny: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    packages = RUNTIMES[variant][1] if variant in RUNTIMES else ("torchao",)
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    page = tmp_path / "page.md"
    argv = [tiny, "--variants", "eager", variant, "--markdown", str(page)]
    assert measured(*argv) == 0
    said = capsys.readouterr()
    assert f"{tiny} x 8 {variant}: skipped: {packages[0]} is not installed" in said.err
    assert "eager" in said.out and variant not in said.out
    assert f"| {variant} |" not in page.read_text()


def test_bfloat16_in_openvino_is_for_processors_with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    with pytest.raises(variants.MissingError, match="no AMX"):
        variants.prepare("openvino-bf16", nn.Linear(2, 2))
    assert isinstance(variants.prepare("openvino-int8", nn.Linear(2, 2)).run, Runtime)


@pytest.mark.parametrize("variant", RUNTIMES)
def test_other_runtimes_compute_the_same(variant: str, tiny: str) -> None:
    for package in RUNTIMES[variant][1]:
        pytest.importorskip(package)
    (got,) = encoders.measure(Row(tiny, 2, (variant,)), timing.CpuTimer(1), seconds=0.001)
    if got.failed.startswith(SKIPPED):
        pytest.skip(got.failed)
    assert not got.failed and got.ms and got.weight_bytes is None
    assert got.cosine and got.cosine > 0.99
    assert got.cosine < 1 or variant == "openvino-bf16", "int8 rounds"


def test_a_cpu_has_a_table_for_each_machine_and_number_of_threads() -> None:
    first = cpu_run(
        on_cpu("fp32-default", 30.0, 28.0),
        on_cpu("bf16-default", 20.0, 35.0, spread=0.5),
        on_cpu("graphquant-fp32", 10.0, 14.0, linears=25, int8=25),
        on_cpu("openvino-int8", None, None, failed=f"{SKIPPED}nncf is not installed"),
        on_cpu("onnxruntime-int8", 5.0, 5.0, cosine=0.9),
        on_cpu("fp32-default", 16.0, 31.0, threads=2),
        on_cpu("graphquant", 8.0, 16.0, threads=2),
    )
    lesser = cpu_run(
        on_cpu("fp32-default", 40.0, 40.0), on_cpu("graphquant", 50.0, 50.0), **{ISA: "x"}
    )
    gpu = run_of(record("bf16-default", 3.0), record("graphquant", 1.5))
    text = write.page([gpu, first, lesser], "gpu.png", "cpu.png")
    head, _, rest = text.partition("## On a CPU")
    section, _, after = rest.partition("## Ops")
    assert "](gpu.png)" in head and "](cpu.png)" in section and "2.00x" in head
    assert [line for line in section.splitlines() if line.startswith("**a processor")] == [
        "**a processor, avx2, 1 thread**",
        "**a processor, avx2, 2 threads**",
        "**a processor, x, 1 thread**",
    ]
    row = "| vit-b-16 | 64 x 197 | {} |"
    # by the clock over bfloat16, by the processor's time over float32
    ours = "10.00 | 2.00x | 14.00 | 2.00x | 0.99990 | - | 25 of 25 | 3 |"
    assert f"{row.format('graphquant-fp32')} {ours}" in section
    assert f"{row.format('bf16-default')} 20.00 | 1 (baseline) | 35.00 | 0.80x |" in section
    assert f"{row.format('onnxruntime-int8')} 5.000 | - | 5.000 | - | 0.90000" in section
    assert f"{row.format('graphquant')} 8.000 | 2.00x | 16.00 | 1.94x" in section
    assert f"{row.format('graphquant')} 50.00 | 0.80x" in section
    assert (
        "| processor | a processor | a processor |" in section and "openvino-int8 |" not in section
    )
    assert "a processor" not in head + after and "a card" in after


@needs_matplotlib
def test_gpus_and_cpus_have_a_chart_each(tmp_path: Path) -> None:
    run = cpu_run(*(on_cpu(v, 1.0, 1.0) for v in ("fp32-default", *variants.CPU_USUAL[2:])))
    ((label, some),) = write.bars([run])
    assert label == "vit-b-16\n64 x 197 tokens, avx2, 1 thread\nover fp32-default"
    assert set(some) == set(variants.CPU_USUAL[2:])
    chart = tmp_path / "chart.png"
    assert write.draw_all([run], chart) == (None, tmp_path / "chart-cpu.png")
    gpu = run_of(record("bf16-default", 3.0), record("graphquant", 1.5))
    assert write.draw_all([run, gpu], chart) == (chart, tmp_path / "chart-cpu.png")
    assert all(p.read_bytes().startswith(PNG) for p in tmp_path.iterdir())


def test_the_instruction_set_may_be_forced_and_is_part_of_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unset(monkeypatch)
    monkeypatch.setenv("GRAPHQUANT_CPU_ISA", "avx2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    said = header(["--preset", "cpu"])["command"]
    assert (
        said == "GRAPHQUANT_CPU_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python -m tools.bench --preset cpu"
    )


# --- records ------------------------------------------------------------------------------------

OP = OpTime("int8_linear", 577, 4096, 1024, "graphquant", 10.0, "bias", host_us=5.0, bytes=1)
FLOAT_OP = replace(OP, variant="bf16 F.linear", us=12.5)


def test_records_come_back_from_json_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "new" / "records.json"
    runs = [
        run_of(
            record("graphquant", 1.2345, linears=7, int8=6, coverage=0.9, cached=True),
            record("eager", None, failed='it said: "{no}" [1]'),
            OP,
            wrong_ops=["quantize: {off}"],
        ),
        run_of(),
    ]
    save(runs, file)
    assert load(file) == runs
    assert list(file.parent.iterdir()) == [file]
    lines = [line for line in file.read_text().splitlines() if '"variant"' in line]
    assert len(lines) == 3  # one for each record
    assert set(json.loads(lines[2])) == {
        "op", "M", "N", "K", "variant", "us", "detail", "host_us", "bytes"
    }  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "[]", '{"runs": [{}]}', '{"runs": [{"wrong_ops": [], "encoders": [{"x": 1}]}]}']
)
def test_a_file_that_holds_no_runs_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "records.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="is not a file of runs"):
        load(file)
    if importlib.util.find_spec("matplotlib"):
        with pytest.raises(SystemExit, match="2"):
            bench.main(["write", str(file)])
        assert "is not a file of runs" in capsys.readouterr().err


def test_merging_keeps_each_run_once_oldest_first() -> None:
    old, new = run_of(OP, date="2026-01-01"), run_of(OP, date="2026-02-01")
    assert merge([new, old, run_of(OP, date="2026-02-01")]) == [old, new]


def test_the_newest_record_is_shown_with_the_ratio_of_its_own_run() -> None:
    old = run_of(record("bf16-default", 4.0), record("graphquant", 2.0))
    new = run_of(
        record("bf16-default", 3.0),
        record("torchao-int8", 6.0),
        record("graphquant", None, failed="out of memory"),
        date="2026-02-01",
    )
    lines = {n.record.variant: n for n in latest([old, new], "encoders")}
    assert {v: n.number for v, n in lines.items()} == {
        "bf16-default": 2, "graphquant": 1, "torchao-int8": 2
    }  # fmt: skip
    assert lines["bf16-default"].record.ms == 3.0
    assert write.speedup_text(lines["graphquant"]) == "2.00x"  # over 4.0, not over 3.0
    assert write.speedup_text(lines["torchao-int8"]) == "0.50x"


def test_a_time_with_nothing_beside_it_does_not_replace_one_that_was_compared() -> None:
    old = run_of(record("bf16-default", 4.0), record("graphquant", 2.0))
    new = run_of(
        record("bf16-default", None, failed="RuntimeError"),
        record("graphquant", 1.9),
        record("eager", None, failed="RuntimeError"),
        date="2026-02-02",
    )
    lines = latest([old, new], "encoders")
    assert {n.record.variant: n.number for n in lines} == {
        "bf16-default": 1, "graphquant": 1, "eager": 2
    }  # fmt: skip


def test_whole_models_beside_cut_ones_are_distinguished() -> None:
    run = run_of(record("eager", 4.0), record("eager", 1.0, layers=2))
    whole, cut = (Line(r, run, 1) for r in run.encoders)
    assert write._title("Encoders", [whole]) == "Encoders"
    assert write._title("Encoders", [cut]).startswith("Encoders (models cut to 2 layers:")
    assert write._title("Encoders", [cut, whole]).startswith(
        "Encoders (some models cut to 2 layers:"
    )


def test_what_was_not_run_for_lack_of_time_is_not_shown() -> None:
    late = run_of(record("bf16-default", 4.0), record("graphquant", None, failed=LATE))
    assert [n.record.variant for n in latest([late], "encoders")] == ["bf16-default"]


def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests run with is no part of a command."""
    for name in ("SELECT", "STRICT", "VERIFY"):
        monkeypatch.delenv(f"GRAPHQUANT_{name}", raising=False)


def test_the_header_says_with_what_but_not_where_to(monkeypatch: pytest.MonkeyPatch) -> None:
    unset(monkeypatch)
    found = header(["ops", "--json", "/a/path.json", "--chart=/b/c.png", "--batch", "1"])
    assert found["command"] == "python -m tools.bench ops --batch 1"
    for name in ("card", "driver", "torch", "triton", "transformers", "torchao", "date"):
        assert found[name]
    for of in (found, header([], on_cpu=True)):
        assert of["python"] == platform.python_version()
        assert of["graphquant"] == graphquant.__version__


def test_settings_in_the_environment_are_part_of_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS", "ATEN,CPP")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere")
    unset(monkeypatch)
    said = header(["ops"])["command"]
    assert said == "TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS=ATEN,CPP python -m tools.bench ops"


def test_a_reason_is_one_short_line_without_paths() -> None:
    assert reason(ValueError("\n  in /home/me/x.py: no\nmore")) == "ValueError: in ...: no"
    assert len(reason(ValueError("x" * 1000))) == 200


# --- Markdown and the chart ---------------------------------------------------------------------


def test_markdown_holds_what_the_records_say() -> None:
    copied = OpTime("quantize", 46656, 0, 1152, "copy", 40.0, bytes=160_000_000)
    ours = replace(copied, variant="graphquant", us=50.0, error=0.5, host_us=8.0)
    text = write.page(
        [
            run_of(
                record("bf16-default", 3.0, spread=0.2),
                record("graphquant", 1.5, linears=73, int8=72, spread=0.01, cached=True),
                OP, FLOAT_OP, copied, ours,
            )
        ],
        "performance.png",
    )  # fmt: skip
    assert "![speed-ups over the fastest bfloat16 variant](performance.png)" in text
    encoder = "| vit-b-16 | 64 x 197 | {} | - | 1 | 2 | 0.50 | {} |"
    base = "bf16-default | 3.000 ± 10 % | 1 (baseline) | 0.99990"
    assert encoder.format(base, "- | 3") in text
    fast = "graphquant | 1.500 | 2.00x | 0.99990"
    assert encoder.format(fast, "72 of 73 | 3 (cached)") in text
    # 2 * 577 * 4096 * 1024 operations in 10 us
    assert "| 577 x 4096 x 1024 | graphquant | bias | 10.0 | 484 | 1.25x | - | 5.0 |" in text
    # 160 MB in 50 us; a copy of as much takes 40
    assert "| quantize |  | 46656 x 1152 | 50.0 | 40.0 | 80% | 3.20 | 0.500 | 8.0 |" in text
    assert "$" not in text.replace("$TORCHINDUCTOR", "")
    for row in (line for line in text.splitlines() if line.startswith("|")):
        assert row.endswith(" |")


def test_tables_have_as_many_cells_as_columns() -> None:
    rows = [
        record("eager", 1.0), record("graphquant", None, failed="no [red]memory[/]"),
        OP, replace(OP, us=None, failed="no"),
        OpTime("quantize", 4, 0, 32, "graphquant", 1.0),
        OpTime("quantize", 8, 0, 32, "graphquant", failed="no"),
    ]  # fmt: skip
    run = run_of(*rows)
    for number in (1, 2):
        for sheet in write.sheets(Line(r, run, number) for r in run.records):
            assert {len(row) for row in sheet.rows} == {len(sheet.columns)}
            assert ("run" in sheet.columns) == (number == 2)
    for line in (Line(r, run, 1) for r in run.records):
        assert "None" not in write.one_line(line)
    for sheet in write.sheets(Line(r, run, 1) for r in run.records):
        assert write.for_terminal(sheet).row_count


def test_without_ops_or_encoders_the_page_says_so() -> None:
    assert write.page([]).count("Not measured yet.") == 3


@needs_matplotlib
def test_write_merges_and_regenerates_page_and_chart(tmp_path: Path) -> None:
    first, second = tmp_path / "one.json", tmp_path / "two.json"
    save([run_of(record("bf16-default", 3.0), record("graphquant", 1.5))], first)
    save([run_of(OP, date="2026-02-01")], second)
    file = tmp_path / "docs" / "performance.json"
    argv = ["write", str(file), "--add", str(second), str(first)]
    assert bench.main(argv) == 0
    assert [len(r.encoders) for r in load(file)] == [2, 0]
    text, picture = (file.with_suffix(s) for s in (".md", ".png"))
    assert "](performance.png)" in text.read_text() and "2.00x" in text.read_text()
    assert picture.read_bytes().startswith(PNG)
    before = [f.read_bytes() for f in (file, text, picture)]
    assert bench.main(argv) == 0  # the same runs again
    assert bench.main(["write", str(file)]) == 0
    assert [f.read_bytes() for f in (file, text, picture)] == before


@needs_matplotlib
def test_no_chart_is_drawn_of_nothing(tmp_path: Path) -> None:
    file = tmp_path / "chart.png"
    assert not write.draw([run_of(record("graphquant", 1.0))], file)
    assert not file.exists()


def test_a_bar_names_its_baseline_and_a_cut_model() -> None:
    run = run_of(
        record("bf16-max-autotune", 3.0, layers=2),
        record("torchao-int8", 6.0, layers=2),
        record("graphquant", 1.5, layers=2),
    )
    ((label, some),) = write.bars([run])
    assert label == "vit-b-16, cut to 2 layers\n64 x 197 tokens\nover bf16-max-autotune"
    assert some == {"graphquant": 2.0, "torchao-int8": 0.5}


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["vit-b-61"], "no model vit-b-61: there are siglip-so400m, "),
        (["vit-b-16", "--variants", "bf17"], "invalid choice: 'bf17'"),
        (["vit-b-16", "--batch", "0"], "0 is not a whole number of at least 1"),
        (["--seconds", "0"], "0 is not a number above 0"),
        (["--layers", "-1"], "-1 is not a whole number of at least 1"),
        (["--preset", "headlines"], "invalid choice: 'headlines'"),
        (["vit-b-16", "--preset", "headline"], "--preset names models"),
        (["--preset", "cpu", "headline"], "some of these presets are for a GPU"),
        (["--preset", "headline", "--batch", "1"], "--preset names models"),
        (["--skip-done", "no/such.json"], "no/such.json"),
        (["--device", "gpu"], "invalid choice: 'gpu'"),
        (["--threads", "0"], "0 is not a whole number of at least 1"),
        (["ops", "--device=cpu"], "unrecognized arguments"),
        (["ops", "vit-b-61"], "no model vit-b-61"),
        (["ops", "--preset=headline"], "unrecognized arguments"),
        (["write"], "FILE.json"),
        (["write", "no/such.json"], "no/such.json"),
    ],
)
def test_wrong_arguments_are_refused(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if said == "no/such.json" and argv[0] == "write":
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match="2"):
        bench.main(argv, timer=CpuTimer())
    assert said in capsys.readouterr().err


def test_without_a_gpu_nothing_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = (["vit-b-16", "--device", "cuda"], ["--preset", "headline"], ["ops"])
    assert [bench.main(argv) for argv in asked] == [3, 3, 3]
    assert capsys.readouterr().err.count("NOTHING WAS TIMED") == 3
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--preset", "cpu", "--jobs", "2"])
    assert "--jobs is for a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_what_there_is(name: str) -> None:
    rows = PRESETS[name]
    assert len({(r.model, r.batch) for r in rows}) == len(rows)
    for row in rows:
        assert row.model in MODELS
        assert set(row.variants) <= set(VARIANTS)
        assert set(row.variants) & set(FLOAT), "a row without a baseline"
        assert any(v.startswith("graphquant") for v in row.variants)


def test_every_variant_is_known_to_prepare() -> None:
    for name in set(VARIANTS) - set(variants.TORCHAO) - set(RUNTIMES):
        assert variants.prepare(name, nn.Linear(2, 2)).module
    with pytest.raises(ValueError, match="no variant 'x': there are eager, bf16-default"):
        variants.prepare("x", nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="NOT RUN: needs g++")
def test_packages_are_measured_like_other_variants(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    names = ["bf16-aoti", "graphquant-aoti", "graphquant-standalone"]
    assert measured(tiny, "--batch", "2", "--variants", *names, "--json", str(out)) == 0
    floats, ops_, alone = load(out)[0].encoders
    assert all(r.right for r in (floats, ops_, alone))
    assert ops_.int8 == alone.int8 == 7 and floats.int8 is None
    assert floats.weight_bytes > alone.weight_bytes > 0
    assert ops_.weight_bytes >= alone.weight_bytes  # packed for a CPU: in whole panels


@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_tokens_they_claim(name: str) -> None:
    """One layer, cut thin by transformers' own configs, on the meta device."""
    model = MODELS[name].cut(1)
    with torch.device("meta"):
        net = models.build(model, "meta")
    given = models.inputs(model, 2, "cpu")
    if (mask := given.pop("attention_mask", None)) is not None:  # transformers looks into it
        assert mask[0].all() and mask.shape == (2, model.tokens)
    kwargs = {k: v.to("meta") for k, v in given.items()}
    with torch.inference_mode():
        shape = net(**kwargs)[0].shape
    if name == "sam-vit-b":  # an image of features
        shape = (shape[0], shape[2] * shape[3], model.hidden)
    assert shape == (2, model.tokens, model.hidden)
