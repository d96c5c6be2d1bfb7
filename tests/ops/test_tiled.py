"""Tiles: the best guess is taken until something was measured, then the fastest that is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphquant.ops import int8_linear
from graphquant.ops.define import load_kernels
from graphquant.ops.int8_linear import tiled
from graphquant.ops.int8_linear.tiled import KERNELS, Operands, Problem, Tiled, _random, _tile, tune

CPU = torch.device("cpu")
PROBLEM = Problem(6, 24, 40, torch.bfloat16, torch.float32, True)

load_kernels()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Tiled:
    ran: list[str] = []
    made = Tiled(lambda o, dtype: None, lambda p, d: ["guess", "other", "third"], ran.append)
    monkeypatch.setitem(KERNELS, "made", made)
    return made


def arguments(o: Operands, problem: Problem) -> list[Any]:
    return int8_linear.join(o, (problem.dtype,))


def known(monkeypatch: pytest.MonkeyPatch, answer: dict[str, float] | None) -> None:
    monkeypatch.setattr(tiled, "recall", lambda question, device: answer)


def test_without_a_measurement_the_best_guess_is_taken(
    kernel: Tiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    for nothing in (None, {}, {"a tile of another version": 1.0}, {"other": -1.0}):
        known(monkeypatch, nothing)
        assert _tile("made", kernel, PROBLEM, CPU) == "guess"


def test_what_was_measured_to_be_the_fastest_is_taken(
    kernel: Tiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(monkeypatch, {"guess": 3.0, "other": 2.0, "third": -1.0, "gone": 1.0})
    assert _tile("made", kernel, PROBLEM, CPU) == "other"


def test_each_kernel_and_each_product_is_a_question_of_its_own() -> None:
    wider = Problem(6, 32, 40, torch.bfloat16, torch.float32, True)
    plain = Problem(6, 24, 40, torch.bfloat16, None, False)
    asked = [p.question(k) for p in (PROBLEM, wider, plain) for k in ("hopper", "triton")]
    assert len(set(asked)) == 6


@pytest.mark.parametrize("problem", [PROBLEM, Problem(1, 8, 3, torch.float32, None, False)])
def test_a_problem_is_read_off_its_operands(problem: Problem) -> None:
    o = _random(problem, CPU)
    assert Problem.of(o, problem.dtype) == problem
    int8_linear.check(*arguments(o, problem))


@pytest.mark.parametrize("name", ["triton", "triton_tma", "hopper"])
def test_every_kernel_has_tiles_for_every_product(name: str) -> None:
    assert [k.name for k in int8_linear.kernels] == ["hopper", "triton_tma", "triton"]
    for M in (1, 100, 50_000):
        for dtype in (torch.bfloat16, torch.float32):
            for N in (24, 25, 4304):
                found = KERNELS[name].tiles(Problem(M, N, 1152, dtype, None, False), CPU)
                assert found and len({str(t) for t in found}) >= min(len(found) - 1, 2)


def test_tuning_runs_every_tile_of_the_kernel_that_the_product_gets(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = torch.empty(0, device=device).device
    asked: list[Any] = []

    def times(question: str, device: torch.device, candidates: Any) -> dict[str, float]:
        asked.append((question, {name: call() for name, call in candidates.items()}))
        return {name: float(i) for i, name in enumerate(candidates, 1)}

    monkeypatch.setattr(tiled, "times", times)
    found = tune(PROBLEM, where)
    ((question, ran),) = asked
    kernel = int8_linear.choose(*arguments(_random(PROBLEM, where), PROBLEM)).name
    assert question == PROBLEM.question(kernel)
    assert list(found) == list(ran) and len(found) > 1


@pytest.mark.cuda
def test_what_was_tuned_is_what_runs(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    problem, device = Problem(300, 256, 512, torch.bfloat16, None, True), torch.device("cuda:0")
    found = {name: us for name, us in tune(problem, device).items() if us > 0}
    o = _random(problem, device)
    name = int8_linear.choose(*arguments(o, problem)).name
    tile = _tile(name, KERNELS[name], problem, device)
    assert len(found) > 2 and found[str(tile)] == min(found.values())
    y = int8_linear(*arguments(o, problem))
    for other in KERNELS[name].tiles(problem, device):
        again = torch.empty_like(y)
        KERNELS[name].run(other, o, again)
        torch.testing.assert_close(again, y, rtol=2**-7, atol=1e-2)
