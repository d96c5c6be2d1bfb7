// int8_linear on the CPU.
//
// A block is 32 rows times one panel of 32 channels, over all of K. Its int32 sums stay in the L1 cache, and while the
// next block is multiplied its epilogue is computed, a few rows after each step of K, so that AMX and the vector units
// work at once. Panels are taken in groups that stay in the L2 cache while all rows go by; the next group is
// prefetched meanwhile, the first one, or the only one of a single block of rows, shortly before it is read.
#include "dot.h"

#include <type_traits>

#include "call.h"

namespace graphquant {
namespace {

constexpr int64_t AHEAD = 32 << 10;  // bytes that the first group is prefetched ahead

// Bytes of panels in the L2 cache. Many rows do not stay there themselves: they are read once for each group.
constexpr int64_t group_bytes(int64_t blocks) { return (UNSIGNED ? 1536 : blocks < 16 ? 576 : 1024) << 10; }

struct Operands {
  int64_t M, N, K;
  const int8_t* x;
  int64_t x_stride;
  const float *x_scale, *x_shift;
  const int8_t* panels;
  const float *w_scale, *w_sum, *bias;  // bias: zeros if there is none
};

struct Block {  // sums [rows][32] of rows m, ... and channels n, ... that wait for their epilogue
  int64_t m = 0, n = 0, rows = 0;
  const int32_t* sums = nullptr;
};

// Rows as Dot reads them: whole steps of K; unsigned and in fours of K where it needs that
struct Rows {
  const int8_t* x;
  int64_t stride;
};

class Reader {
 public:
  explicit Reader(const Operands& o) : o_(o), wide_(up(o.K, STEP)), in_place_(!UNSIGNED && o.x_stride >= wide_) {
    struct Copy;
    if (!in_place_ || wide_ != o.K) copy_ = scratch<int8_t, Copy>(ROWS * wide_);
  }
  Rows operator()(int64_t m, int64_t rows) const {
    bool leaves = wide_ != o_.K && m + rows == o_.M;  // behind the last row the memory may end
    if (in_place_ && !leaves) return {o_.x + m * o_.x_stride, o_.x_stride};
    const int8_t* x = o_.x + m * o_.x_stride;
    if (UNSIGNED) {
      for (int64_t i = 0; i < rows; i += 4) in_fours(x + i * o_.x_stride, std::min<int64_t>(4, rows - i), copy_ + i * 4);
    } else {
      for (int64_t i = 0; i < rows; i++) {
        std::memcpy(copy_ + i * wide_, x + i * o_.x_stride, o_.K);
        std::memset(copy_ + i * wide_ + o_.K, 0, wide_ - o_.K);
      }
    }
    return {copy_, wide_};
  }

 private:
  // Up to four rows to [K / 4][ROWS][4], as unsigned. What lies behind K does not count: weights are 0 there.
  void in_fours(const int8_t* x, int64_t rows, int8_t* out) const {
    int64_t k = 0;
    if (rows == 4)
      for (; k + 16 <= o_.K; k += 16) {
        __m128 v[4];
        for (int r = 0; r < 4; r++) v[r] = _mm_loadu_ps(reinterpret_cast<const float*>(x + r * o_.x_stride + k));
        _MM_TRANSPOSE4_PS(v[0], v[1], v[2], v[3]);
        for (int j = 0; j < 4; j++) {
          __m128i flipped = _mm_xor_si128(_mm_castps_si128(v[j]), _mm_set1_epi8(-128));
          _mm_storeu_si128(reinterpret_cast<__m128i*>(out + (k + 4 * j) * ROWS), flipped);
        }
      }
    for (; k < o_.K; k += 4)
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < std::min<int64_t>(4, o_.K - k); i++)
          out[k * ROWS + r * 4 + i] = x[r * o_.x_stride + k + i] ^ -128;
  }

