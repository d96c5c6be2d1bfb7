"""SmoothQuant's scale for each input channel of a linear, which moves size from x into W.

    x W^T = (x / s) (W s)^T                       whatever s > 0 is

    s[k] = c a[k]^alpha / b[k]^(1 - alpha)        a = absmax,  b[k] = max_n |w[n, k]| / |w[n]|
    c    such that max_k a[k] / s[k] = 1

An activation with a few large channels spends its int8 steps on them. x / s has them smaller, and
W s has their columns larger. b looks at rows of length 1, which the paper's does not: every output
channel has a scale of its own, so that its size tells nothing about its columns, and q/k/v that are
stacked are of different sizes. Within the statistics x / s stays in [-1, 1], whatever the weights
become.

    w       [N, K]  floating point
    absmax  [K]     floating point, >= 0, of x's channels
    alpha   in (0, 1): how much of the size moves
    -> s    [K]     float32 > 0, finite, and so is 1 / s

A channel that is (almost) silent in the statistics may not be so later, and an empty column of W
may be filled: a and b are taken to be at least FLOOR of their mean. What is inf or nan in them is
taken for the mean.

Source: Xiao et al., SmoothQuant, arXiv:2211.10438, equation 4, but for b. Graphs call these
functions as they stand, on the CPU and on CUDA: they run when a weight is packed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 1e-3
SIGMAS = 3.0  # a normalised value hardly ever leaves +- 3
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_SMALLEST = torch.finfo(torch.float32).tiny  # its reciprocal is finite
_LARGEST = 1 / _SMALLEST


def smoothing(w: Tensor, absmax: Tensor, alpha: float) -> Tensor:
    """s for this alpha."""
    return _scale(_floored(absmax), _floored(_column_sizes(w)), alpha)


def norm_smoothing(w: Tensor, gamma: Tensor | None, beta: Tensor | None, alpha: float) -> Tensor:
    """s by what is known of a norm's result without data: |x| <= SIGMAS |gamma| + |beta|, which are
    [K], or None for ones and zeros."""
    absmax = w.new_full(w.shape[1:], SIGMAS) if gamma is None else SIGMAS * gamma.abs()
    return smoothing(w, absmax if beta is None else absmax + beta.abs(), alpha)


def searched_smoothing(w: Tensor, absmax: Tensor, rows: Tensor) -> Tensor:
    """s for that of ALPHAS which promises the least error on `rows` of x, [n, K] float32; or one
    number for all channels, which smoothes nothing, if that is the best.

    Rounding to steps of d makes an error of d^2 / 12 on average. With the half range r[t] of a row
    of x / s and the absmax m[n] of a row of W s, over 127 steps each:

        127^2 12 error = sum_t r[t]^2 sum_nk (w[n,k] s[k])^2 + sum_n m[n]^2 sum_tk (x[t,k] / s[k])^2
    """
    a, b = _floored(absmax), _floored(_column_sizes(w))
    scales = [_usable(a.amax().expand_as(a)), *(_scale(a, b, alpha) for alpha in ALPHAS)]
    errors = torch.stack([_expected_error(w, rows, s) for s in scales])
    best = errors.argmin(0, keepdim=True)  # nan counts as least: then nothing is smoothed
    return torch.stack(scales).index_select(0, best)[0]


def _column_sizes(w: Tensor) -> Tensor:
    return F.normalize(w.float(), dim=1).abs().amax(0)


def _scale(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    log_s = alpha * a.log() - (1 - alpha) * b.log()
    return _usable((log_s + (a.log() - log_s).amax()).exp())


def _usable(s: Tensor) -> Tensor:
    return s.clamp(_SMALLEST, _LARGEST).float()


def _expected_error(w: Tensor, rows: Tensor, s: Tensor) -> Tensor:
    x, w = rows / s, w.float() * s
    half = (x.amax(-1).clamp(min=0.0) - x.amin(-1).clamp(max=0.0)) / 2
    squares = [v.double().square().sum() for v in (half, w, w.abs().amax(-1), x)]
    return squares[0] * squares[1] + squares[2] * squares[3]


def _floored(absmax: Tensor) -> Tensor:
    """In float64, finite and positive."""
    v = absmax.double()
    finite = v.isfinite()
    mean = torch.where(finite, v, 0.0).sum() / finite.sum().clamp(min=1)
    mean = torch.where(mean > 0.0, mean, 1.0)
    return torch.maximum(torch.where(finite, v, mean), FLOOR * mean)
