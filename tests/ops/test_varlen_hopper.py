"""The Hopper kernel of varlen_attention, as far as it can be tested without a GPU, and what it
refuses. With one, it is one of the kernels in test_varlen_attention.py."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from graphquant.errors import KernelBuildError
from graphquant.ops import token_index, varlen_attention
from graphquant.ops.hopper import SHARED
from graphquant.ops.hopper.attention import KEYS, TILE, WIDEST, Variant
from graphquant.ops.token_index import op as token_index_op
from tests.ops.bounds import needs_nvrtc
from tests.ops.offline import CUOBJDUMP
from tests.ops.test_attention import (
    assert_products_run_together,
    assert_registers_suffice,
    assert_softmax_overlaps,
)

SPILLED = 64  # bytes: a few constants, outside of the main loop
BF16, FP16 = torch.bfloat16, torch.float16
VARIANTS = [
    *(Variant(D, BF16) for D in (8, 32, 48, 64, 72, 128)),
    Variant(64, FP16, causal=True),
    Variant(64, BF16, window=True),
    Variant(32, BF16, bias=torch.float32),
    Variant(128, FP16, causal=True, window=True, bias=BF16),
]
VARIANTS += [
    *(Variant(D, BF16, padded=True, key_mask=True) for D in (32, 64, 72, 128)),
    *(Variant(64, dtype, padded=True) for dtype in (FP16, BF16)),
    Variant(72, BF16, padded=True),
    Variant(64, FP16, causal=True, padded=True),
    Variant(64, BF16, causal=True, window=True, padded=True, key_mask=True),
    Variant(32, FP16, bias=FP16, padded=True),
    Variant(64, BF16, bias=torch.float32, padded=True, bias_pairs=True),
    Variant(128, BF16, window=True, bias=BF16, padded=True, key_mask=True, bias_pairs=True),
]


@needs_nvrtc
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant_compiles_to_tensor_core_instructions(
    variant: Variant, tmp_path: Path
) -> None:
    file = tmp_path / "variant.cubin"
    file.write_bytes(variant.cubin())

    def said(what: str) -> str:
        command = [str(CUOBJDUMP), what, str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = said("-res-usage")
    assert variant.entry in usage
    assert sum(map(int, re.findall(r"STACK:(\d+)", usage))) <= SPILLED
    assert sum(map(int, re.findall(r"REG:(\d+)", usage))) * variant.threads <= 65_536
    dtype = "\\.BF16" if variant.dtype == BF16 else ""
    sass = said("-sass")
    shapes = set(re.findall(rf"HGMMA\.64x(\d+)x16\.F32{dtype} ", sass))
    assert shapes == {str(n) for n in (*KEYS, variant.D)}
    assert_products_run_together(sass)
    assert_softmax_overlaps(sass)
    masked = variant.causal or variant.window or variant.bias or variant.key_mask
    stale_max = variant.padded and variant.D == 64 and not masked
    assert ("BAR.RED.OR" in sass) == stale_max  # where a block's maximum is needed
    assert_registers_suffice(sass, usage, variant.threads)


@pytest.mark.parametrize("bias", [None, BF16])
def test_every_width_fits_the_shared_memory_of_a_cta(bias: torch.dtype | None) -> None:
    assert all(Variant(D, BF16, bias=bias).shared <= SHARED for D in range(8, WIDEST + 1, 8))


@needs_nvrtc
def test_another_size_of_shared_memory_than_the_kernels_does_not_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Variant, "shared", Variant(64, BF16).shared + 1024)
    with pytest.raises(KernelBuildError, match=r"static assertion failed.*attention\.py"):
        Variant(64, BF16).cubin()


def arguments(device: str, dtype: torch.dtype = BF16, D: int = 64) -> tuple[Any, ...]:
    """q, k, v, cu_seqlens, position, tiles, scale, max_length of two sequences of 5"""
    _, _, position, cu_seqlens, tiles, _ = token_index(torch.ones(2, 5, dtype=torch.bool))
    q, k, v = (torch.randn(1, 10, 3, D, dtype=dtype, device=device).transpose(1, 2) for _ in "qkv")
    return q, k, v, *(t.to(device) for t in (cu_seqlens, position, tiles)), 0.125, 5


def test_tiles_are_those_of_token_index() -> None:
    assert TILE == token_index_op.TILE


def test_it_is_preferred_where_it_runs() -> None:
    hopper, triton = varlen_attention.kernels
    assert (hopper.name, triton.name) == ("hopper", "triton")
    assert "sm_90 alone" in str(hopper.refuses(*arguments("cpu")))


@pytest.mark.cuda
def test_the_kernel_says_what_is_wrong_with_its_inputs() -> None:
    kernel = varlen_attention.kernels[0]
    q, k, v, _, position, tiles, *rest = good = arguments("cuda")
    if (why := kernel.refuses(*good)) is not None:
        pytest.skip(why)
    spread = torch.stack([tiles, tiles], 2)[:, :, 0]
    for wrong, said in [
        (arguments("cuda", torch.float32), "q is torch.float32, needs float16 or bfloat16"),
        (arguments("cuda", D=136), "heads of 136: needs a multiple of 8 up to 128"),
        (arguments("cuda", D=20), "heads of 20: needs a multiple of 8 up to 128"),
        ((q, k[..., 1:], v, *good[3:]), "k does not start at a multiple of 16 bytes"),
        ((q, k, v.transpose(2, 3), *good[3:]), "v with strides"),
        ((q[:, :, :1].expand_as(q), *good[1:]), "q with strides"),
        ((*good[:4], position[1:], tiles, *rest), "position does not start at a multiple"),
        ((*good[:5], spread, *rest), "tiles is not contiguous"),
    ]:
        assert said in str(kernel.refuses(*wrong))


@pytest.mark.cuda
def test_rows_of_no_sequence_are_not_written() -> None:
    """Their memory may be that of other sequences' rows, which other CTAs write."""
    kernel = varlen_attention.kernels[0]
    *args, scale, max_length = arguments("cuda")
    if (why := kernel.refuses(*args, scale, max_length)) is not None:
        pytest.skip(why)
    args[3][-1] = 7  # the second sequence has 2 rows
    (y,) = out = (torch.full_like(args[0], torch.nan),)
    assert kernel.fill is not None
    kernel.fill(*args, scale, max_length, out=out)
    assert y[:, :, :7].isfinite().all() and y[:, :, 7:].isnan().all()
