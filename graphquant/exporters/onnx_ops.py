"""ONNX translations of graphquant's ops: one method per op.

Profiles "cpu" and "portable", a quantizer and the linear behind it:

    xq  = QuantizeLinear(x - x_shift, x_scale, zero)    on [M, K]: it takes a scale for each index
                                                        of one axis
    acc = MatMulInteger(xq, wq^T, zero)                 exact int32
    y   = float(acc) * (x_scale * w_scale) + (x_shift * w_sum + bias) + residual

with xq uint8 and zero = 128 ("cpu") or xq int8 and zero = 0 ("portable"). onnxruntime fuses
MatMulInteger, the cast and the product with a product of two scales into one kernel
(MatMulIntegerToFloat). It also fuses a constant vector that is added next, but adds it *before* the
row scales are multiplied in, which is wrong (1.32). So the bias is added to the shift term first,
which is not constant.

Profile "qdq", for engines that fuse QuantizeLinear and DequantizeLinear around float products, has
one scale for all rows and no shift:

    scale = max(-low, high, MIN_ABSMAX) / 127
    y     = Dequantize(Quantize(x, scale)) @ Dequantize(wq^T, w_scale) + bias + residual

Rows with inf or nan may give other results than the ops do.

Activations are translated by their entries in numerics.ACTIVATIONS. The rest is not traced from the
ops' float forms: the quantization must be written by hand, and torch.onnx would decompose an
RMSNorm in a way that onnxruntime does not fuse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphquant.ops.define import OPS, Op
from graphquant.ops.numerics import ACTIVATIONS, MIN_ABSMAX, QMAX
from graphquant.ops.qparams import QParams

QMAX7 = 64  # for 7-bit weights: two products with uint8 sum to at most 255 * 64 * 2 < 2^15

Value = Any  # onnxscript.ir.Value


@dataclass(frozen=True)
class Form:
    """How a profile represents the ops."""

    unsigned: bool = False  # xq is uint8, offset by 128
    weight_bits: int = 8
    static: bool = False  # float products between QuantizeLinear and DequantizeLinear


def translations(form: Form, op: Any) -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """torch.onnx.export's custom_translation_table. op: an onnxscript opset, of 20 or later."""
    made = _Translation(form, op)
    found = ((o, getattr(made, o.name, None)) for o in OPS.values())
    return {o.target: _positional(o, method) for o, method in found if method is not None}


def _positional(op: Op, method: Callable[..., Any]) -> Callable[..., Any]:
    """The method as a plain function (torch.onnx sets attributes on it) that takes a node's
    arguments: the last ones by name, or left out."""

    def translate(*args: Any, **named: Any) -> Any:
        rest = op.target._schema.arguments[len(args) :]
        return method(*args, *(named.get(a.name, a.default_value) for a in rest))

    return translate


