"""An exported program without graphquant's ops: their meaning, written in torch's own.

A process that knows no graphquant can load what comes out, and AOTInductor compiles it to C++ and
to kernels that need no Python. On a CPU every op becomes its reference, so nothing changes in the
numbers. On CUDA an int8 product becomes `torch._int_mm`, as exact as ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import ExportedProgram

from graphquant._torch import TreeSpec, statically_known_true, tree_flatten, tree_unflatten
from graphquant._torch import int_mm as int8_mm
from graphquant.ops import OPS, attention, int8_linear
from graphquant.ops.int8_linear.op import epilogue

# What torch._int_mm asks of [M, K] @ [K, N] on CUDA.
LEAST_M = 17
MULTIPLE = 8  # of K and N


def without_ops(program: ExportedProgram) -> ExportedProgram:
    """The program with every op of graphquant decomposed, and only torch's types in its result."""
    table = {op.target: op.reference for op in OPS.values()}
    table |= {int8_linear.target: _int8_linear, attention.target: _attention}
    done: ExportedProgram = program.run_decompositions(table)
    signature = done.module_call_graph[0].signature
    if signature is not None:
        signature.out_spec = _plain(signature.out_spec)
    return done


def _plain(spec: TreeSpec) -> TreeSpec:
    """Dicts and tuples in place of a library's own, as transformers' outputs are: torch has to know
    every type in a program that it loads."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return (list if type(value) is list else tuple)(map(plain, value))
        return value

    return tree_flatten(plain(tree_unflatten(range(spec.num_leaves), spec)))[1]


def _int8_linear(xq: Tensor, *args: Any) -> Tensor:
    fn = by_int_mm if xq.device.type == "cuda" else int8_linear.reference
    y: Tensor = fn(xq, *args)
    return y


def by_int_mm(xq: Tensor, x_scale: Tensor, x_shift: Tensor, wq: Tensor, *args: Any) -> Tensor:
    """int8_linear.reference by one int8 product."""
    acc = int_mm(xq.reshape(-1, xq.shape[-1]), wq).float()
    return epilogue(acc, xq, x_scale, x_shift, wq, *args)


def int_mm(xq: Tensor, wq: Tensor) -> Tensor:
    """xq [M, K] @ wq [N, K].T, exact int32 [M, N], of any size."""
    M, K = xq.shape
    N = wq.shape[0]
    k, n = -K % MULTIPLE, -N % MULTIPLE
    m = 0 if statically_known_true(M >= LEAST_M) else torch.sym_max(LEAST_M - M, 0)
    if k or isinstance(m, torch.SymInt) or m:
        xq = F.pad(xq, (0, k, 0, m))
    if k or n:
        wq = F.pad(wq, (0, k, 0, n))
    return int8_mm(xq, wq.t())[:M, :N]


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, tile: str) -> Tensor:
    # on CUDA the op is one for fp16 and bf16, and so are torch's fast kernels
    fn = attention.float_form if q.device.type == "cuda" else attention.reference
    y: Tensor = fn(q, k, v, scale, tile)
    return y
