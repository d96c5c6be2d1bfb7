"""Definition of ops: schema, checks, fake, float form and reference; kernels are registered later.

An op is one folder: `op.py` defines it (torch only), and each kernel has a file of its own. The
reference is the specification. A kernel takes the op's arguments and `out`, the tensors to fill,
says why it refuses inputs, and is covered by the op's tests once it is registered.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from graphquant._torch import OpOverload
from graphquant.errors import KernelBuildError, UnsupportedInputError
from graphquant.ops.checks import FLOATS
from graphquant.ops.numerics import row_stride
from graphquant.ops.qparams import QParams
from graphquant.ops.runtime.chips import too_old
from graphquant.ops.runtime.launch import native, needs_triton, prepare, stream_of

# Library.define + impl costs 3 us a call; torch.library.custom_op 15 to 24.
LIB = torch.library.Library("graphquant", "DEF")
OPS: dict[str, Op] = {}


_recording = threading.local()

DTYPE = "dtype"
MAX_SITES = 4096  # of one op: one for each combination of shapes, dtypes and constants
MAX_SIZES = 64  # of one call in a compiled graph: 5 KB each


@dataclass(frozen=True)
class Kernel:
    """An implementation of an op, and the condition under which it can be called."""

    name: str
    fn: Callable[..., Any]  # op's arguments -> results
    refuses: Callable[..., str | None]  # op's arguments -> None, or why not
    fill: Callable[..., None] | None = None  # op's arguments, out=(results to fill, ...)


@dataclass(frozen=True)
class CpuKernel:
    """A CPU implementation of an op: a function of the module in ops/cpu.

    function   its name there
    arguments  (op's arguments, out=(results to fill, ...)) -> the function's arguments: numbers,
               and tensors, of which it reads addresses. They may be symbolic and fake.
    refuses    op's arguments -> None, or why it cannot be called
    rows       arguments that it reads in place if they are [M, K] in memory
               (numerics.row_stride). Copies are made of others, and of what is not contiguous.
    strided    arguments that it reads in place whatever their strides are
    """

    function: str
    arguments: Callable[..., Sequence[Any]]
    refuses: Callable[..., str | None]
    rows: tuple[str, ...]
    strided: tuple[str, ...] = ()

    def fits(self, name: str, x: Tensor) -> bool:
        """Is the argument of this name read in place?"""
        if name in self.rows:
            return row_stride(x) is not None
        return name in self.strided or x.is_contiguous()


@dataclass(frozen=True)
class Op:
    """A graphquant op: `graphquant::name`. Callable with the schema's arguments, in order."""

    name: str
    reference: Callable[..., Any]
    float_form: Callable[..., Any]  # see `define`
    check: Callable[..., None]
    fake: Callable[..., Any]  # results, uninitialized
    files: tuple[str, ...]  # CUDA kernel modules beside op.py, preferred first
    has_cpu_kernel: bool  # in cpu.py and cpu.cpp beside op.py
    in_rows: bool = True  # what kernels read in place: see `define`
    sized: Callable[..., Any] | None = None  # see `define`
    kernels: list[Kernel] = field(default_factory=list)  # in order of preference
    cpu_kernels: list[CpuKernel] = field(default_factory=list)  # at most one
    torch_kernels: list[Kernel] = field(default_factory=list)  # for where that one refuses
    _sites: dict[Any, Any] = field(default_factory=dict, repr=False)

    def empty(self, *args: Any) -> Any:
        """Results, uninitialized, for these arguments, which are not fake."""
        return (self.sized or self.fake)(*args)

    @cached_property
    def target(self) -> OpOverload:
        """What a graph node calls."""
        overload: OpOverload = getattr(torch.ops.graphquant, self.name).default
        return overload

    @cached_property
    def tensors(self) -> tuple[bool, ...]:
        """Which of the schema's arguments are tensors, optional ones as well."""
        return tuple("Tensor" in str(a.type) for a in self.target._schema.arguments)

    @cached_property
    def quantizes(self) -> bool:
        """Does it quantize an activation? Then its last arguments are QParams."""
        names = tuple(a.name for a in self.target._schema.arguments)
        return names[-len(QParams._fields) :] == QParams._fields

    @cached_property
    def keeps(self) -> bool:
        """Is its first result the float value that it quantizes, rounded to `dtype`?"""
        return self.quantizes and self.target._schema.returns[0].name == "y"

    @cached_property
    def _defaults(self) -> tuple[Any, ...]:
        return tuple(a.default_value for a in self.target._schema.arguments)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.target(*args, **named)

    def typed(self, args: Sequence[Any]) -> tuple[OpOverload, tuple[Any, ...]]:
        """The same call by the overload of its dtype, without the dtype argument."""
        names = [a.name for a in self.target._schema.arguments]
        if DTYPE not in names:
            return self.target, tuple(args)
        i = names.index(DTYPE)
        overload = getattr(getattr(torch.ops.graphquant, self.name), _overload(args[i]))
        return overload, (*args[:i], *args[i + 1 :])

    def named(self, args: Sequence[Any]) -> dict[str, Any]:
        """All of the schema's arguments by name."""
        names = (a.name for a in self.target._schema.arguments)
        return dict(zip(names, self.full(args), strict=True))

    def full(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """All of the schema's arguments: torch leaves out the last ones if they are defaults."""
        return (*args, *self._defaults[len(args) :])

    def parted(self, args: Sequence[Any]) -> tuple[tuple[Any, ...], QParams]:
        """Split the arguments of an op that quantizes: (float_form's arguments, QParams)."""
        args, n = self.full(args), len(QParams._fields)
        return args[:-n], QParams(*args[-n:])

    def quantizing(self, args: Sequence[Any], qparams: QParams) -> tuple[Any, ...]:
        """The arguments of a call with these QParams after `args`, of which trailing defaults may
        be missing. Trailing defaults of the result are dropped, as torch does."""
        made = [*self.parted(args)[0], *qparams]
        arguments = self.target._schema.arguments
        while arguments[len(made) - 1].has_default_value() and made[-1] is None:
            made.pop()
        return tuple(made)

    def split(self, args: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """(tensors, None for missing ones; constants) of the schema's arguments, each in order."""
        args = self.full(args)
        constant = [not is_tensor for is_tensor in self.tensors]
        return list(compress(args, self.tensors)), list(compress(args, constant))

    def join(self, tensors: Iterable[Any], constants: Iterable[Any]) -> list[Any]:
        """Inverse of `split`: all arguments in the order of the schema."""
        given, rest = iter(tensors), iter(constants)
        return [next(given if is_tensor else rest) for is_tensor in self.tensors]

    def kernel(
        self, name: str, *, refuses: Callable[..., str | None] = lambda *_: None
    ) -> Callable[[Callable[..., None]], Callable[..., Any]]:
        """Decorator: add a CUDA kernel after those already there.

        The function takes the op's arguments and `out`, the tuple of its results, and fills them.
        """

        def add(fill: Callable[..., None]) -> Callable[..., Any]:
            self._require_signature(name, fill)

            def fn(*args: Any) -> Any:
                results = self.empty(*args)
                fill(*args, out=_as_tuple(results))
                return results

            self.kernels.append(Kernel(name, fn, refuses, fill))
            return fn

        return add

    def cpu_kernel(
        self,
        function: str,
        *,
        refuses: Callable[..., str | None],
        rows: tuple[str, ...],
        strided: tuple[str, ...] = (),
    ) -> Callable[[Callable[..., Sequence[Any]]], Callable[..., Sequence[Any]]]:
        """Decorator of a CpuKernel's `arguments`."""

        def add(arguments: Callable[..., Sequence[Any]]) -> Callable[..., Sequence[Any]]:
            self._require_signature(function, arguments)
            self.cpu_kernels.append(CpuKernel(function, arguments, refuses, rows, strided))
            return arguments

        return add

    def torch_kernel(
        self, name: str, *, refuses: Callable[..., str | None]
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: add an implementation for the CPU in torch's ops, faster than the reference.

        It is called where the CPU kernel refuses. It takes the op's arguments.
        """

        def add(fn: Callable[..., Any]) -> Callable[..., Any]:
            self.torch_kernels.append(Kernel(name, fn, refuses))
            return fn

        return add

    def on_cpu(self, *args: Any) -> CpuKernel | None:
        """The CPU kernel for these arguments; None: `in_torch` computes them."""
        load_cpu_kernels()
        return next((k for k in self.cpu_kernels if k.refuses(*args) is None), None)

    def cpu_refusal(self, *args: Any) -> str | None:
        """Why the CPU kernel does not compute these arguments, or None."""
        load_cpu_kernels()
        return next((why for k in self.cpu_kernels if (why := k.refuses(*args))), None)

    def in_torch(self, *args: Any) -> Callable[..., Any]:
        """What computes these arguments on the CPU where no CPU kernel does."""
        load_cpu_kernels()
        return next((k.fn for k in self.torch_kernels if not k.refuses(*args)), self.reference)

    def _require_signature(self, name: str, kernel: Callable[..., Any]) -> None:
        want, got = [*_parameters(self.reference), "out"], _parameters(kernel)
        if want != got:
            raise TypeError(
                f"{self.name}: kernel {name} takes {got}, the reference and `out` are {want}"
            )

    def choose(self, *args: Any) -> Kernel:
        """The first kernel that takes these arguments, or an error with every kernel's reason."""
        reasons = []
        for kernel in self.kernels:
            if (why := kernel.refuses(*args)) is None:
                return kernel
            reasons.append(f"\n  {kernel.name}: {why}")
        raise UnsupportedInputError(
            f"no CUDA kernel of {self.name} takes these inputs:{''.join(reasons)}"
        )

    def site(self, *constants: Any) -> Any:
        """Call site of the op for CUDA tensors of one shape: `site(stream, *tensors)`.

        constants  the arguments that are no tensors, in order
        tensors    those that are, in order, None where one is not given, then the results to fill
        """
        n_inputs = sum(self.tensors)

        def first(*tensors: Tensor | None) -> Any:
            args = self.join(tensors[:n_inputs], constants)
            load_kernels()
            self.check(*args)
            fill = self.choose(*args).fill
            assert fill is not None
            return prepare(lambda: fill(*args, out=tensors[n_inputs:]), tensors)

        return native().Site(first)

    def shared_site(self, constants: Sequence[Any], tensors: Sequence[Tensor | None]) -> Any:
        """The site of all calls with these constants and with tensors, results too, like these."""
        like = (t if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors)
        key = (*constants, *like)
        site = self._sites.get(key)
        if site is None:
            self.check(*self.join(tensors[: sum(self.tensors)], constants))
            if len(self._sites) >= MAX_SITES:
                self._sites.clear()
            site = self._sites[key] = self.site(*constants)
        return site

    def _by_reference(self, *args: Any) -> Any:
        self.check(*args)
        return self.reference(*args)

    def _on_cpu(self, *args: Any) -> Any:
        args = self.full(args)
        self.check(*args)
        kernel = self.on_cpu(*args)
        calls: list[Callable[[], object]] | None = getattr(_recording, "calls", None)
        if kernel is None:
            run = functools.partial(self.in_torch(*args), *args)
            if calls is not None:
                calls.append(run)
            return run()
        names = (a.name for a in self.target._schema.arguments)
        given = [
            a.contiguous() if isinstance(a, Tensor) and not kernel.fits(name, a) else a
            for name, a in zip(names, args, strict=True)
        ]
        results = self.fake(*args)
        arguments = kernel.arguments(*given, out=_as_tuple(results))
        call = functools.partial(cpu_function(kernel.function), *arguments)
        call()
        if calls is not None:
            calls.append(call)
        return results

    def _on_cuda(self, *args: Any) -> Any:
        args = self.full(args)
        device: torch.device = args[0].device
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # kernels launch on the current device, not on x's
                return self._on_cuda(*args)
        results = self.empty(*args)
        given, constants = self.split(args)
        tensors = (*given, *_as_tuple(results))
        self.shared_site(constants, tensors)(stream_of(device), *tensors)
        return results


def define(
    schema: str,
    *,
    float_form: Callable[..., Any],
    fake: Callable[..., Any],
    check: Callable[..., None],
    kernels: tuple[str, ...] = ("triton",),
    cpu: bool = True,
    in_rows: bool = True,
    sized: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Op]:
    """Decorator on the reference. `schema` is written by hand: it is the op's public contract.

    float_form: what the op computes in float, in the dtype of its inputs, written in operators that
    exporters and compilers know; for an op that quantizes, the value that it quantizes. It takes
    the op's arguments without QParams. The TensorRT export is derived from it, and tests and the
    benchmark compare the op with it in float64.

    kernels, cpu: the modules of CUDA kernels beside op.py, and whether there is a cpu.py.

    in_rows: CUDA kernels read tensors in place that are [M, K] in memory (numerics.row_stride); if
    False, any whose last stride is 1. Others are copied.

    sized: results, uninitialized, if their sizes depend on the values of arguments; the fake has
    symbols for those sizes.

    `check(*args)` raises UnsupportedInputError for invalid arguments. It runs before the fake, the
    reference and the kernels alike, so tracing raises what running would raise.
    No layout tag is set: torch's default, needs_exact_strides, keeps padded int8 rows as they are.
    """

    def make(reference: Callable[..., Any]) -> Op:
        op = Op(
            reference.__name__, reference, float_form, check, fake, kernels, cpu, in_rows, sized
        )
        LIB.define(op.name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        declared = [a.name for a in op.target._schema.arguments]
        if declared != _parameters(reference):
            raise TypeError(f"{op.name}: schema {declared}, reference {_parameters(reference)}")

        def checked_fake(*args: Any) -> Any:
            check(*args)
            return fake(*args)

        if DTYPE in declared:
            _define_typed(op, schema, declared.index(DTYPE))
        LIB.impl(op.name, op._on_cpu if cpu else op._by_reference, "CPU")
        LIB.impl(op.name, op._on_cuda if kernels else op._by_reference, "CUDA")
        torch.library.register_fake(f"graphquant::{op.name}", checked_fake, lib=LIB)
        OPS[op.name] = op
        return op

    return make


def _define_typed(op: Op, schema: str, at: int) -> None:
    """An overload for each value of the dtype argument, number `at`: `int8_linear.float32`.

    AOTInductor of torch 2.11 passes a wrong dtype argument to Python ops.
    """
    for dtype in FLOATS:

        def call(*args: Any, dtype: torch.dtype = dtype) -> Any:
            return op.target(*args[:at], dtype, *args[at:])

        name = f"{op.name}.{_overload(dtype)}"
        LIB.define(
            name + schema.replace(f", ScalarType {DTYPE}", ""), tags=(torch.Tag.pt2_compliant_tag,)
        )
        LIB.impl(name, call, "CompositeImplicitAutograd")


def _overload(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def site(name: str, *constants: Any) -> Any:
    """OPS[name].site(*constants), as called by code in Inductor's disk cache."""
    return OPS[name].site(*constants)


def sized_site(name: str) -> Callable[..., None]:
    """Call site for tensors of varying sizes, as called by code in Inductor's disk cache:
    `call(stream, sizes, constants, *tensors)`. The shapes and strides follow from `sizes`."""
    op = OPS[name]
    own: dict[tuple[int, ...], Any] = {}

    def call(
        stream: int, sizes: tuple[int, ...], constants: tuple[Any, ...], *tensors: Any
    ) -> None:
        if (site := own.get(sizes)) is not None:
            site(stream, *tensors)
            return
        shared = op.shared_site(constants, tensors)
        shared(stream, *tensors)
        if len(own) >= MAX_SIZES:
            own.clear()
        own[sizes] = shared.copy()  # keeps descriptors of its own tensors

    return call


@functools.cache
def load_kernels() -> None:
    """Import every op's kernels. Needs triton; called the first time an op runs on CUDA."""
    with needs_triton():
        for op in OPS.values():
            folder = op.reference.__module__.rpartition(".")[0]
            for file in op.files:
                importlib.import_module(f"{folder}.{file}")


@functools.cache
def load_cpu_kernels() -> None:
    """Import every op's CPU kernel: what calls it, not the module in C++ (ops/cpu)."""
    for op in OPS.values():
        if op.has_cpu_kernel:
            importlib.import_module(f"{op.reference.__module__.rpartition('.')[0]}.cpu")


def recorded(
    run: Callable[..., object], args: Sequence[Any]
) -> tuple[object, list[Callable[[], object]]]:
    """run(*args), and the calls of our ops on the CPU in it, to be repeated on the same tensors."""
    calls: list[Callable[[], object]] = []
    _recording.calls = calls
    try:
        return run(*args), calls
    finally:
        _recording.calls = None


@functools.cache
def cpu_function(name: str) -> Callable[..., None]:
    """A function of the module in ops/cpu, as called by code in Inductor's disk cache."""
    from graphquant.ops import cpu  # imports the ops' helpers

    found: Callable[..., None] = getattr(cpu.library().module, name)
    return found


@functools.cache
def missing() -> str | None:
    """Why none of our kernels can run on this machine's GPUs, or None. (None without a GPU.)"""
    if not torch.cuda.is_available():
        return None
    try:
        load_kernels()
        native()
    except (KernelBuildError, OSError, UnsupportedInputError) as error:
        return str(error)
    return None


def no_kernels(device: torch.device) -> str | None:
    """Why none of our kernels can run on this GPU, or None. On a CPU there is the reference."""
    if device.type != "cuda":
        return None
    return missing() or too_old(device)


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _parameters(fn: Callable[..., Any]) -> list[str]:
    """Names of a function's parameters; `*qparams` stands for all of QParams."""
    return [
        name
        for p in inspect.signature(fn).parameters.values()
        for name in (QParams._fields if p.kind is p.VAR_POSITIONAL else (p.name,))
    ]
