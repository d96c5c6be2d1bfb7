"""graphquant.fit_budget: a budget that is kept, with little in float, and how that is found."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphquant
from graphquant import GraphquantError, OptionError, Report, UnsupportedInputError
from graphquant.accuracy.budget import METRICS
from graphquant.accuracy.calls import each_call
from graphquant.accuracy.search import Trials, search
from graphquant.config import Config
from tests.seen import seen
from tests.small import Mlp, Model, int8, seeded

WIDTH = 48


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 5, WIDTH)


class Block(nn.Module):
    """Three siblings behind a norm, an MLP, and residuals around both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + torch.tanh(self.q(y)) * torch.tanh(self.k(y)) + self.v(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def encoder(rough: tuple[str, ...] = ("0.v", "1.up")) -> nn.Sequential:
    """Blocks of which some linears are bad for int8: a column for a channel that holds little."""
    model = nn.Sequential(*(Block() for _ in range(2))).eval()
    for path in rough:
        model.get_submodule(path).weight[:, 3] *= 30.0
    model[0].norm1.weight[3] /= 30.0
    model[1].norm2.weight[3] /= 30.0
    return model


def reached(model: nn.Module, batches: list[Any], options: Any, metric: str = "cosine") -> float:
    """By compiling anew, beside the float model: nothing of graphquant.compare's."""
    torch._dynamo.reset()
    run = int8(model, **options)
    cosines, noise, signal = [], 0.0, 0.0
    for batch in batches:
        got, want = (f(batch).double() for f in (run, model))
        cosines.append(F.cosine_similarity(got, want, dim=-1).flatten())
        noise += float((got - want).square().sum())
        signal += float(want.square().sum())
    rows = torch.cat(cosines)
    return {
        "cosine": float(rows.mean()),
        "worst_cosine": float(rows.min()),
        "sqnr": 10 * math.log10(signal / noise) if noise else math.inf,
    }[metric]


def fitted(model: nn.Module, batches: list[Any], **given: Any) -> graphquant.Budget:
    return graphquant.fit_budget(model, batches, progress=False, **given)


def paths(budget: graphquant.Budget) -> set[str]:
    return {site.path for site in budget.left}


# The search -------------------------------------------------------------------------------------

noises = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12)


@settings(deadline=None)
@given(noises, st.floats(0.0, 1.2), st.randoms(use_true_random=False))
def test_what_is_found_suffices_and_nothing_of_it_can_be_given_back(
    noise: list[float], share: float, random: Any
) -> None:
    """Where errors add up, as they nearly do in a model."""
    named = {f"l{i}": n for i, n in enumerate(noise)}
    costs = {path: random.uniform(1.0, 10.0) for path in named}
    goal, runs = -share * sum(noise), []

    def quality(in_float: frozenset[str]) -> float:
        runs.append(in_float)
        return -sum(n for path, n in named.items() if path not in in_float)

    found = search(costs, quality, lambda q: -q, goal)
    left = frozenset(found.left)
    assert quality(left) >= goal
    assert all(quality(left - {path}) < goal for path in left)
    assert set(found.others) == named.keys() - left
    assert found.alone == {path: pytest.approx(-n, abs=1e-12) for path, n in named.items()}
    most = 1 + len(named) + math.ceil(math.log2(len(named) + 1)) + len(named)
    assert len(runs) - 1 - len(left) <= most


@settings(deadline=None)
@given(noises, st.floats(0.05, 0.95))
def test_no_choice_of_equal_cost_is_smaller(noise: list[float], share: float) -> None:
    named = {f"l{i}": n for i, n in enumerate(noise)}
    goal = -share * sum(noise)

    def quality(in_float: frozenset[str] | tuple[str, ...]) -> float:
        return -sum(n for path, n in named.items() if path not in in_float)

    found = search(dict.fromkeys(named, 1.0), quality, lambda q: -q, goal)
    fewer = itertools.combinations(named, max(len(found.left) - 1, 0))
    assert not found.left or not any(quality(choice) >= goal for choice in fewer)


