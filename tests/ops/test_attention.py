"""attention: softmax(scale q k^T) v against float64, for any lengths, widths, strides and tiles."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import graphquant.lowering.inductor  # noqa: F401 - registers the lowerings
from graphquant.ops import attention, token_index, varlen_attention
from graphquant.ops.attention import hopper
from graphquant.ops.attention.hopper_tiles import MASKED, ROWS, SHARED, TILES, WIDEST
from graphquant.ops.define import Kernel, Op
from tests.ops.bounds import U, implementations, kernels, needs_nvrtc, runnable
from tests.ops.offline import CUOBJDUMP
from tests.ops.test_pack_weight import at_the_end_of_memory
from tests.ops.test_varlen_attention import threads
from tests.strategies import FLOATS

SPILLED = 16  # bytes: a few constants, outside of the main loop
SHORT = {("192x112", 197), ("128x192", 729)}  # of registers; other tiles are faster at that length
LAYOUTS = ("heads", "tokens", "fused", "columns")


@dataclass(frozen=True)
class Heads:
    B: int = 1
    H: int = 2
    S: int = 5  # queries
    T: int = 5  # keys
    D: int = 16
    dtype: torch.dtype = torch.float32
    layout: str = "fused"
    spread: float = 1.0  # of the scores
    scale: float = 1.0  # times D ** -0.5
    seed: int = 0

    def on(self, device: str) -> tuple[Any, ...]:
        """q, k, v, scale: v has a mean of its own in each column."""
        g = torch.Generator().manual_seed(self.seed)
        wide = [
            torch.randn(self.B, n, self.H, self.D, generator=g) for n in (self.S, self.T, self.T)
        ]
        wide[0] *= self.spread
        wide[2] += torch.linspace(-2, 2, self.D)
        laid = [self._laid_out(t.to(self.dtype).to(device)) for t in wide]
        return *laid, self.scale * self.D**-0.5

    def _laid_out(self, t: Tensor) -> Tensor:
        if self.layout == "heads":
            return t.transpose(1, 2).contiguous()
        if self.layout == "columns":  # nothing reads these in place
            return t.transpose(1, 3).contiguous().permute(0, 2, 3, 1)
        if self.layout == "fused":
            t = torch.cat([t, torch.full_like(t, torch.nan)], 2)[:, :, : self.H]
        return t.transpose(1, 2)


def assert_right(y: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """y against float64.

    A score is a sum of D products, off by (D + 2) U of the sum of their sizes, e at most in a row;
    exp turns that into a factor within exp(+-e), as does the 2^-22 of the GPU's own exponential.
    Weights and their sum have those factors, so y is off by 2 (e + 2^-21) of sum p |v|, and by U
    for each of its T additions. Weights are then rounded to v's type, and so is y (eps each: half
    of it on the GPU).
    """
    assert y.shape == q.shape and y.dtype == q.dtype
    assert y.transpose(1, 2).is_contiguous()
    eps = 0.0 if y.dtype == torch.float32 else torch.finfo(y.dtype).eps
    q, k, v, y = (t.cpu().double() for t in (q, k, v, y))
    p = torch.softmax(scale * (q @ k.transpose(2, 3)), -1)
    want, seen = p @ v, p @ v.abs()
    e = (q.shape[3] + 4) * U * scale * (q.abs() @ k.abs().transpose(2, 3)).amax(-1, keepdim=True)
    bound = (2 * (e + 2**-21) + k.shape[2] * U) * seen + eps * (seen + want.abs())
    assert ((y - want).abs() <= bound + 1e-7).all()


heads = st.builds(
    Heads,
    B=st.sampled_from([0, 1, 3]),
    H=st.integers(1, 3),
    S=st.integers(0, 70) | st.sampled_from([64, 128, 130]),
    T=st.integers(1, 70) | st.sampled_from([64, 128, 130, 257]),
    D=st.integers(1, 40) | st.sampled_from([64, 72, 80, 96, 128]),
    dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(LAYOUTS),
    spread=st.sampled_from([0.0, 1.0, 20.0]),
    scale=st.sampled_from([0.5, 1.0]),
    seed=st.integers(0, 99),
)


@given(heads=heads, tile=st.sampled_from(list(TILES)))
def test_reference_is_the_float64_result_up_to_rounding(heads: Heads, tile: str) -> None:
    args = heads.on("cpu")
    assert_right(attention.reference(*args, tile), *args)


def taken_by(kernel: Kernel, heads: Heads) -> Heads:
    """With what the kernel takes instead of what it refuses."""
    if not kernel.name.startswith("hopper"):
        return heads
    half = torch.bfloat16 if heads.dtype == torch.float32 else heads.dtype
    return replace(heads, dtype=half, D=-(-heads.D // 8) * 8)


@kernels(attention)
@given(heads=heads, tile=st.sampled_from(list(TILES)))
@settings(max_examples=40)  # on a GPU nearly every one compiles a kernel
@example(Heads(S=300, T=300, D=64, dtype=torch.bfloat16), "128x128")  # several blocks of keys
@example(Heads(S=300, T=129, D=72), "128x128")
def test_kernel_result_is_the_float64_result_up_to_rounding(
    op: Op, kernel: Kernel, device: str, heads: Heads, tile: str
) -> None:
    heads = taken_by(kernel, heads)
    if TILES[tile].refuses(heads.D) is not None:
        tile = "128x128"
    tile = MASKED if kernel.name == "hopper_padded" else tile
    args = heads.on(device)
    if kernel.name.startswith("hopper") and heads.layout == "columns":
        why = kernel.refuses(*args, tile)  # not if all tensors are empty, or of one row
        assert why is None or "with strides" in why
        args = replace(heads, layout="heads" if why else "columns").on(device)
    assert kernel.name.startswith("cpu") or kernel.refuses(*args, tile) is None
    assert_right(kernel.fn(*args, tile), *args)


def test_what_the_kernel_does_not_take_is_said() -> None:
    kernel, _, others = attention.kernels
    assert others.refuses(*Heads().on("cpu"), "128x128") is None
    assert others.refuses(*Heads().on("cpu"), None) is None
    assert attention.choose(*Heads().on("cpu"), "128x128") is others
    assert "sm_90 alone" in str(kernel.refuses(*Heads().on("cpu"), "128x128"))
    assert TILES["128x192"].refuses(64) is None
    assert "registers" in str(TILES["128x192"].refuses(72))
    assert "registers" in str(TILES["192x112"].refuses(72))
    assert TILES["256x64"].refuses(72) is None
    assert "registers" in str(TILES["256x64"].refuses(80))
    assert "multiple of 8 up to 128" in str(TILES["128x128"].refuses(136))
    assert "multiple of 8 up to 128" in str(TILES["128x128"].refuses(20))


@pytest.mark.cuda
def test_the_kernel_says_what_is_wrong_with_its_inputs() -> None:
    kernel, *_ = attention.kernels
    half = Heads(D=72, dtype=torch.bfloat16)
    q, k, v, scale = half.on("cuda")
    if (why := kernel.refuses(q, k, v, scale, "128x128")) is not None:
        pytest.skip(why)
    assert kernel.refuses(q, k, v, scale, None) == "no tile is named"
    for wrong, said in [
        ((q.float(), k, v), "q is torch.float32, needs float16 or bfloat16"),
        ((q, k[..., 1:], v), "k does not start at a multiple of 16 bytes"),
        ((q, k, replace(half, layout="columns").on("cuda")[2]), "v with strides"),
        ((q[:, :, :1].expand_as(q), k, v), "q with strides"),
    ]:
        assert said in str(kernel.refuses(*wrong, scale, "128x128"))


@kernels(attention)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("tokens", [1, 64, 197, 257])
def test_every_element_is_written(
    op: Op, kernel: Kernel, device: str, tile: str, tokens: int, poisoned: None
) -> None:
    width = 72 if TILES[tile].refuses(72) is None else 64
    tile = MASKED if kernel.name == "hopper_padded" else tile
    args = Heads(B=2, S=tokens, T=tokens, D=width, dtype=torch.bfloat16).on(device)
    assert_right(kernel.fn(*args, tile), *args)


@implementations(attention)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_is_not_finite_leaves_the_others_alone(
    op: Op, kernel: Kernel, device: str, tile: str, dtype: torch.dtype
) -> None:
    tile = MASKED if kernel.name == "hopper_padded" else tile
    q, k, v, scale = taken_by(kernel, Heads(S=70, T=70, dtype=dtype, layout="heads")).on(device)
    clean = kernel.fn(q, k, v, scale, tile)
    q[0, 1, 7, 3] = torch.nan
    y = kernel.fn(q, k, v, scale, tile)
    others = torch.ones(y.shape[:3], dtype=torch.bool)
    others[0, 1, 7] = False
    assert torch.equal(y.cpu()[others], clean.cpu()[others])
    assert y[0, 1, 7].isnan().all()


@kernels(attention, named="cpu")
@pytest.mark.parametrize("dtype", FLOATS)
def test_each_batch_has_the_bits_of_a_packed_sequence(
    op: Op, kernel: Kernel, dtype: torch.dtype
) -> None:
    """On any number of threads."""
    q, k, v, scale = Heads(B=3, S=150, T=150, D=40, dtype=dtype).on("cpu")
    y = kernel.fn(q, k, v, scale)
    packed = [t.transpose(0, 1).flatten(1, 2)[None] for t in (q, k, v)]
    _, _, position, cu_seqlens, tiles, _ = token_index(torch.ones(3, 150, dtype=torch.bool))
    where = cu_seqlens, position, tiles, scale, 150
    (varlen,) = (n for n in runnable(varlen_attention) if n.name == kernel.name)
    assert torch.equal(varlen.fn(*packed, *where).unflatten(2, (3, 150))[0].transpose(0, 1), y)
    with threads(2):
        assert torch.equal(kernel.fn(q, k, v, scale), y)


@kernels(attention, named="cpu")
@pytest.mark.parametrize("D", [5, 32, 64, 72])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nothing_is_read_behind_the_operands(
    op: Op, kernel: Kernel, D: int, dtype: torch.dtype
) -> None:
    q, k, v, scale = Heads(S=70, T=33, D=D, dtype=dtype).on("cpu")
    rows = [t.transpose(1, 2).reshape(-1, 2 * D) for t in (q, k, v)]
    ended = [at_the_end_of_memory(t, 2 * D).view(1, -1, 2, D).transpose(1, 2) for t in rows]
    assert torch.equal(kernel.fn(*ended, scale), kernel.fn(q, k, v, scale))


@kernels(attention, named="cpu")
@pytest.mark.parametrize("tokens", [1, 16, 33, 64, 197])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_element_is_written_without_a_tile(
    op: Op, kernel: Kernel, tokens: int, dtype: torch.dtype, poisoned: None
) -> None:
    args = Heads(B=2, S=tokens, T=tokens, D=24, dtype=dtype).on("cpu")
    assert_right(kernel.fn(*args), *args)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tile", [None, "128x128"])
def test_opcheck_of_layouts(layout: str, tile: str | None, device: str) -> None:
    heads = Heads(B=2, S=7, dtype=torch.bfloat16, layout=layout)
    torch.library.opcheck(attention.target, (*heads.on(device), tile))


def test_one_compiled_graph_takes_every_size() -> None:
    """Inductor calls the CPU kernel with symbolic sizes, on views that it does not copy."""
    torch._dynamo.reset()
    w = torch.randn(3 * 64, 64) / 8

    def attended(x: Tensor) -> Tensor:
        qkv = torch.nn.functional.linear(x, w)
        q, k, v = (t.unflatten(2, (4, 16)).transpose(1, 2) for t in qkv.split(64, -1))
        return attention(q, k, v, 0.25).transpose(1, 2).flatten(2)

    run = torch.compile(attended, fullgraph=True, dynamic=True)
    for B, S in ((3, 70), (4, 90), (2, 33)):
        x = torch.randn(B, S, 64)
        torch.testing.assert_close(run(x), attended(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TILES)
@given(T=st.integers(1, 5000), S=st.integers(1, 5000), B=st.integers(1, 70), H=st.integers(1, 32))
def test_a_launch_covers_every_query_and_every_key_once(
    name: str, B: int, H: int, S: int, T: int
) -> None:
    tile = TILES[name]
    keys, blocks, down, heads, tiles = tile.cover(B, H, S, T)
    assert 1 <= keys <= tile.n and keys + blocks * tile.n == T
    assert (down - 1) * tile.groups * ROWS < S <= down * tile.groups * ROWS
    assert heads == H and tiles == down * H * B
    assert tile.grid(B, H, S, 132) == min(tiles, 132)
    macros = tile.defines(T, 64, "bfloat16")
    assert keys <= macros["FIRST"] < keys + 16 and macros["FIRST"] % 16 == 0
    assert macros["MASKED"] == (keys != macros["FIRST"])


def test_a_tile_takes_heads_only_up_to_a_width() -> None:
    for tile in TILES.values():
        taken = [D for D in range(8, WIDEST + 1, 8) if tile.refuses(D) is None]
        assert taken == list(range(8, max(taken) + 1, 8)) and max(taken) >= 64
        assert all(tile.shared(D) <= SHARED for D in taken)


@needs_nvrtc
@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("T", [197, 729])
def test_the_kernel_compiles_to_tensor_core_instructions(name: str, T: int, tmp_path: Path) -> None:
    """For the widest head that the tile takes."""
    tile, file = TILES[name], tmp_path / "tile.cubin"
    D = max(D for D in range(8, WIDEST + 1, 8) if tile.refuses(D) is None)
    file.write_bytes(hopper.cubin(tile, T, D, "bfloat16"))

    def said(what: str) -> str:
        command = [str(CUOBJDUMP), what, str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = said("-res-usage")
    assert "attention_hopper" in usage
    assert (name, T) in SHORT or sum(map(int, re.findall(r"STACK:(\d+)", usage))) <= SPILLED
    assert sum(map(int, re.findall(r"REG:(\d+)", usage))) * tile.threads <= 65_536
    sass = said("-sass")
    shapes = set(re.findall(r"HGMMA\.64x(\d+)x16\.F32\.BF16", sass))
    assert shapes == {str(tile.n), str(tile.defines(T, D, "bfloat16")["FIRST"]), str(D)}
    if (name, T) not in SHORT:
        assert_products_run_together(sass)
        if tile.groups == 3:
            assert_softmax_overlaps(sass)
    assert_registers_suffice(sass, usage, tile.threads)


def assert_products_run_together(sass: str) -> None:
    """ptxas waits for each one by itself if it lacks registers, and NVRTC does not say so."""
    assert sass.count("WARPGROUP.DEPBAR") <= 8 < sass.count("HGMMA.")


def assert_softmax_overlaps(sass: str) -> None:
    """ptxas may move the wait for a product up to where it begins, past other instructions."""
    between = re.findall(r"DEPBAR\.LE gsb0, 0x1(.*?)DEPBAR\.LE gsb0, 0x0", sass, re.DOTALL)
    assert between and all("MUFU.EX2" in part for part in between)


def assert_registers_suffice(sass: str, usage: str, threads: int) -> None:
    """A CTA has the registers that it was launched with: if warp groups ask for more, they wait
    forever."""
    (launched,) = map(int, re.findall(r"REG:(\d+)", usage))
    (given,) = (int(n, 16) for n in re.findall(r"USETMAXREG\.DEALLOC\.CTAPOOL (\w+)", sass))
    (taken,) = {int(n, 16) for n in re.findall(r"USETMAXREG\.TRY_ALLOC\.CTAPOOL UP\d, (\w+)", sass)}
    assert given * 128 + taken * (threads - 128) <= launched * threads
