"""CUDA C++ to a cubin, without a GPU: NVRTC needs none. (pip install nvidia-cuda-nvrtc)"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from graphquant.errors import GraphquantError, KernelBuildError
from graphquant.ops.runtime import nvrtc
from graphquant.ops.runtime.nvrtc import compile_cubin, missing, version

needs_nvrtc = pytest.mark.skipif(
    missing() is not None, reason="NVRTC is not installed: pip install nvidia-cuda-nvrtc"
)

SOURCE = """
extern "C" __global__ void add(float* y, const float* x) {
  for (int i = 0; i < N; ++i) y[threadIdx.x] += x[i];
}
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def no_library(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_library", nvrtc._library.__wrapped__)
    monkeypatch.setattr(nvrtc, "version", nvrtc.version.__wrapped__)
    monkeypatch.setattr(nvrtc, "_names", lambda: iter(["libnvrtc.so.1", "/nowhere/libnvrtc.so.1"]))


def test_without_the_library_it_is_said_where_it_was_looked_for(no_library: None) -> None:
    why = missing()
    assert why is not None and why.startswith("NVRTC was not found: libnvrtc.so.1: cannot open")
    assert "; /nowhere/libnvrtc.so.1: cannot open" in why
    with pytest.raises(KernelBuildError, match="NVRTC was not found") as caught:
        compile_cubin(SOURCE, {"N": 1}, "sm_90a")
    assert isinstance(caught.value, GraphquantError) and isinstance(caught.value, RuntimeError)
    with pytest.raises(KernelBuildError, match="NVRTC was not found"):
        nvrtc.version()  # not what was asked while there was a library


@pytest.mark.parametrize(("cuda", "major"), [("13.0", "13"), ("12.8", "12"), (None, "13")])
def test_the_library_of_torchs_own_cuda_is_looked_for(
    cuda: str | None, major: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA 12's wheels have a folder for each library, CUDA 13's one for all."""
    wheels = [tmp_path / "nvidia" / of / "lib" for of in ("cu13", "cuda_nvrtc")]
    for folder in wheels:
        folder.mkdir(parents=True)
        for n in (11, 12, 13):
            (folder / f"libnvrtc.so.{n}").touch()
            (folder / f"libnvrtc-builtins.so.{n}.0").touch()
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(nvrtc.sys, "path", [str(tmp_path), str(tmp_path)])
    monkeypatch.setattr(nvrtc.site, "getsitepackages", list)
    first, *inside, last = nvrtc._names()
    assert first == f"libnvrtc.so.{major}"  # what torch has loaded, if it has
    assert sorted(inside) == sorted(str(f / f"libnvrtc.so.{major}") for f in wheels)
    assert last == f"/usr/local/cuda/lib64/libnvrtc.so.{major}"


@needs_nvrtc
def test_a_kernel_is_compiled_for_an_architecture_without_a_gpu(cache: Path) -> None:
    assert version() >= (11, 0)
    cubin = compile_cubin(SOURCE, {"N": 3}, "sm_90a")
    assert cubin[:4] == b"\x7fELF" and b".text.add\0" in cubin
    assert len({cubin, compile_cubin(SOURCE, {"N": 3}, "sm_80")}) == 2


@needs_nvrtc
def test_what_was_compiled_once_is_read_from_disk(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    real = nvrtc._compile

    def spy(source: str, options: list[str], headers: Mapping[str, str]) -> bytes:
        compiled.append(options)
        return real(source, options, headers)

    monkeypatch.setattr(nvrtc, "_compile", spy)
    first = compile_cubin(SOURCE, {"N": 3, "M": 4}, "sm_90a")
    assert compile_cubin(SOURCE, {"M": 4, "N": 3}, "sm_90a") == first
    assert len(compiled) == 1
    assert "-DM=4" in compiled[0] and "-DN=3" in compiled[0]
    compile_cubin(SOURCE, {"N": 4, "M": 4}, "sm_90a")  # another value,
    compile_cubin(SOURCE, {"N": 3, "M": 4}, "sm_80")  # architecture,
    compile_cubin(SOURCE + " ", {"N": 3, "M": 4}, "sm_90a")  # source,
    monkeypatch.setattr(nvrtc, "version", lambda: (1, 0))
    compile_cubin(SOURCE, {"N": 3, "M": 4}, "sm_90a")  # compiler
    assert len(compiled) == 5
    assert len(list(cache.rglob("kernel.cubin"))) == 5


@needs_nvrtc
def test_headers_are_included_by_name_and_belong_to_what_is_cached(cache: Path) -> None:
    source = '#include "sub/n.cuh"\n' + SOURCE
    with pytest.raises(KernelBuildError, match=r"n\.cuh"):
        compile_cubin(source, {}, "sm_90a")
    three = compile_cubin(source, {}, "sm_90a", {"sub/n.cuh": "#define N 3\n"})
    assert three[:4] == b"\x7fELF"
    assert compile_cubin(source, {}, "sm_90a", {"sub/n.cuh": "#define N 3\n"}) == three
    assert compile_cubin(source, {}, "sm_90a", {"sub/n.cuh": "#define N 7\n"}) != three
    with pytest.raises(KernelBuildError, match=r"sub/n\.cuh\(2\): error"):
        compile_cubin(source, {}, "sm_90a", {"sub/n.cuh": "#define N 3\nwrong\n"})
    assert len(list(cache.rglob("kernel.cubin"))) == 2


@pytest.fixture
def compiled(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sources that were compiled, by a stand-in for NVRTC."""
    sources: list[str] = []

    def compile_(source: str, options: list[str], headers: Mapping[str, str]) -> bytes:
        sources.append(source)
        return b"\x7fELF" + bytes(range(200))

    monkeypatch.setattr(nvrtc, "_compile", compile_)
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    return sources


def tampered(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[50] ^= 1
    file.write_bytes(content)


def planted(file: Path) -> None:
    file.write_bytes(b"\x7fELF another kernel")


def open_to_all(file: Path) -> None:
    file.chmod(0o666)


@pytest.mark.parametrize("change", [tampered, planted, open_to_all, Path.unlink])
@pytest.mark.parametrize("suffix", ["", ".sha256"])
def test_a_cubin_that_is_not_what_was_compiled_is_compiled_again(
    change: Any, suffix: str, cache: Path, compiled: list[str]
) -> None:
    first = compile_cubin(SOURCE, {}, "sm_90a")
    assert compile_cubin(SOURCE, {}, "sm_90a") == first and len(compiled) == 1
    (file,) = cache.rglob(f"kernel.cubin{suffix}")
    change(file)
    for _ in range(2):
        assert compile_cubin(SOURCE, {}, "sm_90a") == first and len(compiled) == 2


@needs_nvrtc
def test_a_compile_error_shows_the_compilers_log(cache: Path) -> None:
    with pytest.raises(KernelBuildError) as caught:
        compile_cubin("\n\n__global__ void f() { undeclared = 1; }\n", {}, "sm_90a")
    said = str(caught.value)
    assert said.startswith(f"NVRTC {version()}: kernel.cu(3): error: ")
    assert '"undeclared" is undefined' in said
    assert said == said.strip() and "\0" not in said  # C ends it with one
    assert not list(cache.rglob("kernel.cubin"))


@needs_nvrtc
def test_an_architecture_that_there_is_not_is_an_error(cache: Path) -> None:
    with pytest.raises(KernelBuildError, match="invalid value for --gpu-architecture"):
        compile_cubin(SOURCE, {"N": 1}, "sm_12345")
