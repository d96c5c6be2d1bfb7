"""The CPU kernels: a C++ extension module with one function for each op, built at first use.

Each op's cpu.cpp has its kernel, the files here have what they share: headers, and attention.cpp.
The module is compiled for one instruction set, the best that the processor has or the one that
GRAPHQUANT_CPU_ISA names, and is tried on products of extreme values before it is used.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from graphquant.errors import KernelBuildError, OptionError, UnsupportedInputError
from graphquant.ops.numerics import row_stride
from graphquant.ops.qparams import QParams
from graphquant.ops.runtime.build import extension
from graphquant.utils.progress import phase

log = logging.getLogger(__name__)

OPS = Path(__file__).parents[1]
ISA_VARIABLE = "GRAPHQUANT_CPU_ISA"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # `Type` in rows.h
NO_DOT = "this processor has no int8 dot product"


@dataclass(frozen=True)
class InstructionSet:
    """Instructions that the kernels can be compiled for.

    needs     in torch.cpu.get_capabilities()
    options   of gcc and clang
    has_dot   does it multiply bytes and add the products in one instruction?
    """

    name: str
    needs: tuple[str, ...]
    options: tuple[str, ...]
    has_dot: bool = True

    @property
    def missing(self) -> tuple[str, ...]:
        """What this processor lacks of it."""
        has = torch.cpu.get_capabilities()
        return tuple(name for name in self.needs if not has.get(name))


_AVX2 = (("avx2", "fma3", "f16c"), ("-mavx2", "-mfma", "-mf16c"))
_AVX512 = tuple(f"avx512_{part}" for part in ("f", "bw", "vl", "dq", "vnni"))
_512 = (
    (*_AVX2[0], *_AVX512),
    (*_AVX2[1], *(f"-m{name.replace('_', '')}" for name in _AVX512)),
)

# The best first.
INSTRUCTION_SETS = (
    InstructionSet(
        "amx",
        (*_512[0], "amx_tile", "amx_int8", "amx_bf16"),
        (*_512[1], "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
    ),
    InstructionSet("avx512_vnni", *_512),
    InstructionSet("avx_vnni", (*_AVX2[0], "avx_vnni"), (*_AVX2[1], "-mavxvnni")),
    InstructionSet("avx2", *_AVX2, has_dot=False),
)


@dataclass(frozen=True)
class Library:
    """The kernels, and the instruction set that they were compiled for."""

    isa: InstructionSet
    module: ModuleType


@functools.cache
def library() -> Library:
    """The kernels, built if need be.

    Raises KernelBuildError if they cannot be built, UnsupportedInputError for a processor that
    none of them run on, OptionError for a GRAPHQUANT_CPU_ISA that this processor lacks.
    """
    reasons: dict[str, list[str]] = {}  # why not -> instruction sets
    for isa in _candidates():
        try:
            with phase(f"building CPU kernels for {isa.name}"):
                module = build(isa)
        except (KernelBuildError, ImportError) as why:
            log.debug("no kernels for %s: %s", isa.name, why)
            reasons.setdefault(str(why), []).append(isa.name)
            continue
        if wrong := _wrong_sums(module):
            log.warning("graphquant's CPU kernels for %s are not used: %s", isa.name, wrong)
            reasons.setdefault(wrong, []).append(isa.name)
            continue
        return Library(isa, module)
    if not reasons:
        raise UnsupportedInputError("graphquant's CPU kernels need an x86-64 processor with AVX2")
    each = (f"{', '.join(names)}: {why}" for why, names in reasons.items())
    raise KernelBuildError("\n  ".join(("graphquant's CPU kernels cannot be used:", *each)))


@functools.cache
def missing() -> str | None:
    """Why the kernels cannot run on this machine, or None."""
    try:
        library()
    except (KernelBuildError, UnsupportedInputError) as why:
        return str(why)
    return None


def without_dot() -> str | None:
    """Why int8 is not fast on this processor, or None."""
    return NO_DOT if missing() is None and not library().isa.has_dot else missing()


def in_use() -> str:
    """What computes int8 on the CPU, in words: the kernels for an instruction set, which are built
    if need be, or torch."""
    return "oneDNN" if missing() is not None else f"kernels for {library().isa.name}"


def refuses(*args: Any) -> str | None:
    """`missing`, whatever the arguments."""
    return missing()


def rows(x: Tensor, num_rows: Tensor | None) -> tuple[Any, ...]:
    """How many rows of x [..., K] to compute, as `rows` in call.h reads it."""
    return math.prod(x.shape[:-1]), num_rows


def stride(x: Tensor) -> Any:
    """Elements from row to row of x [..., K], which is [M, K] in memory."""
    found = row_stride(x)
    return 0 if found is None else found  # None: it has no rows


def matrix(x: Tensor | None) -> tuple[Any, ...]:
    """x [..., K] as `Matrix` in call.h is read."""
    return (0, 0, None) if x is None else (TYPES[x.dtype], stride(x), x)


def vector(x: Tensor | None) -> tuple[Any, ...]:
    """x [K] as `Matrix` in call.h is read."""
    return (0, 0, None) if x is None else (TYPES[x.dtype], 0, x)


def activation(act: str | None) -> int:
    """The number of an activation in activations.h."""
    names: list[str] = library().module.activations
    return -1 if act is None else names.index(act)


def no_activation(act: str | None) -> str | None:
    """Why the kernels cannot run with this activation, or None."""
    if (why := missing()) is not None:
        return why
    known = act is None or act in library().module.activations
    return None if known else f"graphquant's CPU kernels have no {act}"


def qparams(given: QParams) -> tuple[Any, ...]:
    """As `QParams` in call.h are read."""
    return given.low, given.high, given.clip, given.factor


def quantized(xq: Tensor, x_scale: Tensor, x_shift: Tensor) -> tuple[Any, ...]:
    """As `Quantized` in call.h is read."""
    return stride(xq), xq, x_scale, x_shift


def _candidates() -> list[InstructionSet]:
    if torch.cpu.get_capabilities().get("architecture") != "x86_64":
        return []
    named = os.environ.get(ISA_VARIABLE)
    if not named:
        return [isa for isa in INSTRUCTION_SETS if not isa.missing]
    found = [isa for isa in INSTRUCTION_SETS if isa.name == named]
    if not found:
        names = ", ".join(isa.name for isa in INSTRUCTION_SETS)
        raise OptionError(f"{ISA_VARIABLE}={named!r} is not one of {names}")
    if lacks := found[0].missing:
        raise OptionError(f"{ISA_VARIABLE}={named!r}, but this processor lacks {', '.join(lacks)}")
    return found


def build(isa: InstructionSet) -> ModuleType:
    """The module compiled for an instruction set. Raises KernelBuildError, ImportError."""

    def say() -> None:
        log.warning("building graphquant's CPU kernels for %s, once; takes some seconds", isa.name)

    return extension(
        sorted(OPS.glob("*/*.cpp")),
        "graphquant_cpu",
        "graphquant's CPU kernels",
        headers=sorted(OPS.glob("*/*.h")),
        include=[Path(__file__).parent],
        options=["-std=c++17", "-fopenmp", "-fvisibility=hidden", *isa.options],
        about_to_build=say,
    )


def _wrong_sums(module: ModuleType) -> str | None:
    """What is wrong with sums of products of extreme values, or None: instructions that saturate,
    and emulators that get them wrong, are not trusted."""
    M, N, K = 33, 40, 200
    x = torch.full((M, K), 127, dtype=torch.int8)
    x[::2] = -127
    x[:, ::3] = 1
    w = torch.full((N, K), -127, dtype=torch.int8)
    w[::2], w[1] = 127, 3
    ones, zeros = torch.ones(max(M, N)), torch.zeros(max(M, N))
    y = torch.full((M, N), torch.nan)
    module.int8_linear(
        *(M, None, N, K, K, x, ones, zeros, K, w, ones, zeros),
        *(0, None, 0, 0, None, TYPES[y.dtype], y),
    )
    if torch.equal(y.double(), x.double() @ w.double().T):
        return None
    return "sums of int8 products are wrong on this machine"