def test_what_costs_less_goes_first() -> None:
    costs = {"dear": 10.0, "cheap": 1.0, "free": -1.0}

    def quality(in_float: frozenset[str]) -> float:
        return -float(len(costs.keys() - in_float))

    assert search(costs, quality, lambda q: -q, -2.0).left == ["free"]
    assert search(costs, quality, lambda q: -q, -1.0).left == ["free", "cheap"]
    assert search(costs, quality, lambda q: -q, -3.0).left == []


def test_what_makes_outputs_nan_goes_first() -> None:
    def quality(in_float: frozenset[str]) -> float:
        return 1.0 - 0.1 * (not in_float) if "bad" in in_float else -math.inf

    assert search(dict.fromkeys(["a", "bad", "b"], 1.0), quality, METRICS["cosine"].loss, 0.9).left
    found = search(dict.fromkeys(["a", "bad", "b"], 1.0), quality, METRICS["sqnr"].loss, 0.9)
    assert found.left == ["bad"]


def test_a_goal_that_float_misses_is_refused() -> None:
    with pytest.raises(GraphquantError, match=r"every linear in float the outputs reach 0\.5"):
        search({"a": 1.0}, lambda in_float: 0.5, lambda q: 1 - q, 0.9)


# Trials -----------------------------------------------------------------------------------------


