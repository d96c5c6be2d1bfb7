"""An exported program with graphquant's ops decomposed into torch's own.

A process without graphquant can load the result, and AOTInductor compiles it to C++ and to kernels
that need no Python. On a CPU every op becomes its reference, with identical results, except that an
int8 product may be `torch._int_mm`, as on CUDA, which is exact as well.

On a CPU, torch multiplies int8 by oneDNN where it finds AVX-512 VNNI, and without, where oneDNN's
sums would saturate, by a loop: right, but 25 to 50 times slower than float32. oneDNN's other int8
products, `onednn.qlinear_pointwise`, are not used: they do not ask for VNNI, and round sums twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import ExportedProgram

from graphquant._torch import (
    TreeSpec,
    has_vnni,
    statically_known_true,
    tree_flatten,
    tree_unflatten,
)
from graphquant._torch import int_mm as int8_mm
from graphquant.ops import OPS, attention, int8_linear, varlen_attention
from graphquant.ops.int8_linear.op import epilogue

# Requirements of torch._int_mm on CUDA for [M, K] @ [K, N].
MIN_M = 17
MULTIPLE = 8  # of K and N

PRODUCTS = ("int8", "float32")


def without_ops(program: ExportedProgram, products: str | None = None) -> ExportedProgram:
    """The program with graphquant's ops decomposed, and only torch's pytree types in its result.

    program   with int8 weights [N, K]
    products  one of PRODUCTS, or None: what is faster where this runs
    """
    table = {op.target: op.reference for op in OPS.values()}
    table |= {int8_linear.target: partial(_int8_linear, products), attention.target: _attention}
    table[varlen_attention.target] = varlen_attention.float_form  # the reference's loop reads data
    done: ExportedProgram = program.run_decompositions(table)
    signature = done.module_call_graph[0].signature
    if signature is not None:
        signature.out_spec = _plain(signature.out_spec)
    return done


def _plain(spec: TreeSpec) -> TreeSpec:
    """The spec with dicts and tuples in place of a library's types, such as transformers' outputs:
    a process that loads the program must know every pytree type in it."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return (list if type(value) is list else tuple)(map(plain, value))
        return value

    return tree_flatten(plain(tree_unflatten(range(spec.num_leaves), spec)))[1]


def _int8_linear(products: str | None, xq: Tensor, *args: Any) -> Tensor:
    if products is None:
        products = "int8" if xq.device.type == "cuda" or has_vnni() else "float32"
    fn = by_int_mm if products == "int8" else int8_linear.reference
    y: Tensor = fn(xq, *args)
    return y


def by_int_mm(xq: Tensor, x_scale: Tensor, x_shift: Tensor, wq: Tensor, *args: Any) -> Tensor:
    """int8_linear.reference with one int8 GEMM."""
    acc = int_mm(xq.reshape(-1, xq.shape[-1]), wq).float()
    return epilogue(acc, xq, x_scale, x_shift, wq, *args[:5])  # num_rows: all are computed


def int_mm(xq: Tensor, wq: Tensor) -> Tensor:
    """xq [M, K] @ wq [N, K].T, exact int32 [M, N], of any size."""
    M, K = xq.shape
    N = wq.shape[0]
    if xq.device.type == "cpu":
        if K == 1:  # torch reads wq.t() as [1, N] in rows of one element: wrong sums (2.13)
            xq, wq = F.pad(xq, (0, 1)), F.pad(wq, (0, 1))
        return int8_mm(xq, wq.t())
    k, n = -K % MULTIPLE, -N % MULTIPLE
    m = 0 if statically_known_true(M >= MIN_M) else torch.sym_max(MIN_M - M, 0)
    if k or isinstance(m, torch.SymInt) or m:
        xq = F.pad(xq, (0, k, 0, m))
    if k or n:
        wq = F.pad(wq, (0, k, 0, n))
    return int8_mm(xq, wq.t())[:M, :N]


def _attention(q: Tensor, *rest: Any) -> Tensor:
    # on CUDA the op is for fp16 and bf16, as are torch's fused kernels
    fn = attention.float_form if q.device.type == "cuda" else attention.reference
    y: Tensor = fn(q, *rest)
    return y
