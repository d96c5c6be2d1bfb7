"""Colors of the rules in pictures and pages, and the rules that each line belongs to."""

from __future__ import annotations

from graphquant.passes.pipeline import INT8_RULES
from graphquant.visualize.lines import Inspected

FILLS = ("#8ecae6", "#a7d49b", "#ffd166", "#f4a6b7", "#cdb4db", "#f7b267", "#9ad9d2", "#d9c5a0")
COLORS = {rule.name: FILLS[i % len(FILLS)] for i, rule in enumerate(INT8_RULES)}
KIND_COLORS = {  # of nodes of an ONNX graph, see graphquant.visualize.onnx_model
    "int8 product": FILLS[1],
    "quantize": FILLS[0],
    "dequantize": FILLS[4],
    "float product": FILLS[5],
}
GONE = "#e2e2e2"  # dropped by normalization, or moved into an epilogue

Rules = dict[str, tuple[str, ...]]  # by the `node` of a line


def rules_of(one: Inspected) -> tuple[Rules, Rules]:
    """(rules that rewrote a line before, rules that made a line after), by the line's node."""
    taken = {o.node: o.rules for o in one.report.outcomes if o.rules}
    made: Rules = {line.node: (line.rule,) for line in one.after if line.rule}
    for line in one.after:
        if line.op == "int8_linear":  # the op that quantizes its input carries the fused rule
            first = made.get(line.reads[0], ()) if line.reads else ()
            made[line.node] = tuple(dict.fromkeys((*first, line.rule)))
    return taken, made
