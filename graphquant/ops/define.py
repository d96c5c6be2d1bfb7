"""How an op is declared: schema, contract, fake and reference in one place; kernels join later.

An op is one folder: `op.py` holds what it means (torch only), one file per kernel makes it fast.
The reference is the meaning. A kernel has the same parameters, says why it refuses its inputs, and
joins the op's tests by being registered.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from graphquant.errors import UnsupportedInputError

# Library.define + impl costs 3 us a call; torch.library.custom_op 15 to 24.
LIB = torch.library.Library("graphquant", "DEF")
OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class Kernel:
    """A CUDA implementation, and the question it answers before it is called."""

    name: str
    fn: Callable[..., Any]
    refuses: Callable[..., str | None]  # op's arguments -> None, or why not


@dataclass(frozen=True)
class Op:
    """A graphquant op: `graphquant::name`. Callable with the schema's arguments, in order."""

    name: str
    reference: Callable[..., Any]
    check: Callable[..., None]
    files: tuple[str, ...]  # kernel modules beside op.py, preferred first
    kernels: list[Kernel] = field(default_factory=list)  # in order of preference

    @cached_property
    def target(self) -> torch._ops.OpOverload:
        """What a graph node calls."""
        overload: torch._ops.OpOverload = getattr(torch.ops.graphquant, self.name).default
        return overload

    def __call__(self, *args: Any) -> Any:
        return self.target(*args)

    def kernel(
        self, name: str, *, refuses: Callable[..., str | None] = lambda *_: None
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: add a CUDA kernel after those already there."""

        def add(fn: Callable[..., Any]) -> Callable[..., Any]:
            want, got = _parameters(self.reference), _parameters(fn)
            if want != got:
                raise TypeError(
                    f"{self.name}: kernel {name} takes {got}, the reference takes {want}"
                )
            self.kernels.append(Kernel(name, fn, refuses))
            return fn

        return add

    def choose(self, *args: Any) -> Kernel:
        """The first kernel that takes these arguments, or an error with every kernel's reason."""
        said = []
        for kernel in self.kernels:
            if (why := kernel.refuses(*args)) is None:
                return kernel
            said.append(f"\n  {kernel.name}: {why}")
        raise UnsupportedInputError(
            f"no CUDA kernel of {self.name} takes these inputs:{''.join(said)}"
        )

    def _on_cpu(self, *args: Any) -> Any:
        self.check(*args)
        return self.reference(*args)

    def _on_cuda(self, *args: Any) -> Any:
        self.check(*args)
        if not self.kernels:
            load_kernels()
        device: torch.device = args[0].device
        if device.index == torch.cuda.current_device():
            return self.choose(*args).fn(*args)
        with torch.cuda.device(device):  # triton launches on the current device, not on x's
            return self.choose(*args).fn(*args)


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    check: Callable[..., None],
    kernels: tuple[str, ...] = ("triton",),
) -> Callable[[Callable[..., Any]], Op]:
    """Decorator on the reference. `schema` is written by hand: it is the op's public contract.

    `check(*args)` raises UnsupportedInputError for arguments that have no meaning. It runs before
    the fake, the reference and the kernels alike, so tracing says what running would say.
    No layout tag is set: torch's default, needs_exact_strides, keeps padded int8 rows as they are.
    """

    def make(reference: Callable[..., Any]) -> Op:
        op = Op(reference.__name__, reference, check, kernels)
        LIB.define(op.name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        declared = [a.name for a in op.target._schema.arguments]
        if declared != _parameters(reference):
            raise TypeError(f"{op.name}: schema {declared}, reference {_parameters(reference)}")

        def checked_fake(*args: Any) -> Any:
            check(*args)
            return fake(*args)

        LIB.impl(op.name, op._on_cpu, "CPU")
        LIB.impl(op.name, op._on_cuda, "CUDA")
        torch.library.register_fake(f"graphquant::{op.name}", checked_fake, lib=LIB)
        OPS[op.name] = op
        return op

    return make


def load_kernels() -> None:
    """Import every op's kernels. Needs triton; called the first time an op runs on CUDA."""
    try:
        for op in OPS.values():
            folder = op.reference.__module__.rpartition(".")[0]
            for file in op.files:
                importlib.import_module(f"{folder}.{file}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise UnsupportedInputError(
            "graphquant's CUDA kernels need triton, which is not installed (torch's Linux CUDA "
            "wheels bring it). On the CPU the ops run without it."
        ) from error


def _parameters(fn: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(fn).parameters)
