"""Inductor lowerings of the ops: a call of one of our kernels fills buffers of Inductor.

By default Inductor calls a custom op through torch's dispatcher and lets it allocate: 20 us of host
time around a 5 us kernel. Here every call on CUDA gets its own Site (ops/runtime/launch.py): after
the first call, a few lines of C read the addresses and launch. A call on the CPU is one of a
function in C++ (ops/cpu), with its sizes as arguments, which may be symbolic. Results are
Inductor's buffers, so its memory planning covers them. C++ wrappers use the default fallback,
AOTInductor's packages use aoti.py.

An activation's int8 rows overwrite the floats that they come from, if those are large and nothing
else reads them: otherwise the widest value of an MLP would be in memory twice, in float and in
int8, which is more than the float model ever holds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from graphquant._torch.inductor import (
    OrderedSet,
    V,
    add_layout_constraint,
    fallback_handler,
    ir,
    lowerings,
    register_decomposition,
    register_lowering,
)
from graphquant.ir.graph import arguments, operand
from graphquant.lowering import aoti
from graphquant.lowering.aoti import boxes_of, expr
from graphquant.lowering.shared_masks import MATERIALIZE
from graphquant.lowering.version import version
from graphquant.ops import attention, int8_linear, quantize
from graphquant.ops.define import OPS, Op, load_cpu_kernels
from graphquant.ops.numerics import OVERLAID, padded, row_stride

aten = torch.ops.aten
LARGE = 2**26  # bytes: above this, saving memory outweighs about 5 us of launch overhead


@functools.cache
def register() -> None:
    """Register the lowerings with Inductor, once per process. Importing this module does it."""
    load_cpu_kernels()  # they say which arguments they read in place
    for op in OPS.values():
        if op.files or op.has_cpu_kernel:
            add_layout_constraint(op.target, functools.partial(_constrain, op))
            register_lowering(op.target, type_promotion_kind=None)(functools.partial(_lower, op))
    register_decomposition([attention.target])(aoti.decompose_attention)
    register_lowering(MATERIALIZE, type_promotion_kind=None)(_materialize)


def _constrain(op: Op, node: Node, *args: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Layout constraint: the traced strides where a kernel reads in place, else contiguous."""

    def one(value: Any, traced: Any) -> Any:
        if not isinstance(value, ir.IRNode):
            return value
        fake = traced.meta["val"]
        if isinstance(getattr(value, "data", None), _Overlay):
            return value
        value.realize()  # else each op that reads it would get a copy of its own
        if not _in_place(op, operand(traced, node), fake):
            return ir.ExternKernel.require_contiguous(value)
        return ir.ExternKernel.require_exact_strides(value, fake.stride())

    return tuple(map(one, args, node.args)), {}


def _lower(op: Op, *args: Any) -> Any:
    results = V.graph.current_node.meta["val"]
    fakes = results if isinstance(results, tuple) else (results,)
    if V.graph.current_node.meta.get("unbacked_bindings"):  # it says how large its results are
        return fallback_handler(op.target, add_to_fallback_set=False)(*args)
    if V.graph.aot_mode:
        if fakes[0].device.type == "cuda":
            given = _as_read(op)
            made = aoti.lower(op, given, op.full(args), fakes)
            if made is not None:
                return tuple(made) if isinstance(results, tuple) else made[0]
        overload, args = op.typed(args)
        return fallback_handler(overload, add_to_fallback_set=False)(*args)
    if not (V.graph.cpp_wrapper or _has_sites(fakes[0].device)):
        made = _call_on_cpu(op, op.full(args), fakes)
        if made is not None:
            return tuple(made) if isinstance(results, tuple) else made[0]
    if V.graph.cpp_wrapper or not _has_sites(fakes[0].device):
        return fallback_handler(op.target, add_to_fallback_set=False)(*args)
    over = _overlay(op, args[0], fakes[0])
    buffers = [_empty(f) for f in fakes] if over is None else [over, *map(_empty, fakes[1:])]
    given, constants = op.split(args)
    symbols = _symbols((*_as_read(op), *fakes))
    if symbols or any(isinstance(c, sympy.Expr) for c in constants):
        _SizedCudaCall(op.name, symbols, [*constants, *given, *buffers], buffers)
    else:
        _CudaCall(op.name, [*constants, *given, *buffers], buffers)
    return tuple(buffers) if isinstance(results, tuple) else buffers[0]


def _materialize(x: Any) -> Any:
    x.realize()
    return x


