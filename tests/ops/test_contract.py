"""What every op promises to torch and to its caller: registration, fakes, errors, full writes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from graphquant import ops
from graphquant.errors import UnsupportedInputError
from graphquant.ops.define import OPS, Kernel, Op, _as_tuple, define
from graphquant.ops.numerics import row_stride, vectors, with_pads
from graphquant.ops.qparams import QParams
from graphquant.ops.runtime.launch import recorded
from graphquant.ops.triton_rows import block_widths, row_config
from graphquant.ops.triton_util import as_rows, unit_of
from tests.ops.bounds import assert_means, assert_weight, assert_within_a_step, kernels, to_cpu
from tests.ops.qparams import RECIPES
from tests.strategies import Rows, rows

ALL = tuple(OPS.values())
QUANTIZERS = tuple(op for op in ALL if op.quantizes)
PLAIN = ""
FORMS = ("act", "gated", "product")  # of quantize, besides PLAIN


@dataclass(frozen=True)
class Call:
    """One way to call an op."""

    op: Op
    form: str = PLAIN
    recipe: str = ""  # of QParams; "": none are given

    def __str__(self) -> str:
        return " ".join(filter(None, (self.op.name, self.form, self.recipe)))

    def on(self, x: Tensor) -> tuple[Any, ...]:
        """Valid arguments around a float x [..., K]."""
        args = _arguments(self.op, x, self.form)
        if not self.recipe:
            return args
        return self.op.quantizing(args, RECIPES[self.recipe].on(x.shape[-1], x.device))


def _calls(op: Op) -> list[Call]:
    """All that differ in what a kernel does."""
    forms = (PLAIN, *FORMS) if op is ops.quantize else (PLAIN,)
    recipes = ("", *RECIPES) if op.quantizes else ("",)
    return [Call(op, form, r) for form in forms for r in recipes if form != "product" or not r]


CASES = [call for op in ALL for call in _calls(op)]


def _arguments(op: Op, x: Tensor, form: str = PLAIN) -> tuple[Any, ...]:
    K = x.shape[-1]
    gamma = torch.linspace(0.5, 2, K, device=x.device).to(x.dtype)
    if op is ops.quantize:
        forms = {
            PLAIN: (x,),
            "act": (x, None, "gelu"),
            "gated": (x, x.flip(-1), "silu"),
            "product": (x, x.flip(-1)),
        }
        return forms[form]
    if op is ops.quantize_weight:
        return (x.flatten(0, -2) if x.dim() > 1 else x[None],)
    if op is ops.norm_quantize:
        return x, gamma, None, 1e-5, False
    if op is ops.norm_quantize_keep:
        return x, None, gamma, 1e-5, True, torch.bfloat16
    if op is ops.attention:
        lead = (*x.shape[:-1], 1, 1)[:2]
        q = x.reshape(lead[0], 1, lead[1], K)
        if x.is_cuda:  # what the kernel takes
            q = F.pad(q, (0, -K % 8)).half()
        return q, q.flip(2), q.flip(3), 0.5, "128x128"
    if op is ops.pack_weight:
        return (ops.quantize_weight(x.flatten(0, -2) if x.dim() > 1 else x[None])[0],)
    if op is ops.token_index:
        return (x.reshape(-1, K) if x.numel() else x.new_zeros(1, K)) > 0, True
    if op is ops.varlen_attention:
        heads = x.reshape(1, 1, -1, K)
        T = heads.shape[2]
        where = ([0, T], range(T), [[0, i] for i in range(0, T, 64)] or [[-1, -1]])
        where = (torch.tensor(w, dtype=torch.int32, device=x.device) for w in where)
        return heads, heads.flip(2), heads.flip(3), *where, 0.5, max(T, 1)
    assert op is ops.int8_linear
    w = torch.randn(24, K, generator=torch.Generator().manual_seed(1))
    quantized = ops.quantize.reference(x.cpu()), ops.quantize_weight.reference(w)
    residual = torch.ones(*x.shape[:-1], 24)
    moved = [_on(t, x.device) for triple in quantized for t in triple]
    return *moved, None, residual.to(x.device), torch.bfloat16


def _on(t: Tensor, device: torch.device) -> Tensor:
    """t on a device; int8 rows keep their pads."""
    if t.dtype != torch.int8 or device.type == "cpu":
        return t.to(device)
    return with_pads(t).to(device)[..., : t.shape[-1]]


SAMPLES = {
    "padded K": Rows((3, 5), 40),
    "bfloat16": Rows((4,), 32, torch.bfloat16),
    "strided": Rows((3, 5), 40, layout="slice"),
    "swapped": Rows((3, 5), 40, layout="swapped"),
    "no rows": Rows((0, 3), 32),
    "one dim": Rows((), 33),
}


SOME = ("padded K", "swapped")  # of the samples, for calls with qparams
OPCHECKS = [
    pytest.param(
        call,
        sample,
        id=f"{name}-{call}",
        marks=() if not call.recipe or name in SOME else pytest.mark.slow,
    )
    for name, sample in SAMPLES.items()
    for call in CASES
]


@pytest.mark.parametrize(("call", "sample"), OPCHECKS)
def test_opcheck(call: Call, sample: Rows, device: str) -> None:
    torch.library.opcheck(call.op.target, call.on(sample.on(device)))


@pytest.mark.parametrize("call", CASES, ids=str)
def test_a_dynamic_batch_gets_no_guard(call: Call) -> None:
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)

    def fake(a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        sizes = [DimDynamic.DYNAMIC if d == 6 else DimDynamic.STATIC for d in a.shape]
        return mode.from_tensor(a, symbolic_context=StatelessSymbolicContext(sizes))

    args = [fake(a) for a in call.on(torch.randn(6, 40))]
    with mode:
        results = call.op.target(*args)
    results = results if isinstance(results, tuple) else (results,)
    sized = results[:-1] if call.op is ops.token_index else results  # the last is one number
    assert all(any(isinstance(n, torch.SymInt) for n in r.shape) for r in sized)
    assert not [str(g.expr) for g in env.guards]


@pytest.mark.parametrize("call", CASES, ids=str)
def test_fullgraph_compile_keeps_the_padded_strides(call: Call) -> None:
    torch._dynamo.reset()  # it counts compilations of one lambda
    args, target = call.on(torch.randn(6, 40)), call.op.target
    want = target(*args)
    got = torch.compile(lambda *a: target(*a), backend="aot_eager", fullgraph=True)(*args)
    for g, w in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, want)), strict=True):
        assert torch.equal(g, w) and g.stride() == w.stride()


@pytest.mark.parametrize("op", ALL, ids=lambda op: op.name)
def test_kernels_take_the_parameters_of_the_reference(op: Op) -> None:
    # per weight, by torch's own operators
    once = (ops.quantize_weight, ops.pack_weight)
    assert op.kernels or op in once
    with pytest.raises(TypeError, match=rf"{op.name}: kernel bad takes \['a'\], the reference"):
        op.kernel("bad")(lambda a: None)
    assert "bad" not in [k.name for k in op.kernels]


def test_what_quantizers_return_is_what_int8_linear_takes() -> None:
    """In name and order: int8_linear(*quantize(x), *quantize_weight(w), ...)."""
    takes = [a.name for a in ops.int8_linear.target._schema.arguments]
    assert takes[6:] == ["bias", "residual", "dtype", "num_rows"]
    for op in ALL:
        returns = [r.name for r in op.target._schema.returns]
        if op is ops.quantize_weight:
            assert returns == takes[3:6]
        elif op in QUANTIZERS:
            assert returns[-3:] == takes[:3]
            assert returns[:-3] == (["y"] if op is ops.norm_quantize_keep else [])


def test_every_op_that_quantizes_ends_with_qparams() -> None:
    assert {op.name for op in QUANTIZERS} == {o.name for o in ALL if "quantize" in o.name} - {
        "quantize_weight"
    }
    for op in QUANTIZERS:
        last = op.target._schema.arguments[-5:]
        assert [a.name for a in last] == ["factor", "low", "high", "clip", "num_rows"]
        tensor, number = "Optional[Tensor]", "Optional[float]"
        assert [str(a.type) for a in last] == [tensor, number, number, number, tensor]
        assert [a.default_value for a in last] == [None] * 5


@pytest.mark.parametrize("op", QUANTIZERS, ids=lambda op: op.name)
def test_arguments_that_are_left_out_are_none(op: Op) -> None:
    """torch hands an op's code no last arguments that are defaults; sites have a place for all."""
    args = _arguments(op, torch.randn(3, 40))
    optional = len(op.target._schema.arguments) - len(args)
    assert optional == (7 if op is ops.quantize else 5)
    full = (*args, *[None] * optional)
    assert op.full(args) == op.full(full[:-2]) == full
    assert op.quantizing(args, QParams()) == op.quantizing(full[:-5], QParams()) == args
    assert op.quantizing(args, QParams(clip=1.0)) == (*full[:-2], 1.0)
    assert op.quantizing(args, QParams(low=0.0, high=1.0)) == (*full[:-4], 0.0, 1.0)
    tensors, constants = op.split(args)
    assert (tensors, constants) == op.split(full)
    assert len(tensors) == sum(op.tensors) and op.join(tensors, constants) == list(full)
    for got, want in zip(op(*full), op(*args), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("call", CASES, ids=str)
def test_the_reference_computes_the_float_form(call: Call) -> None:
    """In float64 it stands for what an op means: TensorRT's form and the benchmark's checks too."""
    op, args = call.op, call.on(torch.randn(7, 40))
    results = op.reference(*args)
    inputs, qparams = op.parted(args) if op.quantizes else (args, QParams())
    want = op.float_form(*map(_in_float64, inputs))
    if op.quantizes:
        assert_means(*results[-3:], want, 1e-5 * (1 + want.abs()), qparams)
    elif op is ops.quantize_weight:
        wq, w_scale, _ = results
        assert ((wq * w_scale[:, None] - want).abs() <= 0.501 * w_scale[:, None]).all()
    if op.keeps or op in (ops.int8_linear, ops.attention, ops.varlen_attention):
        y = _as_tuple(results)[0]
        torch.testing.assert_close(y.double(), want, rtol=2**-7, atol=1e-3)


def _in_float64(argument: Any) -> Any:
    if isinstance(argument, torch.dtype):
        return torch.float64
    return argument.double() if isinstance(argument, Tensor) else argument


def test_a_reference_that_differs_from_its_schema_is_refused() -> None:
    with pytest.raises(TypeError, match=r"schema \['x'\], reference \['y'\]"):

        @define("(Tensor x) -> Tensor", float_form=id, fake=id, check=id)
        def differs_from_schema(y: Tensor) -> Tensor:
            return y


def test_if_no_kernel_takes_the_inputs_every_reason_is_given() -> None:
    op = Op("demo", lambda x: x, lambda x: x, lambda x: None, lambda x: x, (), False)
    op.kernel("first", refuses=lambda x: "too warm")(lambda x, out: None)
    op.kernel("second", refuses=lambda x: None if x else "too cold")(lambda x, out: None)
    assert op.choose(True).name == "second"
    with pytest.raises(
        UnsupportedInputError, match=r"no CUDA kernel of demo .*\n  first: too warm\n  second: too"
    ):
        op.choose(False)


@kernels(*ALL)
@pytest.mark.parametrize("K", [40, 48, 1000, 16_401])
def test_kernels_write_every_byte_of_their_results(
    op: Op, kernel: Kernel, K: int, device: str, poisoned: None
) -> None:
    x = torch.randn(7 if K < 16_384 else 2, K, device=device)
    for call in _calls(op):
        _writes_every_byte(op, kernel, call.on(x))


def _writes_every_byte(op: Op, kernel: Kernel, args: tuple[Any, ...]) -> None:
    if (why := kernel.refuses(*args)) is not None:
        pytest.skip(why)
    results, want = kernel.fn(*args), op.reference(*to_cpu(args))
    if op is ops.quantize_weight:
        assert_weight(*results, *args)
        return
    if op is ops.token_index:
        assert all(torch.equal(got.cpu(), value) for got, value in zip(results, want, strict=True))
        return
    kept = (results,) if isinstance(results, Tensor) else results[:-3]
    wanted = (want,) if isinstance(want, Tensor) else want[:-3]
    for got, value in zip(kept, wanted, strict=True):  # bfloat16: rounded, and cut by Triton's
        torch.testing.assert_close(got.cpu(), value, rtol=2**-7, atol=1e-3)
    if not isinstance(results, Tensor):  # floats of about 1, two orders of summation: 1e-4 is ample
        assert_within_a_step(results[-3:], want[-3:], noise=1e-4)


@kernels(*ALL, named="triton")
@pytest.mark.parametrize("K", [40, 48])
def test_what_a_triton_kernel_would_launch_is_all_that_it_does(
    op: Op, kernel: Kernel, K: int, device: str, poisoned: None
) -> None:
    """`recorded` launches nothing; its call, launched by hand, fills the results."""
    x = torch.randn(7, K, device=device)
    for recorded_call in _calls(op):
        args = recorded_call.on(x)
        results = op.fake(*args)
        out = _as_tuple(results)
        before = [t.clone() for t in out]
        (call,) = recorded(partial(kernel.fill, *args, out=out))
        for t, same in zip(out, before, strict=True):
            assert torch.equal(t.nan_to_num(), same.nan_to_num()), "nothing was launched"
        call.launch()
        want = kernel.fn(*args)
        for got, value in zip(out, _as_tuple(want), strict=True):
            torch.testing.assert_close(got, value, rtol=0, atol=0)


@kernels(*ALL, named="triton")
def test_what_a_triton_kernel_would_launch_is_known_of_fake_tensors(
    op: Op, kernel: Kernel, device: str
) -> None:
    """With a symbol for the rows, in the grid and among the numbers."""
    args = _arguments(op, torch.randn(6, 48, device=device))
    mode = FakeTensorMode(shape_env=ShapeEnv())
    rows = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    M = mode.from_tensor(torch.empty(6, 48), symbolic_context=rows).shape[0]

    def faked(a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        size = [M if n == 6 else n for n in a.shape]
        return torch.empty_strided(size, a.stride(), dtype=a.dtype, device=a.device)

    with mode:
        fakes = [faked(a) for a in args]
        assert kernel.refuses(*fakes) is None
        results = op.fake(*fakes)
    out = _as_tuple(results)
    (call,) = recorded(partial(kernel.fill, *fakes, out=out))
    assert isinstance(call.grid[0], torch.SymInt)
    if op is ops.varlen_attention:
        return  # it reads the numbers of rows from cu_seqlens
    assert any(a is M or (isinstance(a, torch.SymInt) and str(a) == str(M)) for a in call.args)
    (real,) = recorded(partial(kernel.fill, *args, out=_as_tuple(op.fake(*args))))
    assert int(call.grid[0].node.hint) == real.grid[0]
    assert call.meta == real.meta


F32, I8 = torch.float32, torch.int8


def _linear_with(**changes: Any) -> tuple[Any, ...]:
    args = {
        "xq": torch.zeros(4, 32, dtype=I8),
        "x_scale": torch.ones(4, 1),
        "x_shift": torch.zeros(4, 1),
        "wq": torch.zeros(8, 32, dtype=I8),
        "w_scale": torch.ones(8),
        "w_sum": torch.zeros(8),
        "bias": None,
        "residual": None,
        "dtype": F32,
    }
    return tuple((args | changes).values())


def _attention_with(**changes: Any) -> tuple[Any, ...]:
    args = {"q": heads, "k": heads, "v": heads, "scale": 0.125, "tile": "128x128"}
    return tuple((args | changes).values())


def _varlen_with(**changes: Any) -> tuple[Any, ...]:
    where = {"cu_seqlens": torch.tensor([0, 3, 5]), "position": torch.arange(5)}
    where["tiles"] = torch.tensor([[0, 0], [1, 0]])
    args = {"q": torch.ones(1, 4, 5, 8), "k": torch.ones(1, 2, 5, 8), "v": torch.ones(1, 2, 5, 8)}
    args |= {name: t.int() for name, t in where.items()}
    args |= {"scale": 0.5, "max_length": 5, "causal": False, "window": None, "bias": None}
    return tuple((args | changes).values())


def _with(op: Op, **qparams: Any) -> tuple[Any, ...]:
    return op.quantizing(_arguments(op, x), QParams(**qparams))


x = torch.ones(4, 32)
NO_QPARAMS: dict[str, dict[str, Any]] = {
    r"factor has shape \[31\], needs \[32\]: \[K\] like x": {"factor": x[0, 1:]},
    r"factor has shape \[1, 32\], needs \[32\]": {"factor": x[:1]},
    "factor is bfloat16, needs float32": {"factor": x[0].bfloat16()},
    "low is -1.0, high is None, needs both or neither": {"low": -1.0},
    "low is None, high is 1.0, needs both or neither": {"high": 1.0},
    "low is -inf, needs a finite float32": {"low": -torch.inf, "high": 1.0},
    "high is nan, needs a finite float32": {"low": 0.0, "high": torch.nan},
    r"high is 1e\+39, needs a finite float32": {"low": 0.0, "high": 1e39},
    "low is 1.0, above high, 0.5": {"low": 1.0, "high": 0.5},
    "clip is 0.0, needs > 0": {"clip": 0.0},
    "clip is -1.0, needs > 0": {"clip": -1.0},
    "clip is inf, needs a finite float32": {"clip": torch.inf},
    "clip is given beside low and high": {"low": -1.0, "high": 1.0, "clip": 1.0},
}
heads = torch.ones(2, 3, 5, 32)
tokens, square = torch.ones(1, 4, 5, 8), torch.ones(1, 4, 5, 5)
NO_VARLEN: dict[str, dict[str, Any]] = {
    "scale is inf, needs a finite number > 0": {"scale": torch.inf},
    "scale is -1.0, needs a finite number > 0": {"scale": -1.0},
    "window is -1, needs >= 0": {"window": -1},
    "q is float64, needs float16": {"q": tokens.double()},
    "k is float16, needs float32": {"k": tokens.half()},
    r"v has 3 dims, needs \[1, H, T, D\]": {"v": tokens[0]},
    r"q has shape \[2, 3, 5, 32\], needs \[1, 3, 5, 32\]": {"q": heads},
    r"k has shape \[1, 4, 4, 8\], needs \[1, 4, 5, 8\]": {"k": tokens[:, :, 1:]},
    r"k has shape \[1, 0, 5, 8\], needs Hkv >= 1": {"k": tokens[:, :0]},
    r"v has shape \[1, 4, 5, 8\], needs \[1, 2, 5, 8\]: \[1, Hkv, T, D\] like k": {"v": tokens},
    "q has 4 heads, needs a multiple of k's, 3": {"k": tokens[:, :3], "v": tokens[:, :3]},
    "cu_seqlens is torch.int64, needs torch.int32": {"cu_seqlens": torch.arange(3)},
    r"cu_seqlens has shape \[0\], needs \[B \+ 1\]": {"cu_seqlens": torch.arange(0).int()},
    r"position has shape \[4\], needs \[5\]: \[T\] like q": {"position": torch.arange(4).int()},
    r"tiles has shape \[0, 2\], needs n >= 1": {"tiles": torch.zeros(0, 2).int()},
    r"tiles has shape \[2, 3\], needs \[2, 2\]": {"tiles": torch.zeros(2, 3).int()},
    "bias is int32, needs float16": {"bias": square.int()},
    r"bias has shape \[1, 3, 5, 5\], needs \[1, 4, 5, 5\]": {"bias": square[:, :3]},
    r"bias has shape \[1, 4, 4, 4\], needs S >= max_length": {"bias": square[:, :, 1:, 1:]},
}
WRONG: list[tuple[Op, tuple[Any, ...], str]] = [
    (ops.quantize, (x.double(),), "quantize: x is float64, needs float16, bfloat16 or float32"),
    (ops.quantize, (torch.tensor(1.0),), "quantize: x is a scalar, needs at least one dim"),
    (ops.quantize, (x[:, :0],), r"quantize: x has shape \[4, 0\], needs K >= 1"),
    (ops.quantize_weight, (x.int(),), "quantize_weight: w is int32, needs float16, bfloat16 or f"),
    (ops.quantize_weight, (x[0],), r"quantize_weight: w has 1 dims, needs \[N, K\]"),
    (ops.quantize_weight, (x[None],), r"quantize_weight: w has 3 dims, needs \[N, K\]"),
    (ops.quantize_weight, (x[:, :0],), r"quantize_weight: w has shape \[4, 0\], needs K >= 1"),
    (ops.quantize_weight, (x, "max"), "quantize_weight: method is 'max', needs one of absmax, mse"),
    (ops.quantize, (x, None, "mish"), "act is 'mish', needs one of gelu, gelu_tanh, quick_gelu, "),
    (ops.quantize, (x.int(), None, "gelu"), "quantize: x is int32, needs float16"),
    (ops.quantize, (x, x[:, 1:], "silu"), r"up has shape \[4, 31\], needs \[4, 32\]: the sha"),
    (ops.quantize, (x, x.long(), "silu"), "quantize: up is int64, needs float16"),
    (ops.quantize, (x, x, "swish"), "quantize: act is 'swish', needs one of gelu"),
    (ops.norm_quantize, (x, x[0, 1:], None, 1e-5, True), r"gamma has shape \[31\], needs \[32\]"),
    (ops.norm_quantize, (x, None, x[0].int(), 1e-5, True), "beta is int32, needs float16"),
    (ops.norm_quantize_keep, (x, None, None, 1e-5, True, I8), "dtype is int8, needs float16"),
    *(
        (op, _with(op, **changes), f"{op.name}: {message}")
        for op in QUANTIZERS
        for message, changes in NO_QPARAMS.items()
    ),
    (ops.int8_linear, _linear_with(xq=x), "int8_linear: xq is float32, needs int8"),
    (
        ops.int8_linear,
        _linear_with(wq=torch.zeros(8, 48, dtype=I8)),
        r"wq has shape \[8, 48\], needs \[8, 32\]: \[N, K\] like xq",
    ),
    (ops.int8_linear, _linear_with(wq=torch.zeros(32, dtype=I8)), r"wq has shape \[32\], needs"),
    (
        ops.int8_linear,
        _linear_with(x_scale=torch.ones(4)),
        r"x_scale has shape \[4\], needs \[4, 1\]: \[..., 1\] like xq",
    ),
    (ops.int8_linear, _linear_with(x_scale=x[:, :1].half()), "x_scale is float16, needs float32"),
    (
        ops.int8_linear,
        _linear_with(x_shift=torch.ones(4)),
        r"x_shift has shape \[4\], needs \[4, 1\]: \[..., 1\] like xq",
    ),
    (ops.int8_linear, _linear_with(x_shift=x[:, :1].half()), "x_shift is float16, needs float32"),
    (
        ops.int8_linear,
        _linear_with(w_scale=torch.ones(8, 1)),
        r"w_scale has shape \[8, 1\], needs \[8\]",
    ),
    (ops.int8_linear, _linear_with(w_scale=torch.ones(8).half()), "w_scale is float16, needs fl"),
    (
        ops.int8_linear,
        _linear_with(w_sum=torch.ones(8, 1)),
        r"w_sum has shape \[8, 1\], needs \[8\]: \[N\] like wq",
    ),
    (ops.int8_linear, _linear_with(w_sum=torch.ones(8).int()), "w_sum is int32, needs float32"),
    (ops.int8_linear, _linear_with(bias=torch.ones(7)), r"bias has shape \[7\], needs \[8\]"),
    (
        ops.int8_linear,
        _linear_with(residual=torch.ones(8)),
        r"residual has shape \[8\], needs \[4, 8\]",
    ),
    (ops.int8_linear, _linear_with(dtype=torch.float64), "dtype is float64, needs float16"),
    (ops.attention, _attention_with(q=heads.int()), "attention: q is int32, needs float16"),
    (ops.attention, _attention_with(k=heads.half()), "attention: k is float16, needs float32"),
    (ops.attention, _attention_with(v=heads[0]), r"attention: v has 3 dims, needs \[B, H, _, D\]"),
    (
        ops.attention,
        _attention_with(k=heads[:1]),
        r"attention: k has shape \[1, 3, 5, 32\], needs \[2, 3, 5, 32\]: \[B, Hkv, T, D\] like q",
    ),
    (
        ops.attention,
        _attention_with(v=heads[:, :, 1:]),
        r"attention: v has shape \[2, 3, 4, 32\], needs \[2, 3, 5, 32\]: \[B, Hkv, T, D\] like k",
    ),
    (
        ops.attention,
        _attention_with(k=heads[:, :, :0], v=heads[:, :, :0]),
        r"attention: k has shape \[2, 3, 0, 32\], needs T >= 1",
    ),
    (ops.attention, _attention_with(scale=0.0), "attention: scale is 0.0, needs > 0"),
    (ops.attention, _attention_with(tile="8x8"), "attention: tile is '8x8', needs one of 192x96"),
    (ops.token_index, (x,), "token_index: valid is float32, needs bool"),
    (ops.token_index, (x[0] > 0,), r"token_index: valid has 1 dims, needs \[B, S\]"),
    (ops.token_index, (x[:0] > 0,), r"token_index: valid has shape \[0, 32\], needs B >= 1"),
    (ops.token_index, (x[:, :0] > 0, True), r"valid has shape \[4, 0\], needs K >= 1"),
    *(
        (ops.varlen_attention, _varlen_with(**changes), f"varlen_attention: {message}")
        for message, changes in NO_VARLEN.items()
    ),
    (
        ops.int8_linear,
        _linear_with(
            xq=torch.zeros(1, 140_000, dtype=I8),
            wq=torch.zeros(8, 140_000, dtype=I8),
            x_scale=torch.ones(1, 1),
            x_shift=torch.ones(1, 1),
        ),
        "K=140000 is over 133144, where int32 sums can overflow",
    ),
    *(
        (
            ops.int8_linear,
            _linear_with(**{name: _linear_with()[at].to("meta")}),
            f"{name} is on meta, xq is on cpu, need one device",
        )
        for name, at in (("x_shift", 2), ("w_sum", 5))
    ),
    (
        ops.int8_linear,
        _linear_with(bias=torch.ones(8, device="meta")),
        "bias is on meta, xq is on cpu, need one device",
    ),
    *(
        (op, _with(op, factor=x[0].to("meta")), "factor is on meta, x is on cpu, need one device")
        for op in QUANTIZERS
    ),
]
ON_META = 3 + len(QUANTIZERS)  # the last ones: a FakeTensorMode takes them for one device


@pytest.mark.parametrize(("op", "args", "message"), WRONG, ids=[w[2][:40] for w in WRONG])
def test_wrong_arguments_are_refused_with_what_was_seen(
    op: Op, args: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(UnsupportedInputError, match=message):
        op(*args)
    with pytest.raises(UnsupportedInputError, match=message):
        op.check(*args)


@pytest.mark.parametrize(
    ("op", "args", "message"), WRONG[:-ON_META], ids=[w[2][:40] for w in WRONG[:-ON_META]]
)
def test_tracing_refuses_what_running_refuses(op: Op, args: tuple[Any, ...], message: str) -> None:
    mode = FakeTensorMode()
    args = tuple(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args)
    with mode, pytest.raises(UnsupportedInputError, match=message):
        op.target(*args)


@pytest.mark.cuda
@pytest.mark.parametrize(("name", "at"), [("x_shift", 2), ("w_scale", 4), ("w_sum", 5)])
def test_a_cpu_tensor_among_cuda_ones_is_refused(name: str, at: int) -> None:
    args = [a.cuda() if isinstance(a, Tensor) else a for a in _linear_with()]
    args[at] = args[at].cpu()
    with pytest.raises(UnsupportedInputError, match=f"{name} is on cpu, xq is on cuda:0"):
        ops.int8_linear(*args)


@pytest.mark.cuda
@pytest.mark.parametrize("op", ALL, ids=lambda op: op.name)
def test_a_gpu_that_is_not_the_current_one_is_used(op: Op) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("NOT RUN: needs two GPUs")
    args = _arguments(op, torch.randn(7, 40, device="cuda:1"))
    results = op(*args)
    for r in results if isinstance(results, tuple) else (results,):
        assert r.device.index == 1
    want = op(*(a.to("cuda:0") if isinstance(a, Tensor) else a for a in args))
    first = (results if isinstance(results, tuple) else (results,))[0]
    assert torch.equal(first.cpu(), (want if isinstance(want, tuple) else (want,))[0].cpu())


def _python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    ).stdout


def test_importing_ops_does_not_import_triton() -> None:
    """None of it that `import torch` has not imported already, as CUDA builds of torch 2.11 do.

    graphquant/__init__.py does not run here: the backend needs Dynamo, and that imports triton.
    """
    said = _python(
        "import torch, sys, types, importlib.util\n"
        "def triton(): return {m for m in sys.modules if m.partition('.')[0] == 'triton'}\n"
        "found = importlib.util.find_spec('graphquant')\n"
        "package = sys.modules['graphquant'] = types.ModuleType('graphquant')\n"
        "package.__path__ = found.submodule_search_locations\n"
        "before = triton()\n"
        "import graphquant.ops\n"
        "assert len(graphquant.ops.OPS) > 5\n"
        "print(sorted(triton() - before))"
    )
    assert said == "[]\n"


def test_importing_graphquant_imports_no_kernel() -> None:
    said = _python(
        "import graphquant, sys\n"
        "print([m for m in sys.modules if m.startswith('graphquant.ops') and 'triton' in m])"
    )
    assert said == "[]\n"


def test_without_triton_the_error_names_it() -> None:
    said = _python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, graphquant.ops as o\n"
        "o.quantize(torch.ones(2, 16))\n"
        "try: o.load_kernels()\n"
        "except o.define.UnsupportedInputError as e: print(e)"
    )
    assert "need triton, which is not installed" in said


@given(sample=rows())
def test_row_stride_reads_the_rows_in_place(sample: Rows) -> None:
    x = sample.on("cpu")
    base, row = as_rows(x)
    M = x.numel() // x.shape[-1]
    seen = base.as_strided((M, x.shape[-1]), (row, 1), base.storage_offset())
    assert torch.equal(seen.nan_to_num(7.0), x.reshape(M, x.shape[-1]).nan_to_num(7.0))


def test_of_symbols_only_what_always_holds_counts() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = StatelessSymbolicContext([DimDynamic.DYNAMIC] * 2)
    s, t = mode.from_tensor(torch.empty(5, 7), symbolic_context=sizes).shape
    u, _ = mode.from_tensor(torch.empty(7, 7), symbolic_context=sizes).shape
    assert u.node.hint == t.node.hint and mode.shape_env is not None

    def of(shape: tuple[Any, ...], strides: tuple[Any, ...]) -> int | None:
        with mode:
            return row_stride(torch.empty_strided(shape, strides))

    assert of((s, t, 48), (t * 48, 48, 1)) == 48
    assert of((s, t, 48), (u * 48, 48, 1)) is None, "the same today, and no more"
    assert of((s, 48), (t * 48, 1)) == t * 48
    assert of((s, 1, 48), (64, 48, 1)) == 64
    assert of((s, 48), (48, t)) is None
    assert not mode.shape_env.guards


def test_slices_of_a_wider_result_are_read_without_a_copy() -> None:
    fused = torch.randn(2, 3, 96)
    part = fused[..., 32:64]
    base, row = as_rows(part)
    assert base.data_ptr() == part.data_ptr() and row == 96
    assert row_stride(fused.transpose(0, 1)) is None
    assert row_stride(fused[..., ::2]) is None


@pytest.mark.parametrize(("row", "unit"), [(1152, 16), (3420, 4), (7, 1), (0, 16), (24, 8)])
def test_unit_of_divides_the_row_stride(row: int, unit: int) -> None:
    assert unit_of(row) == unit and row % unit == 0


@pytest.mark.parametrize(
    "K", [1, 16, 17, 64, 100, 320, 321, 1000, 2048, 2049, 16_384, 16_385, 10**6]
)
def test_a_row_and_its_pads_fit_the_blocks_or_are_looped_over(K: int) -> None:
    config = row_config(K)
    assert config["ROWS"] * config["LANES"] == 32 * config["num_warps"]
    assert config["LANES"] <= config["BLOCK"]
    if K <= 16_384:
        assert vectors(K) <= sum(block_widths(K))
