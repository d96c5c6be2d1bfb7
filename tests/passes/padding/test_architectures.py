"""Text encoders of transformers: the same tokens without padding as with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphquant.accuracy.outputs import copy_outputs
from tests.zoo import text

from .encoders import close, notes

KEPT = {
    "convbert": "reads padding",  # convolutions over tokens
    "mobilebert": "reads padding",  # an embedding of three tokens
    "siglip_text": "reads padding",  # the last position is pooled
    "squeezebert": "no linear",  # convolutions instead
    "deberta": "",  # many graphs
}
QUICK = ("bert", "clip_text", "deberta_v2", "modernbert", "mpnet", "siglip_text", "t5_encoder")
MODELS = text.SMALL | text.EXTRA
CASES = [
    pytest.param(
        name, attn, marks=() if name in QUICK and attn == entry.attns[0] else pytest.mark.slow
    )
    for name, entry in MODELS.items()
    for attn in entry.attns
]


@pytest.mark.parametrize(("name", "attn"), CASES)
def test_model(name: str, attn: str) -> None:
    entry = MODELS[name]
    model = entry.build(attn)
    args, kwargs = entry.inputs(4)
    reports: list[Any] = []
    torch._dynamo.reset()
    run = torch.compile(
        model,
        backend="graphquant",
        options={
            "inner": "eager",
            "quantize": False,
            "padding": "remove",
            "on_report": reports.append,
        },
    )
    with torch.inference_mode():
        ours, theirs = (copy_outputs(f(*args, **kwargs)) for f in (run, model))
    told = notes(reports)
    if name in KEPT:
        assert all(n.startswith("padding kept") and KEPT[name] in n for n in told), told
    else:
        assert [n.partition(":")[0] for n in told] == ["padding removed by attention_mask"]
        assert name == "deberta_v2" or "no attention" not in told[0] or name == "bros"
    valid = kwargs["attention_mask"].bool()
    for key, want in theirs.items():
        got = ours[key]
        if want.shape[:2] == valid.shape:
            assert close(got[valid], want[valid])
            assert name in KEPT or not got[~valid].any()
        else:
            assert close(got, want)
