"""Fake quantization: modules that round values to int8 levels and compute in float.

They are for inspecting scales, sharing them between layers and exporting them; the compiled graph
is what runs in int8. Their levels are those of its ops (ops/numerics.py).

utils.py recognizes a quantized module, of this library or another, by the attributes of NVIDIA
Model-Optimizer:

    weight_quantizer, input_quantizer, output_quantizer    modules with the attribute `_disabled`
    <name>_weight_quantizer, <name>_weight_quantizers      of the parameter <name>; a ModuleList
    _amax                                                  of a quantizer: a tensor, or None
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

TIED = "_shared_quant_tied_attrs"  # of a quantizer: the buffers that it shares with others
_exporting: ContextVar[bool] = ContextVar("graphquant_exporting", default=False)


@contextmanager
def export_torch_mode() -> Iterator[None]:
    """Context in which a Quantizer with an amax is one `torch.fake_quantize_...` call, which
    exporters write as a pair of QuantizeLinear and DequantizeLinear.

    It can be nested and applies to this thread or task only (the original is global). After NVIDIA
    Model-Optimizer's function of this name.
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
    """Rounds x to int8 levels, in the dtype of x.

        x -> quantize_symmetric(x, amax) * amax / 127      clamped to [-amax, amax]
        x -> quantize_rows(x) * x_scale + x_shift          without an amax: dynamic, per row

    _amax         float32 of a shape that broadcasts to x's: (), or (N, 1) for a weight [N, K]
    _global_amax  float32 (), shared by a group; overrides `_amax`
    _disabled     True: return x unchanged

    Both are buffers that stay float32 when the model is cast, and part of the state_dict once set.
    The result has no gradient.
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
        """The amax in use, None if dynamic."""
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
            raise RuntimeError(f"{name} is shared with other quantizers: write to it by copy_()")
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
        """Create buffers that are not set yet. Shared ones stay shared, also with assign=True."""
        for name, held in self._buffers.items():
            given = state_dict.get(prefix + name)
            if given is not None and (held is None or held.is_meta):
                self._buffers[name] = given.detach().float().clone()
        metadata = {**local_metadata, "assign_to_params_buffers": False}
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)


def moved(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """A scale after `.to()`, `.half()`, ...: `old`, moved to the device of `new` but not cast."""
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
        raise ValueError(
            f"an amax of shape {[*scale.shape]} cannot be exported: only one dim may be wide"
        )
    dim = wide[0] % x.dim()
    return torch.fake_quantize_per_channel_affine(x, scale.flatten(), zero, dim, -QMAX, QMAX)


class QuantizedLinear(nn.Linear):
    """A fake-quantized linear: y = linear(input_quantizer(x), weight_quantizer(weight), bias)."""

    weight_quantizer: Quantizer
    input_quantizer: Quantizer

    @classmethod
    def of(cls, linear: nn.Linear, amax: Tensor | None = None) -> QuantizedLinear:
        """A QuantizedLinear that shares the parameters of `linear`.

        amax  of the input, (); None for dynamic quantization per row

        The weight is quantized per output channel, with an amax of shape (N, 1).
        """
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        new.weight, new.bias = linear.weight, linear.bias
        new.weight_quantizer = Quantizer(linear.weight.abs().amax(1, keepdim=True))
        new.input_quantizer = Quantizer(amax)
        return new.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        x, w = self.input_quantizer(input), self.weight_quantizer(self.weight)
        return F.linear(x, w, self.bias)


def quantize_linears_(model: nn.Module, calibration: Calibration | None = None) -> int:
    """Replace every nn.Linear in `model` by a QuantizedLinear; returns how many.

    With a calibration, the amax of an input is the larger end of its range; inputs that it has not
    seen stay dynamic. Subclasses of nn.Linear, and `model` itself, are not replaced.
    """
    new: dict[nn.Linear, QuantizedLinear] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is not nn.Linear or not path:
            continue
        if module not in new:
            ends = None if calibration is None else calibration.range(path)
            device = module.weight.device
            amax = None if ends is None else torch.tensor(max(-ends[0], ends[1]), device=device)
            new[module] = QuantizedLinear.of(module, amax)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new[module])
    return len(new)