def _has_sites(device: torch.device) -> bool:
    return device.type == "cuda"


def _as_read(op: Op) -> list[Any]:
    """The current node's arguments, with fake tensors in the layout that `_constrain` requires."""
    node = V.graph.current_node

    def one(argument: Any) -> Any:
        if not isinstance(argument, Node):
            return argument
        value = argument.meta["val"]
        if not isinstance(value, Tensor) or _in_place(op, operand(argument, node), value):
            return value
        return aten.clone.default(value, memory_format=torch.contiguous_format)

    return [one(a) for a in op.full(node.args)]


def _in_place(op: Op, name: str, fake: Tensor) -> bool:
    """Is the argument of this name read without a copy? On CUDA not if the row stride is symbolic:
    the kernels of a package are compiled for the stride's divisibility."""
    if op.cpu_kernels and not _has_sites(fake.device):
        return any(kernel.fits(name, fake) for kernel in op.cpu_kernels)
    return isinstance(row_stride(fake), int) if op.in_rows else fake.stride(-1) == 1


def _call_on_cpu(op: Op, args: Sequence[Any], fakes: Sequence[Tensor]) -> list[Any] | None:
    """Results of the op's CPU kernel; None if it has none for these arguments."""
    traced = _as_read(op)
    kernel = op.on_cpu(*traced)
    if kernel is None:
        return None
    buffers = [_empty(f) for f in fakes]
    boxes = boxes_of((*traced, *fakes), (*args, *buffers))
    given = [
        boxes[id(a)] if isinstance(a, Tensor) else expr(a)
        for a in kernel.arguments(*traced, out=tuple(fakes))
    ]
    _CpuCall(kernel.function, given, buffers)
    return buffers


def _is_tensor(argument: Any) -> bool:
    return isinstance(argument, ir.IRNode)


def _code(wrapper: Any, constant: Any) -> str:
    """A constant, or an expression of symbolic sizes, in Python."""
    if isinstance(constant, sympy.Expr):
        code: str = wrapper.codegen_python_sizevar(constant)
        return code
    return repr(constant)


def _symbols(values: Sequence[Any]) -> list[sympy.Symbol]:
    """The symbols in the shapes and strides of the tensors among these, and in sizes, in order."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    sizes = [n for t in tensors for n in (*t.shape, *t.stride())]
    sizes += [v for v in values if isinstance(v, torch.SymInt)]
    return sorted({s for n in sizes for s in sympy.sympify(expr(n)).free_symbols}, key=str)


def _empty(fake: Tensor) -> Any:
    """An Inductor buffer with the layout of `fake`, including the pads of int8 rows."""
    size, strides = ([expr(n) for n in of] for of in (fake.shape, fake.stride()))
    K = size[-1]
    if fake.dtype == torch.int8:
        size[-1] = expr(padded(fake.shape[-1]))
        strides = ir.FlexibleLayout.contiguous_strides(size)
    made = lowerings[aten.empty_strided.default](
        size, strides, dtype=fake.dtype, device=fake.device
    )
    return made if size[-1] == K else lowerings[aten.slice.Tensor](made, -1, 0, K)


def _is_large(x: Tensor) -> bool:
    """Of LARGE bytes or more. Not if its size is symbolic."""
    return isinstance(x.numel(), int) and x.numel() * x.itemsize >= LARGE


class _Overlay(ir.ReinterpretView):
    """A view of a buffer's rows as int8 rows (numerics.overlay)."""

    def codegen_reference(self, writer: Any = None) -> str:
        return f"graphquant_overlay({self.get_name()})"


def _overlay(op: Op, x: Any, fake: Tensor) -> Any | None:
    """A view of x's memory for xq, or None if xq needs its own buffer."""
    if op is not quantize:
        return None
    call = arguments(V.graph.current_node)
    source = call.x
    if call.act is None or call.up is not None:
        return None
    if not isinstance(source, Node) or len(source.users) > 1:
        return None
    if call.low is not None:
        return None  # static range: a program may write before it has read its whole row
    floats, storage = source.meta["val"], x.data
    if source.target is not int8_linear.target or not isinstance(storage, ir.StorageBox):
        return None  # may be the caller's memory
    if floats.itemsize != 2 or floats.shape[-1] not in OVERLAID or not _is_large(floats):
        return None
    storage.realize()
    strides = [2 * n for n in floats.stride()[:-1]]
    layout = ir.FixedLayout(fake.device, fake.dtype, list(fake.shape), [*strides, 1])
    return ir.TensorBox(_Overlay(data=storage, layout=layout))


