"""Lowering for AOTInductor on CUDA: ops become Triton kernels inside the package.

The package then needs neither Python nor graphquant. A kernel's own launch code runs on the graph's
fake tensors, and Inductor emits the launches that it records: with symbolic sizes, and with the
tile chosen for the sizes of the export. Inductor cannot embed CUDA sources, so int8_linear uses its
Triton kernel where torch.compile uses hopper.cu, and attention is torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graphquant._torch.inductor import (
    V,
    create_tma_stable_metadata,
    ir,
    kernel_side_table,
    lowerings,
    triton_kernel_wrapper_mutation,
)
from graphquant.ops import attention
from graphquant.ops.define import Op, load_kernels
from graphquant.ops.numerics import padded, row_stride
from graphquant.ops.runtime.launch import Blocks, TritonCall, recorded

aten = torch.ops.aten
BOX = 128  # bytes per row of a TMA box: the widest swizzle


def lower(
    op: Op, given: Sequence[Any], values: Sequence[Any], fakes: Sequence[Tensor]
) -> list[Any] | None:
    """Results of the op as a Triton kernel that Inductor launches; None if no kernel applies.

    given, fakes  arguments and results as they were traced, with fake tensors
    values        the arguments as Inductor's IR
    """
    load_kernels()
    out = [_rows(fake) for fake in fakes]
    boxes = boxes_of((*given, *fakes), (*values, *out))
    for kernel in op.kernels:
        if not kernel.name.startswith("triton") or kernel.refuses(*given) is not None:
            continue
        assert kernel.fill is not None
        calls = recorded(partial(kernel.fill, *given, out=tuple(fakes)))
        if len(calls) == 1 and _launch(calls[0], boxes):
            return [_shaped(box, fake) for box, fake in zip(out, fakes, strict=True)]
    return None


def boxes_of(fakes: Sequence[Any], values: Sequence[Any]) -> dict[int, Any]:
    """Inductor's IR of each fake tensor, by its id."""
    pairs = zip(fakes, values, strict=True)
    return {id(fake): box for fake, box in pairs if isinstance(fake, Tensor)}


def _launch(call: TritonCall, boxes: dict[int, Any]) -> bool:
    """Emit a recorded launch. False if it reads a tensor that is not in `boxes` (a copy), or needs
    a TMA descriptor of a tensor that is not a matrix in memory."""
    from graphquant.ops.triton_util import compiled_with

    options = dict(call.meta)
    warps, stages = options.pop("num_warps", 4), options.pop("num_stages", 3)
    if options.pop("launch_pdl", False):  # AOTInductor launches one kernel after the other
        options["OVERLAP"] = False
    named = dict(zip(call.kernel.arg_names, call.args, strict=False)) | options
    descriptors = {}
    for name, value in named.items():
        if isinstance(value, torch.SymInt):
            named[name] = expr(value)
        elif isinstance(value, Tensor):
            named[name] = boxes.get(id(value))
        elif isinstance(value, Blocks):
            named[name] = matrix = _matrix(boxes.get(id(value.base)), value)
            if matrix is not None:
                descriptors[name] = create_tma_stable_metadata(value.block)  # type: ignore[arg-type]
            elif value.optional:
                continue
        if value is not None and named[name] is None:
            return False
    lowerings[triton_kernel_wrapper_mutation](
        kernel_idx=kernel_side_table.add_kernel(compiled_with(call.kernel, warps, stages)),
        constant_args_idx=kernel_side_table.add_constant_args({}),
        grid=[tuple(map(expr, (*call.grid, 1, 1)[:3]))],
        tma_descriptor_metadata=descriptors,
        kwargs=named,
    )
    return True


def _rows(fake: Tensor) -> Any:
    """A buffer for a result [..., K]: a matrix [M, K], or [M, padded(K)] of int8; or as the result
    is, if it is no matrix.

    Inductor builds TMA descriptors of whole buffers only, not of views.
    """
    if _is_no_matrix(fake):
        size, stride = (list(map(expr, of)) for of in (fake.shape, fake.stride()))
        return lowerings[aten.empty_strided.default](
            size, stride, dtype=fake.dtype, device=fake.device
        )
    K = fake.shape[-1]
    size = [expr(fake.numel() // K), padded(K) if fake.dtype == torch.int8 else K]
    stride = [size[1], 1]
    return lowerings[aten.empty_strided.default](size, stride, dtype=fake.dtype, device=fake.device)


def _is_no_matrix(fake: Tensor) -> bool:
    """Is a result [..., K] a vector, or are its rows in another order than they are in memory?"""
    return fake.dim() == 1 or (fake.dtype != torch.int8 and row_stride(fake) is None)


def _shaped(box: Any, fake: Tensor) -> Any:
    """The result [..., K] as a view of its matrix."""
    if _is_no_matrix(fake):
        return box
    K, row = fake.shape[-1], box.get_size()[-1]
    y = lowerings[aten.view.default](box, [*map(expr, fake.shape[:-1]), row])
    return y if row == K else lowerings[aten.slice.Tensor](y, -1, 0, K)


def _matrix(box: Any, blocks: Blocks) -> Any:
    """The buffer behind a tensor, if the buffer is exactly this matrix; else None.

    Also None for blocks wider than a TMA box: Triton's launcher splits them, Inductor's does not
    (CUDA_ERROR_INVALID_VALUE). The buffer's rows may be longer, as padded int8 rows are: the pads
    of xq meet the zeros that TMA reads beyond the columns of wq.
    """
    wide = blocks.block[1] * blocks.base.itemsize > BOX
    if box is None or wide or not ir.is_storage_and_layout(box):
        return None
    storage, _ = ir.as_storage_and_layout(box)
    layout = storage.data.get_layout()
    rows, columns = map(expr, blocks.shape)
    same = V.graph.sizevars.statically_known_equals
    whole = (
        len(layout.size) == 2
        and layout.offset == 0
        and same(layout.size[0], rows)
        and layout.size[1] in (columns, blocks.row)
        and [*layout.stride] == [blocks.row, 1]
    )
    return ir.TensorBox(storage) if whole else None


def expr(size: Any) -> Any:
    """A size as Inductor takes it: an int or a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def decompose_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    """Decomposition of attention into torch's SDPA, for AOTInductor on CUDA only."""
    if not (V.aot_compilation and q.device.type == "cuda"):
        return NotImplemented
    y = attention.float_form(q, k, v, *rest)
    y = torch.ops.aten.clone(y.transpose(1, 2), memory_format=torch.contiguous_format)
    return y.transpose(1, 2)  # [B, S, H, D] in memory
