// Vectors of float32: 16 lanes with AVX-512, 8 with AVX2. + - * / are the compiler's own on these types.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace graphquant {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

#if defined(__AVX512F__)

using Vec = __m512;
constexpr int64_t W = 16;

inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const BFloat16* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Vec load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline void store(Half* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline __m512i bfloat16_above(Vec v) {  // to nearest even, in the upper halves; nan stays nan
  __m512i bits = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}
inline void store(BFloat16* p, Vec v) {
  __m512i bits = _mm512_srli_epi32(bfloat16_above(v), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bits));
}
inline void store(int8_t* p, Vec v) {  // to nearest even; v within [-128, 127]
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
}
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }   // b where one is nan
inline Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }  // b where one is nan
inline Vec magnitude(Vec v) { return _mm512_abs_ps(v); }
inline Vec whole(Vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec times_power_of_2(Vec v, Vec n) { return _mm512_scalef_ps(v, n); }
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }
inline float largest(Vec v) { return _mm512_reduce_max_ps(v); }
inline float smallest(Vec v) { return _mm512_reduce_min_ps(v); }
inline Vec if_at_most(Vec a, Vec b, Vec v, Vec other) {  // a <= b ? v : other
  return _mm512_mask_mov_ps(other, _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), v);
}
inline void transpose(Vec (&v)[W]) {  // bits of any type
  Vec t[W];
  auto pairs = [](Vec a, Vec b, bool high) {
    auto x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
  };
  for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]), t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 4; j++) v[i + j] = pairs(t[i + j / 2], t[i + 2 + j / 2], j % 2);
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 2; j++) {
      t[8 * j + i] = _mm512_shuffle_f32x4(v[8 * j + i], v[8 * j + 4 + i], 0x88);
      t[8 * j + 4 + i] = _mm512_shuffle_f32x4(v[8 * j + i], v[8 * j + 4 + i], 0xdd);
    }
  for (int i = 0; i < 8; i++) {
    v[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    v[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
  }
}

#else

using Vec = __m256;
constexpr int64_t W = 8;

inline Vec splat(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const BFloat16* p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Vec load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec load(const int32_t* p) {
  return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline void store(Half* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(BFloat16* p, Vec v) {  // to nearest even; nan stays nan
  __m256i bits = _mm256_castps_si256(v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  up = _mm256_srli_epi32(_mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), nan), 16);
  __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
inline void store(int8_t* p, Vec v) {  // to nearest even; v within [-128, 127]
  __m256i n = _mm256_cvtps_epi32(v);
  __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(packed, packed));
}
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }   // b where one is nan
inline Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }  // b where one is nan
inline Vec magnitude(Vec v) { return _mm256_andnot_ps(splat(-0.0f), v); }
inline Vec whole(Vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec times_power_of_2(Vec v, Vec n) {  // in two steps, each of them a normal number
  auto power = [](__m256i e) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23)); };
  __m256i e = _mm256_cvtps_epi32(smaller(larger(n, splat(-250.0f)), splat(250.0f)));
  __m256i half = _mm256_srai_epi32(e, 1);
  return v * power(half) * power(_mm256_sub_epi32(e, half));
}
template <class F>
float folded(Vec v, F f) {
  float lanes[W];
  store(lanes, v);
  float all = lanes[0];
  for (int i = 1; i < W; i++) all = f(all, lanes[i]);
  return all;
}
inline float sum(Vec v) { return folded(v, [](float a, float b) { return a + b; }); }
inline float largest(Vec v) { return folded(v, [](float a, float b) { return a > b ? a : b; }); }
inline float smallest(Vec v) { return folded(v, [](float a, float b) { return a < b ? a : b; }); }
inline Vec if_at_most(Vec a, Vec b, Vec v, Vec other) {  // a <= b ? v : other
  return _mm256_blendv_ps(other, v, _mm256_cmp_ps(a, b, _CMP_LE_OQ));
}
inline void transpose(Vec (&v)[W]) {
  Vec t[W];
  for (int i = 0; i < 8; i += 2) t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]), t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      v[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0x44);
      v[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0xee);
    }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
  }
  for (int i = 0; i < 8; i++) v[i] = t[i];
}

#endif

// The first n <= W lanes; the others are 0 when loaded, and not written when stored.
template <class T>
Vec load(const T* p, int64_t n) {
  if (n == W) return load(p);
  T some[W] = {};
  std::memcpy(some, p, n * sizeof(T));
  return load(some);
}
template <class T>
void store(T* p, Vec v, int64_t n) {
  if (n == W) return store(p, v);
  T some[W];
  store(some, v);
  std::memcpy(p, some, n * sizeof(T));
}

// e^x, within 2 units in the last place; nan stays nan
inline Vec exp(Vec x) {
  x = smaller(splat(100.0f), larger(splat(-100.0f), x));
  Vec n = whole(x * splat(1.44269504f));
  Vec r = fma(n, splat(-0.693359375f), x);  // ln 2 in two parts, the first exact in 10 bits
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.0f / 720);
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return times_power_of_2(p, n);
}

// c[0] + c[1] x + ... + c[N - 1] x^(N - 1)
template <int N>
Vec polynomial(const float (&c)[N], Vec x) {
  Vec p = splat(c[N - 1]);
  for (int i = N - 2; i >= 0; i--) p = fma(p, x, splat(c[i]));
  return p;
}

// 2^x, x < 128, within 2 units in the last place; 0 below 2^-149; nan stays nan. The polynomials are minimax.
#if defined(__AVX512F__)

template <int N>
Vec exp2_by(const float (&c)[N], Vec x) {  // by powers of the fraction, which is 0 of -inf
  Vec fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(polynomial(c, fraction), x);
}
inline Vec exp2(Vec x) {
  constexpr float C[] = {0.99999994f, 0.693153083f, 0.240153611f, 0.0558263175f, 0.00898933969f, 0.00187757669f};
  return exp2_by(C, x);
}
inline Vec rough_exp2(Vec x) {  // within 2^-13 of itself
  constexpr float C[] = {0.999925196f, 0.695833564f, 0.226067156f, 0.0780245215f};
  return exp2_by(C, x);
}

#else

inline Vec exp2(Vec x) {
  constexpr float C[] = {1.00000012f, 0.693146944f, 0.240221202f, 0.0555071309f, 0.00967554096f, 0.00132764725f};
  x = larger(splat(-200.0f), x);
  Vec n = whole(x);
  return times_power_of_2(polynomial(C, x - n), n);
}

#endif

}  // namespace graphquant
