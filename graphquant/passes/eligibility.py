"""Eligibility: which linears, norms and activations rules may rewrite, and why not the others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from graphquant._torch import HigherOrderOperator
from graphquant.ir.captured import Captured
from graphquant.ir.constants import Constants
from graphquant.ir.graph import (
    LINEAR,
    arguments,
    calls,
    dtype,
    full_args,
    module_path,
    readers,
    shape,
)
from graphquant.ir.paths import linear_path
from graphquant.ir.rows import rows, width
from graphquant.ops.checks import FLOATS
from graphquant.ops.define import no_kernels
from graphquant.ops.int8_linear.op import MAX_K
from graphquant.passes.flops import other_products
from graphquant.passes.rules.patch_linear import PatchLinear
from graphquant.passes.state import RewriteState
from graphquant.report import Outcome

NEEDS_GRADIENT = "its result can need a gradient"
DEVICES = ("cpu", "cuda")


def enter_all(state: RewriteState, captured: Captured) -> None:
    """Enter every linear, norm and activation into the record, in graph order."""
    norms, acts = state.recognized.norms, state.recognized.activations
    unusable = state.recognized.unusable
    default = "" if state.config.quantize else "quantize=False, and no other linear reads its input"
    for node in state.graph.nodes:
        path = module_path(node)
        if node.target is LINEAR:
            x = arguments(node).input
            path = path_of(node, captured, state.constants)
            M, N, K = rows(node), width(node), width(x)
            outcome = Outcome("linear", path, node.name, refused=default, M=M, N=N, K=K)
            ineligible = _ineligible(state, captured, node, path)
            state.record.enter(node, outcome, ineligible)
        elif node in norms or node in acts or node in unusable:
            kind = "activation" if node in acts else "norm"
            why = f"read by {readers(node)}" if state.config.quantize else "quantize=False"
            outcome = Outcome(kind, path, node.name, refused=why, K=width(node))
            state.record.enter(node, outcome, unusable.get(node, ""))
        elif isinstance(node.target, HigherOrderOperator):
            for inner in _linears_inside(state.gm, node):
                state.record.enter_unreachable(
                    Outcome(
                        "linear",
                        module_path(inner) or path,
                        f"{node.name}.{inner.name}",
                        refused=f"inside the higher-order op {node.target.name()}",
                        M=rows(inner),
                        N=width(inner),
                        K=width(inner.all_input_nodes[0]),
                    )
                )


def other_products_of(state: RewriteState) -> Iterator[Outcome]:
    """Attention, convolutions and matmuls that are no linears, also inside higher-order ops."""
    for gm in state.gm.modules():
        if isinstance(gm, GraphModule):
            constants = state.constants if gm is state.gm else Constants(())
            for node, product in other_products(gm.graph, constants):
                kind, why, flops = product
                path = module_path(node)
                yield Outcome(kind, path, node.name, refused=why, product_flops=flops)


def _ineligible(state: RewriteState, captured: Captured, node: Node, path: str) -> str:
    """Why no rule may rewrite this linear, or ""."""
    x, weight, bias = full_args(node)
    if node.meta.get("graphquant") == PatchLinear.name:
        return "patch embeddings stay in float"
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and (written := state.constants.written_in(value)):
            return f"its {name} is not fixed: {_describe(written, state)} is written in place"
    if weight not in state.constants:
        return "its weight is not a parameter"
    if bias is not None and not state.constants.is_fixed(bias):
        return "its bias is not a parameter"
    if why := state.config.wants(path):
        return why
    if node in state.needs_gradient:
        return NEEDS_GRADIENT
    if dtype(node) not in FLOATS or dtype(x) not in FLOATS or dtype(weight) not in FLOATS:
        return f"computes in {str(dtype(node)).removeprefix('torch.')}"
    if (device := node.meta["val"].device).type not in DEVICES:
        return f"graphquant has no kernels for {device.type}"
    if (why := no_kernels(device)) is not None:
        return why
    if len(shape(weight)) != 2:
        return f"its weight has {len(shape(weight))} dims, not two"
    N, K = shape(weight)
    if not 1 <= K <= MAX_K or N < 1:
        return f"K={K}, N={N}: int8 needs 1 <= K <= {MAX_K} and N >= 1"
    operands = [v for v in (weight, bias) if v is not None]
    for root in (r for v in operands for r in state.constants.roots_of(v)):
        kind = type(captured.parameters[root])
        if kind not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            return f"{captured.names[root]} is a {kind.__name__}, not a plain tensor"
    return ""


def path_of(node: Node, captured: Captured, constants: Constants) -> str:
    """The module path of a linear, for reports, options and calibrations."""
    weight = arguments(node).weight
    roots = constants.roots_of(weight) if weight in constants else []
    matrices = sorted(roots, key=lambda root: len(shape(root)) < 2)  # stable
    return linear_path(module_path(node), [captured.names[root] for root in matrices])


def _describe(written: Node, state: RewriteState) -> str:
    if written in state.constants.roots:
        return state.names[written]
    roots = " and ".join(state.names[r] for r in state.constants.roots_of(written))
    where = f" in {path}" if (path := module_path(written)) else ""
    return f"a value computed from {roots or 'constants'}{where}"


def _linears_inside(gm: GraphModule, node: Node) -> Iterator[Node]:
    for argument in node.all_input_nodes:
        if argument.op == "get_attr":
            inner = getattr(gm, str(argument.target), None)
            if isinstance(inner, GraphModule):
                yield from calls(inner.graph, lambda n: n.target is LINEAR and "val" in n.meta)