  const Operands& o_;
  int64_t wide_;
  bool in_place_;
  int8_t* copy_ = nullptr;
};

// All blocks of rows [m0, m1) and panels [p0, p1). done(block) computes the epilogue of some rows.
template <class Done>
void multiply(const Operands& o, int64_t m0, int64_t m1, int64_t p0, int64_t p1, Done done) {
  int64_t bytes = panel_bytes(o.K), steps = over(o.K, STEP), blocks = over(m1 - m0, ROWS);
  int64_t most = std::clamp<int64_t>(group_bytes(blocks) / bytes, 1, UNSIGNED ? p1 - p0 : 2 * blocks);
  int64_t group = blocks == 1 ? p1 - p0 : over(p1 - p0, over(p1 - p0, most));
  int64_t fetched = up(over(bytes, blocks * steps), 64);  // bytes to prefetch in each step
  int64_t streamed = up(over(bytes, steps), 64);          // the same in the first group
  int64_t finished = over(ROWS, steps);                   // rows whose epilogue is computed in each step
  alignas(64) int32_t sums[2][ROWS * PANEL];
  Block waiting;
  auto finish = [&](int64_t rows) {
    rows = std::min(rows, waiting.rows);
    if (rows == 0) return;
    done(Block{waiting.m, waiting.n, rows, waiting.sums});
    waiting.m += rows, waiting.rows -= rows, waiting.sums += rows * PANEL;
  };
  Reader reader(o);
  Dot dot;
  int count = 0;
  const int8_t* next = o.panels + p0 * bytes + AHEAD;  // to prefetch
  for (int64_t g = p0; g < p1; g += group) {
    int64_t end = std::min(p1, g + group);
    const int8_t *first = o.panels + end * bytes, *last = o.panels + std::min(p1, end + group) * bytes;
    auto between = [&] {
      int64_t now = next < first ? streamed : fetched;
      for (int64_t i = 0; i < now && next < last; i += 64, next += 64)
        _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
      finish(finished);
    };
    for (int64_t m = m0; m < m1; m += ROWS) {
      int64_t rows = std::min(ROWS, m1 - m);
      Rows x = reader(m, rows);
      for (int64_t p = g; p < end; p++) {
        int32_t* c = sums[count++ % 2];  // not where a block waits
        dot(x.x, x.stride, rows, o.panels + p * bytes, o.K, c, between);
        finish(ROWS);
        waiting = {m, p * PANEL, rows, c};
      }
    }
  }
  finish(ROWS);
}

struct None {};  // in place of a residual's type

template <class Y, class R>
void epilogue(const Operands& o, const Block& b, Y* y, const R* residual, int64_t residual_stride) {
  auto run = [&](auto is_whole) {
    for (int64_t i = 0; i < b.rows; i++) {
      Vec scale = splat(o.x_scale[b.m + i]), shift = splat(o.x_shift[b.m + i]);
      for (int64_t j = 0; j < PANEL; j += W) {
        int64_t n = b.n + j, count = decltype(is_whole)::value ? W : std::min(W, o.N - n);
        if (count <= 0) break;
        Vec v = load(b.sums + i * PANEL + j) * scale;
        v = fma(v, load(o.w_scale + n, count), fma(shift, load(o.w_sum + n, count), load(o.bias + n, count)));
        if constexpr (!std::is_same_v<R, None>) v = v + load(residual + (b.m + i) * residual_stride + n, count);
        store(y + (b.m + i) * o.N + n, v, count);
      }
    }
  };
  b.n + PANEL <= o.N ? run(std::true_type{}) : run(std::false_type{});
}

void pack(Operands& o, const int8_t* wq, int64_t stride) {
  struct Panels;
  int8_t* packed = scratch<int8_t, Panels>(over(o.N, PANEL) * panel_bytes(o.K));
  parallel(over(o.N, PANEL), 4, [&](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; p++) pack_panel(wq, stride, p * PANEL, o.N, o.K, packed + p * panel_bytes(o.K));
  });
  o.panels = packed;
}

template <class Y, class R>
void run(const Operands& o, Y* y, const R* residual, int64_t residual_stride) {
  int64_t panels = over(o.N, PANEL), blocks = over(o.M, ROWS);
  auto done = [&](const Block& b) { epilogue(o, b, y, residual, residual_stride); };
  if (blocks >= 4 * threads())  // else few rows: each thread takes some panels
    parallel(blocks, 1, [&](int64_t from, int64_t to) {
      multiply(o, from * ROWS, std::min(o.M, to * ROWS), 0, panels, done);
    });
  else
    parallel(panels, 1, [&](int64_t from, int64_t to) { multiply(o, 0, o.M, from, to, done); });
}

}  // namespace

PyObject* int8_linear(PyObject*, PyObject* const* values, Py_ssize_t n) {
  Arguments given(values, n);
  Operands o{};
  o.M = given.rows(), o.N = given.integer(), o.K = given.integer();
  o.x_stride = given.integer(), o.x = given.address<int8_t>();
  o.x_scale = given.address<float>(), o.x_shift = given.address<float>();
  int64_t w_stride = given.integer();  // 0: packed
  auto w = given.address<int8_t>();
  o.w_scale = given.address<float>(), o.w_sum = given.address<float>();
  int64_t bias_type = given.integer();
  auto bias = given.address();
  Matrix residual = given.matrix();
  int64_t y_type = given.integer();
  auto y = given.address();
  return without_gil(given, [&] {
    if (o.M == 0 || o.N == 0) return;
    struct Bias;
    o.bias = as_float<Bias>(bias, bias_type, o.N);
    if (!o.bias) {
      float* zeros = scratch<float, Bias>(up(o.N, W));
      std::fill(zeros, zeros + o.N, 0.0f);
      o.bias = zeros;
    }
    if (w_stride) pack(o, w, w_stride);
    else o.panels = w;
    by_type(y_type, [&](auto type) {
      auto to = static_cast<decltype(type)*>(y);
      if (!residual.data) return run(o, to, static_cast<const None*>(nullptr), 0);
      by_type(residual.type, [&](auto of) { run(o, to, residual.row<decltype(of)>(0), residual.stride); });
    });
  });
}

}  // namespace graphquant
