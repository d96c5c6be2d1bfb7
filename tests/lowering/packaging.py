"""The launches that AOTInductor gets for our ops on a Hopper GPU, without one.

    python -m tests.lowering.packaging      {"mlp dynamic": [one object for each launch], ...}

Runs in a process of its own, because under TRITON_INTERPRET kernels are no kernels to Inductor.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from torch._inductor import ir
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from triton.backends.compiler import GPUTarget

import graphquant  # noqa: F401 - has Inductor know the ops
from graphquant.ops import (
    int8_linear,
    norm_quantize,
    norm_quantize_keep,
    quantize,
    token_index,
    varlen_attention,
)

CUDA = torch.device("cuda", 0)
BATCH, TOKENS, WIDTH = 2, 23, 64
HOPPER = {"major": 9, "minor": 0, "multi_processor_count": 132}
HOPPER |= {"shared_memory_per_block_optin": 232_448}


class Driver:
    """As much of one as it takes to compile."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def linear(
    x: tuple[Tensor, ...],
    N: int,
    bias: Tensor | None,
    residual: Tensor | None,
    num_rows: Tensor | None = None,
) -> Tensor:
    K = x[0].shape[-1]
    row = -(-K // 16) * 16
    wq = torch.empty_strided((N, K), (row, 1), dtype=torch.int8, device=CUDA)
    w_scale, w_sum = (torch.empty(N, device=CUDA) for _ in range(2))
    y: Tensor = int8_linear(*x, wq, w_scale, w_sum, bias, residual, torch.bfloat16, num_rows)
    return y


def mlp(x: Tensor) -> tuple[Tensor, Tensor]:
    """A norm that is also the residual, an activation that is clipped."""
    y, *xq = norm_quantize_keep(x, None, None, 1e-5, False, torch.bfloat16)
    hidden = linear(tuple(xq), 128, torch.empty(128, device=CUDA), None)
    return y, linear(quantize(hidden, None, "gelu", clip=2.0), WIDTH, None, y)


def gated(x: Tensor) -> Tensor:
    """Rows with pads, halves of one product, and an N whose rows TMA cannot store."""
    both = linear(quantize(x.narrow(-1, 0, 60)), 76, None, None)
    gate, up = both.narrow(-1, 0, 38), both.narrow(-1, 38, 38)
    return linear(quantize(gate, up, "silu"), 27, None, None)


def counted(x: Tensor) -> Tensor:
    """The first rows, as many as a tensor says."""
    n = torch.empty(1, dtype=torch.int32, device=CUDA)
    hidden = linear(norm_quantize(x, None, None, 1e-5, True, num_rows=n), 32, None, None, n)
    return linear(quantize(hidden, num_rows=n), 33, None, None, n)


def transposed(x: Tensor) -> Tensor:
    """quantize on what is no [M, K] in memory."""
    return linear(quantize(x.transpose(0, 1)), 32, None, None)


def part(x: Tensor) -> Tensor:
    """Rows that are a part of another tensor's."""
    xq = x.view(torch.int8).narrow(-1, WIDTH, WIDTH)
    column = torch.empty(*x.shape[:-1], 1, device=CUDA)
    return linear((xq, column, column), 32, None, None)


def first(x: Tensor) -> Tensor:
    """Rows as far apart as the text is long."""
    return linear(quantize(x.select(1, 0)), 32, None, None)


def packed(x: Tensor) -> Tensor:
    """Attention of packed sequences, of rows that only the device can count."""
    valid = torch.empty(x.shape[:2], dtype=torch.bool, device=CUDA)
    _, _, position, cu_seqlens, tiles, _ = token_index(valid, True)
    qkv = x.view(1, -1, 4, 16).transpose(1, 2)
    where = cu_seqlens, position, tiles
    y: Tensor = varlen_attention(qkv, qkv * 2, qkv + 1, *where, 0.25, valid.shape[1], False, 9)
    return y


def launches(function: Callable[[Tensor], Any], how: DimDynamic) -> list[dict[str, Any]]:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = StatelessSymbolicContext([how, how, DimDynamic.STATIC])
    x = mode.from_tensor(torch.empty(BATCH, TOKENS, WIDTH), symbolic_context=sizes)
    with mode:
        x = torch.empty_strided(x.shape, x.stride(), dtype=torch.bfloat16, device=CUDA)
        gm = make_fx(function, decomposition_table=select_decomp_table())(x)
    graph = GraphLowering(gm, [x], shape_env=mode.shape_env, aot_mode=True, cpp_wrapper=True)
    with V.set_graph_handler(graph), V.set_fake_mode(mode):
        graph.run(x)
    return [
        _launch(o) if isinstance(o, ir.UserDefinedTritonKernel) else {"kernel": str(o.op_overload)}
        for o in graph.operations
        if isinstance(o, (ir.UserDefinedTritonKernel, ir.FallbackKernel))
    ]


def _launch(node: Any) -> dict[str, Any]:
    kernel, configs, *_ = node.get_kernel_and_metadata()
    numbers = {n: v for n, v in node.kwargs.items() if not isinstance(v, ir.IRNode)}
    blocks = {n: v for n, v in node.kwargs.items() if isinstance(v, ir.TMADescriptor)}
    return {
        "kernel": kernel.__name__,
        "grid": [str(n) for n in node.grid[0]],
        "numbers": {n: str(v) for n, v in numbers.items()},
        "blocks": {n: [str(s) for s in v.tensor.get_size()] for n, v in blocks.items()},
        "written": len({b.get_name() for b in node.mutable_args}),
        "warps": configs[0].num_warps if configs else 4,
    }


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    torch.utils._triton.has_triton_tensor_descriptor_host_tma = lambda: True
    gpu: Any = SimpleNamespace(name="a GPU", **HOPPER)
    torch.cuda.get_device_properties = lambda *_: gpu
    found = {
        f"{function.__name__} {sizes.name.lower()}": launches(function, sizes)
        for function in (mlp, gated, counted, transposed, part, first, packed)
        for sizes in (DimDynamic.STATIC, DimDynamic.DYNAMIC)
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
