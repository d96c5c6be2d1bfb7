"""CUDA C++ compiled at run time by NVRTC, which torch's CUDA wheels bring.

Neither nvcc nor CUDA's headers are needed: a source includes only headers that it comes with.
The result is a cubin, kept in the cache (cache.py).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import site
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from graphquant.errors import KernelBuildError
from graphquant.ops.runtime import cache
from graphquant.utils.progress import phase

Call = Callable[..., int]


def compile_cubin(
    source: str,
    defines: Mapping[str, object],
    arch: str,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> bytes:
    """The cubin of CUDA C++ `source` for `arch` ("sm_90a"), with `-Dname=value` for each define.

    `headers` are the texts behind the names that the source includes. Raises KernelBuildError with
    NVRTC's log.
    """
    options = [f"--gpu-architecture={arch}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in sorted(defines.items())]
    texts = (source, *(part for header in sorted(headers.items()) for part in header))
    made_from = "\0".join((*texts, *options, *map(str, version()), str(torch.version.cuda)))
    key = hashlib.sha256(made_from.encode()).hexdigest()
    cubin = cache.get(key, "kernel.cubin", checked=True)
    if cubin is None:
        with phase("compiling CUDA kernels"):
            cubin = _compile(source, options, headers)
        cache.put(key, "kernel.cubin", cubin, checked=True)
    return cubin


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        _library()
    except KernelBuildError as error:
        return str(error)
    return None


@functools.cache
def version() -> tuple[int, int]:
    """NVRTC's version, e.g. (13, 0)."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def _compile(source: str, options: list[str], headers: Mapping[str, str]) -> bytes:
    library, program = _library(), ctypes.c_void_p()
    text = ctypes.c_char_p(source.encode())
    create = library.nvrtcCreateProgram
    included = (len(headers), _strings(headers.values()), _strings(headers))
    _check(create(ctypes.byref(program), text, b"kernel.cu", *included))
    try:
        if library.nvrtcCompileProgram(program, len(options), _strings(options)):
            log = _read(program, library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog)
            raise KernelBuildError(f"NVRTC {version()}: {_text(log)}")
        return _read(program, library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _strings(of: Iterable[str]) -> ctypes.Array[ctypes.c_char_p]:
    """C's array of strings."""
    encoded = [s.encode() for s in of]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def _text(log: bytes) -> str:
    return log.rstrip(b"\0").decode(errors="replace").strip()


def _read(program: ctypes.c_void_p, size_of: Call, read: Call) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(read(program, buffer))
    return buffer.raw


def _check(result: int) -> None:
    if result:
        text = _library().nvrtcGetErrorString
        text.restype = ctypes.c_char_p
        raise KernelBuildError(f"NVRTC: {text(result).decode()}")


@functools.cache
def _library() -> ctypes.CDLL:
    tried = []
    for name in _names():
        try:
            # It opens its builtins by name; releases before 13.5 do not look beside it.
            if (folder := Path(name).parent).is_absolute():
                for builtins in sorted(folder.glob("libnvrtc-builtins.so.*")):
                    ctypes.CDLL(str(builtins))
            return ctypes.CDLL(name)
        except OSError as error:
            tried.append(str(error))
    raise KernelBuildError(
        f"NVRTC was not found: {'; '.join(tried)} (pip install nvidia-cuda-nvrtc)"
    )


def _names() -> Iterator[str]:
    major = (torch.version.cuda or "13").partition(".")[0]
    yield f"libnvrtc.so.{major}"  # loaded by torch already, or on the loader's path
    for folder in dict.fromkeys([*site.getsitepackages(), *sys.path]):
        yield from map(str, Path(folder).glob(f"nvidia/*/lib/libnvrtc.so.{major}"))
    yield f"/usr/local/cuda/lib64/libnvrtc.so.{major}"
