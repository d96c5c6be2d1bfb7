"""The error of an int8 linear is what rounding alone explains (docs/accuracy.md derives it).

A row of K values with a range of 2 r has steps of 2 r / 254, and an error that is uniform within
half a step: step^2 / 12. A channel of a weight with absmax a has steps of a / 127. The errors of x
and of W are independent of each other and of the values, so for y = x W^T the noise to signal ratio
is their sum, each relative to its own mean square:

    NSR = E[r^2] / (12 127^2 E[x^2]) + E[a^2] / (12 127^2 E[w^2])

whatever K is, but for the ranges: r and a grow with it as the extremes of K gaussian values do.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphquant
from tests.small import Model, seeded
from tools.bench.models import MODELS, build, inputs

LEVELS = 12 * 127**2
NEAR = 1.0  # dB


def extremes(K: int) -> tuple[float, float]:
    """E[r^2] of half the range and E[a^2] of the absmax of K standard gaussian values, by drawing:
    their spread is far below what matters here."""
    x = torch.randn(4000, K, generator=torch.Generator().manual_seed(K))
    r, a = (x.amax(-1) - x.amin(-1)) / 2, x.abs().amax(-1)
    return float(r.square().mean()), float(a.square().mean())


def theory(K: int, x: Tensor | None = None, w: Tensor | None = None) -> float:
    """SQNR in dB of a linear over K channels; x: its rows, w: its weight, if not gaussian."""
    r, a = extremes(K)
    if w is not None:
        a = float(w.double().abs().amax(-1).square().mean() / w.double().square().mean())
    if x is not None:
        x = x.double()
        high, low = x.amax(-1).clamp(min=0), x.amin(-1).clamp(max=0)
        r = float(((high - low) / 2).square().mean() / x.square().mean())
    return -10 * math.log10((r + a) / LEVELS)


@pytest.mark.parametrize(("N", "K"), [(3456, 1152), (1152, 1152), (4304, 1152), (1152, 4304)])
def test_a_linear_of_gaussian_data_has_the_error_of_the_theory(N: int, K: int) -> None:
    """At the widths of SigLIP-so400m."""
    model = seeded(lambda: Model(lambda m, x: m.fc(x), fc=nn.Linear(K, N, bias=False)))
    nn.init.normal_(model.fc.weight, std=K**-0.5, generator=torch.Generator().manual_seed(1))
    x = torch.randn(64, K, generator=torch.Generator().manual_seed(2))
    (site,) = graphquant.compare(model, [x]).sites
    assert abs(site.local.sqnr - theory(K)) < 0.15


def test_every_linear_of_siglip_so400m_has_the_error_of_the_theory() -> None:
    """One layer in its true dimensions. Its weights are uniform or gaussian, as the model's own
    initialization makes them; what linears read behind a norm is nearly gaussian."""
    model = MODELS["siglip-so400m"].cut(1)
    net, batch = seeded(lambda: (build(model, "cpu").float(), inputs(model, 1, "cpu")))
    batch = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
    read: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: read.update({name: args[0].detach()})
            )
    with torch.no_grad():
        net(**batch)
    for module in net.modules():
        module._forward_pre_hooks.clear()
    sites = {s.path: s.local.sqnr for s in graphquant.compare(net, [batch]).sites}
    layer = [path for path in sites if "layers.0." in path]
    assert len(layer) == 6
    for path in layer:
        x, w = read[path], net.get_submodule(path).weight.detach()
        assert abs(sites[path] - theory(x.shape[-1], x, w)) < NEAR, path
        if not path.endswith(("fc2", "out_proj")):  # behind a norm: gaussian
            assert abs(sites[path] - theory(x.shape[-1], w=w)) < NEAR, path


def test_what_theory_leaves_out_is_noticed() -> None:
    """One channel 30 times as large as the others costs what its range says."""
    K = 768
    x = torch.randn(64, K, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 30
    model = seeded(lambda: Model(lambda m, x: m.fc(x), fc=nn.Linear(K, 96)))
    nn.init.normal_(model.fc.weight, generator=torch.Generator().manual_seed(1))
    model.fc.weight.data[:, 5] /= 30
    (site,) = graphquant.compare(model, [x]).sites
    assert site.local.sqnr < theory(K) - 6
    y = F.linear(x, model.fc.weight)
    r = ((x.amax(-1) - x.amin(-1)) / 2).square().mean() * model.fc.weight.square().sum(-1).mean()
    by_range = 10 * math.log10(float(y.square().mean()) / (float(r) / LEVELS))
    assert site.local.sqnr == pytest.approx(by_range, abs=NEAR)
