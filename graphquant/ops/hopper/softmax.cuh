// Online softmax on scores as wgmma leaves them: a thread has parts of two rows, and four lanes have all of a row.
#pragma once

#include "hopper/ptx.cuh"

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Of the two rows of scores that a thread has a part of. row_sum is of this thread's columns alone.
struct SoftmaxState {
  float row_max[2];  // what exponentials are relative to: the maximum so far or a little less
  float row_sum[2];
};

// Probabilities of N keys for row r, in the place of their scores, relative to scaled_max. Returns their sum over this
// thread's columns.
template <int N>
__device__ __forceinline__ float row_exponentials(float (&s)[N / 2], int r, float scaled_max, float scale) {
  float partial_sum[2] = {0.0f, 0.0f};  // two chains, for instruction-level parallelism
#pragma unroll
  for (int c = 0; c < N / 8; ++c)
#pragma unroll
    for (int i = 2 * r; i < 2 * r + 2; ++i) {
      s[c * 4 + i] = exp2_approx(__fmaf_rn(s[c * 4 + i], scale, -scaled_max));
      partial_sum[i & 1] += s[c * 4 + i];
    }
  return partial_sum[0] + partial_sum[1];
}

// Turns scores of N keys into probabilities that are not normalized yet, relative to row_max, and returns the factors
// by which earlier results of each row have to be rescaled. MAY_SEE_NONE: a row may see no key of a block (-inf).
template <int N, bool FIRST_BLOCK, bool MAY_SEE_NONE>
__device__ __forceinline__ float2 online_softmax(float (&s)[N / 2], SoftmaxState& state, float scale) {
  const float minus_infinity = __int_as_float(0xff800000);
  float rescale[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // Two chains, for instruction-level parallelism.
    float partial_max[2] = {fmaxf(s[2 * r], s[2 * r + 1]), FIRST_BLOCK ? minus_infinity : state.row_max[r]};
#pragma unroll
    for (int c = 1; c < N / 8; ++c)
      partial_max[c & 1] = fmaxf(partial_max[c & 1], fmaxf(s[c * 4 + 2 * r], s[c * 4 + 2 * r + 1]));
    float row_max = fmaxf(partial_max[0], partial_max[1]);
    row_max = fmaxf(row_max, __shfl_xor_sync(0xffffffff, row_max, 1));
    row_max = fmaxf(row_max, __shfl_xor_sync(0xffffffff, row_max, 2));
    // Lazy rescaling: a maximum that is only a little higher is not taken over. y seldom has to be rescaled then,
    // and probabilities stay below 2^8, which neither float16 nor the sum minds.
    if (!FIRST_BLOCK && !((row_max - state.row_max[r]) * scale > 8.0f)) row_max = state.row_max[r];
    const float base = MAY_SEE_NONE && row_max == minus_infinity ? 0.0f : row_max;
    rescale[r] = FIRST_BLOCK ? 0.0f : exp2_approx((state.row_max[r] - base) * scale);
    state.row_max[r] = row_max;
    const float sum = row_exponentials<N>(s, r, base * scale, scale);
    state.row_sum[r] = FIRST_BLOCK ? sum : __fmaf_rn(state.row_sum[r], rescale[r], sum);
  }
  return make_float2(rescale[0], rescale[1]);
}

// Stale maxima: softmax is the same relative to any number, so the first block's maximum does for later blocks as long
// as nothing overflows. FlashAttention-4 rescales only if a maximum rises by more than a threshold, as online_softmax
// does above. With the following functions later maxima are not even computed: `exponentials` needs none, and too large
// ones show in the sums, which are needed anyway. Only for such a block `raise_max` looks for its maximum.

// What a thread's probabilities of a block and row may add up to. In float16 each has to be below 2^16. In bfloat16 and
// in sums they may be up to 2^128: with the columns of four lanes and 2^9 blocks, that leaves values in v up to 2^85.
template <Dtype Type>
__device__ __forceinline__ float sum_limit() {
  return Type == FP16 ? 0x1p15f : 0x1p32f;
}

// Probabilities of N keys relative to the row_max of blocks before, and their sums over this thread's columns, which
// the caller compares with sum_limit: no probability is above its sum. Scores that are NaN make their own row NaN.
template <int N>
__device__ __forceinline__ void exponentials(
    float (&s)[N / 2], float (&sums)[2], const SoftmaxState& state, float scale) {
#pragma unroll
  for (int r = 0; r < 2; ++r) sums[r] = row_exponentials<N>(s, r, state.row_max[r] * scale, scale);
}

// row_max becomes the maximum of N scores in the rows whose `sums` are above `limit` in any lane, and only in those: a
// row's result does not depend on other rows. Returns the factors by which earlier results have to be rescaled.
template <int N>
__device__ __forceinline__ float2 raise_max(
    const float (&s)[N / 2], const float (&sums)[2], SoftmaxState& state, float scale, float limit) {
  float factors[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float row_max = s[2 * r], most = sums[r];
#pragma unroll
    for (int c = 0; c < N / 8; ++c) row_max = fmaxf(row_max, fmaxf(s[c * 4 + 2 * r], s[c * 4 + 2 * r + 1]));
#pragma unroll
    for (int lanes = 1; lanes <= 2; lanes *= 2) {
      row_max = fmaxf(row_max, __shfl_xor_sync(0xffffffff, row_max, lanes));
      most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, lanes));
    }
    if (!(most > limit)) row_max = state.row_max[r];
    factors[r] = most > limit ? exp2_approx((state.row_max[r] - row_max) * scale) : 1.0f;
    state.row_max[r] = row_max;
    state.row_sum[r] *= factors[r];
  }
  return make_float2(factors[0], factors[1]);
}

// Most blocks change no row_max: then the whole warp skips it.
template <int COUNT>
__device__ __forceinline__ void rescale(float (&y)[COUNT], float2 factors) {
  if (__any_sync(0xffffffff, factors.x != 1.0f || factors.y != 1.0f))
#pragma unroll
    for (int i = 0; i < COUNT; ++i) y[i] *= i & 2 ? factors.y : factors.x;
}

// row_sum of row r becomes that of all columns, which four lanes share.
__device__ __forceinline__ void sum_lanes(SoftmaxState& state, int r) {
  state.row_sum[r] += __shfl_xor_sync(0xffffffff, state.row_sum[r], 1);
  state.row_sum[r] += __shfl_xor_sync(0xffffffff, state.row_sum[r], 2);
}

// Scores as wgmma leaves them are, as probabilities, in the order in which wgmma takes A from registers.
template <Dtype Type, int N>
__device__ __forceinline__ void to_operand(u32 (&p)[N / 4], const float (&s)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) p[i] = pack<Type>(s[2 * i], s[2 * i + 1]);
}
