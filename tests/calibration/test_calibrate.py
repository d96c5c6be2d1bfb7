"""graphquant.calibrate: what it gathers, against hooks on the modules and sums over whole data."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphquant
from graphquant import Calibration, CalibrationError, OptionError, UnsupportedInputError
from graphquant.calibration import Record
from tests import zoo
from tests.models import different
from tests.small import Mlp, Model, error, int8, seeded

pytestmark = pytest.mark.usefixtures("seeded_dynamo")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 5, 64)


def calibrate(model: nn.Module, batches: Any, **given: Any) -> Calibration:
    return graphquant.calibrate(model, batches, progress=False, **given)


def record(calibration: Calibration, path: str) -> Record:
    found = calibration.record(path)
    assert found is not None
    return found


def holds(calibration: Calibration, path: str, x: Tensor, calls: int = 1) -> None:
    """The site at this path has seen exactly these values."""
    want, got = Record.of(x), record(calibration, path)
    assert torch.equal(got.low, want.low) and torch.equal(got.high, want.high)
    assert torch.equal(got.histogram.counts, want.histogram.counts)
    assert got.histogram.exponent == want.histogram.exponent
    assert (got.rows, got.calls) == (want.rows, calls)
    sample = calibration.sample(path)
    assert sample is not None and torch.equal(sample, want.sample)
    absmax = calibration.absmax(path)
    assert absmax is not None and absmax.dtype == torch.float32 and absmax.shape == x.shape[-1:]
    assert torch.equal(absmax, x.detach().abs().reshape(-1, x.shape[-1]).amax(0).float())


# What is gathered -------------------------------------------------------------------------------


def test_a_site_is_the_input_of_its_linear(x: Tensor) -> None:
    model = seeded(Mlp).eval()
    calibration = calibrate(model, [x])
    assert calibration.sites == ("fc1", "fc2") and calibration.batches == 1
    y = model.norm(x)
    holds(calibration, "fc1", y)
    holds(calibration, "fc2", F.gelu(model.fc1(y)))
    assert calibration.absmax("norm") is None and calibration.range("fc3") is None


def test_the_data_of_all_batches_counts_as_their_concatenation(x: Tensor) -> None:
    model = Model(lambda m, x: m.fc(x), fc=nn.Linear(64, 8))
    calibration = calibrate(model, (part for part in x.split([1, 3, 2])))
    holds(calibration, "fc", x, calls=3)
    assert calibration.batches == 3


@pytest.mark.parametrize("entry", different())
def test_every_linear_of_a_model_is_found_with_what_its_module_reads(entry: zoo.Entry) -> None:
    model, batches = entry.build("sdpa"), [entry.inputs(2, draw=i) for i in range(2)]
    seen: dict[str, Record] = {}

    def note(name: str, module: nn.Module, x: Tensor) -> None:
        seen[name] = seen.get(name, Record.empty(x.shape[-1])) + Record.of(x)

    hooks = [
        m.register_forward_pre_hook(lambda m, args, name=n: note(name, m, args[0]))
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    with torch.no_grad():
        for args, kwargs in batches:
            model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    calibration = calibrate(model, batches, mask=False)
    assert not model.training and calibration.batches == 2
    for path, want in seen.items():
        got = record(calibration, path)
        torch.testing.assert_close(got.low, want.low)
        torch.testing.assert_close(got.high, want.high)
        assert got.rows == want.rows
    args, kwargs = batches[0]
    with torch.no_grad():
        linears = graphquant.explain(model, *args, **kwargs).linears
    for linear in linears:
        # behind a graph break the Report's paths begin at the module that goes on
        paths = [p for p in calibration.sites if p.endswith(linear.path)]
        assert any(record(calibration, p).K == linear.K for p in paths)
    assert seen.keys() <= set(calibration.sites)


def test_linears_that_read_one_value_share_one_record(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.norm(x)
        return m.q(y), m.k(y), m.v(y), m.out(x)

    linears = {name: nn.Linear(64, 32) for name in ("q", "k", "v", "out")}
    calibration = calibrate(Model(forward, norm=nn.LayerNorm(64), **linears), [x, x])
    assert calibration.groups == (("k", "q", "v"),)
    assert record(calibration, "q") is record(calibration, "k") is record(calibration, "v")
    assert record(calibration, "q").rows == 60  # once for each row, not for each reader
    assert record(calibration, "out") is not record(calibration, "q")


def test_a_linear_that_is_called_twice_has_both_inputs(x: Tensor) -> None:
    model = Model(lambda m, x: m.fc(torch.tanh(m.fc(x))), fc=nn.Linear(64, 64))
    calibration = calibrate(model, [x])
    holds(calibration, "fc", torch.cat([x, torch.tanh(model.fc(x))]), calls=2)


def test_readers_that_meet_once_share_everything(x: Tensor) -> None:
    """`a` reads x alone in one batch, and with `b` in the next: one scale must fit all of it."""

    def forward(m: Any, x: Tensor, both: bool) -> Any:
        return (m.a(x), m.b(x)) if both else m.a(x)

    model = Model(forward, a=nn.Linear(64, 8), b=nn.Linear(64, 8))
    batches = [(10 * x, False), (x, True)]
    for order in (batches, batches[::-1]):
        calibration = calibrate(model, order)
        assert calibration.groups == (("a", "b"),)
        holds(calibration, "b", torch.cat([10 * x, x]), calls=2)


def test_a_value_that_is_written_to_between_its_readers_is_read_by_each(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = x * 1.0
        first = m.a(y)
        y[:, 0] = 100
        return first, m.b(y)

    calibration = calibrate(Model(forward, a=nn.Linear(64, 8), b=nn.Linear(64, 8)), [x])
    holds(calibration, "a", x)
    assert calibration.range("b") == (float(x[:, 1:].min()), 100.0)
    assert calibration.groups == ()


def test_a_weight_with_two_names_is_found_under_both(x: Tensor) -> None:
    fc = nn.Linear(64, 64)
    model = Model(lambda m, x: m.b(torch.tanh(m.a(x))), a=fc, b=nn.Linear(64, 64))
    model.b.weight = fc.weight
    calibration = calibrate(model, [x])
    assert calibration.sites == ("a", "b")
    holds(calibration, "b", torch.cat([x, torch.tanh(fc(x))]), calls=2)


def test_a_weight_that_is_used_both_ways_has_no_one_input(x: Tensor) -> None:
    model = Model(lambda m, x: F.linear(m.fc(x), m.fc.weight.t()), fc=nn.Linear(64, 8))
    calibration = calibrate(model, [x])
    assert calibration.sites == ("fc",) and calibration.absmax("fc") is None


def broken(m: Any, x: Tensor) -> Tensor:
    x = m.first(m.norm(x))
    torch._dynamo.graph_break()
    return m.second(F.gelu(x))


def test_sites_are_found_behind_graph_breaks(x: Tensor) -> None:
    parts = {"first": nn.Linear(64, 96), "second": nn.Linear(96, 8)}
    model = Model(broken, norm=nn.LayerNorm(64), **parts)
    calibration = calibrate(model, [x])
    assert calibration.sites == ("first", "second")
    holds(calibration, "second", F.gelu(model.first(model.norm(x))))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return torch.tanh(self.fc(x))


def test_layers_that_share_one_graph_are_distinguished(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        for layer in m.layers:
            x = layer(x)
        return x

    model = Model(forward, layers=nn.ModuleList(Layer() for _ in range(3)))
    calibration = calibrate(model, [x])
    assert calibration.sites == tuple(f"layers.{i}.fc" for i in range(3))
    for i, layer in enumerate(model.layers):
        holds(calibration, f"layers.{i}.fc", x)
        x = torch.tanh(layer.fc(x))


# Methods ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_methods_differ_on_an_outlier_and_can_be_changed_afterwards(sign: int) -> None:
    x = torch.randn(1000, 1000)
    x[0, 0] = 12.0
    x *= sign
    model = Model(lambda m, x: m.fc(x), fc=nn.Linear(1000, 1))
    calibration = calibrate(model, [x])
    assert calibration.range("fc") == (float(x.min()), float(x.max()))
    most = float(x.abs().flatten().kthvalue(999_000).values)
    cut = calibration.using("percentile", percentile=99.9).range("fc")
    assert cut == pytest.approx((-most, most), abs=0.005)
    low, high = calibration.using("mse").range("fc") or (0.0, 0.0)
    assert max(-low, high) < 6 and min(-low, high) > 3.5
    assert calibration.method == "absmax"
    assert calibrate(model, [x], method="percentile", percentile=99.9).range("fc") == cut
    assert calibration.using("percentile", percentile=100).range("fc") == calibration.range("fc")


def test_a_range_holds_zero() -> None:
    model = Model(lambda m, x: m.fc(x), fc=nn.Linear(8, 1))
    for method in ("absmax", "percentile", "mse"):
        low, high = calibrate(model, [torch.rand(40, 8) + 5], method=method).range("fc") or (1, 1)
        assert low == 0 and 5.5 < high <= 6
        low, high = calibrate(model, [-torch.rand(40, 8) - 5], method=method).range("fc") or (1, 1)
        assert high == 0 and -6 <= low < -5.5


def test_wrong_methods_are_refused(x: Tensor) -> None:
    model = Model(lambda m, x: m.fc(x), fc=nn.Linear(64, 8))
    with pytest.raises(OptionError, match="method='entropy' is not one of 'absmax', 'percentile'"):
        calibrate(model, [x], method="entropy")
    for percentile in (0, 100.1, math.nan):
        with pytest.raises(OptionError, match="percentile must be above 0 and at most 100"):
            Calibration(model, method="percentile", percentile=percentile)


# Parts and sums ---------------------------------------------------------------------------------


def same(a: Calibration, b: Calibration) -> None:
    assert (a.sites, a.groups, a.batches) == (b.sites, b.groups, b.batches)
    for path in a.sites:
        mine, other = record(a, path), record(b, path)
        assert torch.equal(mine.low, other.low) and torch.equal(mine.high, other.high)
        assert torch.equal(mine.histogram.counts, other.histogram.counts)
        assert mine.histogram.exponent == other.histogram.exponent
        assert torch.equal(mine.sample, other.sample)
        assert (mine.rows, mine.calls) == (other.rows, other.calls)
        assert mine.left_out == other.left_out


@pytest.fixture
def parts() -> list[Tensor]:
    return [torch.randn(3, 64) * size for size in (1.0, 30.0, 1e-3)]


def test_parts_merge_to_the_whole_in_any_order(parts: list[Tensor]) -> None:
    model = seeded(Mlp).eval()
    whole = calibrate(model, parts)
    each = [calibrate(model, [part]) for part in parts]
    for order in itertools.permutations(each):
        same(order[0].merge(order[1]).merge(order[2]), whole)
    same(each[0].merge(each[1].merge(each[2])), whole)
    assert [c.batches for c in each] == [1, 1, 1]  # merge makes a new one
    same(whole.merge(Calibration(model)), whole)


def test_a_calibration_is_resumed(parts: list[Tensor]) -> None:
    model = seeded(Mlp).eval()
    first = calibrate(model, parts[:1])
    resumed = calibrate(model, parts[1:], resume=first, method="mse")
    same(resumed, calibrate(model, parts))
    assert resumed.method == "mse" and first.batches == 1


def test_calibrations_of_different_models_do_not_mix(x: Tensor) -> None:
    first = calibrate(seeded(Mlp).eval(), [x])
    other = seeded(Mlp, seed=1).eval()
    said = r"fc1\.bias has other values; .*Calibrated linears concerned: fc1, fc2"
    with pytest.raises(CalibrationError, match=said):
        first.merge(calibrate(other, [x]))
    with pytest.raises(CalibrationError, match="is not the one that was calibrated"):
        calibrate(other, [x], resume=first)


# Edges ------------------------------------------------------------------------------------------


def test_what_is_not_finite_is_left_out_and_reported(x: Tensor, caplog: Any) -> None:
    model = Model(lambda m, x: m.fc(x), fc=nn.Linear(64, 8))
    bad = x.clone()
    bad[0, 0, 0], bad[1, 1, 1], bad[:, :, 2], bad[2, 2, 3] = math.nan, math.inf, math.nan, -math.inf
    calibration = calibrate(model, [bad])
    got = record(calibration, "fc")
    assert got.left_out == 33 and got.rows == 30
    assert "33 of 1920 values that fc read were inf or nan" in caplog.text
    finite = bad.nan_to_num(0, 0, 0)
    assert torch.equal(calibration.absmax("fc"), finite.abs().amax((0, 1)))
    assert calibration.range("fc") == (float(finite.min()), float(finite.max()))
    assert int(got.histogram.counts.sum()) == 1920 - 33
    assert calibration.sample("fc") is None  # no row is finite


def test_a_site_without_any_finite_value_has_nothing(x: Tensor) -> None:
    model = Model(lambda m, x: m.fc(x), fc=nn.Linear(64, 8))
    calibration = calibrate(model, [x * math.nan, x[:0]])
    assert calibration.sites == ("fc",)
    assert calibration.absmax("fc") is None and calibration.range("fc") is None
    merged = calibration.merge(calibrate(model, [x]))
    assert torch.equal(merged.absmax("fc"), x.abs().amax((0, 1)))
    assert record(merged, "fc").calls == 3


def test_an_empty_batch_counts_nothing(x: Tensor) -> None:
    model = Model(lambda m, x: m.fc(x), fc=nn.Linear(64, 8))
    calibration = calibrate(model, [x[:0], x])
    holds(calibration, "fc", x, calls=2)


def test_token_ids_and_integer_products(x: Tensor) -> None:
    def forward(m: Any, ids: Tensor) -> Any:
        return m.fc(m.table(ids)), F.linear(ids, m.counts)

    model = Model(forward, table=nn.Embedding(10, 64), fc=nn.Linear(64, 8))
    model.register_buffer("counts", torch.ones(3, 4, dtype=torch.int64))
    ids = torch.arange(8).view(2, 4)
    calibration = calibrate(model, [ids])
    assert calibration.sites == ("fc",)
    holds(calibration, "fc", model.table(ids))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_count_in_float32(dtype: torch.dtype, x: Tensor) -> None:
    model = Model(lambda m, x: m.fc(x), fc=nn.Linear(64, 8)).to(dtype)
    x = 1000 * x.to(dtype)
    holds(calibrate(model, [x]), "fc", x.float())


def test_under_autocast_the_values_are_those_that_the_graph_hands_to_the_linear(x: Tensor) -> None:
    """Autocast rounds inside of the linear: a quantizer in front of it reads the float32."""
    model = Model(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(64, 64), b=nn.Linear(64, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        calibration = calibrate(model, [x])
        y = torch.tanh(model.a(x))
    holds(calibration, "a", x)
    assert y.dtype == torch.bfloat16
    holds(calibration, "b", y.float())


def test_zeros_have_a_range() -> None:
    calibration = calibrate(Model(lambda m, x: m.fc(x), fc=nn.Linear(4, 2)), [torch.zeros(3, 4)])
    for method in ("absmax", "percentile", "mse"):
        assert calibration.using(method).range("fc") == (0.0, 0.0)
    assert torch.equal(calibration.absmax("fc"), torch.zeros(4))


def test_no_batches_and_wrong_batches_are_refused(x: Tensor) -> None:
    model = Model(lambda m, x: m.fc(x), fc=nn.Linear(64, 8))
    with pytest.raises(UnsupportedInputError, match="calibrate needs at least one batch, got none"):
        calibrate(model, [])
    with pytest.raises(UnsupportedInputError, match="at least one batch"):
        calibrate(model, iter(()), resume=calibrate(model, [x]))
    with pytest.raises(UnsupportedInputError, match="batches is a Tensor"):
        calibrate(model, x)


def test_what_is_no_module_in_eval_mode_is_refused(x: Tensor) -> None:
    with pytest.raises(UnsupportedInputError, match=r"calibrate needs a torch\.nn\.Module, got"):
        calibrate(lambda x: x, [x])  # type: ignore[arg-type]
    with pytest.raises(UnsupportedInputError, match=r"in training mode: call model\.eval"):
        calibrate(Mlp(), [x])


def test_a_model_without_linears_is_reported(x: Tensor, caplog: Any) -> None:
    calibration = calibrate(Model(lambda m, x: m.norm(x), norm=nn.LayerNorm(64)), [x])
    assert calibration.sites == () and "saw no linear" in caplog.text


def test_linears_that_no_graph_holds_are_reported(x: Tensor, caplog: Any) -> None:
    model = Model(lambda m, x: m.a(x), a=nn.Linear(64, 8), b=nn.Linear(64, 8))
    assert calibrate(model, [x]).sites == ("a",)
    assert "1 of 2 nn.Linear modules are in no captured graph" in caplog.text


# What stays -------------------------------------------------------------------------------------


def test_nothing_of_a_batch_is_kept() -> None:
    model = seeded(Mlp).eval()
    sizes = []

    def batches() -> Iterator[Tensor]:
        for _ in range(8):
            yield torch.randn(70, 64)  # more rows than a sample has
            gc.collect()
            sizes.append(sum(o.numel() for o in gc.get_objects() if type(o) is Tensor))

    calibrate(model, batches())
    assert len(set(sizes[3:])) == 1


def test_the_model_the_batches_and_the_generators_are_left_as_they_were(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.fc(x.add_(torch.randn_like(x)))

    model = Model(forward, fc=nn.Linear(64, 8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch, state = x.clone(), torch.get_rng_state()
    calibrate(model, [x, x])
    assert torch.equal(x, batch) and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_it_can_be_called_often_and_leaves_compiled_code_alone(x: Tensor) -> None:
    model, reports = seeded(Mlp).eval(), []
    compiled = int8(model, reports)
    with torch.no_grad():
        once = compiled(x)
        for _ in range(10):  # over Dynamo's recompile_limit
            calibration = calibrate(compiled, [x])
        assert calibration.sites == ("fc1", "fc2")
        assert torch.equal(compiled(x), once)
        assert 0.001 < error(once, model(x)) < 0.1
    assert len(reports) == 1


def test_the_progress_bar_counts_batches(x: Tensor, capsys: Any) -> None:
    model = Model(lambda m, x: m.fc(x), fc=nn.Linear(64, 8))
    graphquant.calibrate(model, [x, x], progress=True)
    shown = capsys.readouterr()
    assert "2/2" in shown.err and shown.out == ""
    calibrate(model, [x, x])
    assert capsys.readouterr().err == ""
