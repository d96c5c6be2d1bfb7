"""Adapters of PEFT are merged, unmerged and swapped behind our back, and the next call is right.

PEFT writes through `.data`, which leaves no trace on a parameter. What is computed is compared with
the same PEFT model in float.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from tests.small import FAR, NEAR, Mlp, error, int8, seeded

LAYERS = ["fc1", "fc2"]


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(autouse=True)
def _announced_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are not compared, as on a GPU at the next call: PEFT's writes are known of."""
    monkeypatch.setattr(
        "graphquant.weights.versions.values_of", lambda tensors: [None] * len(tensors)
    )


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(
        target_modules=LAYERS, init_lora_weights=False, r=4, lora_alpha=16, **options
    )  # fmt: skip


def adapted(device: str, config: Any = None, names: tuple[str, ...] = ("default",)) -> Any:
    """A PEFT model with adapters that are not zero."""

    def make() -> Any:
        model = get_peft_model(Mlp(), config or lora(), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config or lora())
        return model

    return seeded(make).to(device).eval()


def check(run: Callable[..., Any], model: nn.Module, x: Tensor) -> Tensor:
    """The compiled model computes what the model computes now."""
    want: Tensor = model(x)
    for _ in range(2):
        assert error(run(x), want) < NEAR
    return want


def test_merge_and_unmerge(device: str, x: Tensor) -> None:
    model = adapted(device)
    base = model.base_model.model
    run = int8(base)
    first = check(run, base, x)
    model.merge_adapter()
    assert error(check(run, base, x), first) < NEAR  # the adapter is another part of the model now
    model.unmerge_adapter()
    check(run, base, x)


def test_merge_while_the_linear_alone_is_compiled(device: str, x: Tensor) -> None:
    """Nothing but the values of the weight changes."""
    model = adapted(device)
    layer = model.base_model.model.fc1
    run = int8(layer.base_layer)
    old = check(run, layer.base_layer, x)
    layer.merge()
    merged = check(run, layer.base_layer, x)
    assert error(old, merged) > FAR
    layer.unmerge()
    assert error(merged, check(run, layer.base_layer, x)) > FAR


def test_one_adapter_after_another(device: str, x: Tensor) -> None:
    model = adapted(device, names=("a", "b"))
    linear = model.base_model.model.fc1.base_layer
    run = int8(linear)
    seen = [check(run, linear, x)]
    for name in ("a", "b", "a"):
        model.merge_adapter([name])
        seen.append(check(run, linear, x))
        model.unmerge_adapter()
    assert error(seen[1], seen[2]) > FAR
    assert error(seen[1], seen[3]) < NEAR
    check(run, linear, x)


def test_an_adapter_that_comes_and_goes_between_two_calls(device: str, x: Tensor) -> None:
    model = seeded(Mlp).to(device).eval()
    run = int8(model)
    old = check(run, model, x)
    seeded(lambda: get_peft_model(model, lora())).merge_and_unload()
    assert error(check(run, model, x), old) > FAR


@pytest.mark.parametrize(
    "config",
    [
        lora(use_dora=True),
        LoHaConfig(target_modules=LAYERS, init_weights=False, r=4, alpha=16),
        IA3Config(target_modules=LAYERS, feedforward_modules=[], init_ia3_weights=False),
        OFTConfig(target_modules=LAYERS, init_weights=False, r=4, oft_block_size=0),
        VeraConfig(target_modules=["fc1"], init_weights=False, r=4, d_initial=2.0),
    ],
    ids=["dora", "loha", "ia3", "oft", "vera"],
)
@pytest.mark.parametrize("safe", [False, True], ids=["", "safe"])
def test_other_kinds_of_adapters(config: Any, safe: bool, device: str, x: Tensor) -> None:
    model = adapted(device, config)
    linear = model.base_model.model.fc1.base_layer
    run = int8(linear)
    old = check(run, linear, x)
    model.merge_adapter(safe_merge=safe)
    merged = check(run, linear, x)
    assert error(old, merged) > NEAR
    model.unmerge_adapter()
    check(run, linear, x)


def test_an_initialization_that_takes_from_the_weight(device: str, x: Tensor) -> None:
    """OLoRA subtracts its adapter from the weight, in place, when it is added."""
    model = seeded(Mlp).to(device).eval()
    run = int8(model.fc1)
    linear = model.fc1
    old = check(run, linear, x)
    get_peft_model(model, LoraConfig(target_modules=LAYERS, init_lora_weights="olora", r=16))
    assert error(check(run, linear, x), old) > FAR


