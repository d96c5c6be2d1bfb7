"""A libcuda.so.1 that only writes down what it is asked: launch.c runs on it without a GPU.

A test that says @on_stub runs in a process of its own, which finds this library where others find
the NVIDIA driver. A real driver copies as many bytes for each parameter as the kernel declares, so
tests set `sizes` first.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

MAX_PARAMS = 32
MAX_RECORDS = 4096

SOURCE = """
#include <string.h>
#include <unistd.h>
#include "cuda.h"

typedef struct {
  unsigned long long function, stream;
  unsigned grid[3], block[3], shared, attributes, cluster[3], serialization;
  unsigned long long at[32];
  unsigned char bytes[32][128];
} Launched;

typedef struct {
  unsigned long long address, sizes[5], strides[4];
  unsigned type, rank, box[5], steps[5], interleave, swizzle, promotion, fill;
} Encoded;

Launched launched[4096];
Encoded encoded[4096];
int n_launched, n_encoded, n_params, sizes[32], delay_us, shared_limit;
int no_context, last_device;
CUresult answer_launch, answer_encode, answer_load, answer_function, answer_set;
CUresult answer_pointer, answer_device, answer_retain, answer_enter;
char loaded[16], named[32];

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **params, void **extra) {
  if (no_context) return CUDA_ERROR_INVALID_CONTEXT;
  if (answer_launch) return answer_launch;
  if (delay_us) usleep(delay_us);
  Launched *l = &launched[__atomic_fetch_add(&n_launched, 1, __ATOMIC_SEQ_CST) % 4096];
  memset(l, 0, sizeof *l);
  l->function = (unsigned long long)f;
  l->stream = (unsigned long long)c->hStream;
  l->grid[0] = c->gridDimX, l->grid[1] = c->gridDimY, l->grid[2] = c->gridDimZ;
  l->block[0] = c->blockDimX, l->block[1] = c->blockDimY, l->block[2] = c->blockDimZ;
  l->shared = c->sharedMemBytes;
  l->attributes = c->numAttrs;
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    if (c->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) {
      l->cluster[0] = c->attrs[i].value.clusterDim.x;
      l->cluster[1] = c->attrs[i].value.clusterDim.y;
      l->cluster[2] = c->attrs[i].value.clusterDim.z;
    }
    if (c->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
      l->serialization = c->attrs[i].value.programmaticStreamSerializationAllowed;
  }
  for (int i = 0; i < n_params; ++i) {
    l->at[i] = (unsigned long long)params[i];
    memcpy(l->bytes[i], params[i], sizes[i]);
  }
  return extra ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
    void *address, const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
    const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  if (answer_encode) return answer_encode;
  if ((unsigned long long)map % 64) return CUDA_ERROR_MISALIGNED_ADDRESS;
  Encoded *e = &encoded[n_encoded++ % 4096];
  *e = (Encoded){.address = (unsigned long long)address, .type = type, .rank = rank};
  e->interleave = interleave, e->swizzle = swizzle, e->promotion = promotion, e->fill = fill;
  for (unsigned i = 0; i < rank; ++i) {
    e->sizes[i] = dims[i], e->box[i] = box[i], e->steps[i] = steps[i];
    if (i + 1 < rank) e->strides[i] = strides[i];
  }
  memset(map, n_encoded, sizeof *map);
  memcpy(map, &e->address, 8);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = no_context ? 0 : (CUcontext)0x70;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr address) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) return CUDA_ERROR_INVALID_VALUE;
  *(int *)data = address >> 32; /* the device of an At, for these tests */
  return answer_pointer;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal + 100;
  return answer_device;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)(unsigned long long)device;
  return answer_retain;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  if (answer_enter) return answer_enter;
  last_device = (int)(unsigned long long)context - 100;
  no_context = 0;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (no_context) return CUDA_ERROR_INVALID_CONTEXT;
  memcpy(loaded, image, sizeof loaded);
  *module = (CUmodule)0x50;
  return answer_load;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  strncpy(named, name, sizeof named - 1);
  *function = (CUfunction)((unsigned long long)module + 1);
  return answer_function;
}

CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) shared_limit = value;
  return answer_set;
}

