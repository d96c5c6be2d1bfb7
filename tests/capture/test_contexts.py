"""Contexts, checks and transforms inside a model mean what they mean in eager and in aot_eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import graphquant
from graphquant import Report
from graphquant.capture.aten import from_dynamo
from graphquant.ir.contexts import Region, regions
from graphquant.ir.graph import SDPA
from graphquant.passes.attention.kernels import pinned_by_model
from graphquant.passes.eligibility import NEEDS_GRADIENT
from tests.small import NEAR, Mlp, Model, error, int8, notes, seeded

INNER = ("eager", "aot_eager")
# torch.compile of 2.11 loses checks of sizes that depend on data: aot_eager returns as well
CHECKED = TorchVersion(torch.__version__) >= (2, 13)
# AOTAutograd of torch 2.11 fails on inference mode in a graph, and leaves it on for the process
INFERENCE_INNER = INNER if TorchVersion(torch.__version__) >= (2, 13) else ("eager",)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.enable_grad():
        yield
    assert not torch.is_inference_mode_enabled()


def over(forward: Callable[..., Any], device: str) -> nn.Module:
    """A model that runs forward(mlp, *args)."""
    return Model(lambda m, *args: forward(m.mlp, *args), mlp=seeded(Mlp)).to(device)


def tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def check(
    model: nn.Module,
    *args: Any,
    near: float = NEAR,
    inners: Sequence[str] = INNER,
    **options: Any,
) -> list[Report]:
    """Values near eager's; types and requires_grad as in eager and in torch's own backend."""
    want = theirs = tensors(model(*args))
    if "aot_eager" in inners:
        theirs = tensors(torch.compile(model, backend="aot_eager")(*args))
    reports: list[Report] = []
    for inner in inners:
        torch._dynamo.reset()
        got = tensors(int8(model, reports, inner=inner, **options)(*args))
        for g, w, t in zip(got, want, theirs, strict=True):
            assert (g.dtype, g.shape) == (w.dtype, w.shape) == (t.dtype, t.shape)
            assert g.requires_grad == w.requires_grad == t.requires_grad
            assert error(g, w) <= near
    return reports


def int8_paths(reports: list[Report]) -> list[str]:
    return [o.path for r in reports for o in r.linears if o.int8]


def refusals(reports: list[Report]) -> set[str]:
    return {o.refused for r in reports for o in r.linears if not o.int8}


# Inference mode ----------------------------------------------------------------------------------


@torch.inference_mode()
def decorated(mlp: nn.Module, x: Tensor) -> Tensor:
    return mlp(x)


def inside_no_grad_and_autocast(mlp: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, dtype=torch.bfloat16), torch.no_grad():
        with torch.inference_mode():
            y = mlp(x)
        return y, mlp(x.flip(0))


def left_by_an_exception(mlp: nn.Module, x: Tensor) -> Tensor:
    try:
        with torch.inference_mode():
            y = mlp(x)
            raise ValueError
    except ValueError:
        return y.clone()


@pytest.mark.parametrize("forward", [decorated, inside_no_grad_and_autocast, left_by_an_exception])
def test_linears_under_inference_mode_inside_the_model_are_int8(
    forward: Callable[..., Any], device: str, x: Tensor
) -> None:
    reports = check(over(forward, device), x, inners=INFERENCE_INNER)
    assert set(int8_paths(reports)) == {"mlp.fc1", "mlp.fc2"}
    assert refusals(reports) == set()
    assert not any(map(notes, reports))


def test_result_under_inference_mode_is_an_inference_tensor_as_in_eager(
    device: str, x: Tensor
) -> None:
    assert int8(over(decorated, device))(x).is_inference()


def half_and_half(mlp: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        y = mlp(x)
    return y, mlp(x)


def test_gradients_flow_again_behind_inference_mode(device: str, x: Tensor) -> None:
    reports = check(over(half_and_half, device), x, inners=INFERENCE_INNER)
    assert len(int8_paths(reports)) == 2 * len(INFERENCE_INNER)
    assert refusals(reports) == {NEEDS_GRADIENT}


def switched_off(mlp: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return mlp(x.clone())


def test_inference_mode_switched_off_brings_gradients_back(device: str, x: Tensor) -> None:
    with torch.no_grad():
        reports = check(over(switched_off, device), x, inners=INFERENCE_INNER)
    assert refusals(reports) == {NEEDS_GRADIENT} and int8_paths(reports) == []


def in_another_context(mlp: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    y = mlp.norm(x)
    with torch.inference_mode():
        q = mlp.fc1(y)
    return q, F.linear(y, mlp.fc2.weight[:, :64])


def test_siblings_in_two_contexts_are_not_stacked(device: str, x: Tensor) -> None:
    model = over(in_another_context, device)
    with torch.no_grad():
        reports = check(model, x, inners=INFERENCE_INNER)
        assert not any("stack_siblings" in o.rules for r in reports for o in r.linears)
        torch._dynamo.reset()
        q, k = int8(model)(x)
    assert q.is_inference() and not k.is_inference()


# Gradients and autocast --------------------------------------------------------------------------


def weight_made_with_gradient(mlp: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return F.linear(x, mlp.fc1.weight * 2)


def test_a_computed_weight_stays_in_its_grad_mode(device: str, x: Tensor) -> None:
    model = over(weight_made_with_gradient, device)
    with torch.no_grad():
        check(model, x)
        got = int8(model)(x)
    got.sum().backward()
    assert model.mlp.fc1.weight.grad is not None


def weight_made_under_autocast(mlp: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        weight = mlp.fc2.weight @ mlp.fc1.weight
        return F.linear(x, weight), weight


def test_a_computed_weight_stays_under_its_autocast(device: str, x: Tensor) -> None:
    with torch.no_grad():
        assert int8_paths(check(over(weight_made_under_autocast, device), x))


def toggled(mlp: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    torch.set_grad_enabled(False)
    y = mlp(x)
    torch.set_grad_enabled(True)
    return y, mlp(y)


@pytest.mark.parametrize("ambient", [torch.enable_grad, torch.no_grad])
def test_grad_mode_toggled_between_linears_is_followed(
    ambient: Callable[[], Any], device: str, x: Tensor
) -> None:
    with ambient():
        reports = check(over(toggled, device), x)
    assert len(int8_paths(reports)) == 2 * len(INNER)
    assert refusals(reports) == {NEEDS_GRADIENT}


# Attention ---------------------------------------------------------------------------------------


def attend(mlp: nn.Module, x: Tensor) -> Tensor:
    q = mlp(x).view(1, 4, 8, 16).bfloat16()
    before = F.scaled_dot_product_attention(q, q, q)
    with sdpa_kernel(SDPBackend.MATH):
        inside = F.scaled_dot_product_attention(q, q, q)
    return before, inside, F.scaled_dot_product_attention(q, q, q)


def test_sdpa_kernel_inside_the_model_is_in_force(device: str, x: Tensor) -> None:
    found: list[list[str]] = []

    def watch(*args: Any, **kwargs: Any) -> Tensor:
        found.append([b.name for b in _cur_sdpa_kernel_backends()])
        return sdpa(*args, **kwargs)

    graphs: list[Any] = []

    def keep(gm: Any, inputs: list[Any]) -> Any:
        graphs.append(from_dynamo(gm, inputs))
        return gm.forward

    model = over(attend, device)
    everything = [b.name for b in _cur_sdpa_kernel_backends()]
    with torch.no_grad():
        check(model, x)
        torch.compile(model, backend=keep)(x)
    assert [b.name for b in _cur_sdpa_kernel_backends()] == everything
    (captured,) = graphs
    for node in captured.gm.graph.find_nodes(op="call_function", target=SDPA):
        sdpa, node.target = node.target, watch
    captured.gm.recompile()
    with torch.no_grad():
        given = captured.gm.graph.find_nodes(op="placeholder")
        captured.gm(*[captured.parameters.get(node, x) for node in given])
    assert found == [everything, ["MATH"], everything]


def test_the_choice_of_kernels_leaves_the_models_own_choice_alone(device: str, x: Tensor) -> None:
    chosen: list[list[bool]] = []

    def look(gm: Any, inputs: list[Any]) -> Any:
        captured = from_dynamo(gm, inputs)
        assert captured is not None
        graph = captured.gm.graph
        theirs = pinned_by_model(graph)
        nodes = graph.find_nodes(op="call_function", target=SDPA)
        chosen.append([n in theirs for n in nodes])
        return gm.forward

    with torch.no_grad():
        torch.compile(over(attend, device), backend=look)(x)
    assert chosen == [[False, True, False]]


# What is not kept --------------------------------------------------------------------------------


def deterministic(mlp: nn.Module, x: Tensor) -> Tensor:
    torch.use_deterministic_algorithms(True)
    y = mlp(x)
    torch.use_deterministic_algorithms(False)
    return y


def precise(mlp: nn.Module, x: Tensor) -> Tensor:
    torch.set_float32_matmul_precision("high")
    y = mlp(x)
    torch.set_float32_matmul_precision("highest")
    return y


@pytest.mark.parametrize("forward", [deterministic, precise])
def test_a_state_that_is_not_kept_leaves_the_graph_in_float(
    forward: Callable[..., Any], device: str, x: Tensor
) -> None:
    with torch.no_grad():
        # on a GPU "high" is TF32
        reports = check(over(forward, device), x, near=1e-6 if device == "cpu" else 2e-3)
    assert int8_paths(reports) == []
    assert all("changes a state that is not kept" in r.notes[0] for r in reports)


def checkpointed(mlp: nn.Module, x: Tensor) -> Tensor:
    def part(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return mlp(x)

    return checkpoint(part, x, use_reentrant=False)


def test_a_context_inside_a_checkpoint_leaves_the_graph_in_float(device: str, x: Tensor) -> None:
    with torch.no_grad():
        reports = check(over(checkpointed, device), x, near=1e-2)
    assert int8_paths(reports) == []
    assert all("inside a higher-order op" in r.notes[0] for r in reports)


def test_a_failed_capture_leaves_no_context_behind(device: str, x: Tensor) -> None:
    def stop(gm: Any, inputs: list[Any]) -> Any:
        linear = next(n for n in gm.graph.nodes if "linear" in n.name)
        linear.target = lambda *args: 1 / 0
        before = torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type)
        with pytest.raises(ZeroDivisionError):
            from_dynamo(gm, inputs)
        assert not torch.is_inference_mode_enabled()
        assert before == (torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type))
        return lambda *args: (x, x)

    torch.compile(over(inside_no_grad_and_autocast, device), backend=stop)(x)


# Transforms --------------------------------------------------------------------------------------


def vjp(mlp: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    y, pull = torch.func.vjp(mlp, x)
    return y, pull(y)[0]


def jacrev(mlp: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jacrev(mlp)(x[:1])


def grad(mlp: nn.Module, x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: mlp(x).sum())(x)


@pytest.mark.parametrize("forward", [vjp, jacrev, grad])
def test_transforms_inside_the_model_run_in_float(
    forward: Callable[..., Any], device: str, x: Tensor
) -> None:
    model = over(forward, device)
    with torch.no_grad():
        reports = check(model, x, near=1e-5)
        explained = graphquant.explain(model, x)
    assert int8_paths([*reports, explained]) == []
    assert all("torch.func" in r.notes[0] for r in (*reports, explained))


def functional_call(mlp: nn.Module, x: Tensor) -> Tensor:
    doubled = {name: p * 2 for name, p in mlp.named_parameters()}
    return torch.func.functional_call(mlp, doubled, (x,))


def test_functional_call_with_computed_weights_is_int8(device: str, x: Tensor) -> None:
    with torch.no_grad():
        assert len(int8_paths(check(over(functional_call, device), x))) == 2 * len(INNER)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("first", ["plain", "dual"])
def test_tangents_of_forward_mode_are_eagers(
    first: str, inner: str, device: str, x: Tensor
) -> None:
    """Dynamo runs the same code with and without tangents."""
    model = seeded(Mlp).to(device).eval()
    run = int8(model, inner=inner)

    def both(model: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        with fwad.dual_level():
            value, tangent = fwad.unpack_dual(model(fwad.make_dual(x, x.flip(0))))
            return value.clone(), tangent.clone()

    with torch.no_grad():
        want = both(model)
        if first == "plain":
            run(x)
        torch.testing.assert_close(both(run), want)
        assert 0 < error(run(x), model(x)) < NEAR


def test_tangents_of_weights_are_eagers(device: str, x: Tensor) -> None:
    model = seeded(Mlp).to(device).eval()
    run = int8(model)
    with torch.no_grad(), fwad.dual_level():
        weight = model.fc1.weight.detach()
        del model.fc1.weight
        model.fc1.weight = fwad.make_dual(weight, torch.ones_like(weight))
        want = fwad.unpack_dual(model(x)).tangent
        torch.testing.assert_close(fwad.unpack_dual(run(x)).tangent, want)


def ragged(*lengths: int) -> Tensor:
    parts = [torch.randn(n, 64) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


def test_jagged_tensors_run_in_float(device: str) -> None:
    model, reports = seeded(Mlp).to(device).eval(), list[Report]()
    run = int8(model, reports)
    with torch.no_grad():
        for lengths in ((3, 5), (7, 2)):
            x = ragged(*lengths).to(device)
            torch.testing.assert_close(run(x).values(), model(x).values())
    assert int8_paths(reports) == []
    assert "makes a nested tensor" in reports[0].notes[0]


def test_what_a_jagged_tensor_holds_is_int8(device: str) -> None:
    mlp = seeded(Mlp).to(device).eval()

    def model(x: Tensor) -> Tensor:
        return mlp(torch.nested.to_padded_tensor(x, 0.0))

    reports: list[Report] = []
    run = int8(model, reports)
    with torch.no_grad():
        for lengths in ((3, 5), (7, 2)):
            x = ragged(*lengths).to(device)
            assert 0 < error(run(x), model(x)) < NEAR
    assert len(int8_paths(reports)) == 2


class Straight(torch.autograd.Function):
    """round(x), with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def straight_through(mlp: nn.Module, x: Tensor) -> Tensor:
    return mlp.fc1(Straight.apply(4 * x))


