"""The model table: every entry builds, runs, and is the same each time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests import zoo
from tests.models import UNUSUAL

TRUE = [pytest.param(e, id=f"{n}@true", marks=pytest.mark.slow) for n, e in zoo.TRUE_WIDTH.items()]
QUICK = [
    pytest.param(
        entry,
        id=f"{name}@{title}",
        marks=() if title == "small" or name in UNUSUAL else pytest.mark.slow,
    )
    for title in ("small", "extra")
    for name, entry in zoo.TABLES[title].items()
]
ENTRIES = QUICK + TRUE


def tensors(tree: object) -> list[Tensor]:
    """The tensors of a nested structure."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def run(model: nn.Module, inputs: zoo.Inputs) -> list[Tensor]:
    """The tensors that a model returns."""
    args, kwargs = inputs
    with torch.inference_mode():
        return tensors(model(*args, **kwargs))


def check_weights(model: nn.Module) -> None:
    """Everything float32, and no parameter that a mistake could hide behind."""
    assert not any(module.training for module in model.modules())
    for name, param in model.named_parameters():
        assert param.dtype == torch.float32, name
        assert torch.isfinite(param).all(), name
        assert param.numel() == 1 or param.std() > 0, f"{name} is constant"


@pytest.mark.parametrize("entry", ENTRIES)
def test_entry(entry: zoo.Entry) -> None:
    state = torch.get_rng_state()
    first = entry.build(entry.attns[0])
    second = entry.build(entry.attns[-1])
    assert torch.equal(state, torch.get_rng_state())

    check_weights(first)
    assert first is not second
    weights, again = first.state_dict(), second.state_dict()
    assert weights.keys() == again.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, again[name]), name

    inputs = entry.inputs(2)
    for model in (first, second):
        out = run(model, inputs)
        assert out
        assert all(torch.isfinite(x).all() for x in out if x.is_floating_point())


@pytest.mark.parametrize("entry", QUICK)
def test_inputs(entry: zoo.Entry) -> None:
    one, three, again = (tensors(entry.inputs(batch)) for batch in (1, 3, 3))
    assert any(x.shape[0] == 3 for x in three)
    for small, large, same in zip(one, three, again, strict=True):
        assert large.numel() == 3 * small.numel()
        assert torch.equal(large, same)
        assert large.data_ptr() != same.data_ptr()


@pytest.mark.parametrize(
    "entry", [e for e in zoo.SMALL.values() if len(e.attns) == 2], ids=lambda e: e.name
)
def test_switch(entry: zoo.Entry) -> None:
    """Both attention implementations compute the same thing."""
    inputs = entry.inputs(2)
    pair = [run(entry.build(attn), inputs)[0] for attn in zoo.BOTH]
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


def test_load_names() -> None:
    assert zoo.load("vit") is zoo.SMALL["vit"]
    assert zoo.load("mpnet") is zoo.EXTRA["mpnet"]
    assert zoo.load("vit_b") is zoo.TRUE_WIDTH["vit_b"]
    assert zoo.load("qwen2_5_vl") is zoo.SMALL["qwen2_5_vl"]
    assert zoo.load("qwen2_5_vl@true") is zoo.TRUE_WIDTH["qwen2_5_vl"]
    with pytest.raises(KeyError, match="no model 'vitt'"):
        zoo.load("vitt")
    with pytest.raises(KeyError, match="no table"):
        zoo.load("vit@big")
