"""SmoothQuant's math: the scale s of each input channel, from weights and statistics.

    x W^T = (x / s) (W s)^T                       whatever s > 0 is

    s[k] = c a[k]^alpha / b[k]^(1 - alpha)        a = absmax,  b[k] = max_n |w[n, k]| / |w[n]|
    c    such that max_k a[k] / s[k] = 1

A few large channels of x use up its int8 range: x / s shrinks them, and W s grows their columns.
Unlike in the paper, b is of rows normalized to length 1, since each output channel has a scale of
its own and stacked q/k/v differ in size. Within the statistics x / s stays in [-1, 1] for any
weights.

    w       [N, K]  floating point
    absmax  [K]     floating point, >= 0, of x's channels
    alpha   in (0, 1): the share of the range that moves into W
    -> s    [K]     float32 > 0; s and 1 / s are finite

a and b are raised to at least FLOOR of their mean, since a channel that is silent in the statistics
may be active later. inf and nan in them become the mean.

Source: Xiao et al., SmoothQuant, arXiv:2211.10438, equation 4, but for b. Graphs call these
functions when a weight is packed, on the CPU and on CUDA.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 1e-3
SIGMAS = 3.0  # a normalized value hardly ever exceeds 3
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_SMALLEST = torch.finfo(torch.float32).tiny  # its reciprocal is finite
_LARGEST = 1 / _SMALLEST


def smoothing(w: Tensor, absmax: Tensor, alpha: float) -> Tensor:
    """s [K] for this alpha."""
    return _scale(_floored(absmax), _floored(_column_sizes(w)), alpha)


def norm_smoothing(w: Tensor, gamma: Tensor | None, beta: Tensor | None, alpha: float) -> Tensor:
    """s [K] of a norm's output, without data: |x| <= SIGMAS |gamma| + |beta|. gamma, beta: [K], or
    None for ones and zeros."""
    absmax = w.new_full(w.shape[1:], SIGMAS) if gamma is None else SIGMAS * gamma.abs()
    return smoothing(w, absmax if beta is None else absmax + beta.abs(), alpha)


def searched_smoothing(w: Tensor, absmax: Tensor, rows: Tensor) -> Tensor:
    """s [K] for the one of ALPHAS with the least expected error on `rows` of x, [n, K] float32; the
    same for all channels, which smooths nothing, if that is best.

    Rounding to steps of d has a mean squared error of d^2 / 12. With the half range r[t] of a row
    of x / s and the absmax m[n] of a row of W s, over 127 steps each:

        127^2 12 error = sum_t r[t]^2 sum_nk (w[n,k] s[k])^2 + sum_n m[n]^2 sum_tk (x[t,k] / s[k])^2
    """
    a, b = _floored(absmax), _floored(_column_sizes(w))
    scales = [_clamped(a.amax().expand_as(a)), *(_scale(a, b, alpha) for alpha in ALPHAS)]
    errors = torch.stack([_expected_error(w, rows, s) for s in scales])
    best = errors.argmin(0, keepdim=True)  # argmin takes nan for least: then nothing is smoothed
    return torch.stack(scales).index_select(0, best)[0]


def _column_sizes(w: Tensor) -> Tensor:
    return F.normalize(w.float(), dim=1).abs().amax(0)


def _scale(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    log_s = alpha * a.log() - (1 - alpha) * b.log()
    return _clamped((log_s + (a.log() - log_s).amax()).exp())


def _clamped(s: Tensor) -> Tensor:
    return s.clamp(_SMALLEST, _LARGEST).float()


def _expected_error(w: Tensor, rows: Tensor, s: Tensor) -> Tensor:
    x, w = rows / s, w.float() * s
    half = (x.amax(-1).clamp(min=0.0) - x.amin(-1).clamp(max=0.0)) / 2
    squares = [v.double().square().sum() for v in (half, w, w.abs().amax(-1), x)]
    return squares[0] * squares[1] + squares[2] * squares[3]


def _floored(absmax: Tensor) -> Tensor:
    """absmax in float64, finite and at least FLOOR of its mean."""
    v = absmax.double()
    finite = v.isfinite()
    mean = torch.where(finite, v, 0.0).sum() / finite.sum().clamp(min=1)
    mean = torch.where(mean > 0.0, mean, 1.0)
    return torch.maximum(torch.where(finite, v, mean), FLOOR * mean)
