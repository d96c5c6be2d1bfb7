"""Kernel launches, recorded at the first call and then replayed by a few lines of C (launch.c).

Triton's own launch takes 20 to 100 us of host time, more than the run time of many of our kernels.
So the first call of a kernel, for given shapes, goes through Python and is watched; if it was one
launch that read the caller's own tensors, all 16-byte aligned, it is repeated with new addresses
only. For AOTInductor's packages, launches are only recorded.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from graphquant._torch import current_raw_stream
from graphquant.errors import UnsupportedInputError
from graphquant.ops.runtime.build import extension

log = logging.getLogger(__name__)

ALIGNED = 16  # bytes: launch.c requires this alignment of every address
# CUtensorMapDataType and CUtensorMapSwizzle (by its bytes) in cuda.h
MAP_TYPES = {torch.uint8: 0, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
MAP_SWIZZLES = {64: 2, 128: 3}
Param = tuple[Any, ...]  # launch.c's parameters, with tensors in place of their positions

_watching = threading.local()


@functools.cache
def native() -> ModuleType:
    """launch.c as a module, built by the C compiler that Triton needs as well.

    Raises UnsupportedInputError without Triton, KernelBuildError without a compiler, OSError
    without a driver.
    """
    with needs_triton():
        import triton

    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).with_suffix(".c")
    return extension([source], "graphquant_launch", "graphquant's CUDA kernels", include=[headers])


@contextlib.contextmanager
def needs_triton() -> Iterator[None]:
    """Context for imports of Triton. Raises UnsupportedInputError if it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise UnsupportedInputError(
            "graphquant's CUDA kernels need triton, which is not installed (torch's Linux CUDA "
            "wheels bring it). On the CPU the ops run without it."
        ) from error


def stream_of(device: torch.device) -> int:
    """The handle of the device's current stream."""
    return current_raw_stream(device.index)


@dataclass
class _Watch:
    """Records the launches of a kernel's first run."""

    tensors: Sequence[Tensor | None]
    launches: int = 0
    made: Any = None  # a Launch

    def take(self, make: Callable[[Sequence[Tensor | None]], Any]) -> None:
        self.launches += 1
        self.made = make(self.tensors)


def prepare(run: Callable[[], None], tensors: Sequence[Tensor | None]) -> Any:
    """Run a kernel. Returns a Launch that repeats it on other tensors of these shapes, or None."""
    before = getattr(_watching, "now", None)
    watch = _watching.now = _Watch(tensors)
    try:
        run()
    finally:
        _watching.now = before
    return watch.made if watch.launches == 1 else None


def launch(
    function: int,
    grid: int,
    block: int,
    shared: int,
    params: Sequence[Param],
    keep: object = None,
    *,
    cluster: int = 1,
    pdl: bool = False,
) -> None:
    """Launch a loaded function. Raises ValueError if an address is not a multiple of 16."""

    def make(tensors: Sequence[Tensor | None]) -> Any:
        placed = _placed(params, tensors)
        if placed is None:
            return None
        dims = (grid, 1, 1)
        return native().Launch(function, dims, block, shared, cluster, pdl, placed, keep)

    mine = list({id(v): v for p in params for v in p if isinstance(v, Tensor)}.values())
    if not make(mine)(stream_of(mine[0].device), *mine):
        raise ValueError(f"an address is not a multiple of {ALIGNED} bytes")
    _tell(make)


@dataclass(frozen=True)
class Blocks:
    """A TMA argument of a Triton kernel: a matrix [rows, columns], read or written in blocks.
    `rows` may be symbolic. `optional`: the kernel also takes None."""

    base: Tensor  # its first element is the matrix's
    shape: tuple[int, int]
    row: int  # elements from row to row
    block: tuple[int, int]
    optional: bool = False

    def descriptor(self) -> Any:
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(self.base, list(self.shape), [self.row, 1], list(self.block))


@dataclass(frozen=True)
class TritonCall:
    """A launch of a Triton kernel, before it is compiled."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]  # the kernel's first arguments
    meta: dict[str, Any]  # the rest, and how it is compiled

    def launch(self) -> Any:
        """Launch. Returns the compiled kernel; None in Triton's interpreter."""
        args = (a.descriptor() if isinstance(a, Blocks) else a for a in self.args)
        return self.kernel[self.grid](*args, **self.meta)


def recorded(run: Callable[[], None]) -> list[TritonCall]:
    """The calls of `launch_triton` in `run`: nothing is launched, and tensors may be fake."""
    calls: list[TritonCall] = []
    _watching.calls = calls
    try:
        run()
    finally:
        _watching.calls = None
    return calls


def launch_triton(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """`kernel[grid](*args, **meta)`, seen by `prepare` and `recorded`."""
    call = TritonCall(kernel, grid, args, meta)
    calls: list[TritonCall] | None = getattr(_watching, "calls", None)
    if calls is not None:
        calls.append(call)
        return
    compiled = call.launch()
    if getattr(_watching, "now", None) is None or not hasattr(compiled, "metadata"):
        return  # the interpreter returns nothing

    def make(tensors: Sequence[Tensor | None]) -> Any:
        about = compiled.metadata
        types = list(compiled.src.signature.values())
        special = about.global_scratch_size or about.profile_scratch_size or about.num_ctas != 1
        params = [(t, a) for t, a in zip(types, args, strict=False) if t != "constexpr"]
        if special or any(t not in _KINDS and not t.startswith("*") for t, _ in params):
            return None
        placed = _placed(
            [("pointer", a) if t.startswith("*") else (_KINDS[t], a) for t, a in params], tensors
        )
        if placed is None or any(isinstance(a, Tensor) and a.data_ptr() % ALIGNED for a in args):
            return None
        dims = (*grid, 1, 1)[:3]
        scratch = (("null",), ("null",))
        return native().Launch(
            compiled.function, dims, 32 * about.num_warps, about.shared, 1, about.launch_pdl,
            placed + scratch, compiled,
        )  # fmt: skip

    _tell(make)


_KINDS = {"i32": "i32", "i64": "i64", "fp32": "f32"}


def _placed(
    params: Sequence[Param], tensors: Sequence[Tensor | None]
) -> tuple[tuple[Any, ...], ...] | None:
    """Params with positions in place of tensors; None if one is not among `tensors` (a copy), or
    twice (the next call may pass two tensors)."""
    ids = [id(t) for t in tensors]
    at = {i: ids.index(i) for i in ids}
    if any(isinstance(v, Tensor) and ids.count(id(v)) != 1 for p in params for v in p):
        return None
    return tuple(tuple(at[id(v)] if isinstance(v, Tensor) else v for v in p) for p in params)


def _tell(make: Callable[[Sequence[Tensor | None]], Any]) -> None:
    watch = getattr(_watching, "now", None)
    if watch is not None:
        watch.take(make)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Context whose launches `prepare` does not see, such as measurements."""
    before = getattr(_watching, "now", None)
    _watching.now = None
    try:
        yield
    finally:
        _watching.now = before