#ifndef OLD
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == 999 ? 0 : "the stub was told to fail";
  return CUDA_SUCCESS;
}
#endif
"""


class Launched(ctypes.Structure):
    """One cuLaunchKernelEx."""

    _fields_ = (
        ("function", ctypes.c_ulonglong),
        ("stream", ctypes.c_ulonglong),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("attributes", ctypes.c_uint),
        ("cluster", ctypes.c_uint * 3),
        ("serialization", ctypes.c_uint),
        ("at", ctypes.c_ulonglong * MAX_PARAMS),
        ("bytes", (ctypes.c_ubyte * 128) * MAX_PARAMS),
    )

    def number(self, i: int) -> int:
        """Parameter i as eight bytes."""
        return int.from_bytes(bytes(self.bytes[i])[:8], "little")


class Encoded(ctypes.Structure):
    """One cuTensorMapEncodeTiled."""

    _fields_ = (
        ("address", ctypes.c_ulonglong),
        ("sizes", ctypes.c_ulonglong * 5),
        ("strides", ctypes.c_ulonglong * 4),
        ("type", ctypes.c_uint),
        ("rank", ctypes.c_uint),
        ("box", ctypes.c_uint * 5),
        ("steps", ctypes.c_uint * 5),
        ("interleave", ctypes.c_uint),
        ("swizzle", ctypes.c_uint),
        ("promotion", ctypes.c_uint),
        ("fill", ctypes.c_uint),
    )


class At(NamedTuple):
    """All that launch.c asks of a tensor."""

    address: int

    def data_ptr(self) -> int:
        return self.address + 0  # a new object every time, as torch's


class Driver:
    """The stub as this process sees it, and launch.c on top of it."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")

    def __getattr__(self, name: str) -> int:
        return ctypes.c_int.in_dll(self._library, name).value

    def set(self, **values: int) -> None:
        for name, value in values.items():
            ctypes.c_int.in_dll(self._library, name).value = value

    def sizes(self, *sizes: int) -> None:
        """What the kernel declares: the bytes of each parameter."""
        self.set(n_params=len(sizes))
        (ctypes.c_int * MAX_PARAMS).in_dll(self._library, "sizes")[: len(sizes)] = sizes

    def text(self, name: str) -> bytes:
        return bytes((ctypes.c_char * 16).in_dll(self._library, name).value)

    @property
    def launched(self) -> list[Launched]:
        assert self.n_launched <= MAX_RECORDS
        every = (Launched * MAX_RECORDS).in_dll(self._library, "launched")
        return [Launched.from_buffer_copy(v) for v in every[: self.n_launched]]

    @property
    def encoded(self) -> list[Encoded]:
        every = (Encoded * MAX_RECORDS).in_dll(self._library, "encoded")
        return [Encoded.from_buffer_copy(v) for v in every[: self.n_encoded]]

    @property
    def native(self) -> Any:
        """launch.c, without graphquant and torch around it, which take seconds to import."""
        loader = importlib.machinery.ExtensionFileLoader("graphquant_launch", os.environ["NATIVE"])
        spec = importlib.util.spec_from_loader("graphquant_launch", loader)
        assert spec is not None
        module = sys.modules.setdefault("graphquant_launch", importlib.util.module_from_spec(spec))
        return module


class Stub:
    """Where the stub was built, and processes that find it."""

    def __init__(self, folder: Path) -> None:
        from triton import backends

        headers = Path(backends.__file__).parent / "nvidia" / "include"
        (folder / "stub.c").write_text(SOURCE)
        for name, *more in (("new",), ("old", "-DOLD")):
            (folder / name).mkdir()
            library = folder / name / "libcuda.so.1"
            subprocess.run(
                ["gcc", "-shared", "-fPIC", "-O1", *more, f"-I{headers}", "-o", str(library),
                 str(folder / "stub.c")],
                check=True,
            )  # fmt: skip
        self.folder = folder
        build = "from graphquant.ops.runtime.launch import native; print(native().__file__)"
        built = self.python("-c", build)
        assert built.returncode == 0, built.stderr
        self.module = built.stdout.strip()

    def python(self, *args: str, driver: str = "new") -> subprocess.CompletedProcess[str]:
        command, env = [sys.executable, *args], self._environment(driver)
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)

    def _environment(self, driver: str) -> dict[str, str]:
        return {
            **os.environ,
            "LD_LIBRARY_PATH": str(self.folder / driver),
            "TRITON_CACHE_DIR": str(self.folder / "cache"),
            "NATIVE": getattr(self, "module", ""),
            "OMP_NUM_THREADS": "1",
        }

    @functools.cached_property
    def _server(self) -> subprocess.Popen[str]:
        """A process that has imported graphquant; it ends with this one."""
        command, env = [sys.executable, "-m", "tests.ops.driver"], self._environment("new")
        return subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def forked(self, file: str, name: str) -> tuple[int, str]:
        """The exit code of a test in a process forked from that one, and what it printed."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(f"{file} {name}\n")
        self._server.stdin.flush()
        code, printed = json.loads(self._server.stdout.readline())
        return code, printed


def on_stub(body: Callable[[Driver], None]) -> Callable[[Stub], None]:
    """Decorator: the test runs in its own process, on the stub."""

    def test(stub: Stub) -> None:
        child = stub.python("-m", "tests.ops.driver", body.__module__, body.__name__)
        if child.returncode:
            pytest.fail(child.stdout + child.stderr, pytrace=False)

    test.__name__, test.__doc__ = body.__name__, body.__doc__
    test.body = body  # type: ignore[attr-defined]
    return test


def on_stub_with_graphquant(body: Callable[[Driver], None]) -> Callable[[Stub], None]:
    """The same for a test that needs torch, Triton and graphquant, which take seconds to import:
    its process is forked from one that has imported them."""

    def test(stub: Stub) -> None:
        code, printed = stub.forked(body.__module__, body.__name__)
        if code:
            pytest.fail(printed, pytrace=False)

    test.__name__, test.__doc__ = body.__name__, body.__doc__
    test.body = body  # type: ignore[attr-defined]
    return test


def run(file: str, name: str) -> None:
    getattr(importlib.import_module(file), name).body(Driver())


def serve() -> None:
    """For each line with a file and a test's name: run it in a forked process, answer with its exit
    code and what it printed."""
    import torch

    from graphquant.ops.runtime import launch  # noqa: F401

    torch.set_num_threads(1)  # a pool of threads would not be there in a forked process
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as printed:
            if not (child := os.fork()):
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
                code = 1
                try:
                    run(*line.split())
                    code = 0
                except BaseException:
                    traceback.print_exc()
                    raise
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            _, status = os.waitpid(child, 0)
            printed.seek(0)
            answer = os.waitstatus_to_exitcode(status), printed.read()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    if sys.argv[1:]:
        run(*sys.argv[1:])
    else:
        serve()
