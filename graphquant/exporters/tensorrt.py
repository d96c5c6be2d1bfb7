"""A static program with quantize and dequantize nodes around its linears, for TensorRT to fuse.

graphquant's ops become float ops, and each quantization a pair of nodes:

    x   Q(x) = clamp(round(x / s), -128, 127),  DQ(q) = q s     s per tensor, no zero point
    W   DQ(wq) = wq w_scale                                     w_scale per output channel
    y   linear(DQ(Q(x)), DQ(wq), bias) + residual               in float

A static range [low, high] is quantized around its middle by graphquant, in steps of (high - low) /
254; TensorRT has no zero point:

    s = max(|low|, |high|) / 127

which is the same step for a symmetric range, and twice as large for a one-sided one (the result of
a GELU or a ReLU): up to one bit. Within the range the two differ by at most half a
step of each. Beyond it graphquant clips at `low` and `high`, TensorRT at -128 s and 127 s.

Norms and activations are computed in the dtype of what they read, as in the float model, and no
longer in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.export import ExportedProgram

from graphquant._torch import register_quantized_decomposed
from graphquant.errors import MissingPackageError, OptionError, UnsupportedInputError
from graphquant.exporters.program import require_program, unpack_weights
from graphquant.exporters.scales import dynamic_linears
from graphquant.ops import OPS, attention, int8_linear
from graphquant.ops.define import DTYPE, Op
from graphquant.ops.int8_linear.op import linear
from graphquant.ops.numerics import MIN_ABSMAX, QMAX
from graphquant.ops.qparams import QParams

QMIN = -128  # of activations in TensorRT; weights are never below -127


def qdq(program: ExportedProgram, *, ops: str = "modelopt") -> ExportedProgram:
    """The program with quantize and dequantize nodes in place of graphquant's ops.

    program  graphquant.export(model, ..., activation="static", calibration=...); not modified
    ops      which ops the nodes call. "modelopt": `torch.ops.tensorrt.quantize_op` of NVIDIA's
             ModelOpt, the only ones that Torch-TensorRT converts; they run on CUDA. "torch":
             `torch.ops.quantized_decomposed`, which run everywhere with the same results, to
             measure the engine's accuracy

    Inputs, outputs, dynamic shapes and the int8 weights are those of the program. Activations
    become symmetric, which costs up to one bit where a range is one-sided:
    graphquant/exporters/tensorrt.py has the equations.

    Raises UnsupportedInputError for anything but an ExportedProgram, and for one with per-token
    scales, which TensorRT's nodes do not have; OptionError for other `ops`; MissingPackageError
    where ModelOpt is not installed.
    """
    require_program("tensorrt.qdq", program)
    if ops not in _NODES:
        raise OptionError(f"ops={ops!r} is not one of {', '.join(map(repr, _NODES))}")
    if dynamic := list(dynamic_linears(program)):
        named = ", ".join(dynamic[:3]) + (", ..." if len(dynamic) > 3 else "")
        raise UnsupportedInputError(
            f"{len(dynamic)} int8 linears have a scale for each token ({named}), "
            'TensorRT\'s nodes one for the tensor: export with activation="static" and '
            "calibration=graphquant.calibrate(model, batches), and leave in float by `exclude` "
            "what the calibration does not know"
        )
    nodes = _Floats(_NODES[ops]())
    converted: ExportedProgram = unpack_weights(program).run_decompositions(nodes.table())
    return converted


class _Nodes(Protocol):
    """The ops that compute Q and DQ."""

    def activation(self, x: Tensor, absmax: float) -> Tensor:
        """DQ(Q(x)) with absmax = 127 s, in x's dtype."""
        ...

    def weight(self, wq: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
        """DQ(wq) [N, K] in this dtype."""
        ...


class _Torch:
    def __init__(self) -> None:
        self.ops = register_quantized_decomposed()

    def activation(self, x: Tensor, absmax: float) -> Tensor:
        steps = absmax / QMAX, 0, QMIN, QMAX, torch.int8
        q = self.ops.quantize_per_tensor(x, *steps)
        return self.ops.dequantize_per_tensor(q, *steps, out_dtype=x.dtype)  # type: ignore[no-any-return]

    def weight(self, wq: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
        return self.ops.dequantize_per_channel(  # type: ignore[no-any-return]
            wq, w_scale, None, 0, -QMAX, QMAX, torch.int8, out_dtype=dtype
        )


class _ModelOpt:
    """One op for Q and DQ together, for weights as well: TensorRT recovers the same int8 values."""

    def __init__(self) -> None:
        try:
            import modelopt.torch.quantization  # noqa: F401 registers the ops
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "modelopt":
                raise
            raise MissingPackageError(
                "Torch-TensorRT converts the quantization ops of NVIDIA's ModelOpt, which is not "
                'installed: pip install "graphquant[tensorrt]". ops="torch" gives a program that '
                "needs neither, to look at its accuracy"
            ) from error
        self.op = torch.ops.tensorrt.quantize_op

    def activation(self, x: Tensor, absmax: float) -> Tensor:
        return self._fake(x, torch.full((), absmax, dtype=torch.float32, device=x.device))

    def weight(self, wq: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
        w_scale = w_scale[:, None]
        return self._fake((wq * w_scale).to(dtype), w_scale * QMAX)

    def _fake(self, x: Tensor, absmax: Tensor) -> Tensor:
        bits, exponent_bits, unsigned, narrow_range = 8, 0, False, False
        return self.op(x, absmax, bits, exponent_bits, unsigned, narrow_range)  # type: ignore[no-any-return]


_NODES: dict[str, Callable[[], _Nodes]] = {"modelopt": _ModelOpt, "torch": _Torch}


class _Floats:
    """Decompositions of graphquant's ops into float ops and Q/DQ: x after Q/DQ stands for xq."""

    def __init__(self, nodes: _Nodes) -> None:
        self.nodes = nodes

    def table(self) -> dict[Any, Callable[..., Any]]:
        """For run_decompositions."""
        return {
            **{op.target: partial(self.quantizer, op) for op in OPS.values() if op.quantizes},
            int8_linear.target: self.linear,
            attention.target: attention.float_form,
        }

    def quantizer(self, op: Op, *args: Any) -> tuple[Tensor, ...]:
        inputs, qparams = op.parted(args)
        y = op.float_form(*inputs)
        rows = self.rows(y, qparams)
        return (y.to(op.named(args)[DTYPE]), *rows) if op.keeps else rows

    def rows(self, x: Tensor, qparams: QParams) -> tuple[Tensor, Tensor, Tensor]:
        factor, low, high = qparams[:3]
        assert low is not None and high is not None  # checked by `qdq`
        if factor is not None:
            x = (x * factor).to(x.dtype)
        x = self.nodes.activation(x, max(-low, high, MIN_ABSMAX))
        return x, x[..., :1], x[..., :1]  # placeholders for scale and shift, which are unused

    def linear(
        self,
        x: Tensor,
        x_scale: Tensor,
        x_shift: Tensor,
        wq: Tensor,
        w_scale: Tensor,
        w_sum: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        dtype: torch.dtype,
        num_rows: Tensor | None = None,
    ) -> Tensor:
        if x.dtype == torch.int8:  # a constant, quantized when the program was packed
            x = x * x_scale + x_shift
        return linear(x, self.nodes.weight(wq, w_scale, dtype), bias, residual, dtype)
