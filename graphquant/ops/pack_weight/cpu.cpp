// pack_weight(wq) on the CPU.
#include "layout.h"

#include <cstring>

#include "call.h"

namespace graphquant {

void pack_panel(const int8_t* w, int64_t stride, int64_t n, int64_t N, int64_t K, int8_t* panel) {
  std::memset(panel, 0, panel_bytes(K));
  int32_t sums[PANEL] = {};
  for (int64_t c = 0; c < std::min(PANEL, N - n); c++) {
    const int8_t* row = w + (n + c) * stride;
    int8_t* column = panel + c / 16 * TILE + c % 16 * 4;
    for (int64_t k = 0; k < K; k += 4) {
      int64_t some = std::min<int64_t>(4, K - k);
      std::memcpy(column + k / STEP * 2 * TILE + k % STEP / 4 * 64, row + k, some);
      for (int64_t i = 0; i < some; i++) sums[c] += row[k + i];
    }
  }
  std::memcpy(panel + panel_bytes(K) - SUMS, sums, SUMS);
}

PyObject* pack_weight(PyObject*, PyObject* const* values, Py_ssize_t n) {
  Arguments given(values, n);
  int64_t N = given.integer(), K = given.integer(), stride = given.integer();
  auto w = given.address<int8_t>(), packed = given.address<int8_t>();
  return without_gil(given, [&] {
    parallel(over(N, PANEL), 4, [&](int64_t from, int64_t to) {
      for (int64_t p = from; p < to; p++) pack_panel(w, stride, p * PANEL, N, K, packed + p * panel_bytes(K));
    });
  });
}

}  // namespace graphquant
