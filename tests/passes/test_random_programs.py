"""Random programs: what comes back is what eager gives, in values, layout, aliases and state."""

from __future__ import annotations

import os
from typing import Any

import torch
from hypothesis import assume, given, note, settings
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.models import relative
from tests.passes.simulated import Int8Linears
from tests.programs import Program, programs

CALLS = 2  # the second one sees the state that the first one left
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
TOO_ROUGH = 0.3  # above this relative error of int8 itself, results are not compared


def seen(program: Program, run: Any, model: nn.Module) -> list[Any]:
    """All that a caller can see after each call: results, inputs and what the module keeps."""
    found: list[Any] = []
    inputs = program.inputs()
    for _ in range(CALLS):
        with getattr(torch, program.mode)():
            results = run(*inputs)
        kept = [getattr(model, name, None) for name in ("state", "mem", "count", "token")]
        found += tree_leaves((inputs, kept, results))
    return found


def layout(found: list[Any]) -> list[Any]:
    """Shape, dtype and strides of every tensor, and the first one that shares its memory."""
    owners: dict[int, int] = {}
    result: list[Any] = []
    for i, value in enumerate(found):
        if isinstance(value, Tensor):
            owner = owners.setdefault(value.untyped_storage()._cdata, i)
            steps = [s for s, n in zip(value.stride(), value.shape, strict=True) if n != 1]
            result.append((i, tuple(value.shape), value.dtype, steps, f"memory of {owner}"))
        else:
            result.append((i, value))
    return result


def compiled(program: Program, backend: str, **options: Any) -> list[Any]:
    torch._dynamo.reset()
    model = program.build()
    extra = {"options": options} if options else {}
    return seen(program, torch.compile(model, backend=backend, dynamic=False, **extra), model)


def check(program: Program) -> None:
    """Raises AssertionError where graphquant shows a caller anything else than eager does."""
    model = program.build()
    try:
        want = seen(program, model, model)
    except (RuntimeError, IndexError):
        assume(False)  # no program at all, such as one that writes into an expanded tensor
    with Int8Linears():
        model = program.build()
        rounded = seen(program, model, model)
    got = compiled(program, "graphquant", inner="eager", quantize=program.quantize)
    assert len(got) == len(want)
    triples = enumerate(zip(got, want, rounded, strict=True))
    faults = [f for i, triple in triples if (f := wrong(i, program, *triple))]
    if not faults and layout(got) != layout(want):
        right = layout(compiled(program, "aot_eager"))
        pairs = zip(layout(got), right, strict=True)
        faults = [f"{g}, with aot_eager {r}" for g, r in pairs if g != r]
    assert not faults, "\n".join(faults)


def wrong(i: int, program: Program, got: Any, want: Any, rounded: Any) -> str:
    """What is wrong with the i-th value that is seen, or ""."""
    if not isinstance(want, Tensor):
        return "" if got == want else f"value {i} is {got}, not {want}"
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        return f"value {i} is {got.dtype} {got.shape}, not {want.dtype} {want.shape}"
    least = relative(rounded.float(), want.float()) if program.quantize else 0.0
    error = relative(got.float(), want.float())
    if least < TOO_ROUGH and not error <= 2 * least + (0.01 if program.quantize else 1e-4):
        return f"value {i} has an error of {error:.3g}, int8 alone of {least:.3g}"
    return ""


@settings(max_examples=2000 if NIGHTLY else 60, derandomize=not NIGHTLY)
@given(programs)
def test_a_random_program_is_seen_as_eager_is(program: Program) -> None:
    note(repr(program))
    check(program)
