"""wgmma instructions as CUDA functions.

PTX wants every register of the accumulators by name, so each shape has a text of its own.
"""

from __future__ import annotations

HEADER = "wgmma_shapes.cuh"  # how the kernels include what `shapes` returns


def shapes(*functions: str) -> str:
    """The text of HEADER: these functions, each once."""
    return '#pragma once\n#include "hopper/wgmma.cuh"\n' + "".join(dict.fromkeys(functions))


def wgmma_ss(n: int, dtype: str) -> str:
    """`wgmma_ss<n>`, D[64, n] (+)= A B^T with A [64, k] and B [n, k] in shared memory.

    dtype is PTX's of A and B: "s8" (k is 32, D int32), "bf16" or "f16" (k is 16, D float32).
    """
    return _wgmma("wgmma_ss", n, dtype, "u64 a", ['"l"(a)'])


def wgmma_rs(n: int, dtype: str) -> str:
    """`wgmma_rs<n>`, D[64, n] (+)= A B with A [64, 16] in registers and B [16, n] in shared memory.

    dtype is PTX's of A and B: "bf16" or "f16"; D is float32.
    """
    return _wgmma("wgmma_rs", n, dtype, "const u32* a", [f'"r"(a[{i}])' for i in range(4)])


def _wgmma(name: str, n: int, dtype: str, a: str, inputs: list[str]) -> str:
    k, d_type, d_ctype, constraint = _ACCUMULATORS[dtype]
    b = n // 2 + len(inputs)  # number of the operand that describes B; D and A come before it
    ds = ", ".join(f"%{i}" for i in range(n // 2))
    as_ = ", ".join(f"%{i}" for i in range(n // 2, b))
    outputs = ", ".join(f'"+{constraint}"(d[{i}])' for i in range(n // 2))
    if name == "wgmma_rs":
        as_, transposed = f"{{{as_}}}", ", 1"  # B's rows are those of the sum
    else:
        transposed = ", 0, 0"
    modifiers = "" if dtype == "s8" else f", 1, 1{transposed}"  # neither operand negated
    return (
        f"template <>\n__device__ __forceinline__ void {name}<{n}>"
        f"({d_ctype}* d, {a}, u64 b, int accumulate) {{\n"
        f'  asm volatile("{{\\n.reg .pred accumulate;\\nsetp.ne.b32 accumulate, %{b + 1}, 0;\\n"\n'
        f'      "wgmma.mma_async.sync.aligned.m64n{n}k{k}.{d_type}.{dtype}.{dtype} "\n'
        f'      "{{{ds}}}, {as_}, %{b}, accumulate{modifiers};\\n}}"\n'
        f'      : {outputs}\n      : {", ".join(inputs)}, "l"(b), "r"(accumulate));\n}}\n'
    )


# dtype of A and B: k, dtype of D in PTX and in C++, and the letter of D's registers in asm
_ACCUMULATORS = {
    "s8": (32, "s32", "int", "r"),
    "bf16": (16, "f32", "float", "f"),
    "f16": (16, "f32", "float", "f"),
}