class _Call(ir.ExternKernel):
    """One op call as an Inductor kernel that mutates its result buffers.

    arguments  in order: Inductor's tensors, and constants, which may be symbolic
    """

    def __init__(self, name: str, arguments: Sequence[Any], results: Sequence[Any]) -> None:
        tensors = [a for a in arguments if _is_tensor(a)]
        constants = tuple(a for a in arguments if not _is_tensor(a))
        inputs = [self._input(t) for t in tensors]
        self.device: Any = inputs[0].get_device()
        super().__init__(None, ir.NoneLayout(device=self.device), inputs, constants)
        self.name_of_op = name
        self.is_input = [_is_tensor(a) for a in arguments]
        self.mutation_outputs = [
            ir.MutationOutput(ir.NoneLayout(device=self.device), r, self) for r in results
        ]
        V.graph.register_operation(self)

    def _input(self, value: Any) -> Any:
        if isinstance(value.data, _Overlay):
            return value.data
        return self.unwrap_storage_for_input(self.realize_input(value))

    def arguments(self, wrapper: Any) -> list[str]:
        """The arguments as code."""
        inputs: Iterator[Any] = iter(self.inputs)
        constants = iter(self.constant_args)
        return [
            next(inputs).codegen_reference() if is_ else _code(wrapper, next(constants))
            for is_ in self.is_input
        ]

    def get_outputs(self) -> list[Any]:
        return list(self.mutation_outputs)

    def get_device(self) -> Any:
        return self.device

    def get_unbacked_symbol_defs(self) -> Any:
        return OrderedSet()


class _CpuCall(_Call):
    """A call of a function in C++."""

    def codegen(self, wrapper: Any) -> None:
        wrapper.add_import_once(
            "from graphquant.ops.define import cpu_function as graphquant_cpu_function"
        )
        name = f"graphquant_{self.name_of_op}"
        wrapper.add_import_once(f"{name} = graphquant_cpu_function({self.name_of_op!r})")
        wrapper.writeline(f"{name}({', '.join(self.arguments(wrapper))})")


class _CudaCall(_Call):
    """A call of a Site; the constants are the Site's."""

    def codegen(self, wrapper: Any) -> None:
        wrapper.add_import_once("from graphquant.ops.define import site as graphquant_site")
        constants, tensors = self.split(wrapper)
        made = f"graphquant_site({', '.join((repr(self.name_of_op), *constants))})"
        self.write(wrapper, made, tensors)

    def split(self, wrapper: Any) -> tuple[list[str], list[str]]:
        """Code of the arguments that are no tensors, and of those that are or are left out."""
        given, n = self.arguments(wrapper), len(self.mutation_outputs)
        n += sum(OPS[self.name_of_op].tensors)
        return given[:-n], given[-n:]

    def write(self, wrapper: Any, made: str, arguments: Sequence[str]) -> None:
        """Write the call site's construction, `made`, and its call."""
        buffer = self.mutation_outputs[0].get_mutation_names()[0]  # no other call fills it
        name = f"graphquant_{self.name_of_op}_{buffer}"
        if any(isinstance(i, _Overlay) for i in self.inputs):
            wrapper.add_import_once(
                "from graphquant.ops.numerics import overlay as graphquant_overlay"
            )
        wrapper.header.writeline(f"{name} = {made}")
        stream = wrapper.write_get_raw_stream(self.device.index, V.graph.name)
        wrapper.writeline(f"{name}({', '.join((stream, *arguments))})")


class _SizedCudaCall(_CudaCall):
    """A call for tensors of symbolic sizes (define.sized_site)."""

    def __init__(
        self,
        name: str,
        symbols: Sequence[sympy.Symbol],
        arguments: Sequence[Any],
        results: Sequence[Any],
    ) -> None:
        super().__init__(name, [*symbols, *arguments], results)
        self.n_symbols = len(symbols)

    def codegen(self, wrapper: Any) -> None:
        wrapper.add_import_once("from graphquant.ops.define import sized_site as graphquant_sized")
        constants, tensors = self.split(wrapper)
        n = self.n_symbols
        parts = (f"({''.join(f'{c}, ' for c in part)})" for part in (constants[:n], constants[n:]))
        self.write(wrapper, f"graphquant_sized({self.name_of_op!r})", (*parts, *tensors))


register()
# also for programs that are compiled without our backend
torch.compiler.config.cache_key_tag += version()