class _Translation:
    """Methods have the names and the arguments of the ops."""

    def __init__(self, form: Form, op: Any) -> None:
        from onnxscript import ir

        self.form, self.op, self.ir = form, op, ir
        self.weights: dict[int, tuple[Value, Value, Value]] = {}  # by id(wq)

    # --- the ops ---------------------------------------------------------------------------------

    def quantize(
        self, x: Value, up: Value | None, act: str | None, *qparams: Any
    ) -> tuple[Value, Value, Value]:
        y = self._float(x)
        if act is not None:
            y = ACTIVATIONS[act].onnx(self.op, y)
        if up is not None:
            y = self.op.Mul(y, self._float(up))
        return self._quantized(y, QParams(*qparams))

    def norm_quantize(
        self, x: Value, gamma: Value, beta: Value, eps: float, rms: bool, *qparams: Any
    ) -> tuple[Value, Value, Value]:
        return self._quantized(self._norm(x, gamma, beta, eps, rms), QParams(*qparams))

    def norm_quantize_keep(
        self, x: Value, gamma: Value, beta: Value, eps: float, rms: bool, dtype: int, *qparams: Any
    ) -> tuple[Value, Value, Value, Value]:
        y = self._norm(x, gamma, beta, eps, rms)
        return self._cast(y, dtype), *self._quantized(y, QParams(*qparams))

    def int8_linear(
        self,
        xq: Value,
        x_scale: Value,
        x_shift: Value,
        wq: Value,
        w_scale: Value,
        w_sum: Value,
        bias: Value | None,
        residual: Value | None,
        dtype: int,
        num_rows: Value | None,
    ) -> Value:
        op, added = self.op, None if bias is None else self._float(bias)
        wT, w_scale, w_sum = self._weight(wq, w_scale, w_sum)
        if self.form.static:
            w = op.DequantizeLinear(wT, w_scale, axis=1)
            y = op.MatMul(self._dequantized(xq, x_scale, x_shift), w)
        else:
            acc = op.Cast(self._product(xq, wT), to=self.ir.DataType.FLOAT)
            y = op.Mul(acc, op.Mul(x_scale, w_scale))
            shifted = op.Mul(x_shift, w_sum)
            added = shifted if added is None else op.Add(shifted, added)
        if added is not None:
            y = op.Add(y, added)
        if residual is not None:
            y = op.Add(y, self._float(residual))
        return self._cast(y, dtype)

    def attention(
        self,
        q: Value,
        k: Value,
        v: Value,
        scale: float,
        tile: str | None = None,
        key_mask: Value | None = None,
        causal: bool = False,
        window: int | None = None,
        bias: Value | None = None,
    ) -> Value:
        op = self.op
        seen = self._seen(q, key_mask, causal, window)
        k, v = (self._for_heads(self._float(t), q.shape[1]) for t in (k, v))
        kT = op.Transpose(k, perm=[0, 1, 3, 2])
        scores = op.MatMul(op.Mul(self._float(q), self._f32(scale)), kT)
        if bias is not None:
            scores = op.Add(scores, self._float(bias))
        if seen is not None:
            scores = op.Where(seen, scores, self._f32(np.finfo(np.float32).min))
        weights = op.Softmax(scores, axis=-1)
        if seen is not None:  # a query that sees no key has weights as well
            weights = op.Where(seen, weights, self._f32(0.0))
        return self._cast(op.MatMul(weights, v), q.dtype)

    # --- parts of the ops ------------------------------------------------------------------------

    def _seen(
        self, q: Value, key_mask: Value | None, causal: bool, window: int | None
    ) -> Value | None:
        """Which keys each query sees, as [B or 1, 1, S or 1, T]; None: all."""
        op, found = self.op, []
        if key_mask is not None:
            found.append(op.Unsqueeze(key_mask, self._const(np.array([1, 2]))))
        if causal or window is not None:
            zero, one = (self._const(np.array(n)) for n in (0, 1))
            length = op.Squeeze(op.Shape(q, start=2, end=3))
            i = op.Range(zero, length, one)
            behind = op.Sub(i, op.Unsqueeze(i, one))  # of the key, behind the query
            if causal:
                found.append(op.LessOrEqual(behind, zero))
            if window is not None:
                found.append(op.LessOrEqual(op.Abs(behind), self._const(np.array(window))))
        if not found:
            return None
        seen, *others = found
        for other in others:
            seen = op.And(seen, other)
        return seen

    def _for_heads(self, x: Value, heads: int) -> Value:
        """[B, Hkv, T, D] -> [B, heads, T, D], each head for its group."""
        op, own, width = self.op, x.shape[1], x.shape[3]
        if own == heads:
            return x
        x = op.Unsqueeze(x, self._const(np.array([2])))
        x = op.Tile(x, self._const(np.array([1, 1, heads // own, 1, 1])))
        return op.Reshape(x, self._const(np.array([0, heads, -1, width])))

    def _quantized(self, x: Value, qparams: QParams) -> tuple[Value, Value, Value]:
        """numerics.quantize_rows: (xq, x_scale, x_shift)."""
        op = self.op
        factor, low, high, clip, _ = qparams
        if factor is not None:
            x = op.Mul(x, factor)
        if low is not None and high is not None:
            return self._in_range(x, low, high)
        if clip is not None:
            x = op.Clip(x, self._f32(-clip), self._f32(clip))
        half, last = self._f32(0.5), self._const(np.array([-1]))
        most = op.Mul(op.Max(op.ReduceMax(x, last), self._f32(0.0)), half)
        least = op.Mul(op.Min(op.ReduceMin(x, last), self._f32(0.0)), half)
        x_shift = op.Add(most, least)
        absmax = op.Max(op.Sub(most, least), self._f32(MIN_ABSMAX))
        x_scale = op.Div(absmax, self._f32(QMAX))
        rows = op.Flatten(op.Sub(x, x_shift), axis=-1)
        scales = op.Reshape(x_scale, last)
        zeros = op.Expand(self._zero([1]), op.Shape(scales))
        xq = op.Reshape(op.QuantizeLinear(rows, scales, zeros, axis=0), op.Shape(x))
        return self._steps(xq), x_scale, x_shift

    def _in_range(self, x: Value, low: float, high: float) -> tuple[Value, Value, Value]:
        """The same with one range for all rows."""
        op = self.op
        column = op.Concat(op.Shape(x, end=-1), self._const(np.array([1])), axis=0)
        if self.form.static:
            shift, absmax = np.float32(0), np.float32(max(-low, high, MIN_ABSMAX))
        else:  # in float32, as the op has it
            least, most, half = np.float32(low), np.float32(high), np.float32(0.5)
            shift = half * most + half * least
            absmax = max(most - shift, shift - least, np.float32(MIN_ABSMAX))
            x = op.Sub(op.Clip(x, self._f32(least), self._f32(most)), self._f32(shift))
        scale = self._f32(absmax / np.float32(QMAX))
        xq = op.QuantizeLinear(x, scale, self._zero([]))
        return self._steps(xq), op.Expand(scale, column), op.Expand(self._f32(shift), column)

    def _product(self, xq: Value, wT: Value) -> Value:
        """xq [..., K] @ wT [K, N] in exact int32."""
        op = self.op
        if not self.form.unsigned:
            return op.MatMulInteger(xq, wT)
        if self._quantizer(xq) is None:  # a constant, already quantized to int8
            wide = op.Cast(xq, to=self.ir.DataType.INT32)
            wide = op.Add(wide, self._const(np.array(128, np.int32)))
            xq = op.Cast(wide, to=self.ir.DataType.UINT8)
        return op.MatMulInteger(xq, wT, self._zero([]))

    def _dequantized(self, xq: Value, x_scale: Value, x_shift: Value) -> Value:
        """x dequantized to float; a constant by the scale and shift of its rows."""
        op, quantizer = self.op, self._quantizer(xq)
        if quantizer is not None:
            return op.DequantizeLinear(xq, *quantizer.inputs[1:])
        x = op.Mul(op.Cast(xq, to=self.ir.DataType.FLOAT), x_scale)
        return op.Add(x, x_shift)

    def _quantizer(self, xq: Value) -> Any | None:
        """The QuantizeLinear that xq comes from through row views, or None. The views are declared
        int8, the op's dtype; their dtype is corrected here."""
        views, node = [xq], xq.producer()
        while node is not None and node.op_type != "QuantizeLinear":
            views.append(node.inputs[0])
            node = node.inputs[0].producer()
        if node is not None:
            for view in views:
                view.dtype = node.outputs[0].dtype
        return node

    def _weight(self, wq: Value, w_scale: Value, w_sum: Value) -> tuple[Value, Value, Value]:
        """wT [K, N], w_scale, w_sum in the file's bit width; shared by all linears with this wq."""
        if (weight := self.weights.get(id(wq))) is None:
            seven = self.form.weight_bits == 7
            q, w_scale, w_sum = self._seven_bits(wq, w_scale) if seven else (wq, w_scale, w_sum)
            weight = self.weights[id(wq)] = self.op.Transpose(q, perm=[1, 0]), w_scale, w_sum
        return weight

    def _seven_bits(self, wq: Value, w_scale: Value) -> tuple[Value, Value, Value]:
        """The weight requantized to 64 steps instead of 127."""
        op, types = self.op, self.ir.DataType
        steps = op.Round(op.Mul(op.Cast(wq, to=types.FLOAT), self._f32(QMAX7 / QMAX)))
        w_scale = op.Mul(w_scale, self._f32(QMAX / QMAX7))
        w_sum = op.Mul(op.ReduceSum(steps, self._const(np.array([-1])), keepdims=0), w_scale)
        return op.Cast(steps, to=types.INT8), w_scale, w_sum

    def _norm(self, x: Value, gamma: Value, beta: Value, eps: float, rms: bool) -> Value:
        op, K, x = self.op, x.shape[-1], self._float(x)
        gamma = self._const(np.ones(K, np.float32)) if gamma is None else self._float(gamma)
        beta = None if beta is None else self._float(beta)
        if not rms:
            return op.LayerNormalization(x, gamma, beta, axis=-1, epsilon=eps)[0]
        # the pattern of onnxruntime's SimplifiedLayerNormFusion; opset 23 has an operator
        squares = op.ReduceMean(op.Pow(x, self._f32(2.0)), self._const(np.array([-1])))
        y = op.Mul(op.Div(x, op.Sqrt(op.Add(squares, self._f32(eps)))), gamma)
        return y if beta is None else op.Add(y, beta)

    # --- helpers ---------------------------------------------------------------------------------

    def _float(self, x: Value) -> Value:
        return self._cast(x, self.ir.DataType.FLOAT)

    def _cast(self, x: Value, dtype: int) -> Value:
        undeclared = self.ir.DataType.FLOAT  # values made here have no dtype yet
        return x if (x.dtype or undeclared) == dtype else self.op.Cast(x, to=int(dtype))

    def _steps(self, xq: Value) -> Value:
        """Declare xq as uint8 if it is: torch.onnx would use the op's dtype, int8."""
        if self.form.unsigned:
            xq.dtype = self.ir.DataType.UINT8
        return xq

    def _zero(self, shape: list[int]) -> Value:
        """The zero point, as a constant of this shape."""
        zero = (128, np.uint8) if self.form.unsigned else (0, np.int8)
        return self._const(np.full(shape, *zero))

    def _f32(self, number: float | np.float32) -> Value:
        return self._const(np.array(number, np.float32))

    def _const(self, array: np.ndarray[Any, Any]) -> Value:
        return self.op.Constant(value=self.ir.tensor(array))
