"""The rule engine: applies one rule to a graph.

It keeps the graph valid: new nodes have fake values, a replacement has the shape, dtype and device
of what it replaces (for strides see layout.py), replaced nodes are erased, and every decision is
recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, Node

from graphquant.errors import RuleError
from graphquant.ir.contexts import APART, are_apart
from graphquant.ir.graph import (
    LINEAR,
    LITERAL,
    MODULE,
    arguments,
    autocast_at,
    described,
    is_impure,
)
from graphquant.ops import int8_linear
from graphquant.passes.editor import Editor
from graphquant.passes.layout import inherit_layout, restore_layouts
from graphquant.passes.policy.gate import Candidate, Gate, Verdict
from graphquant.passes.rule import Refuse, Rewrite, Rule, Site
from graphquant.passes.state import RewriteState

log = logging.getLogger(__name__)

_LINEARS = (LINEAR, int8_linear.target)  # a rewrite makes exactly one of these


def apply(state: RewriteState, rule: Rule[Any], gates: Sequence[Gate] = ()) -> None:
    """Rewrite every site of one rule, unless the rule or a gate refuses it.

    Raises RuleError for a rule that breaks the contract of rule.py.
    """
    for site in rule.sites(state):
        if (no := _refusal(state, rule, site)) is not None:
            log.debug("%s refused %s: %s", rule.name, site.outputs[0].name, no.reason)
            state.record.decline(rule.name, site.subjects, no.reason)
            continue
        editor = Editor(state)
        first = min(site.outputs)  # in graph order
        with state.graph.inserting_before(first), autocast_at(first):
            rewrite = rule.rewrite(editor, site)
            linear = _made_linear(rule, site, rewrite, editor.made)
            verdict = _verdict(gates, Candidate(site, rewrite, editor.made))
        if verdict.reason:
            log.debug("%s left %s: %s", rule.name, site.outputs[0].name, verdict.reason)
            state.record.decline(rule.name, site.subjects, verdict.reason, verdict.times)
            if verdict.final and rewrite.product is not None:
                state.record.exclude(rewrite.product.linear.node, verdict.reason)
            _undo(state, editor.made)
        else:
            _replace(state, rule, site, rewrite, editor.made, linear, verdict)
    restore_layouts(state.graph, state.fake_mode)


def _verdict(gates: Sequence[Gate], candidate: Candidate) -> Verdict:
    """The verdict of the first gate that refuses the rewrite, else the merged one."""
    found = Verdict(_order_conflict(candidate))
    for gate in () if found.reason else gates:
        verdict = gate(candidate)
        found = verdict._replace(times=verdict.times or found.times)
        if found.reason:
            break
    return found


def _made_linear(rule: Rule[Any], site: Site, rewrite: Rewrite, made: Sequence[Node]) -> Node:
    """The one linear that the rewrite made; the subjects' entries move to it."""
    for old, now in zip(site.outputs, rewrite.values, strict=True):
        if (want := _spec(old)) != (got := _spec(now)):
            raise RuleError(f"{rule.name} turned {old.name} {want} into {got}")
    linears = [n for n in made if n.target in _LINEARS]
    if len(linears) != 1:
        raise RuleError(f"{rule.name} made {len(linears)} linears of one site, not one")
    return linears[0]


def _undo(state: RewriteState, made: Sequence[Node]) -> None:
    for node in reversed(made):
        state.graph.erase_node(node)
        if LITERAL in node.meta:
            delattr(state.gm, str(node.target))


def _replace(
    state: RewriteState,
    rule: Rule[Any],
    site: Site,
    rewrite: Rewrite,
    made: Sequence[Node],
    linear: Node,
    verdict: Verdict,
) -> None:
    for node in made:
        node.meta.setdefault("graphquant", rule.name)
        for key in (MODULE, "nn_module_stack", "stack_trace", "custom"):
            if key in site.outputs[0].meta:
                node.meta.setdefault(key, site.outputs[0].meta[key])
    value = _model_value(linear, dict(zip(rewrite.values, site.outputs, strict=True)))
    if rewrite.product is not None:
        smoothing = rewrite.product.smoothing
        state.record.set_smoothing(site.subjects, smoothing.method, smoothing.reason)
    state.record.apply(rule.name, site.subjects, linear, verdict.times, value)
    log.debug("%s applied to %s", rule.name, site.outputs[0].name)
    for old, now in zip(site.outputs, rewrite.values, strict=True):
        inherit_layout(now, old)
        old.replace_all_uses_with(now)
        state.replaced[old] = now
        if old in state.written:
            state.written.add(now)
    for old in site.outputs:
        _erase(state.graph, old)
    if alive := [n.name for n in site.outputs if not n._erased]:
        raise RuleError(f"{rule.name} left what it replaced alive: {', '.join(alive)}")


def _order_conflict(candidate: Candidate) -> str:
    """Why these new nodes cannot replace the old ones, or "": they depend on a value that the model
    computes only after a reader of the old ones."""
    replacing = dict(zip(candidate.site.outputs, candidate.rewrite.values, strict=True))
    for old, new in replacing.items():
        for user in old.users:
            if user < new and user not in replacing:
                return f"{user.name} reads {old.name} before the rewrite's inputs are computed"
    return ""


def _model_value(linear: Node, replaced: dict[Node, Node]) -> str:
    """The model's node whose value the new linear computes. "" if there is none, as for stacked
    siblings or a fused residual."""
    old = replaced.get(linear)
    if old is None or "graphquant" in old.meta:
        return ""
    if linear.target is int8_linear.target and arguments(linear).residual is not None:
        return ""
    return old.name


def _refusal(state: RewriteState, rule: Rule[Any], site: Site) -> Refuse | None:
    no = rule.check(state, site)
    if no is not None and not isinstance(no, Refuse):
        raise RuleError(f"{rule.name}.check returned {no!r}; it must return None or a Refuse")
    if no is None and (hit := next((x for x in site.moved if x in state.written), None)):
        return Refuse(f"{described(hit, state.names)} is written in place", hit)
    if no is None and are_apart(site.outputs, autocast=False):
        return Refuse(APART, site.outputs[0])
    return no


def _spec(node: Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    return tuple(value.shape), value.dtype, value.device


def _erase(graph: Graph, node: Node) -> None:
    """Erase a node without users, and the inputs that only it read."""
    if node._erased or node.users or node.op != "call_function" or is_impure(node):
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for i in inputs:
        _erase(graph, i)
