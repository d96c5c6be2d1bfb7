"""A norm in front of a linear quantizes on its way out, and keeps its float result if needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.graphs import (
    Model,
    argument,
    assert_near,
    compiled,
    linear_bound,
    parameter,
    rewritten,
)

K, N = 40, 24


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, K) * 2 + 1


def jittered(norm: nn.Module) -> nn.Module:
    """Weights and biases that are not ones and zeros."""
    for p in norm.parameters():
        p.add_(torch.randn_like(p))
    return norm


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: jittered(nn.LayerNorm(K)),
    "layer norm without bias": lambda: jittered(nn.LayerNorm(K, bias=False)),
    "layer norm without affine": lambda: nn.LayerNorm(K, elementwise_affine=False),
    "rms norm": lambda: jittered(nn.RMSNorm(K, eps=1e-3)),
    "rms norm without affine": lambda: nn.RMSNorm(K, elementwise_affine=False),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_before_a_linear_is_fused(name: str, x: Tensor) -> None:
    norm, fc = NORMS[name](), nn.Linear(K, N)
    result = rewritten(Model(lambda m, x: m.fc(m.norm(x)), norm=norm, fc=fc), x)
    assert result.counts == {"norm_linear": 1}
    assert result.ops() == {
        "norm_quantize": 1,
        "getitem": 6,
        "quantize_weight": 1,
        "int8_linear": 1,
    }
    assert not result.report.refused
    assert_near(result.got, result.want, linear_bound(norm(x), fc.weight))


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_that_is_also_the_residual_is_kept_in_float(name: str, x: Tensor) -> None:
    norm, fc = NORMS[name](), nn.Linear(K, K)

    def forward(m: Any, x: Tensor) -> Any:
        h = m.norm(x)
        return h + m.fc(h), h

    result = rewritten(Model(forward, norm=norm, fc=fc), x)
    assert result.counts == {"norm_linear + residual": 1}
    assert result.ops()["norm_quantize_keep"] == 1 and "quantize" not in result.ops()
    assert not result.report.refused
    assert_near(result.got[0], result.want[0], linear_bound(norm(x), fc.weight))
    torch.testing.assert_close(result.got[1], result.want[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_kept(dtype: torch.dtype, x: Tensor) -> None:
    norm, fc = NORMS["layer norm"](), nn.Linear(K, N)

    def forward(m: Any, x: Tensor) -> Any:
        h = m.norm(x)
        return m.fc(h), h

    model = Model(forward, norm=norm, fc=fc).to(dtype)
    result = rewritten(model, x.to(dtype))
    assert result.counts == {"norm_linear": 1}
    h = result.want[1].float()
    rounding = torch.finfo(dtype).eps * (h.abs() @ fc.weight.float().abs().T + 1)
    assert_near(result.got[0], result.want[0], linear_bound(h, fc.weight) + rounding)
    assert_near(result.got[1], result.want[1], 1e-4)  # one rounding apart


ROW_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda h: h.flatten(0, 1),
    "view": lambda h: h.view(15, K),
    "reshape": lambda h: h.reshape(5, 3, K),
    "transpose": lambda h: h.transpose(0, 1),
    "permute": lambda h: h.permute(1, 0, 2),
    "unsqueeze": lambda h: h.unsqueeze(1),
    "there and back": lambda h: h.unsqueeze(0).squeeze(0),
    "unflatten": lambda h: h.unflatten(1, (5, 1)),
    "contiguous": lambda h: h.transpose(0, 1).contiguous(),
    "windows": lambda h: h.view(3, 5, 1, K).permute(2, 1, 0, 3).reshape(-1, 3, K),
}


@pytest.mark.parametrize("keep", [False, True], ids=["alone", "kept"])
@pytest.mark.parametrize("name", ROW_VIEWS)
def test_views_of_whole_rows_stand_in_no_ones_way(name: str, keep: bool, x: Tensor) -> None:
    norm, fc = NORMS["layer norm"](), nn.Linear(K, N)

    def forward(m: Any, x: Tensor) -> Any:
        h = m.norm(x)
        y = m.fc(ROW_VIEWS[name](h))
        return (y, h) if keep else (y,)

    result = rewritten(Model(forward, norm=norm, fc=fc), x)
    assert result.counts == {"norm_linear": 1}
    assert result.ops()["norm_quantize_keep"] == int(keep)
    assert_near(result.got[0], result.want[0], linear_bound(ROW_VIEWS[name](norm(x)), fc.weight))
    torch.testing.assert_close(result.got[1:], result.want[1:])


def test_a_view_that_others_read_as_well_is_of_the_kept_norm(x: Tensor) -> None:
    norm, fc = NORMS["layer norm"](), nn.Linear(K, N)
    model = Model(lambda m, x: (m.fc(rows := m.norm(x).flatten(0, 1)), rows), norm=norm, fc=fc)
    result = rewritten(model, x)
    assert result.counts == {"norm_linear": 1}
    assert result.ops()["norm_quantize_keep"] == 1 and "layer_norm" not in result.ops()
    torch.testing.assert_close(result.got[1], result.want[1])


ODD_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads": lambda h: h.view(3, 5, 4, K // 4).flatten(0, 1),
    "one head": lambda h: h.unflatten(-1, (1, K)),
    "a squeeze of the last dim": lambda h: h.squeeze(-1),
    "a squeeze of two dims": lambda h: h.squeeze((0, -1)),
    "columns first": lambda h: h.transpose(1, 2),
    "rows swapped for columns": lambda h: h.permute(0, 2, 1).reshape(3, 5, K),
    "a slice": lambda h: h[..., :32],
    "shifted": lambda h: h.roll(1, 1),
}


@pytest.mark.parametrize("keep", [False, True], ids=["alone", "also read"])
@pytest.mark.parametrize("name", ODD_VIEWS)
def test_other_views_leave_the_norm_in_float(name: str, keep: bool, x: Tensor) -> None:
    norm = NORMS["layer norm"]()
    seen = ODD_VIEWS[name](norm(x))
    fc = nn.Linear(seen.shape[-1], N)

    def forward(m: Any, x: Tensor) -> Any:
        h = m.norm(x)
        y = m.fc(ODD_VIEWS[name](h))
        return (y, h) if keep else (y,)

    result = rewritten(Model(forward, norm=norm, fc=fc), x)
    assert result.counts == {"linear": 1}
    (reason,) = result.refused("norm")
    assert reason.startswith("read by ") and reason.endswith(", the output") == keep
    assert_near(result.got[0], result.want[0], linear_bound(seen, fc.weight))


def test_a_norm_over_two_dims_is_refused(x: Tensor) -> None:
    norm, fc = jittered(nn.LayerNorm((5, K))), nn.Linear(K, N)
    result = rewritten(Model(lambda m, x: m.fc(m.norm(x)), norm=norm, fc=fc), x)
    assert result.counts == {"linear": 1}
    assert result.refused("norm") == ["normalizes over 2 dims; int8 scales are per row"]
    assert_near(result.got, result.want, linear_bound(norm(x), fc.weight))


def test_a_norm_that_no_linear_reads_is_refused(x: Tensor) -> None:
    model = Model(lambda m, x: m.norm(m.fc(x)).sin(), norm=nn.LayerNorm(N), fc=nn.Linear(K, N))
    result = rewritten(model, x)
    assert result.counts == {"linear": 1}
    assert result.refused("norm") == ["read by sin"]


def test_a_norm_of_doubles_is_refused(x: Tensor) -> None:
    fc = nn.Linear(K, N)
    model = Model(lambda m, x: m.fc(F.layer_norm(x, (K,)).float()), fc=fc)
    result = rewritten(model, x.double())
    assert result.counts == {"linear": 1}
    why = "it reads float64; the ops take float16, bfloat16 and float32"
    assert result.refused("norm") == [why]
    assert_near(result.got, result.want, linear_bound(F.layer_norm(x, (K,)), fc.weight))


def test_a_norm_whose_result_is_written_is_refused(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.norm(x)
        y = m.fc(h)
        torch.einsum("bij->bji", h).mul_(0.5)
        return y + h

    fc = nn.Linear(K, K)
    result = rewritten(Model(forward, norm=nn.LayerNorm(K), fc=fc), x)
    assert result.counts == {"linear + residual": 1}
    assert result.refused("norm") == ["the result of layer_norm in norm is written in place"]
    assert_near(result.got, result.want, linear_bound(F.layer_norm(x, (K,)), fc.weight))


def test_a_norm_whose_input_is_written_before_the_linear_is_refused(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.norm(x)
        x.mul_(0)
        return m.fc(h)

    fc = nn.Linear(K, N)
    result = compiled(Model(forward, norm=nn.LayerNorm(K), fc=fc), x)
    assert result.counts == {"linear": 1}
    assert_near(result.got, result.want, linear_bound(F.layer_norm(x, (K,)), fc.weight))


def test_two_linears_of_different_types_share_a_kept_norm(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        h = m.norm(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = m.a(h)
        return low, m.b(h)

    norm, a, b = NORMS["layer norm"](), nn.Linear(K, N), nn.Linear(K, N)
    result = compiled(Model(forward, norm=norm, a=a, b=b), x)
    assert result.counts == {"norm_linear": 1, "linear": 1}
    assert [y.dtype for y in result.got] == [torch.bfloat16, torch.float32]
    h = norm(x)
    rounding = 2**-7 * (h.abs() @ a.weight.abs().T + 1)
    assert_near(result.got[0], result.want[0], linear_bound(h, a.weight) + rounding)
    assert_near(result.got[1], result.want[1], linear_bound(h, b.weight))


def test_two_linears_on_different_views_share_a_kept_norm(x: Tensor) -> None:
    norm, a, b = NORMS["layer norm"](), nn.Linear(K, N), nn.Linear(K, N)

    def forward(m: Any, x: Tensor) -> Any:
        h = m.norm(x)
        return m.a(h), m.b(h.transpose(0, 1))

    result = rewritten(Model(forward, norm=norm, a=a, b=b), x)
    assert result.counts == {"norm_linear": 1, "linear": 1}
    assert result.ops()["norm_quantize_keep"] == 1
    assert_near(result.got[0], result.want[0], linear_bound(norm(x), a.weight))
    assert_near(result.got[1], result.want[1], linear_bound(norm(x).transpose(0, 1), b.weight))


def test_an_excluded_reader_gets_the_float_norm(x: Tensor) -> None:
    norm, a, b = NORMS["rms norm"](), nn.Linear(K, N), nn.Linear(K, N)
    model = Model(lambda m, x: (m.a(h := m.norm(x)), m.b(h)), norm=norm, a=a, b=b)
    result = rewritten(model, x, exclude="b")
    assert result.counts == {"norm_linear": 1}
    assert result.refused("linear") == ["excluded by 'b'"]
    torch.testing.assert_close(result.got[1], result.want[1])


def test_siblings_share_one_fused_norm(x: Tensor) -> None:
    parts = {name: nn.Linear(K, N) for name in "qkv"}
    model = Model(lambda m, x: (m.q(h := m.norm(x)), m.k(h), m.v(h)), norm=nn.LayerNorm(K), **parts)
    result = rewritten(model, x)
    assert result.counts == {"stack_siblings + norm_linear": 3}
    assert result.ops()["norm_quantize"] == result.ops()["int8_linear"] == 1


def test_a_spelled_out_gamma_of_more_dims_is_one_row(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        d = x - x.mean(-1, keepdim=True)
        y = d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + 1e-5)
        return m.fc(m.gamma * y + m.beta)

    fc = nn.Linear(K, N)
    model = Model(forward, fc=fc, gamma=parameter(1, 1, K), beta=parameter(1, K))
    result = rewritten(model, x)
    assert result.counts == {"norm_linear": 1}
    gamma = argument(result.one("norm_quantize"), "gamma")
    assert gamma.meta["val"].shape == (K,)
    h = F.layer_norm(x, (K,)) * model.gamma + model.beta
    assert_near(result.got, result.want, linear_bound(h, fc.weight))


def test_a_gamma_written_between_norm_and_linear_is_refused(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.layer_norm(x, (K,), m.gamma)
        m.gamma.mul_(2)
        return m.fc(h)

    fc = nn.Linear(K, N)
    gamma = torch.randn(K)
    result = compiled(Model(forward, fc=fc, gamma=gamma.clone()), x, calls=2)
    assert result.counts == {"linear": 1}
    assert_near(result.got, result.want, linear_bound(2 * F.layer_norm(x, (K,), gamma), fc.weight))


def post_norm(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    B, S, D = h.shape
    return m.fc(h.reshape(B * S, D)).reshape(B, S, D) + h


def test_a_view_whose_size_is_computed_after_the_norm_is_kept(x: Tensor) -> None:
    any_size = torch.export.Dim.DYNAMIC
    norm, fc = NORMS["layer norm"](), nn.Linear(K, K)
    result = rewritten(
        Model(post_norm, norm=norm, fc=fc), x, sizes={"args": ({0: any_size, 1: any_size},)}
    )
    assert result.counts == {"norm_linear + residual": 1}
    other = torch.randn(2, 9, K)
    want = post_norm(Model(post_norm, norm=norm, fc=fc), other)
    assert_near(result.captured.gm(other), want, linear_bound(norm(other), fc.weight))


def test_dynamic_sizes_compile_as_well(x: Tensor) -> None:
    norm, fc = NORMS["layer norm"](), nn.Linear(K, K)
    model = Model(post_norm, norm=norm, fc=fc)
    run = torch.compile(model, backend="graphquant", dynamic=True, options={"inner": "eager"})
    for size in ((3, 5), (2, 9), (4, 4)):
        x = torch.randn(*size, K)
        assert_near(run(x), model(x), linear_bound(norm(x), fc.weight))


NARROW = [torch.float8_e4m3fn, torch.float8_e5m2]
FINE = [torch.bfloat16, torch.float64]


@pytest.mark.parametrize("low", NARROW)
def test_a_float8_cast_behind_a_norm_is_kept(low: torch.dtype) -> None:
    """Its steps are coarser than int8's."""
    x, fc = torch.randn(4, 32), nn.Linear(32, 8)
    model = Model(lambda m, x: m.fc(m.norm(x).to(low).float()), norm=nn.LayerNorm(32), fc=fc)
    result = compiled(model, x)
    assert result.counts == {"linear": 1}
    assert_near(result.got, result.want, linear_bound(model.norm(x).to(low).float(), fc.weight))


