// Exact int32 sums of int8 products: c [rows][32] = a [rows][K] times one panel of packed weights.
//
// The instructions are those that the file is compiled for: AMX tiles, else VNNI on 512 or 256 bits. VNNI multiplies
// unsigned by signed bytes: activations are given as xq + 128, and the sums start at -128 sum_k wq, which is exact. They
// are given as [K / 4][32 rows][4], so that all rows are at fixed distances.
#pragma once

#include <immintrin.h>

#include "../pack_weight/layout.h"

namespace graphquant {

constexpr int64_t ROWS = 32;  // of a block: two tiles

#if defined(__AMX_INT8__)

constexpr bool UNSIGNED = false;

class Dot {
 public:
  ~Dot() {
    if (rows_) _tile_release();
  }

  // between() runs after each step of K: it may compute on vectors while tiles are multiplied.
  template <class Between>
  void operator()(const int8_t* a, int64_t lda, int64_t rows, const int8_t* panel, int64_t K, int32_t* c,
                  Between between) {
    if (rows != rows_) configure(rows_ = rows);
    rows > 16 ? block<true>(a, lda, panel, K, c, between) : block<false>(a, lda, panel, K, c, between);
  }

 private:
  // Tiles 0 1 / 2 3: sums of the upper and the lower 16 rows. 4 and 5: activations. 6 and 7: weights.
  static void configure(int64_t rows) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } c;
    for (int i = 0; i < 8; i++) c.row_bytes[i] = 64, c.rows[i] = 16;
    c.rows[0] = c.rows[1] = c.rows[4] = std::min<int64_t>(rows, 16);
    c.rows[2] = c.rows[3] = c.rows[5] = rows > 16 ? rows - 16 : 16;
    asm volatile("" ::"m"(c));  // the intrinsic does not tell the compiler that it reads all of it
    _tile_loadconfig(&c);
  }

  template <bool LOWER, class Between>
  static void block(const int8_t* a, int64_t lda, const int8_t* b, int64_t K, int32_t* c, Between between) {
    _tile_zero(0);
    _tile_zero(1);
    if (LOWER) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < K; k += STEP, a += STEP, b += 2 * TILE) {
      _tile_loadd(6, b, 64);
      _tile_loadd(4, a, lda);
      _tile_loadd(7, b + TILE, 64);
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      if (LOWER) {
        _tile_loadd(5, a + 16 * lda, lda);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
      between();
    }
    constexpr int64_t LDC = PANEL * sizeof(int32_t);
    _tile_stored(0, c, LDC);
    _tile_stored(1, c + 16, LDC);
    if (LOWER) {
      _tile_stored(2, c + 16 * PANEL, LDC);
      _tile_stored(3, c + 16 * PANEL + 16, LDC);
    }
  }

  int64_t rows_ = 0;  // that tiles are configured for
};

#else

constexpr bool UNSIGNED = true;

#if defined(__AVX512VNNI__)
struct Lanes {  // of int32
  using V = __m512i;
  static constexpr int64_t N = 16;
  static constexpr int ROWS_AT_ONCE = 8;
  static V load(const void* p) { return _mm512_loadu_si512(p); }
  static V repeat(const uint8_t* four) { return _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(four)); }
  static V dot(V c, V a, V b) { return _mm512_dpbusd_epi32(c, a, b); }
  static V times_minus_128(V v) { return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(v, 7)); }
  static void store(int32_t* p, V v) { _mm512_storeu_si512(p, v); }
};
#else
struct Lanes {
  using V = __m256i;
  static constexpr int64_t N = 8;
  static constexpr int ROWS_AT_ONCE = 4;
  static V load(const void* p) { return _mm256_loadu_si256(static_cast<const V*>(p)); }
  static V repeat(const uint8_t* four) { return _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(four)); }
  static V times_minus_128(V v) { return _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(v, 7)); }
#if defined(__AVXVNNI__)
  static V dot(V c, V a, V b) { return _mm256_dpbusd_avx_epi32(c, a, b); }
#else  // without VNNI: in 16 bits, which never saturates
  static V dot(V c, V a, V b) {
    const V low = _mm256_set1_epi16(0xff);
    V even = _mm256_madd_epi16(_mm256_and_si256(a, low), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    V odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
    return _mm256_add_epi32(c, _mm256_add_epi32(even, odd));
  }
#endif
  static void store(int32_t* p, V v) { _mm256_storeu_si256(reinterpret_cast<V*>(p), v); }
};
#endif

class Dot {
 public:
  template <class Between>
  void operator()(const int8_t* a, int64_t, int64_t rows, const int8_t* panel, int64_t K, int32_t* c, Between) {
    constexpr int R = Lanes::ROWS_AT_ONCE;
    auto bytes = reinterpret_cast<const uint8_t*>(a);
    auto sums = reinterpret_cast<const int32_t*>(panel + panel_bytes(K) - SUMS);
    for (int64_t n = 0; n < PANEL; n += Lanes::N) {
      auto start = Lanes::times_minus_128(Lanes::load(sums + n));
      for (int64_t m = 0; m < rows; m++) Lanes::store(c + m * PANEL + n, start);
    }
    for (int64_t k = 0; k < K; k += PIECE) {
      int64_t end = std::min(K, k + PIECE), m = 0;
      const int8_t* b = panel + k * PANEL;
      for (; m + R <= rows; m += R) some<R>(bytes + k * ROWS + m * 4, b, end - k, c + m * PANEL);
      for (; m < rows; m++) some<1>(bytes + k * ROWS + m * 4, b, end - k, c + m * PANEL);
    }
  }

 private:
  static constexpr int64_t PIECE = 512;  // of K: that of all rows and of the panel fit the L1 cache together

  // Adds R rows times the panel, two vectors of channels at a time: neighbors in one tile, or one of each tile
  template <int R>
  static void some(const uint8_t* a, const int8_t* panel, int64_t K, int32_t* c) {
    constexpr int64_t NEXT = Lanes::N == 16 ? TILE : 32;  // bytes from one vector to the other
    for (int64_t n = 0; n < PANEL; n += 2 * Lanes::N) {
      const int8_t* b = panel + (Lanes::N == 16 ? 0 : n / 16 * TILE);
      typename Lanes::V s[R][2];
      for (int r = 0; r < R; r++)
        for (int j = 0; j < 2; j++) s[r][j] = Lanes::load(c + r * PANEL + n + j * Lanes::N);
      for (int64_t k = 0; k < K; k += STEP, b += 2 * TILE)
        for (int64_t l = 0; l < 16; l++) {
          auto b0 = Lanes::load(b + l * 64), b1 = Lanes::load(b + l * 64 + NEXT);
#pragma GCC unroll 8
          for (int r = 0; r < R; r++) {
            auto x = Lanes::repeat(a + (k + l * 4) * ROWS + r * 4);
            s[r][0] = Lanes::dot(s[r][0], x, b0), s[r][1] = Lanes::dot(s[r][1], x, b1);
          }
        }
      for (int r = 0; r < R; r++)
        for (int j = 0; j < 2; j++) Lanes::store(c + r * PANEL + n + j * Lanes::N, s[r][j]);
    }
  }
};

#endif

}  // namespace graphquant
