"""CUDA graphs replay at fixed addresses: weights must be known as static, and stay in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

import graphquant
from tests import zoo
from tests.small import FAR, NEAR, Mlp, again, error, seeded


@pytest.mark.parametrize("name", [pytest.param("siglip", marks=pytest.mark.slow), "bert", "dinov2"])
def test_every_weight_is_a_static_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not would be copied into the graph's own memory on every call."""
    seen: list[tuple[int, int]] = []

    def spy(gm: Any, inputs: Any, **kwargs: Any) -> Any:
        seen.append((len(inputs), len(kwargs["static_input_idxs"])))
        return compile_fx_inner(gm, inputs, **kwargs)

    def compiled(gm: Any, inputs: Any, options: Any) -> Any:
        options = {**options, "force_disable_caches": True}  # a cache hit would pass the spy by
        return compile_fx(gm, inputs, inner_compile=spy, config_patches=options)

    monkeypatch.setattr(torch._inductor, "compile", compiled)
    entry = zoo.SMALL[name]
    model = entry.build("sdpa")
    args, kwargs = entry.inputs(2)
    torch._dynamo.reset()
    with torch.inference_mode():
        torch.compile(model, backend="graphquant", fullgraph=True)(*args, **kwargs)
    arguments = sum(isinstance(v, torch.Tensor) for v in (*args, *kwargs.values()))
    ((inputs, static),) = seen
    assert static == inputs - arguments
    assert static > 20


@pytest.mark.cuda
def test_replay_follows_a_weight_that_changes() -> None:
    model = seeded(Mlp).to("cuda")
    x = torch.randn(8, 64, device="cuda")
    torch._dynamo.reset()
    run = torch.compile(model, backend="graphquant", mode="reduce-overhead")
    with torch.inference_mode():
        for _ in range(4):  # warm up, record, replay
            before = run(x).clone()
        assert error(before, again(model)(x)) < NEAR
    with torch.no_grad():
        model.fc1.weight.copy_(torch.randn_like(model.fc1.weight))
    with torch.inference_mode():
        want = again(model)(x)
        assert error(before, want) > FAR
        assert error(run(x).clone(), want) < NEAR
        model.fc2.weight.data += 1
        graphquant.refresh(model)
        assert error(run(x).clone(), again(model)(x)) < NEAR
