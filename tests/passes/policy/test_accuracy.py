"""min_sqnr: which linears are measured, on which values, and what happens to those below it."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphquant import OptionError, Report, calibrate, compare, explain
from graphquant.passes.policy.accuracy import below
from tests.passes.graphs import Model, compiled, rewritten
from tests.seen import Seen, seen
from tests.small import Mlp, notes

K = 48
SAME = 0.02  # dB: float32 sums and a few roundings that fall the other way


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 8, K)  # as many rows as a calibration keeps


def siblings(**widths: int) -> nn.Module:
    parts = {name: nn.Linear(K, width) for name, width in widths.items()}

    def forward(m: Any, x: Tensor) -> Any:
        y = m.norm(x)
        return tuple(getattr(m, name)(y) for name in widths)

    return Model(forward, norm=nn.LayerNorm(K), **parts).eval()


def roughened(model: Any, linear: nn.Linear, times: float = 30.0) -> None:
    """A column of the weight takes the steps of its rows, for a channel that holds little."""
    model.norm.weight[3] /= times
    linear.weight[:, 3] *= times


def local(model: nn.Module, x: Tensor, **options: Any) -> dict[str, float]:
    return {s.path: s.local.sqnr for s in compare(model, [x], options=options).sites}


def said(report: Report) -> dict[str, float]:
    """The SQNR that the report gives for each linear that it left in float."""
    found = {}
    for o in report.linears:
        if (hit := re.search(r"would be (-?[\d.]+|nan|-inf) dB, less than", o.refused)) is not None:
            found[o.path] = float(hit[1])
    return found


@settings(max_examples=10, deadline=None)
@given(
    chosen=st.sampled_from(
        [
            {},
            {"weight_scale": "mse"},
            {"activation": "static"},
            {"clip_range": 1.5},
            {"smooth": 0.4},
            {"smooth": "auto"},
            {"smooth": "norm"},
            {"smooth": 0.6, "activation": "static", "weight_scale": "mse"},
        ]
    ),
    size=st.floats(1.0, 200.0),
    seed=st.integers(0, 2**16),
)
def test_a_linear_is_measured_as_compare_does(
    chosen: dict[str, Any], size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    model, x = Mlp(K, 64).eval(), torch.randn(40, K)
    with torch.no_grad():
        model.norm.weight[5] *= size
        options = {**chosen, "calibration": seen(model, x, rows=True)}
        found = local(model, x, **options)
        left = said(explain(model, x, options={**options, "min_sqnr": 200}))
        assert left.keys() == found.keys() == {"fc1", "fc2"}
        for path, sqnr in left.items():
            assert sqnr == pytest.approx(found[path], abs=0.1 + SAME)  # it is rounded down


def test_only_what_is_under_the_threshold_stays_in_float(x: Tensor) -> None:
    model = Mlp(K, 64).eval()
    roughened(model, model.fc1)
    calibration = calibrate(model, [x], progress=False)
    sqnr = local(model, x)
    assert sqnr["fc1"] < sqnr["fc2"] - 3
    middle = (sqnr["fc1"] + sqnr["fc2"]) / 2
    result = rewritten(model, x, calibration=calibration, min_sqnr=middle)
    assert result.counts == {"act_linear": 1}
    (why,) = result.refused("linear")
    down = math.floor(10 * sqnr["fc1"]) / 10
    assert why == f"its SQNR would be {down:.1f} dB, less than min_sqnr={middle:g}"
    assert result.ops()["linear"] == result.ops()["layer_norm"] == 1
    assert "norm_quantize" not in result.ops()
    kept = rewritten(model, x, calibration=calibration, min_sqnr=sqnr["fc1"] - 0.2)
    assert kept.counts == {"norm_linear": 1, "act_linear": 1}


def test_what_is_left_computes_as_in_float(x: Tensor) -> None:
    model = Mlp(K, 64).eval()
    calibration = seen(model, x, rows=True)
    result = compiled(model, x, calibration=calibration, min_sqnr=150, smooth=0.5)
    assert torch.equal(result.got, result.want)
    assert len(result.report.refused) == 4 and result.report.coverage == 0


def test_smoothing_makes_a_linear_exact_enough(x: Tensor) -> None:
    model = Mlp(K, 64).eval()
    model.norm.weight[7] *= 80
    model.fc1.weight[:, 7] /= 80
    options = {"calibration": seen(model, x, rows=True), "min_sqnr": 35}
    assert rewritten(model, x, **options).counts == {"act_linear": 1}
    smoothed = rewritten(model, x, **options, smooth=0.5)
    assert smoothed.counts == {"norm_linear": 1, "act_linear": 1}


def test_siblings_of_one_product_stay_in_float_together(x: Tensor) -> None:
    model = siblings(q=32, k=24, v=16)
    roughened(model, model.k)
    sqnr = local(model, x)
    assert sqnr["k"] < 37 < min(sqnr["q"], sqnr["v"])
    result = rewritten(model, x, calibration=seen(model, x, rows=True), min_sqnr=37)
    for outcome in result.report.linears:
        assert outcome.rules == ("stack_siblings",) and not outcome.int8
        down = math.floor(10 * sqnr["k"]) / 10
        assert outcome.refused == (
            f"in one product with k, whose SQNR would be {down:.1f} dB, less than min_sqnr=37"
        )
        assert outcome.refused in str(outcome) and "stack_siblings" in str(outcome)
    assert result.report.coverage == 0
    assert outcome.refused in str(result.report).replace("\n", " ")
    assert list(result.report.reasons().values()) == [3]


def test_one_weight_that_is_read_twice_in_a_product(x: Tensor) -> None:
    fc = nn.Linear(K, K)
    model = Model(lambda m, x: (m.a(x), m.b(x)), a=fc, b=fc).eval()
    known = Seen(rows={name: x.flatten(0, 1) for name in "ab"})
    assert rewritten(model, x, calibration=known, min_sqnr=30).report.coverage == 1
    assert rewritten(model, x, calibration=known, min_sqnr=90).report.coverage == 0


def test_what_the_calibration_does_not_know_is_int8_and_counted(x: Tensor) -> None:
    model = Mlp(K, 64).eval()
    known = seen(model, x, rows=True)
    del known.rows["fc1"]
    result = rewritten(model, x, calibration=known, min_sqnr=150)
    assert result.counts == {"norm_linear": 1} and said(result.report).keys() == {"fc2"}
    assert result.report.notes == (
        "min_sqnr was not checked for 1 of 1 int8 linears: the calibration has no rows of their "
        "inputs",
    )
    known.rows["fc1"] = torch.randn(8, K + 1)  # of another linear
    assert rewritten(model, x, calibration=known, min_sqnr=150).counts == {"norm_linear": 1}
    assert not rewritten(model, x, calibration=seen(model, x, rows=True), min_sqnr=9).report.notes


def test_what_is_not_finite_in_float_does_not_count(x: Tensor) -> None:
    model = Mlp(K, 64).eval()
    known = seen(model, x, rows=True)
    before = said(rewritten(model, x, calibration=known, min_sqnr=200).report)
    model.fc1.weight[3, 3] = math.nan  # one column of its result
    after = said(rewritten(model, x, calibration=known, min_sqnr=200).report)
    assert after["fc1"] == pytest.approx(before["fc1"], abs=0.3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(dtype: torch.dtype, x: Tensor) -> None:
    model = Mlp(K, 64).eval()
    known = seen(model, x, rows=True)
    found = said(rewritten(model, x, calibration=known, min_sqnr=200).report)
    half = said(rewritten(model.to(dtype), x.to(dtype), calibration=known, min_sqnr=200).report)
    for path, sqnr in found.items():
        assert half[path] == pytest.approx(sqnr, abs=0.5)  # of other weights


def test_a_later_call_of_other_sizes_keeps_what_was_released(x: Tensor) -> None:
    model = Mlp(K, 64).eval()
    options = {"calibration": seen(model, x, rows=True), "min_sqnr": 20, "free_weights": True}
    reports: list[Report] = []
    run = torch.compile(
        model,
        backend="graphquant",
        dynamic=False,
        options={"inner": "eager", "on_report": reports.append, **options},
    )
    want = run(x)
    torch.testing.assert_close(run(x[:3]), want[:3], rtol=1e-4, atol=1e-4)
    assert [r.coverage for r in reports] == [1.0, 1.0]
    assert not any(map(notes, reports))


def test_a_layer_scale_and_a_residual_join_what_was_measured(x: Tensor) -> None:
    model = Model(
        lambda m, x: x + m.fc(x) * m.gamma, fc=nn.Linear(K, K), gamma=nn.Parameter(torch.rand(K))
    )
    known = Seen(rows={"fc": x.flatten(0, 1)})
    joined = rewritten(model, x, calibration=known, min_sqnr=30)
    assert joined.counts == {"linear + layer_scale + residual": 1}
    assert rewritten(model, x, calibration=known, min_sqnr=90).report.coverage == 0


numbers = st.floats(-50, 150) | st.sampled_from([math.inf, -math.inf, math.nan])


@given(st.lists(numbers, min_size=1, max_size=4), st.floats(0.01, 120))
def test_the_worst_decides_and_no_number_looks_larger_than_it_is(
    found: list[float], least: float
) -> None:
    paths = [f"layer.{i}" for i in range(len(found))]
    why = below(paths, found, least)
    assert (why == "") == all(sqnr >= least for sqnr in found)
    if why:
        shown = float(re.search(r"would be (\S+) dB", why)[1])  # type: ignore[index]
        assert math.isnan(shown) or shown <= min(v for v in found if not math.isnan(v))


@pytest.mark.parametrize("value", [0, -3, "30", True, math.inf, math.nan])
def test_a_threshold_is_a_positive_number(value: Any, x: Tensor) -> None:
    with pytest.raises(OptionError, match="min_sqnr must be a number above 0"):
        rewritten(Mlp(K).eval(), x, min_sqnr=value, calibration=Seen())


def test_without_rows_to_measure_on_it_is_refused(x: Tensor) -> None:
    class NoRows:
        absmax = range = lambda self, path: None

    for calibration in (None, NoRows()):
        with pytest.raises(OptionError, match="min_sqnr=30 needs sampled rows of calibration data"):
            rewritten(Mlp(K).eval(), x, min_sqnr=30, calibration=calibration)
