"""Modules that put values on int8 levels and compute on in float: fake quantisation.

They are for looking at scales, sharing them between layers and handing them to exporters; what runs
in int8 is the compiled graph. Their levels are those of its ops (ops/numerics.py).

The attributes by which utils.py knows a quantized module, of this library or of another, are
those of NVIDIA Model-Optimizer:

    weight_quantizer, input_quantizer, output_quantizer    modules with the attribute `_disabled`
    <name>_weight_quantizer, <name>_weight_quantizers      of the parameter <name>; a ModuleList
    _amax                                                  of a quantiser: a tensor, or None
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphquant.calibration.calibration import Calibration
from graphquant.ops.numerics import MIN_ABSMAX, QMAX, quantize_rows, quantize_symmetric

TIED = "_shared_quant_tied_attrs"  # of a quantiser: the buffers that it shares with others
_exporting: ContextVar[bool] = ContextVar("graphquant_exporting", default=False)


@contextmanager
def export_torch_mode() -> Iterator[None]:
    """Within, a Quantizer with an amax is one `torch.fake_quantize_...` call, which exporters write
    as a pair of QuantizeLinear and DequantizeLinear.

    It can be nested, ends with an exception as well, and holds in this thread or task alone (the
    original's is a global). After NVIDIA Model-Optimizer's function of this name.
    """
    token = _exporting.set(True)
    try:
        yield
    finally:
        _exporting.reset(token)


def is_torch_export_mode() -> bool:
    """Is this within `export_torch_mode()`?"""
    return _exporting.get()


class Quantizer(nn.Module):
    """x on int8 levels, in x's type.

        x -> quantize_symmetric(x, amax) * amax / 127      clamped to [-amax, amax]
        x -> quantize_rows(x) * x_scale + x_shift          without an amax: row by row, dynamic

    _amax         float32 of a shape that broadcasts to x's: (), or (N, 1) for a weight [N, K]
    _global_amax  float32 (): one that a group shares, which counts instead of `_amax`
    _disabled     True: x stays as it is

    Both are buffers, float32 whatever the model is cast to, and part of the state_dict once they
    are set. Gradients do not flow.
    """

    _amax: Tensor | None
    _global_amax: Tensor | None

    def __init__(self, amax: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("_amax", None if amax is None else amax.detach().float())
        self.register_buffer("_global_amax", None)
        self._disabled = False

    @property
    def amax(self) -> Tensor | None:
        """The one that counts."""
        return self._amax if self._global_amax is None else self._global_amax

    @property
    def global_amax(self) -> Tensor | None:
        return self._global_amax

    def forward(self, x: Tensor) -> Tensor:
        if self._disabled:
            return x
        x = x.detach()
        if self.amax is None:
            xq, scale, shift = quantize_rows(x)
            return (xq * scale + shift).to(x.dtype)
        amax = self.amax.clamp(min=MIN_ABSMAX)
        if is_torch_export_mode():
            return _fake_quantize(x.float(), amax / QMAX).to(x.dtype)
        xq, scale = quantize_symmetric(x, amax)
        return (xq * scale).to(x.dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get(TIED, ()):
            raise RuntimeError(f"{name} is shared with other quantisers: write to it by copy_()")
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            self._buffers[name] = moved(old, self._buffers[name])
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        """A buffer that is not set yet is taken from the state_dict; one that is shared stays the
        one tensor, also with assign=True."""
        for name, held in self._buffers.items():
            given = state_dict.get(prefix + name)
            if given is not None and (held is None or held.is_meta):
                self._buffers[name] = given.detach().float().clone()
        metadata = {**local_metadata, "assign_to_params_buffers": False}
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)


def moved(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """A scale after `.to()`, `.half()`, ...: on the device of `new`, with the values and the type
    of `old`, and the same object if nothing had to move."""
    if old is None or new is None or old.is_meta:
        return new
    return old.to(new.device)


def _fake_quantize(x: Tensor, scale: Tensor) -> Tensor:
    wide = [d - scale.dim() for d in range(scale.dim()) if scale.shape[d] > 1]
    zero = torch.zeros(scale.numel(), dtype=torch.int32, device=scale.device)
    if not wide:
        return torch.fake_quantize_per_tensor_affine(
            x, scale.reshape(()), zero.reshape(()), -QMAX, QMAX
        )
    if len(wide) > 1:
        raise ValueError(f"an amax of shape {[*scale.shape]} has no export: one dim may be wide")
    dim = wide[0] % x.dim()
    return torch.fake_quantize_per_channel_affine(x, scale.flatten(), zero, dim, -QMAX, QMAX)


class QuantizedLinear(nn.Linear):
    """A linear on int8 levels: y = linear(input_quantizer(x), weight_quantizer(weight), bias)."""

    weight_quantizer: Quantizer
    input_quantizer: Quantizer

    @classmethod
    def of(cls, linear: nn.Linear, amax: Tensor | None = None) -> QuantizedLinear:
        """With the parameters of `linear` (the same, not copies), as graphquant quantises them.

        The weight has an amax for each output channel, (N, 1). `amax` is that of the input, ();
        without one the input is quantised row by row.
        """
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        made.weight, made.bias = linear.weight, linear.bias
        made.weight_quantizer = Quantizer(linear.weight.abs().amax(1, keepdim=True))
        made.input_quantizer = Quantizer(amax)
        return made.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        x, w = self.input_quantizer(input), self.weight_quantizer(self.weight)
        return F.linear(x, w, self.bias)


def quantize_linears_(model: nn.Module, calibration: Calibration | None = None) -> int:
    """Put a QuantizedLinear in the place of every nn.Linear below `model`; how many there were.

    With a calibration of the model, inputs have its range's larger end as their amax; those that it
    has not seen stay dynamic. Subclasses of nn.Linear stay as they are, and so does `model` itself.
    """
    made: dict[nn.Linear, QuantizedLinear] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is not nn.Linear or not path:
            continue
        if module not in made:
            ends = None if calibration is None else calibration.range(path)
            device = module.weight.device
            amax = None if ends is None else torch.tensor(max(-ends[0], ends[1]), device=device)
            made[module] = QuantizedLinear.of(module, amax)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, made[module])
    return len(made)
