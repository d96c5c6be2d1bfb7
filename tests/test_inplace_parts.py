"""optimize_ reaches what people call: methods, `generate`, and the parts that these run."""

from __future__ import annotations

import copy
import logging
import pickle
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import graphquant
from graphquant import (
    ReleasedWeightError,
    Report,
    UnsupportedInputError,
    optimize_,
    restore_,
)
from graphquant.optimized.module import _warn_of_what_was_not_called
from graphquant.parts import module_of, parts_of
from tests.small import NEAR, Mlp, error, notes, seeded

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, **LAYERS}
VISION = {**WIDTHS, "image_size": 32, "patch_size": 8}
TOKENS = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE = 99  # the id of an image's token


def quick(module: Any, **options: Any) -> Report:
    """optimize_ without Inductor."""
    return optimize_(module, inner="eager", **options)


def clip(device: str) -> Any:
    text = {**WIDTHS, **TOKENS, "max_position_embeddings": 16}
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=32)
    return seeded(lambda: CLIPModel(config)).to(device).eval()


def whisper(device: str) -> Any:
    config = WhisperConfig(
        **TOKENS,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_mel_bins=16,
        max_source_positions=30,
        max_target_positions=32,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return seeded(lambda: WhisperForConditionalGeneration(config)).to(device).eval()


def llava(device: str) -> Any:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**WIDTHS, **TOKENS, num_key_value_heads=2),
        image_token_index=IMAGE,
    )
    return seeded(lambda: LlavaForConditionalGeneration(config)).to(device).eval()


