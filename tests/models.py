"""Run zoo models in float and in int8, and compare."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from graphquant import Report
from tests import zoo

# torch itself cannot trace these into one graph: they split tensors by lengths read from data
BREAKS = {"qwen2_5_vl", "qwen2_vl", "qwen3_vl"}


@dataclass
class Run:
    float: Any
    int8: Any
    report: Report


def pairs(table: dict[str, zoo.Entry]) -> Iterator[tuple[str, str]]:
    """(model, attention implementation) for every entry of a table."""
    return ((name, attn) for name, entry in table.items() for attn in entry.attns)


def one_each(table: dict[str, zoo.Entry]) -> list[Any]:
    """Parameters of a test: those of `pairs`. Every model is run with one of its attention
    implementations, by turns; what is left is slow."""
    turns = {(n, e.attns[i % len(e.attns)]) for i, (n, e) in enumerate(table.items())}
    return [pytest.param(*p, marks=() if p in turns else pytest.mark.slow) for p in pairs(table)]


# of the small models, those whose layers differ most from each other: norms behind or in front,
# gated, scaled, biases left out, packed, with a mask, a graph that breaks, layers that share one
DIFFERENT = {
    "clip_text", "siglip2", "dinov2_swiglu", "bert", "whisper", "internvl_rms", "qwen2_5_vl",
    "nn_mha",
}  # fmt: skip


# of the other encoders, those with something that the rest has not: relative positions, shared
# layers, convolutions among the linears, bottlenecks, windows, rotations, stages, gates
UNUSUAL = {
    "mpnet", "albert", "deberta_v2", "convbert", "squeezebert", "mobilebert", "modernbert",
    "t5_encoder", "beit", "dinov3_gated", "aimv2", "swin", "segformer", "wav2vec2", "eva_rope",
}  # fmt: skip


def different() -> list[Any]:
    """Every small model as a parameter of a test; those like another are slow."""
    return [
        pytest.param(entry, id=name, marks=() if name in DIFFERENT else pytest.mark.slow)
        for name, entry in zoo.SMALL.items()
    ]


def on(device: str, value: Any) -> Any:
    return tree_map(lambda v: v.to(device) if isinstance(v, (Tensor, nn.Module)) else v, value)


def run(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, full: bool, **options: Any
) -> Run:
    """One inference with the model as it is, one with graphquant; the graph runs as it stands."""
    torch._dynamo.reset()
    reports: list[Report] = []
    options = {"inner": "eager", "on_report": reports.append, **options}
    with torch.inference_mode():
        want = model(*args, **kwargs)
        compiled = torch.compile(model, backend="graphquant", fullgraph=full, options=options)
        got = compiled(*args, **kwargs)
    return Run(want, got, Report.merge(reports))


def run_entry(entry: zoo.Entry, attn: str, device: str, batch: int = 2, **options: Any) -> Run:
    args, kwargs = entry.inputs(batch)
    model = entry.build(attn).to(device)
    return run(
        model, on(device, args), on(device, kwargs), full=entry.name not in BREAKS, **options
    )


def error(got: Any, want: Any) -> float:
    """The largest relative error of any tensor of a model's output."""
    pairs_ = zip(tree_leaves(got), tree_leaves(want), strict=True)
    return max(relative(g, w) for g, w in pairs_ if isinstance(w, Tensor) and w.is_floating_point())


def relative(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64; nan where either is."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def same_structure(got: Any, want: Any) -> None:
    """The same types, shapes, dtypes, devices and None-ness, all the way down."""
    assert type(got) is type(want)
    if isinstance(want, Tensor):
        assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
    elif isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            same_structure(got[key], want[key])
    elif isinstance(want, (tuple, list)):
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            same_structure(g, w)
    else:
        assert got == want
