// Quantization of rows: the arithmetic of ops/numerics.py.
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>

#include "parallel.h"
#include "vec.h"

namespace graphquant {

constexpr float MIN_ABSMAX = 1e-20f;

enum Type { FLOAT32, BFLOAT16, FLOAT16 };

struct Matrix {  // [M, K], last stride 1; data is null for a tensor that is not given
  const void* data;
  int64_t type, stride;
  template <class T>
  const T* row(int64_t m) const {
    return static_cast<const T*>(data) + m * stride;
  }
};

template <class F>
void by_type(int64_t type, F f) {
  if (type == FLOAT32) f(float{});
  if (type == BFLOAT16) f(BFloat16{});
  if (type == FLOAT16) f(Half{});
}

struct QParams {
  const float* factor;
  bool is_static, clips;
  float low, high, clip;
};

struct Quantized {  // where results go
  int8_t* q;
  int64_t stride;
  float *scale, *shift;
};

// row[k] = value(k, n) for n <= W elements from every k on. Rows are multiples of W long; the rest is 0.
template <class Value>
void fill(float* row, int64_t K, Value value) {
  int64_t k = 0;
  for (; k + W <= K; k += W) store(row + k, value(k, W));
  if (k == K) return;
  float last[W];
  store(last, value(k, K - k));
  std::memset(last + (K - k), 0, (W - (K - k)) * sizeof(float));
  store(row + k, load(last));
}

// A row of any float type as float32
inline void read(float* row, int64_t K, const Matrix& x, int64_t m) {
  by_type(x.type, [&](auto type) {
    auto p = x.row<decltype(type)>(m);
    fill(row, K, [&](int64_t k, int64_t n) { return load(p + k, n); });
  });
}

// A vector of any float type as float32, in place if it is; null stays null
template <class Tag>
const float* as_float(const void* data, int64_t type, int64_t n) {
  if (!data || type == FLOAT32) return static_cast<const float*>(data);
  float* made = scratch<float, Tag>(up(n, W));
  read(made, n, {data, type, n}, 0);
  return made;
}

inline void apply_qparams(float* row, int64_t K, const QParams& p) {
  if (p.factor) fill(row, K, [&](int64_t k, int64_t n) { return load(row + k) * load(p.factor + k, n); });
  if (p.clips)  // the value is the second operand: nan stays
    fill(row, K, [&](int64_t k, int64_t) { return smaller(splat(p.clip), larger(splat(-p.clip), load(row + k))); });
  if (p.is_static)  // the value is the first operand: nan becomes low
    fill(row, K, [&](int64_t k, int64_t) { return smaller(larger(load(row + k), splat(p.low)), splat(p.high)); });
}

struct Range {
  float low, high;
};

// Of a row and 0; nan if any value is.
inline Range range_of(const float* row, int64_t K) {
  Vec most[4], least[4], odd[4];  // odd: 0, or nan where a value is not finite
  for (int u = 0; u < 4; u++) most[u] = least[u] = odd[u] = splat(0);
  auto see = [&](int64_t k, int u) {
    Vec v = load(row + k);
    most[u] = larger(v, most[u]), least[u] = smaller(v, least[u]), odd[u] = fma(v, splat(0), odd[u]);
  };
  int64_t k = 0;
  for (; k + 4 * W <= K; k += 4 * W) see(k, 0), see(k + W, 1), see(k + 2 * W, 2), see(k + 3 * W, 3);
  for (; k < K; k += W) see(k, 0);
  Vec hi = larger(larger(most[0], most[1]), larger(most[2], most[3]));
  Vec lo = smaller(smaller(least[0], least[1]), smaller(least[2], least[3]));
  if (sum(odd[0] + odd[1] + odd[2] + odd[3]) == 0) return {smallest(lo), largest(hi)};
  Range r{0, 0};
  for (k = 0; k < K; k++) {
    if (std::isnan(row[k])) return {row[k], row[k]};
    r.high = std::max(r.high, row[k]), r.low = std::min(r.low, row[k]);
  }
  return r;
}

// row [K], which is overwritten, to row m of the results
inline void quantize_row(float* row, int64_t K, const QParams& p, const Quantized& out, int64_t m) {
  apply_qparams(row, K, p);
  Range r = p.is_static ? Range{p.low, p.high} : range_of(row, K);
  float shift = 0.5f * r.high + 0.5f * r.low;
  float absmax = p.is_static ? std::max(r.high - shift, shift - r.low) : 0.5f * r.high - 0.5f * r.low;
  if (absmax < MIN_ABSMAX) absmax = MIN_ABSMAX;  // not std::max: nan stays
  out.scale[m] = absmax / 127.0f, out.shift[m] = shift;
  int8_t* q = out.q + m * out.stride;
  if (!std::isfinite(absmax)) return (void)std::memset(q, 0, K);
  Vec sh = splat(shift), steps = splat(127.0f / absmax);
  int64_t k = 0;
  for (; k + W <= K; k += W) store(q + k, smaller(larger((load(row + k) - sh) * steps, splat(-127)), splat(127)));
  if (k < K) store(q + k, smaller(larger((load(row + k) - sh) * steps, splat(-127)), splat(127)), K - k);
}

// body(m, row) for every row m of M; row: memory for K floats
template <class Body>
void each_row(int64_t M, int64_t K, Body body) {
  constexpr int64_t GRAIN = 16384;  // elements below which another thread does not pay
  parallel(M, std::max<int64_t>(1, GRAIN / K), [&](int64_t from, int64_t to) {
    struct Row;
    float* row = scratch<float, Row>(up(K, W));
    for (int64_t m = from; m < to; m++) body(m, row);
  });
}

}  // namespace graphquant
