"""The verifier names the pass and the node of every kind of fault that a pass can make.

Each fault is made in a right graph, by a pass of the pipeline that is replaced for the test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from graphquant import Config
from graphquant.errors import VerifyError
from graphquant.ir.graph import LINEAR, aten
from graphquant.ops import int8_linear
from graphquant.passes import pipeline
from graphquant.passes.pipeline import rewrite
from graphquant.passes.verify import verifier
from tests.passes.graphs import Model, exported

K = 16


def model() -> nn.Module:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.b(m.a(x).sin())
        return y, y.transpose(0, 1)

    return Model(forward, a=nn.Linear(K, K), b=nn.Linear(K, K))


def call(graph: Graph, target: Any) -> Node:
    return next(n for n in graph.nodes if n.op == "call_function" and n.target is target)


def insert_after(graph: Graph, node: Node, target: Any, *args: Any) -> Node:
    """A node with the fake value that it computes."""
    with graph.inserting_after(node):
        made = graph.call_function(target, args)
    values = [a.meta["val"] if isinstance(a, Node) else a for a in args]
    made.meta["val"] = target(*values)
    return made


def replace_output(graph: Graph, i: int, make: Callable[[Node], Node]) -> None:
    (returned,) = graph.output_node().args
    outputs = list(returned)  # type: ignore[arg-type]
    outputs[i] = make(outputs[i])
    graph.output_node().args = (tuple(outputs),)


def read_before_it_is_made(graph: Graph) -> None:
    sine = call(graph, aten.sin.default)
    next(iter(sine.users)).append(sine)


def another_shape_than_it_says(graph: Graph) -> None:
    sine = call(graph, aten.sin.default)
    sine.meta["val"] = sine.meta["val"][:1]


def another_dtype_than_it_says(graph: Graph) -> None:
    sine = call(graph, aten.sin.default)
    sine.meta["val"] = sine.meta["val"].half()


def one_output_less(graph: Graph) -> None:
    graph.output_node().args = (graph.output_node().args[0][:1],)  # type: ignore[index]


def an_output_of_other_strides(graph: Graph) -> None:
    def other(y: Node) -> Node:
        turned = insert_after(graph, y, aten.transpose.int, y, 0, 2)
        copied = insert_after(graph, turned, aten.clone.default, turned)
        copied.kwargs = {"memory_format": torch.contiguous_format}
        copied.meta["val"] = turned.meta["val"].contiguous()
        return insert_after(graph, copied, aten.transpose.int, copied, 0, 2)

    replace_output(graph, 0, other)


def an_output_inside_larger_memory(graph: Graph) -> None:
    (y, _) = graph.output_node().args[0]  # type: ignore[misc, union-attr]
    with graph.inserting_after(y):
        both = graph.call_function(aten.stack.default, ([y, y],))
    both.meta["val"] = torch.stack([y.meta["val"]] * 2)
    replace_output(graph, 0, lambda y: insert_after(graph, both, aten.select.int, both, 0, 0))


def an_output_that_is_a_copy(graph: Graph) -> None:
    replace_output(graph, 0, lambda y: insert_after(graph, y, aten.clone.default, y))


def an_output_that_is_an_input(graph: Graph) -> None:
    given = graph.find_nodes(op="placeholder")[0]
    replace_output(graph, 0, lambda y: given)


ALWAYS = [
    (read_before_it_is_made, r"linear_1 reads sin before it is made"),
    (another_shape_than_it_says, r"the fake value of sin is \(\(1, 5, 16\), .* computes \(\(2, 5"),
    (another_dtype_than_it_says, r"the fake value of sin is .*float16.* computes .*float32"),
    (one_output_less, r"1 outputs, 2 were captured"),
    (an_output_of_other_strides, r"output 0, transpose_int_1, is .*captured was"),
    (an_output_inside_larger_memory, r"output 0, select_int, is .*1280 bytes.* was .*640 bytes"),
    (an_output_that_is_a_copy, r"output 1, transpose, is .*memory of output 1.*memory of output 0"),
    (an_output_that_is_an_input, r"output 0, .* is .*the memory of "),
]


@pytest.mark.parametrize(("fault", "message"), ALWAYS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_fault_of_a_pass_is_found(
    fault: Callable[[Graph], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 5, K)
    monkeypatch.setattr(pipeline, "drop_empty_masks", fault)
    captured = exported(model(), x)
    with (
        captured.fake_mode,
        pytest.raises(VerifyError, match=f"^after empty masks: {message}"),
    ):
        rewrite(captured, Config())


def test_a_node_that_cannot_run_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(graph: Graph) -> None:
        call(graph, aten.transpose.int).args = (graph.find_nodes(op="placeholder")[0], 0, 7)

    monkeypatch.setattr(pipeline, "drop_empty_masks", fault)
    with pytest.raises(VerifyError, match="after empty masks: transpose cannot be computed"):
        rewrite(exported(model(), torch.randn(2, 5, K)), Config())


def weight_is_written(graph: Graph) -> None:
    weight = next(n for n in graph.nodes if n.op == "get_attr" and n.target == "a.weight")
    insert_after(graph, call(graph, aten.sin.default), aten.zero_.default, weight)


def weight_is_written_through_a_view(graph: Graph) -> None:
    weight = next(n for n in graph.nodes if n.op == "get_attr" and n.target == "a.weight")
    part = insert_after(graph, call(graph, aten.sin.default), aten.select.int, weight, 0, 0)
    insert_after(graph, part, aten.zero_.default, part)


def an_int8_linear_is_gone(graph: Graph) -> None:
    last = [n for n in graph.nodes if n.target is int8_linear.target][-1]
    sine = call(graph, aten.sin.default)
    last.replace_all_uses_with(sine)
    graph.erase_node(last)


AFTER_RULES = [
    (weight_is_written, r"int8_linear.* takes a_weight for constant, which zero_.* writes"),
    (weight_is_written_through_a_view, r"int8_linear.* takes a_weight for constant"),
    (an_int8_linear_is_gone, r"int8_linear.* is gone, which computed b"),
]


@pytest.mark.parametrize(
    ("fault", "message"), AFTER_RULES, ids=lambda v: getattr(v, "__name__", "")
)
def test_a_fault_behind_the_rules_is_found(
    fault: Callable[[Graph], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "merge_equal_views", fault)
    captured = exported(model(), torch.randn(2, 5, K))
    with (
        captured.fake_mode,
        pytest.raises(VerifyError, match=f"^after the end of the rewrite: {message}"),
    ):
        rewrite(captured, Config())


def test_a_linear_that_is_not_on_record_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(graph: Graph) -> None:
        sine = call(graph, aten.sin.default)
        weight = next(n for n in graph.nodes if n.op == "get_attr" and n.target == "a.weight")
        insert = insert_after(graph, sine, LINEAR, sine, weight)
        call(graph, aten.neg.default).args = (insert,)

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin().neg(), m.a(x)

    monkeypatch.setattr(pipeline, "merge_equal_views", fault)
    captured = exported(Model(forward, a=nn.Linear(K, K)), torch.randn(2, 5, K))
    message = "after the end of the rewrite: linear_default is a linear that is not on record"
    with captured.fake_mode, pytest.raises(VerifyError, match=message):
        rewrite(captured, Config())


def test_a_write_to_an_input_that_is_lost_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        x.mul_(2)
        return y

    def fault(graph: Graph) -> None:
        call(graph, aten.mul_.Tensor).target = aten.mul.Tensor

    monkeypatch.setattr(pipeline, "drop_empty_masks", fault)
    captured = exported(Model(forward, a=nn.Linear(K, K)), torch.randn(2, 5, K))
    with pytest.raises(VerifyError, match="a write in place to args_0 was lost or added"):
        rewrite(captured, Config())


def test_packing_what_is_written_is_found() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(m.state)
        m.state.mul_(2)
        return x + y

    model = Model(forward, a=nn.Linear(K, K), state=torch.randn(5, K))
    captured = exported(model, torch.randn(2, 5, K))
    state = next(n for n in captured.parameters if captured.names[n] == "state")
    check = verifier(captured)
    with pytest.raises(VerifyError, match=f"after x: {state.name} takes {state.name} for constant"):
        check("x", taken=[state])


def test_nothing_is_verified_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHQUANT_VERIFY", "0")
    monkeypatch.setattr(pipeline, "drop_empty_masks", another_shape_than_it_says)
    rewrite(exported(model(), torch.randn(2, 5, K)), Config(exclude="*"))


def test_every_test_runs_verified() -> None:
    captured = exported(model(), torch.randn(2, 5, K))
    sine = call(captured.gm.graph, aten.sin.default)
    sine.meta["val"] = sine.meta["val"].half()
    with pytest.raises(VerifyError, match="after capture: the fake value of sin is"):
        rewrite(captured, Config())


def test_a_right_graph_passes_with_what_is_known_only_at_run_time() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.a(x)
        return y[y[:, :, 0] > 0], y.unsqueeze_(0).squeeze_(0).add_(1)

    rewrite(exported(Model(forward, a=nn.Linear(K, K)), torch.randn(2, 5, K)), Config())