@settings(max_examples=settings().max_examples // 6, deadline=None)
@given(
    st.sets(st.sampled_from([f"{i}.{n}" for i in (0, 1) for n in ("q", "k", "v", "up", "down")]))
)
def test_a_trial_is_what_comes_of_excluding(in_float: set[str]) -> None:
    model, x = seeded(encoder), seeded(lambda: torch.randn(6, 5, WIDTH))
    with torch.no_grad():
        trials = Trials(model, list(each_call([x, x[:2]])), Config(weight_scale="mse"))
        assert len(trials.costs()) == 10
        got = trials.quality(METRICS["sqnr"], frozenset(in_float))
        options = {"weight_scale": "mse", "exclude": sorted(in_float)}
        want = METRICS["sqnr"](graphquant.compare(model, [x, x[:2]], options=options).outputs)
    assert got == pytest.approx(want, abs=0.05)  # dB: sums in another order


def test_costs_are_flops_or_measured_times(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    model, calls = seeded(encoder), list(each_call([x]))
    flops = 2 * 30 * WIDTH * WIDTH
    costs = Trials(model, calls, Config()).costs()
    assert costs["0.q"] == flops and costs["0.up"] == costs["0.down"] == 2 * flops

    from graphquant.passes.policy import speed
    from graphquant.passes.record import Times

    monkeypatch.setattr(speed, "measure", lambda old, new, *_: Times(40.0, 10.0))
    costs = Trials(model, calls, Config(select="faster")).costs()
    assert costs["0.up"] == costs["0.down"] == 30.0
    assert costs["0.q"] == costs["0.k"] == costs["0.v"] == pytest.approx(10.0)  # of one product


# Budgets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metric", ["cosine", pytest.param("worst_cosine", marks=pytest.mark.slow), "sqnr"]
)
def test_a_budget_is_kept_by_what_is_compiled(metric: str, x: Tensor) -> None:
    model, batches = seeded(encoder), [x, 2 * x[:3]]
    plain = reached(model, batches, {}, metric)
    goal = plain + 3.0 if metric == "sqnr" else 1 - (1 - plain) / 2
    budget = fitted(model, batches, **{metric: goal})
    assert (budget.metric, budget.goal) == (metric, goal)
    assert budget.before == pytest.approx(plain, abs=0.05 if metric == "sqnr" else 1e-5)
    assert budget.before < goal <= budget.after
    again = reached(model, batches, budget.options, metric)
    assert again == pytest.approx(budget.after, abs=0.05 if metric == "sqnr" else 1e-5)
    assert budget.left[0].path in {"0.v", "1.up"}


def test_those_that_cost_most_are_left_and_no_more(x: Tensor) -> None:
    model = seeded(encoder)
    both = reached(model, [x], {"exclude": ["0.v", "1.up"]})
    budget = fitted(model, [x], cosine=both - 1e-6)
    assert paths(budget) == {"0.v", "1.up"}
    naive = list(dict.fromkeys(s.path for s in graphquant.compare(model, [x]).sites))
    needed = next(
        n for n in range(11) if reached(model, [x], {"exclude": naive[:n]}) >= budget.goal
    )
    assert needed > len(budget.left)
    total = 2 * (3 + 2 + 2)
    assert budget.float_share == pytest.approx(3 / total)
    assert {s.path: s.share for s in budget.left} == {
        "0.v": pytest.approx(1 / total),
        "1.up": pytest.approx(2 / total),
    }


def test_a_budget_that_holds_already_changes_nothing(x: Tensor) -> None:
    model = seeded(encoder)
    options = {"exclude": "0.q", "calibration": seen(model, x, rows=True)}
    budget = fitted(model, [x], cosine=0.9, options=options)
    assert budget.options == options and budget.left == ()
    assert budget.before == budget.after >= 0.9
    assert budget.float_share == pytest.approx(1 / 14)


def test_float_is_a_budget_too(x: Tensor) -> None:
    model = seeded(encoder)
    budget = fitted(model, [x], cosine=1.0)
    assert budget.after == 1.0 and len(budget.left) == 10 and budget.float_share == 1.0
    assert reached(model, [x], budget.options) == pytest.approx(1.0, abs=1e-9)


def test_with_a_calibration_smoothing_comes_first(x: Tensor) -> None:
    model = seeded(encoder)
    calibration = graphquant.calibrate(model, [x], progress=False)
    smoothed = reached(model, [x], {"smooth": "auto", "calibration": calibration})
    plain = reached(model, [x], {})
    assert smoothed > plain
    goal = (smoothed + plain) / 2
    known = {"calibration": calibration}
    budget = fitted(model, [x], cosine=goal, options=known)
    assert budget.options == {**known, "smooth": "auto"} and budget.left == ()
    assert fitted(model, [x], cosine=goal).left
    as_told = fitted(model, [x], cosine=goal, options={**known, "smooth": None})
    assert as_told.left and as_told.options["smooth"] is None
    harder = fitted(model, [x], cosine=1 - (1 - smoothed) / 2, options=known)
    assert harder.left and harder.options["smooth"] == "auto"
    assert reached(model, [x], harder.options) >= harder.goal - 1e-7


def test_what_the_user_excludes_stays_excluded(x: Tensor) -> None:
    model = seeded(encoder)
    goal = reached(model, [x], {"exclude": ["*.v", "1.up"]}) - 1e-6
    budget = fitted(model, [x], cosine=goal, options={"exclude": "*.v"})
    assert budget.options["exclude"] == ["*.v", "1.up"]
    assert paths(budget) == {"1.up"}


ODD = ("a*", "ab", "a[b]", "a?", "re:a*", "re:a")


@pytest.mark.parametrize(
    "rough",
    [pytest.param(n, marks=() if n in ("a*", "a[b]", "re:a*") else pytest.mark.slow) for n in ODD],
)
def test_paths_are_meant_literally(rough: str, x: Tensor) -> None:
    parts = {name: nn.Linear(WIDTH, WIDTH) for name in ODD}
    parts[rough].weight[:, 3] *= 30.0

    class Odd(nn.ModuleDict):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            x[..., 3] /= 30.0  # little, for a column that takes all steps
            return sum((part(x + 0.01 * i) for i, part in enumerate(self.values())), 0.0 * x)

    model = Odd(parts).eval()
    all_others = {name for name in ODD if name != rough}
    plain = reached(model, [x], {}, "sqnr")
    budget = fitted(model, [x], sqnr=plain + 1.0)
    assert paths(budget) == {rough}
    reports: list[Report] = []
    torch._dynamo.reset()
    int8(model, reports, **budget.options)(x)
    assert {o.path for o in reports[0].linears if o.int8} == all_others


def test_layers_that_share_one_graph_go_together(x: Tensor) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return torch.tanh(self.fc(x))

    class Layers(nn.ModuleList):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self:
                x = layer(x)
            return x

    model = Layers(Layer() for _ in range(3)).eval()
    budget = fitted(model, [x], cosine=0.9999999)
    assert reached(model, [x], budget.options) >= budget.goal - 1e-7


def test_what_trials_promise_too_much_is_made_up_for(
    monkeypatch: pytest.MonkeyPatch, x: Tensor
) -> None:
    """Siblings that are smoothed without one of them may be less exact than in the trial."""
    model = seeded(encoder)
    goal = reached(model, [x], {"exclude": ["0.v", "1.up"]}) - 1e-6
    tried = Trials.search

    def hopeful(*args: Any, **kwargs: Any) -> Any:
        found = tried(*args, **kwargs)
        return found._replace(left=[], others=[*found.left, *found.others])

    monkeypatch.setattr(Trials, "search", hopeful)
    budget = fitted(model, [x], cosine=goal)
    assert reached(model, [x], budget.options) >= goal - 1e-7
    assert {"0.v", "1.up"} <= paths(budget) and len(budget.left) < 5


def test_another_model_at_every_call_has_no_budget(x: Tensor) -> None:
    model = Model(lambda m, x: m.fc(x) + next(m.noise), fc=nn.Linear(WIDTH, WIDTH))
    model.noise = (torch.full((), float(i)) for i in itertools.count())
    with pytest.raises(GraphquantError, match="this budget cannot be met: with every linear in"):
        fitted(model, [x], cosine=0.9999999)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "one of cosine, worst_cosine, sqnr, got none"),
        ({"cosine": 0.9, "sqnr": 30}, "got cosine, sqnr"),
        ({"cosine": 1.5}, "cosine=1.5 must be a number above 0, at most 1"),
        ({"cosine": math.nan}, "cosine=nan must be a number"),
        ({"cosine": True}, "cosine=True"),
        ({"sqnr": "30"}, "sqnr='30' must be a number above 0"),
        ({"sqnr": math.inf}, "sqnr=inf"),
        ({"worst_cosine": 0}, "worst_cosine=0 must be a number"),
    ],
)
def test_a_budget_is_one_number(given: Any, said: str, x: Tensor) -> None:
    with pytest.raises(OptionError, match=said.replace("(", r"\(")):
        fitted(Mlp(WIDTH).eval(), [x], **given)