def test_hot_swap(device: str, x: Tensor, tmp_path: Path) -> None:
    first, second = (adapted(device), adapted(device))
    for p in second.parameters():
        p.copy_(torch.randn_like(p) / 8)
    second.save_pretrained(tmp_path)
    run = int8(first)
    old = check(run, first, x)
    hotswap_adapter(first, str(tmp_path), adapter_name="default", torch_device=device)
    assert error(check(run, first, x), old) > FAR


def test_disable_adapter(device: str, x: Tensor) -> None:
    model = adapted(device)
    run = int8(model)
    on = check(run, model, x)
    with model.disable_adapter():
        off = check(run, model, x)
    assert error(on, off) > FAR
    assert error(check(run, model, x), on) < NEAR


def test_disabled_while_merged(device: str, x: Tensor) -> None:
    """Then the layer's forward itself unmerges."""
    model, twin = adapted(device), adapted(device)
    run = int8(model)
    on = check(run, model, x)
    for m in (model, twin):
        m.merge_adapter()
    assert error(check(run, model, x), on) < NEAR
    with model.disable_adapter(), twin.disable_adapter():
        want = twin(x)
        for _ in range(2):
            assert error(run(x), want) < NEAR
    assert error(want, on) > FAR
    assert error(run(x), twin(x)) < NEAR


def test_adapters_that_are_added_chosen_weighted_and_deleted(device: str, x: Tensor) -> None:
    model = adapted(device, names=("a", "b"))
    run = int8(model)
    seen = [check(run, model, x)]
    model.set_adapter("b")
    seen.append(check(run, model, x))
    model.add_weighted_adapter(["a", "b"], [1.0, -1.0], "c", combination_type="linear")
    model.set_adapter("c")
    seen.append(check(run, model, x))
    model.delete_adapter("c")
    model.add_weighted_adapter(["a", "b"], [-1.0, 2.0], "c", combination_type="linear")
    model.set_adapter("c")
    seen.append(check(run, model, x))
    assert all(error(a, b) > FAR for a, b in itertools.pairwise(seen))


def test_adapters_that_are_gone_leave_no_packs(device: str, x: Tensor) -> None:
    model = adapted(device)
    run = int8(model)
    sizes = []
    for _ in range(6):
        model.add_adapter("next", lora())
        model.set_adapter("next")
        run(x)
        model.delete_adapter("next")
        model.set_adapter("default")
        run(x)
        gc.collect()
        packed = [t for t in gc.get_objects() if type(t) is Tensor and t.dtype == torch.int8]
        sizes.append(sum(t.untyped_storage().nbytes() for t in packed))
    assert 0 < max(sizes) < 2 * sizes[0]


def test_a_kind_of_layer_that_is_defined_later_is_followed(device: str, x: Tensor) -> None:
    linear = seeded(lambda: nn.Linear(64, 64)).to(device)
    run = int8(linear)
    old = check(run, linear, x)

    class Late(nn.Module, BaseTunerLayer):
        adapter_layer_names = ("base_layer",)

        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer

        def merge(self, safe_merge: bool = False, adapter_names: Any = None) -> None:
            self.base_layer.weight.data += 1

    Late(linear).merge()
    assert error(check(run, linear, x), old) > FAR


def bert(device: str) -> tuple[nn.Module, Tensor]:
    config = BertConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=50, max_position_embeddings=32,
    )  # fmt: skip
    return seeded(lambda: BertModel(config)).to(device).eval(), torch.arange(20, device=device)[
        None
    ]


def vit(device: str) -> tuple[nn.Module, Tensor]:
    config = ViTConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        image_size=32, patch_size=16,
    )  # fmt: skip
    images = seeded(lambda: torch.randn(2, 3, 32, 32)).to(device)
    return seeded(lambda: ViTModel(config)).to(device).eval(), images


@pytest.mark.parametrize(
    ("make", "before"), [(bert, True), (vit, False)], ids=["compiled before", "compiled after"]
)
def test_a_model_of_transformers(make: Any, before: bool, device: str) -> None:
    model, x = make(device)
    config = LoraConfig(
        target_modules="all-linear", init_lora_weights=False, r=4, lora_alpha=32
    )  # fmt: skip
    run = int8(model) if before else None
    if run is not None:
        run(x)
    adapter = seeded(lambda: get_peft_model(model, config)).to(device).eval()
    run = int8(model) if run is None else run

    def near() -> Tensor:
        want: Tensor = model(x).last_hidden_state
        assert error(run(x).last_hidden_state, want) < FAR / 2  # of many linears
        return want

    on = near()
    adapter.merge_adapter()
    near()
    adapter.unmerge_adapter()
    near()
    with adapter.disable_adapter():
        assert error(near(), on) > FAR
    adapter.merge_and_unload()
    assert error(near(), on) < 1e-4
