// Arguments of a call from Python: numbers and tensors, read in order. A tensor is read as its address.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <new>

#include "rows.h"

namespace graphquant {

inline PyObject* data_ptr_name() {
  static PyObject* name = PyUnicode_InternFromString("data_ptr");
  return name;
}

class Arguments {
 public:
  Arguments(PyObject* const* values, Py_ssize_t n) : next_(values), end_(values + n) {}

  int64_t integer() {
    PyObject* value = take();
    return value ? PyLong_AsLongLong(value) : 0;
  }
  double number() {
    PyObject* value = take();
    return value ? PyFloat_AsDouble(value) : 0;
  }
  bool maybe(float& number) {  // is it given?
    PyObject* value = take();
    if (!value || value == Py_None) return false;
    number = static_cast<float>(PyFloat_AsDouble(value));
    return true;
  }
  template <class T = void>
  T* address() {  // null for None
    PyObject* value = take();
    if (!value || value == Py_None || PyErr_Occurred()) return nullptr;
    PyObject* number = PyObject_CallMethodNoArgs(value, data_ptr_name());
    if (!number) return nullptr;
    void* found = PyLong_AsVoidPtr(number);
    Py_DECREF(number);
    return static_cast<T*>(found);
  }
  int64_t rows() {  // all there are; how many of them to compute, or None
    int64_t all = integer();
    auto some = address<int32_t>();
    return some ? std::clamp<int64_t>(*some, 0, all) : all;
  }
  Matrix matrix() {  // type, row stride, tensor
    int64_t type = integer(), stride = integer();
    return {address(), type, stride};
  }
  QParams qparams() {  // low, high, clip, factor
    QParams p{};
    bool low = maybe(p.low), high = maybe(p.high);
    p.is_static = low && high, p.clips = maybe(p.clip), p.factor = address<float>();
    return p;
  }
  Quantized quantized() {  // row stride of xq, xq, x_scale, x_shift
    int64_t stride = integer();
    auto q = address<int8_t>();
    auto scale = address<float>();
    return {q, stride, scale, address<float>()};
  }
  bool good() {  // else a Python error is set
    if (!PyErr_Occurred() && next_ != end_) PyErr_SetString(PyExc_TypeError, "too many arguments");
    return !PyErr_Occurred();
  }

 private:
  PyObject* take() {
    if (next_ != end_) return *next_++;
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "too few arguments");
    return nullptr;
  }
  PyObject *const *next_, *const *end_;
};

// Runs a kernel without the GIL. Its arguments have been read.
template <class Run>
PyObject* without_gil(Arguments& given, Run run) {
  if (!given.good()) return nullptr;
  bool out_of_memory = false;
  Py_BEGIN_ALLOW_THREADS
  try {
    run();
  } catch (const std::bad_alloc&) {
    out_of_memory = true;
  }
  Py_END_ALLOW_THREADS
  if (out_of_memory) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

using Method = PyObject*(PyObject*, PyObject* const*, Py_ssize_t);
Method quantize, norm_quantize, int8_linear, pack_weight, attention, varlen_attention;  // cpu.cpp in the ops' folders

}  // namespace graphquant
