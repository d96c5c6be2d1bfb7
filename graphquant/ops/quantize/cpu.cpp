// quantize(x, up, act, *qparams) on the CPU.
#include "activations.h"
#include "call.h"

namespace graphquant {
namespace {

void run(int64_t M, int64_t K, Matrix x, Matrix up, int64_t act, const QParams& p, const Quantized& out) {
  each_row(M, K, [&](int64_t m, float* row) {
    by_type(x.type, [&](auto type) {
      auto from = x.row<decltype(type)>(m);
      by_activation(act, [&](auto f) { fill(row, K, [&](int64_t k, int64_t n) { return f(load(from + k, n)); }); });
    });
    if (up.data)
      by_type(up.type, [&](auto type) {
        auto from = up.row<decltype(type)>(m);
        fill(row, K, [&](int64_t k, int64_t n) { return load(row + k) * load(from + k, n); });
      });
    quantize_row(row, K, p, out, m);
  });
}

}  // namespace

PyObject* quantize(PyObject*, PyObject* const* values, Py_ssize_t n) {
  Arguments given(values, n);
  int64_t M = given.rows(), K = given.integer(), act = given.integer();
  Matrix x = given.matrix(), up = given.matrix();
  QParams p = given.qparams();
  Quantized out = given.quantized();
  return without_gil(given, [&] { run(M, K, x, up, act, p, out); });
}

}  // namespace graphquant
