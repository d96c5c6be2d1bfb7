"""Compile every kernel for one architecture, without a GPU: `python -m tests.ops.offline 90`.

Prints one JSON object per kernel: name, stack (bytes spilled), shared (bytes), mma (instructions),
sums (the layouts of what is added up).
Runs in a process of its own because under TRITON_INTERPRET nothing compiles.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graphquant.ops.define import load_kernels
from graphquant.ops.int8_linear import tiles
from graphquant.ops.numerics import ACTIVATIONS, padded, vectors
from graphquant.ops.triton_rows import quantize_rows_kernel, row_config
from graphquant.ops.triton_util import unit_of

load_kernels()
from graphquant.ops.int8_linear.triton import int8_linear_kernel  # noqa: E402
from graphquant.ops.int8_linear.triton_tma import int8_linear_tma_kernel  # noqa: E402
from graphquant.ops.norm_quantize.triton import norm_quantize_kernel  # noqa: E402
from graphquant.ops.token_index.triton import config, token_index_kernel  # noqa: E402
from graphquant.ops.varlen_attention import triton as varlen  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
QPARAMS = {
    "factor": {"factor_ptr": "*fp32"},
    "range": {"low": "fp32", "high": "fp32"},
    "clip": {"clip": "fp32"},
    "num_rows": {"num_rows_ptr": "*i32"},
}
Case = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]


def cases(sm: int) -> Iterator[Case]:
    """(name, kernel, pointer and integer types, constants, options); None is an absent argument."""
    for act, K in [*((a, 1152) for a in ("none", *ACTIVATIONS)), ("gelu", 4304), ("silu", 20_000)]:
        yield _row_case(f"rows {act} {K}", quantize_rows_kernel, K, {}, {"ACT": act})
    up = {"up_ptr": "*bf16", "up_row": "i32"}
    yield _row_case("rows glu 3420", quantize_rows_kernel, 3420, up, {"ACT": "silu"})
    yield _row_case("rows product 1152", quantize_rows_kernel, 1152, up, {"ACT": "none"})
    affine = {"gamma_ptr": "*bf16", "beta_ptr": "*bf16", "eps": "fp32"}
    for K in (64, 1152, 4096, 20_000):
        for keep in (False, True):
            types = affine | ({"y_ptr": "*bf16"} if keep else {})
            yield _row_case(
                f"norm {K} keep={keep}", norm_quantize_kernel, K, types, {"RMS": not keep}
            )
    for name, given in QPARAMS.items():
        for K in (1152, 20_000):
            yield _row_case(f"rows {K} {name}", quantize_rows_kernel, K, given, {"ACT": "gelu"})
            types = affine | given
            yield _row_case(f"norm {K} {name}", norm_quantize_kernel, K, types, {"RMS": False})
    seen = {"window": "i32", "bias_ptr": "*bf16"}
    for D, types in ((64, {}), (64, seen), (80, {}), (128, {})):
        for dtype in ("bf16", "fp32"):
            yield _varlen_case(f"varlen {D} {dtype} {', '.join(types)}", D, dtype, types)
    for B, S in ((8, 4096), (1024, 128)):
        yield _index_case(f"index {B} x {S}", B, S)
    for unit in (1, 4, 16):
        x = {"RMS": False, "X_UNIT": unit}
        yield _row_case(f"sums 1004 unit={unit}", norm_quantize_kernel, 1004, affine, x)
    for tile in tiles.POINTER:
        for tail in (False, True):
            for dtype in ("bf16", "fp32"):
                name = f"pointer {tile} {dtype} tail={tail}"
                yield _linear_case(name, tile, dtype, {"TAIL": tail})
        yield _linear_case(f"pointer num_rows {tile}", tile, "bf16", {"TAIL": True}, num_rows=True)
    if sm >= 90:
        for tile in tiles.TMA:
            yield _linear_case(f"tma {tile}", tile, "bf16", None, by_tma=True)
            name = f"tma num_rows {tile}"
            yield _linear_case(name, tile, "bf16", None, by_tma=True, num_rows=True)
        for tile in tiles.TMA_FLOAT32:
            yield _linear_case(f"tma fp32 {tile}", tile, "fp32", None, by_tma=True)
        for tile in tiles.TMA_ODD_N:
            yield _linear_case(f"tma odd N {tile}", tile, "bf16", None)
            yield _linear_case(f"tma odd N fp32 {tile}", tile, "fp32", None)


def _row_case(
    name: str, kernel: Any, K: int, types: dict[str, str], constants: dict[str, Any]
) -> Case:
    config = row_config(K, 2 if "up_ptr" in types else 1)
    warps = config.pop("num_warps")
    unit = unit_of(K)
    base = {"x_ptr": "*bf16", "xq_ptr": "*i8", "scale_ptr": "*fp32", "shift_ptr": "*fp32"}
    base |= {"M": "i32", "x_row": "i32"}
    constants = {
        "K": K,
        "K_PAD": vectors(K),
        "XQ_ROW": padded(K),
        "X_UNIT": unit,
        "UP_UNIT": unit,
        **config,
        **constants,
    }
    return name, kernel, base | {"up_row": "i32"} | types, constants, {"num_warps": warps}


def _index_case(name: str, B: int, S: int) -> Case:
    types = {"valid_ptr": "*i1"} | dict.fromkeys(("index_ptr", "slot_ptr"), "*i64")
    types |= {f"{t}_ptr": "*i32" for t in ("position", "cu_seqlens", "tiles", "count")}
    types |= dict.fromkeys(("B", "S", "T", "row", "n_tiles"), "i32")
    sizes = config(B, S, num_sms=132)
    warps = sizes.pop("num_warps")
    units = {"S_UNIT": unit_of(S), "ROW_UNIT": unit_of(S)}
    return name, token_index_kernel, types, {**units, **sizes}, {"num_warps": warps}


def _varlen_case(name: str, D: int, dtype: str, types: dict[str, str]) -> Case:
    base = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "y_ptr"), f"*{dtype}")
    base |= dict.fromkeys(("cu_seqlens_ptr", "position_ptr", "tiles_ptr"), "*i32")
    base |= dict.fromkeys((f"{t}_{of}" for t in "qkv" for of in ("head", "row")), "i32")
    base |= dict.fromkeys(("bias_head", "bias_row", "bias_column"), "i32") | {"scale": "fp32"}
    sizes = varlen.config(D, torch.float32 if dtype == "fp32" else torch.bfloat16)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"H": 12, "GROUP": 1, "D": D, "CAUSAL": bool(types), "UNIT": 16, **sizes}
    return name, varlen.varlen_attention_kernel, base | types, constants, options


def _linear_case(
    name: str,
    tile: tiles.Tile,
    dtype: str,
    tail: dict[str, bool] | None,
    by_tma: bool = False,
    num_rows: bool = False,
) -> Case:
    types = dict.fromkeys(("M", "N", "K", "K_pad", "x_row", "w_row", "residual_row"), "i32")
    types |= dict.fromkeys(("x_scale_ptr", "x_shift_ptr", "w_scale_ptr", "w_sum_ptr"), "*fp32")
    types |= dict.fromkeys(("bias_ptr", "residual_ptr", "y_ptr"), f"*{dtype}")
    types |= {"xq_ptr": "*i8", "wq_ptr": "*i8"}
    types |= {"x_desc": f"tensordesc<i8[{tile.m}, {tile.k}]>"}
    types |= {"w_desc": f"tensordesc<i8[{tile.n}, {tile.k}]>"}
    if num_rows:
        types["num_rows_ptr"] = "*i32"
    if by_tma:
        types["y_desc"] = f"tensordesc<{dtype}[{tile.m}, {tile.n}]>"
    constants = {"BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP": tiles.GROUP}
    kernel = int8_linear_tma_kernel if tail is None else int8_linear_kernel
    aligned = by_tma or tail is not None
    constants |= {"RESIDUAL_UNIT": 16 if aligned else 1, **(tail or {})}
    if not aligned:
        types["N"] = "i32 odd"
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return name, kernel, types, constants, options


def compiled(case: Case, sm: int) -> dict[str, Any]:
    name, kernel, types, constants, options = case
    constants = {**constants, "OVERLAP": sm >= 90}
    arguments = kernel.arg_names
    signature = {a: types.get(a, "constexpr").removesuffix(" odd") for a in arguments}
    at = {a: (i,) for i, a in enumerate(arguments)}
    multiples_of_16 = [
        a
        for a in arguments
        if signature[a].startswith("*")
        or (a in ("N", "K_pad", "x_row", "w_row") and types.get(a) == "i32")
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={at[a]: constants.get(a) for a in arguments if signature[a] == "constexpr"},
        attrs={at[a]: [["tt.divisibility", 16]] for a in multiples_of_16},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    mma = r"(?:wgmma\.mma_async|mma\.sync)[.\w]*"
    return {
        "name": name,
        "stack": sum(map(int, re.findall(r"STACK:(\d+)", usage))),
        "local": len(re.findall(r"\b(?:ld|st)\.local", binary.asm["ptx"])),
        "shared": binary.metadata.shared,
        "mma": sorted(set(re.findall(mma, binary.asm["ptx"]))),
        "sums": _sums(binary.asm["ttgir"]),
    }


def _sums(ir: str) -> list[str]:
    """The types of the floats that are added up, with their layouts: the order of the sums."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ir, re.MULTILINE))
    types = re.findall(r"\}\) : \((tensor<\w+xf32, #\w+>)\)", ir)
    return [re.sub(r"#\w+", lambda m: layouts[m[0]], t) for t in types]


if __name__ == "__main__":
    for case in cases(int(sys.argv[1])):
        sys.stdout.write(json.dumps(compiled(case, int(sys.argv[1]))) + "\n")
