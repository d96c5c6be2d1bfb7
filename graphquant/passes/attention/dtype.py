"""On CPUs with bfloat16 instructions, float32 attention in bfloat16, where measured to be faster.

    int8_linear(..., float32) -> views -> attention float32  -> views -> quantize
    int8_linear(..., bfloat16) -> views -> attention bfloat16 -> views -> quantize

Only what lies between int8 products and int8 quantizers changes, so everything that the model adds
up stays float32. The attention kernels accumulate in float32, and a float32 mask is read as it is:
rounded to bfloat16, float32's lowest number would be -inf, which gives a fully masked row another
result.

This runs behind the pipeline, for graphs that graphquant compiles itself: the processor that
exports a program need not be the one that runs it.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from graphquant._torch import unset_fake_temporarily
from graphquant.config import Config
from graphquant.ir.captured import Captured
from graphquant.ir.contexts import regions
from graphquant.ir.graph import SDPA, arguments, aten, calls, fake_result, with_arguments
from graphquant.ir.rows import ROW_VIEWS
from graphquant.ops import int8_linear, norm_quantize, quantize
from graphquant.ops.timing import times
from graphquant.passes.attention.kernels import pinned_by_model
from graphquant.passes.policy.speed import cut_out
from graphquant.passes.record import MAX_TIME_RATIO
from graphquant.passes.verify import verifier
from graphquant.report import Quiet, Report

log = logging.getLogger(__name__)

QUANTIZERS = (quantize.target, norm_quantize.target)
VIEWS = ROW_VIEWS | frozenset(
    {
        aten.chunk.default,
        aten.expand.default,
        aten.movedim.int,
        aten.movedim.intlist,
        aten.narrow.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        aten.squeeze.default,
        aten.unbind.int,
        operator.getitem,
    }
)


def has_bfloat16() -> bool:
    """Does this processor multiply bfloat16 numbers?"""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def with_bfloat16_attention(report: Report, captured: Captured, config: Config) -> Report:
    """The report of this rewritten graph, with a note if attention of it now runs in bfloat16."""
    if config.attention_dtype == "float32" or not has_bfloat16():
        return report
    check = verifier(captured)
    found: list[dict[str, float]] = []  # times of each changed part of the graph
    attention = 0
    for part in _parts(captured):
        layers = [n for n in part if n.target is SDPA]
        measured = _in_bfloat16(captured, part, measuring=config.select == "faster")
        log.debug("%s: %s", layers, "float32" if measured is None else "bfloat16")
        if measured is not None:
            attention += len(layers)
            found.append(measured)
    if not attention:
        return report
    check("attention in bfloat16")
    captured.gm.recompile()
    return replace(report, notes=(*report.notes, _note(attention, found)))


def _note(layers: int, measured: Sequence[dict[str, float]]) -> Quiet:
    note = f"attention of {layers} layer{'s' * (layers != 1)} runs in bfloat16"
    if not all(measured):
        return Quiet(note)
    new, old = (sum(us[kind] for us in measured) / 1000.0 for kind in ("bfloat16", "float32"))
    return Quiet(f"{note}: measured {new:.2f} ms with q, k and v, in float32 {old:.2f} ms")


def _parts(captured: Captured) -> list[list[Node]]:
    """The parts of the graph that can be in bfloat16, each from int8 products to quantizers, in
    graph order."""
    graph = captured.gm.graph
    excluded = pinned_by_model(graph) | {n for n, region in regions(graph) if region.autocast}
    seen: set[Node] = set()
    parts = []
    for node in calls(graph, lambda n: n.target is SDPA):
        if node in seen:
            continue
        part = _part(node)
        seen |= part.keys()
        if part and not any(n in excluded for n in part if n.target is SDPA):
            parts.append(sorted(part))
    return parts


def _part(attention: Node) -> dict[Node, None]:
    """All that must change with this attention; empty if something else reads or makes it.

    So nothing in it is written in place or has a gradient: views and quantizers alone read it.
    """
    part: dict[Node, None] = {}
    edge = [(attention, False)]  # (node, does it come after attention?)
    while edge:
        node, after = edge.pop()
        if node in part:
            continue
        part[node] = None
        if after and node.target in QUANTIZERS:
            continue
        if node.target in VIEWS:
            if not after:
                edge.append((node.all_input_nodes[0], False))
        elif after:
            return {}
        elif _is_attention(node):
            edge += [(i, False) for i in _qkv(node)]
            after = True
        elif not _is_product(node):
            return {}
        edge += [(reader, after) for reader in node.users]
    masks = {arguments(n).attn_mask for n in part if n.target is SDPA}
    return {} if masks & part.keys() else part


def _qkv(attention: Node) -> tuple[Node, Node, Node]:
    read = arguments(attention)
    return read.query, read.key, read.value


def _is_attention(node: Node) -> bool:
    """float32 attention on the CPU without dropout."""
    if node.target is not SDPA or arguments(node).dropout_p:
        return False
    values = [n.meta["val"] for n in (node, *_qkv(node))]
    return all(v.dtype == torch.float32 and v.device.type == "cpu" for v in values)


def _is_product(node: Node) -> bool:
    """An int8 linear without a residual, which would be rounded to bfloat16 as well."""
    return (
        node.target is int8_linear.target
        and arguments(node).residual is None
        and arguments(node).dtype == torch.float32
    )


def _in_bfloat16(
    captured: Captured, part: Sequence[Node], *, measuring: bool
) -> dict[str, float] | None:
    """Change this part of the graph to bfloat16. Returns its times in microseconds, {} if not
    measured; None if it stays float32."""
    before = [(n, n.args, n.kwargs, n.meta["val"]) for n in part]
    old = cut_out(part)
    asked, run = old.text, old.bind()
    found: dict[str, float] | None = None
    if _change(captured, part):
        new = cut_out(part)
        question = f"{asked}\n->\n{new.text}"
        found = _times(question, {"float32": run, "bfloat16": new.bind()}) if measuring else {}
    if found is None:
        for node, args, kwargs, value in before:
            node.args, node.kwargs, node.meta["val"] = args, kwargs, value
    return found


def _change(captured: Captured, part: Sequence[Node]) -> bool:
    """Make the products of this part write bfloat16. False if a node cannot take that."""
    for node in part:
        if node.target in QUANTIZERS:
            continue  # its results do not depend on the dtype that it reads
        if node.target is int8_linear.target:
            node.args, node.kwargs = with_arguments(node, dtype=torch.bfloat16), {}
        try:
            value = fake_result(captured.fake_mode, node.target, node.args, node.kwargs)
        except (RuntimeError, ValueError, TypeError) as why:  # a view of another layout
            log.debug("%s does not take bfloat16: %s", node.name, why)
            return False
        node.meta["val"] = value
    return True


def _times(question: str, candidates: dict[str, Callable[[], object]]) -> dict[str, float] | None:
    """Microseconds of both, or None if bfloat16 is not faster."""
    with unset_fake_temporarily(), torch.inference_mode():
        found = times(question, torch.device("cpu"), candidates)
    if found is None or found.keys() != candidates.keys():
        return None
    return found if found["bfloat16"] <= MAX_TIME_RATIO * found["float32"] else None
