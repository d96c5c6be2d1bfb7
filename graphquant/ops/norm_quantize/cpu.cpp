// norm_quantize and norm_quantize_keep on the CPU.
#include "call.h"

namespace graphquant {
namespace {

struct Norm {
  const float *gamma, *beta;  // [K], or null
  float eps;
  bool rms;

  void operator()(float* row, int64_t K) const {  // in place
    auto total = [&](auto f) {
      Vec t[4] = {splat(0), splat(0), splat(0), splat(0)};
      int64_t k = 0;
      for (; k + 4 * W <= K; k += 4 * W)
        for (int u = 0; u < 4; u++) t[u] = t[u] + f(load(row + k + u * W));
      for (; k + W <= K; k += W) t[0] = t[0] + f(load(row + k));
      float rest = 0;
      if (k < K) {
        float last[W];
        store(last, f(load(row + k)));
        for (int64_t i = 0; i < K - k; i++) rest += last[i];
      }
      return sum((t[0] + t[1]) + (t[2] + t[3])) + rest;
    };
    Vec mean = splat(rms ? 0.0f : total([](Vec x) { return x; }) / K);
    float variance = total([&](Vec x) {
      Vec d = x - mean;
      return d * d;
    }) / K;
    Vec r = splat(1.0f / std::sqrt(variance + eps));
    fill(row, K, [&](int64_t k, int64_t n) {
      Vec y = (load(row + k) - mean) * r;
      if (gamma) y = y * load(gamma + k, n);
      return beta ? y + load(beta + k, n) : y;
    });
  }
};

void run(int64_t M, int64_t K, Matrix x, const Norm& norm, Matrix y, const QParams& p, const Quantized& out) {
  each_row(M, K, [&](int64_t m, float* row) {
    read(row, K, x, m);
    norm(row, K);
    if (y.data)
      by_type(y.type, [&](auto type) {
        auto to = const_cast<decltype(type)*>(y.row<decltype(type)>(m));
        int64_t k = 0;
        for (; k + W <= K; k += W) store(to + k, load(row + k));
        if (k < K) store(to + k, load(row + k), K - k);
      });
    quantize_row(row, K, p, out, m);
  });
}

}  // namespace

PyObject* norm_quantize(PyObject*, PyObject* const* values, Py_ssize_t n) {
  Arguments given(values, n);
  int64_t M = given.rows(), K = given.integer();
  bool rms = given.integer();
  float eps = static_cast<float>(given.number());
  Matrix x = given.matrix(), gamma = given.matrix(), beta = given.matrix(), y = given.matrix();
  QParams p = given.qparams();
  Quantized out = given.quantized();
  return without_gil(given, [&] {
    struct Gamma;
    struct Beta;
    auto g = as_float<Gamma>(gamma.data, gamma.type, K), b = as_float<Beta>(beta.data, beta.type, K);
    run(M, K, x, {g, b, eps, rms}, y, p, out);
  });
}

}  // namespace graphquant