@pytest.mark.parametrize("low", FINE)
def test_a_cast_behind_a_norm_that_hardly_rounds_is_none(low: torch.dtype) -> None:
    x, fc = torch.randn(4, 32), nn.Linear(32, 8)
    model = Model(lambda m, x: m.fc(m.norm(x).to(low).float()), norm=nn.LayerNorm(32), fc=fc)
    result = compiled(model, x)
    assert result.counts == {"norm_linear": 1}
    h = model.norm(x)
    slack = 2**-8 * (h.abs() @ fc.weight.abs().T)  # bfloat16's half step
    assert_near(result.got, result.want, linear_bound(h, fc.weight) + slack)


def test_a_cast_behind_a_norm_that_may_overflow_is_kept() -> None:
    x, fc = torch.randn(4, 32), nn.Linear(32, 8)
    model = Model(lambda m, x: m.fc(m.norm(x).half().float()), norm=nn.LayerNorm(32), fc=fc)
    with torch.no_grad():
        model.norm.weight.fill_(1e6)
    result = compiled(model, x)
    assert result.counts == {"linear": 1}
    assert result.refused("norm") == ["between them is a cast to torch.float16, which may overflow"]
    assert not result.want.isfinite().any() and not result.got.isfinite().any()


def test_a_cast_back_to_the_half_type_behind_a_norm_is_none() -> None:
    x, fc = torch.randn(4, 32).half(), nn.Linear(32, 8).half()
    model = Model(lambda m, x: m.fc(m.norm(x.float()).half()), norm=nn.LayerNorm(32), fc=fc)
    assert compiled(model, x).counts == {"norm_linear": 1}
