"""What stands between a layer's kernels: what layers more cost, counted in generated code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from graphquant.lowering import inductor
from graphquant.ops.define import Op

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
IMAGE = {"image_size": 32, "patch_size": 8}
PRE_NORM = {"norm_quantize": 2, "int8_linear": 4, "attention": 1, "quantize": 2}
POST_NORM = PRE_NORM | {"norm_quantize": 0, "norm_quantize_keep": 2}
WINDOWED = PRE_NORM | {"norm_quantize": 1, "quantize": 3}  # windows lie between norm and linear


@dataclass(frozen=True)
class Case:
    """An encoder in transformers.

    sizes  of its config, by the number of layers
    step   layers that make a period
    ops    calls of a layer
    fused  kernels of a layer that Inductor generates between them
    """

    config: str
    model: str
    sizes: Callable[[int], dict[str, Any]]
    ops: dict[str, int] = field(default_factory=PRE_NORM.copy)
    fused: int = 0
    step: int = 1

    def build(self, layers: int) -> Any:
        config = getattr(transformers, self.config)(**self.sizes(layers))
        return getattr(transformers, self.model)(config).eval()

    def inputs(self) -> dict[str, Tensor]:
        if "Vision" in self.model or self.model in ("ViTModel", "Dinov2Model", "SwinModel"):
            side = 64 if self.model == "SwinModel" else 32
            return {"pixel_values": torch.randn(2, 3, side, side)}
        valid = torch.ones(2, 64, dtype=torch.long)
        valid[1, 40:] = 0
        return {"input_ids": torch.randint(5, 99, (2, 64)), "attention_mask": valid}


def _sizes(**sizes: Any) -> Callable[[int], dict[str, Any]]:
    return lambda layers: sizes | {"num_hidden_layers": layers}


SPECIAL = dict.fromkeys(("pad", "bos", "cls", "eos", "sep"), 0)
CASES = {
    "siglip": Case("SiglipVisionConfig", "SiglipVisionModel", _sizes(**WIDE, **IMAGE)),
    "clip": Case("CLIPVisionConfig", "CLIPVisionModel", _sizes(**WIDE, **IMAGE)),
    "internvit": Case(
        "InternVLVisionConfig",
        "InternVLVisionModel",
        _sizes(**WIDE, image_size=[32, 32], patch_size=[8, 8]),
    ),
    "vit": Case("ViTConfig", "ViTModel", _sizes(**WIDE, **IMAGE)),
    "dinov2": Case("Dinov2Config", "Dinov2Model", _sizes(**WIDE, **IMAGE)),
    "bert": Case("BertConfig", "BertModel", _sizes(**WIDE, vocab_size=99), POST_NORM),
    "t5": Case(
        "T5Config",
        "T5EncoderModel",
        lambda n: {
            "d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "vocab_size": 99,
            "num_layers": n,
        },
    ),
    "modernbert": Case(  # rotary position embedding of q and k
        "ModernBertConfig",
        "ModernBertModel",
        _sizes(
            **WIDE, vocab_size=99, global_attn_every_n_layers=3, local_attention=16,
            **{f"{name}_token_id": i for name, i in SPECIAL.items()},
        ),
        fused=1,
        step=3,
    ),
    "swin": Case(  # norm and windows; bias of positions and mask; windows back and residual
        "SwinConfig",
        "SwinModel",
        lambda n: {
            "image_size": 64, "embed_dim": 64, "depths": [n], "num_heads": [4], "window_size": 4,
        },
        WINDOWED,
        fused=2,
        step=2,
    ),
}  # fmt: skip


def _by_reference(op: Op, *constants: Any) -> Any:
    """A site for the CPU."""

    def call(stream: int, *tensors: Tensor | None) -> None:
        n = sum(op.tensors)
        given, rest = iter(tensors[:n]), iter(constants)
        results = op.reference(*(next(given) if is_ else next(rest) for is_ in op.tensors))
        results = results if isinstance(results, tuple) else (results,)
        for to, value in zip(tensors[n:], results, strict=True):
            assert to is not None
            to.copy_(value)

    return call


def _kernels(case: Case, layers: int) -> Counter[str]:
    torch._dynamo.reset()
    options = {"select": "always", "inductor": {"force_disable_caches": True}}
    with torch.inference_mode():
        compiled = torch.compile(
            case.build(layers), backend="graphquant", fullgraph=True, options=options
        )
        _, (code,) = run_and_get_code(compiled, **case.inputs())
    body = code[code.index("def call(") :]
    found: Counter[str] = Counter()
    for line in body.splitlines():
        if site := re.match(r"\s+graphquant_(\w+)_buf\d+\(", line):
            found[site[1]] += 1
        elif line.lstrip().startswith(("#", "assert_")):
            continue
        elif "torch.ops.aten._scaled_dot_product" in line:
            found["attention"] += 1
        elif re.search(r"extern_kernels\.|torch\.ops\.|cpp_fused|\.run\(|\.copy_\(", line):
            found["fused"] += 1
    return found


SOME = ("siglip", "bert")  # the others differ in little


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SOME else pytest.mark.slow) for n in CASES]
)
def test_between_the_ops_of_a_layer_stands_only_what_fuses_with_none(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "_has_sites", lambda device: True)
    monkeypatch.setattr("graphquant.passes.attention.dtype.has_bfloat16", lambda: False)
    monkeypatch.setattr(Op, "site", _by_reference)
    case = CASES[name]
    few, more = (_kernels(case, n * case.step) for n in (2, 3))
    per_layer = {k: (more[k] - few[k]) / case.step for k in more if more[k] != few[k]}
    wanted = {k: n for k, n in (case.ops | {"fused": case.fused}).items() if n}
    assert per_layer == wanted