def test_wrong_models_and_batches_are_refused_as_by_compare(x: Tensor) -> None:
    with pytest.raises(UnsupportedInputError, match="fit_budget needs a model in eval mode"):
        fitted(Mlp(WIDTH), [x], cosine=0.9)
    with pytest.raises(UnsupportedInputError, match="at least one batch"):
        fitted(Mlp(WIDTH).eval(), [], cosine=0.9)
    with pytest.raises(OptionError, match="unknown option"):
        fitted(Mlp(WIDTH).eval(), [x], cosine=0.9, options={"quantise": True})
    counts = Model(lambda m, x: m.fc(x).argmax(-1), fc=nn.Linear(WIDTH, 8))
    with pytest.raises(UnsupportedInputError, match="returns no floating-point tensor"):
        fitted(counts, [x], cosine=0.9)


def test_batches_may_come_once_and_the_model_stays_as_it_was(x: Tensor) -> None:
    model = seeded(encoder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    goal = reached(model, [x], {"exclude": ["0.v"]}) - 1e-6
    once = fitted(model, iter([x[:4], (x[4:],)]), cosine=goal)
    assert paths(once) == paths(fitted(model, [x], cosine=goal))
    assert torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_mask_of_the_batches_can_be_a_part_of_the_model(x: Tensor) -> None:
    """Pooled over some tokens only: what counts is what the module returns."""

    class Pooled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return (self.inner(x) * mask).sum(1)

    mask = (torch.arange(5) < 3).float().reshape(1, 5, 1)
    batch = ((x,), {"mask": mask})
    model = Pooled(seeded(encoder)).eval()
    plain = graphquant.compare(model, [batch]).outputs[0].cosines.mean
    budget = fitted(model, [batch], cosine=1 - (1 - plain) / 3)
    assert all(site.path.startswith("inner.") for site in budget.left)
    report = graphquant.compare(model, [batch], options=budget.options)
    assert report.outputs[0].cosines.mean >= budget.goal
    assert 1 - report.report.coverage == pytest.approx(budget.float_share)
