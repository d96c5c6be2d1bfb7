"""Nothing stands between a layer's kernels: what a layer more costs, counted in generated code."""

from __future__ import annotations

import re
from collections import Counter
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
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", WIDE | IMAGE),
    "clip": ("CLIPVisionConfig", "CLIPVisionModel", WIDE | IMAGE),
    "internvit": (
        "InternVLVisionConfig",
        "InternVLVisionModel",
        WIDE | {"image_size": [32, 32], "patch_size": [8, 8]},
    ),
    "vit": ("ViTConfig", "ViTModel", WIDE | IMAGE),
    "bert": ("BertConfig", "BertModel", WIDE),
    "dinov2": ("Dinov2Config", "Dinov2Model", WIDE | IMAGE),
}
PRE_NORM = {"norm_quantize": 2, "int8_linear": 4, "attention": 1, "quantize": 2}
POST_NORM = PRE_NORM | {"norm_quantize": 0, "norm_quantize_keep": 2}


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


def _kernels(name: str, layers: int) -> Counter[str]:
    config, model, sizes = MODELS[name]
    config = getattr(transformers, config)(**sizes, num_hidden_layers=layers)
    encoder = getattr(transformers, model)(config).eval()
    x = torch.randint(0, 99, (2, 16)) if name == "bert" else torch.randn(2, 3, 32, 32)
    torch._dynamo.reset()
    options = {"inductor": {"force_disable_caches": True}}
    with torch.inference_mode():
        compiled = torch.compile(encoder, backend="graphquant", fullgraph=True, options=options)
        _, (code,) = run_and_get_code(compiled, x)
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
            found[line.strip()] += 1
    return found


SOME = ("siglip",)  # the others differ in little


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SOME else pytest.mark.slow) for n in MODELS]
)
def test_a_layer_is_nine_kernels_and_no_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "_has_sites", lambda device: True)
    monkeypatch.setattr("graphquant.passes.attention_dtype.has_bfloat16", lambda: False)
    monkeypatch.setattr(Op, "site", _by_reference)
    two, three = _kernels(name, 2), _kernels(name, 3)
    added = {k: three[k] - two[k] for k in three if three[k] != two[k]}
    # generated kernels are numbered, so equal ones of two graphs may have two names
    fused = sum(three[k] - two[k] for k in three | two if k not in PRE_NORM | POST_NORM)
    wanted = POST_NORM if name == "bert" else PRE_NORM
    assert {k: n for k, n in added.items() if k in PRE_NORM | POST_NORM} == {
        k: n for k, n in wanted.items() if n
    }
    assert sum(wanted.values()) == 9 and fused == 0