def test_a_backward_of_the_models_own_is_kept(device: str, x: Tensor) -> None:
    model = over(straight_through, device).requires_grad_(False)
    gradients = []
    for run in (model, int8(model, reports := list[Report]())):
        leaf = x.clone().requires_grad_()
        run(leaf).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
    assert "backward of its own" in reports[0].notes[0]
    with torch.no_grad():
        assert int8_paths(check(model, x))


# Checks ------------------------------------------------------------------------------------------


def four(mlp: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    y = x[mask]
    torch._check(y.shape[0] == 4)
    return mlp(y)


def four_at_the_end(mlp: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    y = mlp(x)[mask]
    torch._check(y.shape[0] == 4)
    return y


def four_places(mlp: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    at = torch.nonzero(mask)
    torch._check(at.shape[0] == 4)
    return mlp(x) + at.sum()


def two_values(mlp: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    values = torch.unique(mask.long())
    torch._check(values.shape[0] == 2)
    return mlp(x) + values.sum()


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("forward", [four, four_at_the_end, four_places, two_values])
def test_a_check_of_a_size_that_depends_on_data_is_made_at_every_call(
    forward: Callable[..., Any], inner: str, device: str, x: Tensor
) -> None:
    right = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.bool, device=device)
    wrong = torch.zeros(8, dtype=torch.bool, device=device)
    model = over(forward, device)
    reports: list[Report] = []
    run = int8(model, reports, inner=inner)
    with (
        torch.no_grad(),
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
    ):
        assert 0 < error(run(x, right), model(x, right)) < NEAR
        with pytest.raises(RuntimeError):
            model(x, wrong)
        if CHECKED:
            for backend in (torch.compile(model, backend="aot_eager"), run):
                with pytest.raises(RuntimeError):
                    backend(x, wrong)
    assert len(int8_paths(reports)) == 2


@pytest.mark.parametrize("inner", INNER)
def test_a_check_of_values_is_kept(inner: str, device: str, x: Tensor) -> None:
    def small(mlp: nn.Module, x: Tensor) -> Tensor:
        assert (x < 100).all(), "too large"
        return mlp(x)

    reports: list[Report] = []
    run = int8(over(small, device), reports, inner=inner)
    with torch.no_grad():
        run(x)
        if device == "cpu":  # on CUDA it is a device-side assertion, which ends the process
            with pytest.raises(RuntimeError, match="too large"):
                run(100 * x.abs() + 100)
    assert len(int8_paths(reports)) == 2


# Regions -----------------------------------------------------------------------------------------


def test_regions_follow_nested_contexts(device: str, x: Tensor) -> None:
    seen: dict[str, Region] = {}

    def forward(mlp: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            a = x.sin()
            with torch.inference_mode():
                b = x.cos()
            with torch.autocast(x.device.type, dtype=torch.bfloat16):
                c = x.tan()
        return a + b + c + x.exp()

    def look(gm: Any, inputs: list[Any]) -> Any:
        captured = from_dynamo(gm, inputs)
        assert captured is not None
        for node, region in regions(captured.gm.graph, captured.grad_enabled):
            seen[node.name] = region
        return gm.forward

    torch.compile(over(forward, device), backend=look)(x)
    assert not seen["sin"].grad and not seen["sin"].inference
    assert seen["cos"].inference and not seen["cos"].records
    assert [args[1] for args in seen["tan"].autocast] == [torch.bfloat16]
    assert seen["exp"] == Region(grad=True)