def qwen(device: str) -> Any:
    config = Qwen2_5_VLConfig(
        text_config={
            **WIDTHS,
            **TOKENS,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 64,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        vision_start_token_id=97,
        vision_end_token_id=98,
    )
    return seeded(lambda: Qwen2_5_VLForConditionalGeneration(config)).to(device).eval()


def pixels(device: str) -> Tensor:
    return seeded(lambda: torch.randn(2, 3, 32, 32)).to(device)


def prompt(device: str, images: int = 16) -> dict[str, Any]:
    """What `generate` takes, with as many tokens of an image in each of two sentences."""
    words = seeded(lambda: torch.randint(3, 90, (2, 5)))
    ids = torch.cat([torch.full((2, images), IMAGE), words], 1).to(device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 3,
        "do_sample": False,
    }


def embeddings(model: Any, device: str) -> tuple[Tensor, Tensor]:
    ids = seeded(lambda: torch.randint(3, 90, (2, 9))).to(device)
    image = model.get_image_features(pixel_values=pixels(device))
    text = model.get_text_features(input_ids=ids)
    return image.pooler_output, text.pooler_output


def overridden(model: nn.Module) -> list[str]:
    """The modules with attributes that `optimize_` sets."""
    names = {"forward", "__getstate__"}
    return [n for n, m in model.named_modules() if names & set(vars(m))]


# Methods -----------------------------------------------------------------------------------------


def test_methods_run_the_towers_that_they_call_in_int8(device: str) -> None:
    model = clip(device)
    want = embeddings(model, device)
    report = quick(model)
    (image, text) = embeddings(model, device)
    assert 1e-5 < error(image, want[0]) < NEAR and 1e-5 < error(text, want[1]) < NEAR
    assert report.ran and report.graphs == 4 and report.coverage == 1
    assert len(report.linears) == 2 * (2 * 6 + 1)  # with the projections
    assert not any("not called" in note for note in report.notes)
    assert report.linears[0].path == "vision_model.encoder.layers.0.self_attn.q_proj"


def test_what_was_not_called_is_named(device: str, caplog: pytest.LogCaptureFixture) -> None:
    model = clip(device)
    report = quick(model)
    with caplog.at_level(logging.INFO, logger="graphquant.optimized"):
        model.get_image_features(pixel_values=pixels(device))
    (note,) = (n for n in report.notes if n.startswith("not called"))
    assert note == "not called: text_model, text_projection"
    assert not notes(report)  # which are warnings
    (said,) = (m for m in caplog.messages if m.startswith("optimize_:"))
    assert "12 of 12 linears in int8" in said and "not called: text_model" in said


def test_a_call_of_the_module_is_one_graph_as_before(device: str) -> None:
    """The entries of a tower's graph are replaced by those of the larger one."""
    model = clip(device)
    ids = seeded(lambda: torch.randint(3, 90, (2, 9))).to(device)
    want = model(input_ids=ids, pixel_values=pixels(device)).image_embeds
    report = quick(model)
    first = model.get_image_features(pixel_values=pixels(device)).pooler_output
    got = model(input_ids=ids, pixel_values=pixels(device)).image_embeds
    assert error(got, want) < NEAR
    assert report.graphs == 1 and len(report.linears) == 26 and report.coverage == 1
    assert not any("not called" in n for n in report.notes)
    assert torch.equal(first, model.get_image_features(pixel_values=pixels(device)).pooler_output)


def test_released_weights_serve_methods_and_calls(device: str) -> None:
    model = clip(device)
    want = embeddings(model, device)
    ids = seeded(lambda: torch.randint(3, 90, (2, 9))).to(device)
    report = quick(model, free_weights=True)
    first = embeddings(model, device)
    model(input_ids=ids, pixel_values=pixels(device))
    assert report.graphs == 1 and report.coverage == 1
    for got, before, expected in zip(embeddings(model, device), first, want, strict=True):
        assert torch.equal(got, before) and error(got, expected) < NEAR
    with pytest.raises(ReleasedWeightError, match=r"such as encoder\.layers"):
        restore_(model.vision_model)


# Decoding ----------------------------------------------------------------------------------------


def test_whisper_generates_with_its_encoder_in_int8(device: str) -> None:
    model = whisper(device)
    features = seeded(lambda: torch.randn(2, 16, 60)).to(device)
    want = model.model.encoder(features).last_hidden_state
    tokens = model.generate(features, max_new_tokens=4)
    reports: list[Report] = []
    report = quick(model, on_report=reports.append)
    got = model.generate(features, max_new_tokens=4)
    assert got.shape == tokens.shape and len(reports) == 1  # no step of the decoder
    assert 1e-5 < error(model.model.encoder(features).last_hidden_state, want) < NEAR
    assert {o.path.split(".")[1] for o in report.linears} == {"encoder"} and report.coverage == 1
    assert (
        "in float, because called with a key/value cache: model.decoder, proj_out; decoding token "
        "by token is not quantized"
    ) in report.notes


@pytest.mark.parametrize("name", ["llava", pytest.param("qwen", marks=pytest.mark.slow)])
def test_a_vlm_generates_with_its_vision_tower_in_int8(name: str, device: str) -> None:
    given = prompt(device)
    if name == "llava":
        model, towers = llava(device), {"vision_tower", "multi_modal_projector"}
        given["pixel_values"] = pixels(device)
    else:
        model, towers = qwen(device), {"visual"}
        patches = seeded(lambda: torch.randn(2 * 64, 3 * 2 * 4 * 4)).to(device)
        grid = torch.tensor([[1, 8, 8]] * 2, device=device)
        kinds = (given["input_ids"] == IMAGE).long()
        given |= {"pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    want = model.generate(**given)
    report = quick(model)
    assert model.generate(**given).shape == want.shape
    assert report.coverage == 1
    assert {o.path.split(".")[1] for o in report.linears} == towers
    (note,) = (n for n in report.notes if n.startswith("in float"))
    assert "model.language_model, lm_head" in note


def test_without_a_cache_a_decoder_is_int8(device: str) -> None:
    model = whisper(device)
    features = seeded(lambda: torch.randn(2, 16, 60)).to(device)
    ids = torch.ones(2, 3, dtype=torch.long, device=device)
    report = quick(model)
    model(features, decoder_input_ids=ids, use_cache=False)
    assert report.coverage == 1 and report.graphs == 1 and len(report.linears) == 33


def test_if_all_stays_float_a_warning_says_so_once(
    device: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = LlamaConfig(**WIDTHS, **TOKENS, num_key_value_heads=2)
    model = seeded(lambda: LlamaForCausalLM(config)).to(device).eval()
    given = prompt(device, images=0)
    want = model.generate(**given)
    report = quick(model)
    with caplog.at_level(logging.WARNING, logger="graphquant"):
        for _ in range(2):
            assert torch.equal(model.generate(**given), want)
    assert not report.ran
    (said,) = caplog.messages
    assert said.startswith(
        "optimize_: nothing has run in int8: in float, because called with a key"
    )


def test_an_image_after_text_alone_is_int8(device: str, caplog: pytest.LogCaptureFixture) -> None:
    model = llava(device)
    report = quick(model)
    with caplog.at_level(logging.WARNING, logger="graphquant"):
        model.generate(**prompt(device, images=0))
    assert "lm_head; decoding" in caplog.text
    assert "not called: model.vision_tower, model.multi_modal_projector" in caplog.text
    model.generate(**prompt(device), pixel_values=pixels(device))
    assert report.coverage == 1 and len(report.linears) == 14


# What else is done -------------------------------------------------------------------------------


def test_the_linears_that_the_options_leave_in_float_are_a_warning_if_none_is_left(
    device: str, x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = seeded(Mlp).to(device).eval()
    quick(model, exclude="*")
    with caplog.at_level(logging.WARNING, logger="graphquant"):
        model(x)
        model(x[:3])
        quick(model, quantize=False)  # as asked for
        model(x)
    (said,) = caplog.messages
    assert said.startswith("optimize_: nothing runs in int8: 0 of 2 linears")


def test_what_is_never_called_is_a_warning_at_the_end(
    device: str, x: Tensor, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphquant.optimized.module._not_called", WeakSet())
    called, idle, restored = (seeded(Mlp).to(device).eval() for _ in range(3))
    for model in (called, idle, restored):
        quick(model)
    called(x)
    restore_(restored)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="graphquant"):
        _warn_of_what_was_not_called()
    (said,) = caplog.messages
    assert said == "optimize_: nothing has run in int8: Mlp was never called"


def test_restoring_leaves_no_trace_on_any_part(device: str) -> None:
    model = clip(device)
    want = embeddings(model, device)
    before = {n: dict(vars(m)) for n, m in model.named_modules()}
    quick(model)
    embeddings(model, device)
    assert overridden(model) == ["", *parts_of(clip(device))]
    restore_(model)
    assert {n: dict(vars(m)) for n, m in model.named_modules()} == before
    for got, expected in zip(embeddings(model, device), want, strict=True):
        assert torch.equal(got, expected)


def test_copies_have_float_parts(device: str) -> None:
    model = clip(device)
    want = embeddings(model, device)
    quick(model)
    embeddings(model, device)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not overridden(other)
        assert torch.equal(embeddings(other, device)[0], want[0])


def test_a_part_can_have_options_of_its_own_and_go_back_to_float(device: str) -> None:
    model = clip(device)
    want = model.vision_model(pixels(device)).pooler_output
    outer = quick(model)
    inner = quick(model.vision_model, exclude="*mlp*")
    embeddings(model, device)
    assert {o.path.split("_")[0] for o in outer.linears} == {"text", "visual"}
    assert inner.linears[0].path == "encoder.layers.0.self_attn.q_proj"
    assert 0 < inner.coverage < 1
    restore_(model.vision_model)
    assert torch.equal(model.vision_model(pixels(device)).pooler_output, want)
    restore_(model.text_model)
    assert overridden(model) == ["", "visual_projection", "text_projection"]


def test_compilations_around_it_take_its_parts_in(device: str) -> None:
    model = clip(device)
    tower, x = model.vision_model, pixels(device)
    want = tower(x).last_hidden_state
    plain = graphquant.explain(tower, x)
    quick(model)
    tower(x)
    assert graphquant.explain(tower, x) == plain
    exported = torch.export.export(tower, (x,)).module()
    around = torch.compile(lambda x: tower(x).last_hidden_state, backend="eager", fullgraph=True)
    for got in (exported(x).last_hidden_state, around(x)):
        assert error(got, want) < 1e-6


def test_an_object_with_one_module_stands_for_it(device: str, x: Tensor) -> None:
    model = seeded(Mlp).to(device).eval()
    holder = SimpleNamespace(model=model, tokenizer="words", same=model)
    want = holder.model(x)
    report = quick(holder)
    assert quick(model) is report
    assert 1e-4 < error(holder.model(x), want) < NEAR
    restore_(holder)
    assert torch.equal(holder.model(x), want)
    assert module_of(holder) is model
    with pytest.raises(UnsupportedInputError, match=r"several modules \(unet, text\): optimize"):
        optimize_(SimpleNamespace(unet=model, text=seeded(Mlp)))
    with pytest.raises(UnsupportedInputError, match=r"needs a torch\.nn\.Module, got SimpleN"):
        optimize_(SimpleNamespace(model=torch.nn.functional.gelu))


def test_parts_are_towers_and_projectors_and_no_layers() -> None:
    assert list(parts_of(llava("cpu"))) == [
        "model",
        "model.vision_tower",
        "model.vision_tower.encoder",
        "model.multi_modal_projector",
        "model.language_model",
        "lm_head",
    ]
    assert not parts_of(nn.Sequential(Mlp(), Mlp()))
    assert not parts_of(Mlp())
