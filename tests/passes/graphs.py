"""Small models on their way through the rules, and what must hold of every rewritten graph."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from graphquant import Config, Report
from graphquant.capture.aten import from_export
from graphquant.ir.captured import Captured
from graphquant.ir.graph import LINEAR, full_args
from graphquant.passes.pipeline import rewrite
from graphquant.passes.prepack import prepack

SLACK = 2e-5  # float32 sums of a few hundred products, in units of the sum of their magnitudes


class Model(nn.Module):
    """A model written on one line: Model(lambda m, x: m.fc(m.norm(x)), norm=..., fc=...)."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any) -> Any:
        return self._forward(self, *args)


def parameter(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*size))


@dataclass
class Rewritten:
    """One model: in float, exported and rewritten, and what the report says."""

    captured: Captured
    report: Report
    want: Any
    got: Any

    @property
    def graph(self) -> Graph:
        return self.captured.gm.graph

    @property
    def counts(self) -> dict[str, int]:
        return self.report.counts()

    def ops(self) -> Counter[str]:
        return Counter(name_of(n) for n in self.graph.nodes if n.op == "call_function")

    def one(self, op: str) -> Node:
        (node,) = [n for n in self.graph.nodes if n.op == "call_function" and name_of(n) == op]
        return node

    def refused(self, kind: str) -> list[str]:
        return [o.refused for o in self.report.refused if o.kind == kind]


def name_of(node: Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).split(".")[0]


def argument(node: Node, name: str) -> Any:
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [a.name for a in node.target._schema.arguments]
    return full_args(node)[names.index(name)]


def exported(model: nn.Module, *args: Any, sizes: Any = None) -> Captured:
    captured = from_export(torch.export.export(model, args, dynamic_shapes=sizes))
    assert captured is not None
    return captured


def rewritten(model: nn.Module, *args: Any, sizes: Any = None, **options: Any) -> Rewritten:
    """Export, rewrite, and hold the graph to everything that is true of all rewritten graphs."""
    model.eval()
    want = copy.deepcopy(model)(*cloned(args))
    captured = exported(model, *args, sizes=sizes)
    graph, config = captured.gm.graph, Config(**options)
    before = spec(graph)
    report = rewrite(captured, config).report
    honest(captured)
    assert spec(graph) == before
    if config.quantize:
        left = sum(n.target is LINEAR and n.meta.get("graphquant") is None for n in graph.nodes)
        assert left == sum(not o.rules for o in report.linears), "a replaced linear is still there"
    once = text(graph)
    rewrite(captured, config)
    assert text(graph) == once, "the second rewrite changed something"
    return Rewritten(captured, report, want, captured.gm(*cloned(args)))


def compiled(model: nn.Module, *args: Any, calls: int = 1, **options: Any) -> Rewritten:
    """The same through torch.compile; what is compared is the last of `calls` calls."""
    model.eval()
    twin, reports = copy.deepcopy(model), list[Report]()
    options = {"inner": "eager", "on_report": reports.append, **options}
    run = torch.compile(model, backend="graphquant", fullgraph=True, options=options)
    for _ in range(calls):
        want, got = twin(*cloned(args)), run(*cloned(args))
    nothing: Any = None
    return Rewritten(nothing, Report.merge(reports), want, got)


def cloned(args: Any) -> Any:
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, args)


def text(graph: Graph) -> list[str]:
    """Every node, in order; where parameters stand among each other means nothing."""
    lines = [(n.op, f"{n.name} {n.op} {n.target} {n.args} {n.kwargs}") for n in graph.nodes]
    parameters = sorted(line for op, line in lines if op == "get_attr")
    return parameters + [line for op, line in lines if op != "get_attr"]


def spec(graph: Graph) -> list[tuple[Any, ...]]:
    """Shape, dtype and device of every output."""
    values = [n.meta["val"] for n in tree_leaves(graph.output_node().args) if isinstance(n, Node)]
    return [(str(tuple(v.shape)), v.dtype, v.device) for v in values]


def honest(captured: Captured) -> None:
    """The graph lints, nothing in it is dead, and every fake value is what its node computes."""
    graph = captured.gm.graph
    graph.lint()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        assert node.users or node.is_impure(), f"{node.name} is dead"
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with captured.fake_mode:
            values = node.target(*args, **kwargs)
        for value, said in zip(tree_leaves(values), tree_leaves(node.meta["val"]), strict=True):
            if isinstance(value, Tensor):
                assert (value.dtype, value.device) == (said.dtype, said.device), node.name
                assert tuple(map(str, value.shape)) == tuple(map(str, said.shape)), node.name


def packed(model: nn.Module, *args: Any) -> list[list[Tensor]]:
    """What each int8 linear of the model reads instead of float weights, in graph order."""
    captured = exported(model.eval(), *args)
    rewrite(captured, Config())
    last = captured.gm.graph.find_nodes(op="placeholder")[-1]

    def new_input(name: str) -> Node:
        with captured.gm.graph.inserting_after(last):
            return captured.gm.graph.placeholder(name)

    return [
        p.recipe.compute([captured.parameters[r] for r in p.roots])
        for p in prepack(captured, new_input)
    ]


def linear_bound(x: Tensor, weight: Tensor) -> Tensor:
    """How far int8_linear may be from x @ weight^T, elementwise [..., N].

    A row's step is at most absmax / 127 and rounding costs half a step, so with the absmax a of a
    row of x and b of a row of the weight, and with x' = x + dx, w' = w + dw as rounded:

        |x' w' - x w| <= |dx| |w| + |x'| |dw| <= a/254 |w|_1 + b/254 (|x|_1 + K a/254)

    and float32 rounding on top.
    """
    x, w = x.double(), weight.double()
    a, b = x.abs().amax(-1, keepdim=True) / 254, w.abs().amax(-1) / 254
    one_x, one_w = x.abs().sum(-1, keepdim=True), w.abs().sum(-1)
    return a * one_w + b * (one_x + x.shape[-1] * a) + SLACK * (1 + x.abs() @ w.abs().T)


def assert_near(got: Tensor, want: Tensor, bound: Tensor | float) -> None:
    """|got - want| <= bound, and one more rounding of the result in types below float32.

    A bound sums K errors as if all had one sign and their full size. On gaussian values they add up
    to 1.4 sqrt(K) times less, so from K = 8 on no more than a third of it may show on average.
    """
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    rounding = 0.0 if want.dtype == torch.float32 else 2 * torch.finfo(want.dtype).eps
    far = (got.double() - want.double()).abs() - rounding * want.double().abs()
    assert bool((far <= bound).all()), f"{float((far - bound).max())} over the bound"
    if isinstance(bound, Tensor):
        assert far.clamp_min(0).norm() <= bound.expand_as(far).norm() / 3
