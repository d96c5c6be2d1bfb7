"""How AOTInductor calls our ops on CUDA: as Triton kernels that become part of the package.

The package needs neither Python nor graphquant then. A kernel's own launch code is run on the fake
tensors of the graph, and what it would launch, Inductor launches: with the sizes of each call, and
the tile that suits the sizes of the export. Inductor has no place for CUDA sources, so a product
has Triton's kernel where torch.compile has hopper.cu, and attention is torch's.
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
from graphquant.ops.numerics import padded
from graphquant.ops.runtime.launch import Blocks, TritonCall, recorded

aten = torch.ops.aten
BOX = 128  # bytes of a row: the widest swizzle


def lower(
    op: Op, given: Sequence[Any], values: Sequence[Any], fakes: Sequence[Tensor]
) -> list[Any] | None:
    """Have Inductor launch the op's Triton kernel: its results, or None if no kernel will do.

    given, fakes  the arguments and results as they were traced, with fake tensors
    values        the arguments for Inductor
    """
    load_kernels()
    out = [_rows(fake) for fake in fakes]
    boxes = {
        id(fake): box
        for fake, box in zip((*given, *fakes), (*values, *out), strict=True)
        if isinstance(fake, Tensor)
    }
    for kernel in op.kernels:
        if not kernel.name.startswith("triton") or kernel.refuses(*given) is not None:
            continue
        assert kernel.fill is not None
        calls = recorded(partial(kernel.fill, *given, out=tuple(fakes)))
        if len(calls) == 1 and _launch(calls[0], boxes):
            return [_shaped(box, fake) for box, fake in zip(out, fakes, strict=True)]
    return None


def _launch(call: TritonCall, boxes: dict[int, Any]) -> bool:
    """False if it is on a tensor that is not among these (a copy that was made), or one that is no
    matrix in memory, of which a descriptor could be made."""
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
    """A buffer for a result [..., K]: the matrix [M, K], or [M, padded(K)] of int8.

    Inductor can make a descriptor of a whole buffer, not of a view of one.
    """
    K = fake.shape[-1]
    size = [expr(fake.numel() // K), padded(K) if fake.dtype == torch.int8 else K]
    stride = [size[1], 1]
    return lowerings[aten.empty_strided.default](size, stride, dtype=fake.dtype, device=fake.device)


def _shaped(box: Any, fake: Tensor) -> Any:
    """The matrix as the result that it holds."""
    K, row = fake.shape[-1], box.get_size()[-1]
    y = lowerings[aten.view.default](box, [*map(expr, fake.shape[:-1]), row])
    return y if row == K else lowerings[aten.slice.Tensor](y, -1, 0, K)


def _matrix(box: Any, blocks: Blocks) -> Any:
    """The whole buffer that a tensor lies in, if that is the matrix; else None. None as well for
    blocks wider than a box of TMA can be: Triton's launcher makes several of one, Inductor's does
    not (CUDA_ERROR_INVALID_VALUE).

    Its rows may be wider, as int8 ones with pads are: in a product those of xq meet zeros, which
    TMA reads beyond the columns of wq.
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
    """A size for Inductor: a number, or a symbolic expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def attention_of_torch(q: Tensor, k: Tensor, v: Tensor, scale: float, tile: str) -> Any:
    """A decomposition of attention, for AOTInductor on CUDA alone."""
    if not (V.aot_compilation and q.device.type == "cuda"):
        return NotImplemented
    y = attention.float_form(q, k, v, scale, tile)
    heads_beside = torch.ops.aten.clone(y.transpose(1, 2), memory_format=torch.contiguous_format)
    return heads_beside.transpose(1, 2)
