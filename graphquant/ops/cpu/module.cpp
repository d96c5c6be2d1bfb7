// The extension module: one function for each op.
#include <sys/syscall.h>
#include <unistd.h>

#include "activations.h"
#include "call.h"

namespace graphquant {
namespace {

// Linux grants the memory of AMX tiles to processes that ask. False: it is refused.
bool may_use_tiles() {
#if defined(__AMX_INT8__)
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
#else
  return true;
#endif
}

PyObject* names_of_activations() {
  PyObject* names = PyList_New(0);
  for (const char* name : NAMES) {
    PyObject* text = PyUnicode_FromString(name);
    PyList_Append(names, text);
    Py_DECREF(text);
  }
  return names;
}

template <class F>
PyCFunction fast(F* f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyMethodDef functions[] = {
    {"quantize", fast(quantize), METH_FASTCALL, "M, num_rows, K, act, x, up, qparams, results"},
    {"norm_quantize", fast(norm_quantize), METH_FASTCALL, "M, num_rows, K, rms, eps, x, gamma, beta, y, qparams, results"},
    {"int8_linear", fast(int8_linear), METH_FASTCALL,
     "M, num_rows, N, K, x stride, xq, x_scale, x_shift, w stride (0: packed), wq, w_scale, w_sum, bias, residual, y"},
    {"pack_weight", fast(pack_weight), METH_FASTCALL, "N, K, stride, wq, packed"},
    {"attention", fast(attention), METH_FASTCALL,
     "type, B, S, T, H, D, (batch, head, row, column strides, tensor) of q, k and v, scale, y"},
    {"varlen_attention", fast(varlen_attention), METH_FASTCALL,
     "type, H, Hkv, D, sequences, tiles, (head, row, column strides, tensor) of q, k and v, cu_seqlens, position, tiles, scale, causal, "
     "window (-1: none), (type, head, row, column strides, tensor) of bias, y"},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "graphquant_cpu", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace graphquant

PyMODINIT_FUNC PyInit_graphquant_cpu() {
  if (!graphquant::may_use_tiles()) {
    PyErr_SetString(PyExc_ImportError, "the kernel does not let this process use AMX tiles");
    return nullptr;
  }
  PyObject* module = PyModule_Create(&graphquant::definition);
  PyModule_AddObject(module, "activations", graphquant::names_of_activations());
  return module;
}
