// attention for Hopper (sm_90a), one source for NVRTC and nvcc, no headers.
//
//   y = softmax(scale q k^T) v                             per head; scores, softmax and sums in float32
//
// A block is a producer and GROUPS consumer warpgroups of 64 queries each. One thread of the producer brings
// queries, keys and values with the tensor memory accelerator (TMA), keys and values in rings of STAGES
// blocks. Consumers multiply (wgmma), keep a high score and the sum of exponentials of each row as blocks of
// keys come, and write y, again by TMA. While one of them turns scores into weights, another multiplies.
// Blocks are persistent: each takes every so-manyth tile.
//
// The first block of keys is the narrow one: the T % BN last keys, if that is not 0. Nothing else is computed
// in vain but rows of queries beyond S, and columns of a head beyond D up to a multiple of 16 in the scores.
//
// Macros (hopper_tiles.py beside this file defines them):
//   GROUPS   consumer warpgroups: 2 or 3
//   BN       keys of a block, a multiple of 16
//   FIRST    keys of the first block, BN or the narrow one's rounded up to a multiple of 16
//   MASKED   1: the first block has fewer keys than FIRST
//   D        width of a head, a multiple of 8 up to 128
//   STAGES   blocks in flight, of keys and of values each
//   TURNS    1: consumers begin their products in turn
//   HALF     type of q, k, v and y: 1 bfloat16, 2 float16
// and the functions score_first, score and weigh: wgmma for N of FIRST, BN and D (hopper_tiles.py).
//
// Launch: attention_hopper(q_map, k_map, v_map, y_map, S, keys, blocks, down, heads, tiles, scale)
//   *_map    CUtensorMap by value: (D, H, S or T, B), boxes of 64 columns of one head by 64, BN, BN and 16
//            tokens. Zeros outside, swizzle of 128 bytes.
//   S        queries           keys   of the first block     blocks   of BN keys that follow it
//   down     tiles of a head   heads  H                      tiles    down * H * B
//   scale    of the scores, times log2(e)
//   block ((GROUPS + 1) * 128, 1, 1). May be launched with programmatic stream serialization.

typedef unsigned int u32;
typedef unsigned long long u64;
struct __align__(64) TensorMap { u64 word[16]; };

#define PARTS ((D + 63) / 64)          // of a head, 128 bytes wide: a row of the swizzle
#define STEPS ((D + 15) / 16)          // of a score's sum
#define Q_BYTES (PARTS * 64 * 128)     // of a consumer
#define K_BYTES (PARTS * BN * 128)     // of a stage, v's as well
#if GROUPS == 3
#define REGISTERS "160"
#else
#define REGISTERS "240"
#endif

static_assert(BN % 16 == 0 && FIRST % 16 == 0 && FIRST <= BN && BN <= 256 && D % 8 == 0 && D <= 128, "tile");

// ------------------------------------------------------------------------------------ PTX

__device__ __forceinline__ u32 shared_address(const void* p) {
  u32 a;
  asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(a) : "l"(p));
  return a;
}
__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier), "r"(parity)
      : "memory");
}
__device__ __forceinline__ void load_tile(u32 to, const TensorMap* map, u32 barrier, int column, int head, int token, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(head), "r"(token), "r"(batch)
      : "memory");
}
__device__ __forceinline__ void store_tile(const TensorMap* map, u32 from, int column, int head, int token, int batch) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map), "r"(from),
               "r"(column), "r"(head), "r"(token), "r"(batch)
               : "memory");
}
__device__ __forceinline__ void stores_read() {  // until no store reads shared memory any more
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving reads of sums to before wgmma has written them.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// wgmma's matrix descriptor, 128-byte swizzle: 8 rows are 1024 bytes. `next` bytes from 64 columns to the
// next 64, where the columns are the product's (v); where they are summed over (q, k) it is not looked at.
__device__ __forceinline__ u64 descriptor(u32 address, u32 next) {
  return (u64)((address & 0x3FFFF) >> 4) | ((u64)(next >> 4) << 16) | ((u64)(1024 >> 4) << 32) | ((u64)1 << 62);
}

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 r;
#if HALF == 1
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
  return r;
}
__device__ __forceinline__ float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ------------------------------------------------------------------------------------ softmax

// A thread's part of 64 queries: two rows, and of each the score that weights count from, the highest or a
// little less, and the sum of weights.
struct Rows {
  float highest[2], total[2];
};

// Scores of N keys become weights; returns by what y and total of each row shrink. `keys`: how many there are.
template <int N, bool BEGIN, bool CUT>
__device__ __forceinline__ float2 soften(float (&s)[N / 2], Rows& rows, float scale, int keys) {
  const float none = __int_as_float(0xff800000);
  if (CUT) {
    const int column = (threadIdx.x & 3) * 2;
#pragma unroll
    for (int c = 0; c < N / 8; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (c * 8 + column + (i & 1) >= keys) s[c * 4 + i] = none;
  }
  float shrink[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top[2] = {fmaxf(s[2 * r], s[2 * r + 1]), BEGIN ? none : rows.highest[r]};
#pragma unroll
    for (int c = 1; c < N / 8; ++c) top[c & 1] = fmaxf(top[c & 1], fmaxf(s[c * 4 + 2 * r], s[c * 4 + 2 * r + 1]));
    float highest = fmaxf(top[0], top[1]);
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 2));
    // What is a little higher may as well count from where the others do: y seldom has to shrink then, and
    // weights stay below 2^8.
    if (!BEGIN && !((highest - rows.highest[r]) * scale > 8.0f)) highest = rows.highest[r];
    shrink[r] = BEGIN ? 0.0f : power_of_2((rows.highest[r] - highest) * scale);
    rows.highest[r] = highest;
    const float offset = highest * scale;
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int c = 0; c < N / 8; ++c)
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        s[c * 4 + i] = power_of_2(__fmaf_rn(s[c * 4 + i], scale, -offset));
        sum[i & 1] += s[c * 4 + i];
      }
    rows.total[r] = BEGIN ? sum[0] + sum[1] : __fmaf_rn(rows.total[r], shrink[r], sum[0] + sum[1]);
  }
  return make_float2(shrink[0], shrink[1]);
}

template <int N>
__device__ __forceinline__ void pack_weights(u32 (&p)[N / 4], const float (&s)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) p[i] = pack(s[2 * i], s[2 * i + 1]);
}

// ------------------------------------------------------------------------------------ products

// Begins s = q k^T for a block of keys at shared address k.
template <bool NARROW>
__device__ __forceinline__ void begin_scores(float (&s)[(NARROW ? FIRST : BN) / 2], u32 q, u32 k) {
#pragma unroll
  for (int i = 0; i < STEPS; ++i) {
    const u64 a = descriptor(q + i / 4 * (64 * 128) + i % 4 * 32, 16), b = descriptor(k + i / 4 * (BN * 128) + i % 4 * 32, 16);
    NARROW ? score_first(s, a, b, i > 0) : score(s, a, b, i > 0);
  }
  wgmma_commit();
}

// Begins y += p v for N keys; with BEGIN y = p v.
template <int N, bool BEGIN>
__device__ __forceinline__ void begin_weighing(float (&y)[D / 2], const u32 (&p)[N / 4], u32 v) {
#pragma unroll
  for (int i = 0; i < N / 16; ++i) weigh(y, p + 4 * i, descriptor(v + i * (16 * 128), BN * 128), !BEGIN || i > 0);
  wgmma_commit();
}

// Consumers begin their products one after the other, so that the softmax of one meets the products of others.
__device__ __forceinline__ void take_turn(int me) {
  if (TURNS) asm volatile("bar.sync %0, 256;" ::"r"(8 + me) : "memory");
}
__device__ __forceinline__ void give_turn(int me) {
  if (TURNS) asm volatile("bar.arrive %0, 256;" ::"r"(8 + (me + 1) % GROUPS) : "memory");
}

// Position in a ring.
struct Turn {
  u32 stage, parity;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

extern "C" __global__ void __launch_bounds__((GROUPS + 1) * 128, 1)
    attention_hopper(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                     const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap y_map, int S, int keys,
                     int blocks, u32 down, u32 heads, u32 tiles, float scale) {
  extern __shared__ unsigned char memory[];
  const u32 q_tiles = (shared_address(memory) + 1023u) & ~1023u;  // swizzled tiles start at multiples of 1024
  const u32 k_ring = q_tiles + 2 * GROUPS * Q_BYTES;
  const u32 v_ring = k_ring + STAGES * K_BYTES;
  const u32 q_full = v_ring + STAGES * K_BYTES;  // barriers: 8 bytes each
  const u32 q_empty = q_full + 16;
  const u32 k_full = q_empty + 16;
  const u32 k_empty = k_full + 8 * STAGES;
  const u32 v_full = k_empty + 8 * STAGES;
  const u32 v_empty = v_full + 8 * STAGES;
  const int thread = threadIdx.x, group = thread >> 7, lane = thread & 31;

  if (thread == 0) {
    prefetch(&q_map);
    prefetch(&k_map);
    prefetch(&v_map);
    prefetch(&y_map);
    for (int i = 0; i < 2; ++i) {
      barrier_init(q_full + 8 * i, 1);
      barrier_init(q_empty + 8 * i, 4 * GROUPS);  // warps
    }
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(k_full + 8 * i, 1);
      barrier_init(k_empty + 8 * i, 4 * GROUPS);
      barrier_init(v_full + 8 * i, 1);
      barrier_init(v_empty + 8 * i, 4 * GROUPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  // With programmatic dependent launch all of the above overlaps the kernel before; a no-op otherwise.
  asm volatile("griddepcontrol.wait;" ::: "memory");

  if (group == 0) {  // ------------------------------------------------------------ producer
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (thread == 0) {
      Turn k = {0, 1}, v = {0, 1};
      u32 nth = 0;
      for (u32 t = blockIdx.x; t < tiles; t += gridDim.x, ++nth) {
        const u32 above = t / down, head = above % heads, batch = above / heads;
        const u32 q = q_tiles + (nth & 1) * (GROUPS * Q_BYTES), barrier = q_full + 8 * (nth & 1);
        barrier_wait(q_empty + 8 * (nth & 1), (nth >> 1 & 1) ^ 1);
        barrier_expect(barrier, GROUPS * Q_BYTES);
#pragma unroll
        for (int g = 0; g < GROUPS; ++g)
#pragma unroll
          for (int part = 0; part < PARTS; ++part)
            load_tile(q + g * Q_BYTES + part * (64 * 128), &q_map, barrier, part * 64, head,
                      (t - above * down) * (GROUPS * 64) + g * 64, batch);
        // keys of a block, then the values of the block before: as they are used
        for (int block = 0; block <= blocks + 1; ++block) {
          if (block <= blocks) {
            barrier_wait(k_empty + 8 * k.stage, k.parity);
            barrier_expect(k_full + 8 * k.stage, K_BYTES);
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
              load_tile(k_ring + k.stage * K_BYTES + part * (BN * 128), &k_map, k_full + 8 * k.stage, part * 64, head,
                        (block ? block - 1 : blocks) * BN, batch);
            k.next();
          }
          if (block) {
            barrier_wait(v_empty + 8 * v.stage, v.parity);
            barrier_expect(v_full + 8 * v.stage, K_BYTES);
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
              load_tile(v_ring + v.stage * K_BYTES + part * (BN * 128), &v_map, v_full + 8 * v.stage, part * 64, head,
                        (block > 1 ? block - 2 : blocks) * BN, batch);
            v.next();
          }
        }
      }
      // What waits for this kernel may come and set itself up while the last tiles are computed.
      asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    }
  } else {  // ----------------------------------------------------------------------- consumers
    asm volatile("setmaxnreg.inc.sync.aligned.u32 " REGISTERS ";");
    const int me = group - 1, warp = thread >> 5 & 3;
    // where this lane points stmatrix at: its row of the tile, ^ 16 * u for 16-byte unit u
    const u32 row = warp * 16 + (lane & 15), my_row = row * 128 + ((lane >> 4 ^ (row & 7)) << 4);
    Turn k = {0, 0}, v = {0, 0};
    u32 nth = 0;
    if (me == GROUPS - 1) give_turn(me);  // the first begins
    for (u32 t = blockIdx.x; t < tiles; t += gridDim.x, ++nth) {
      const u32 above = t / down, head = above % heads, batch = above / heads;
      const int m = (t - above * down) * (GROUPS * 64) + me * 64;
      const u32 q = q_tiles + (nth & 1) * (GROUPS * Q_BYTES) + me * Q_BYTES;
      barrier_wait(q_full + 8 * (nth & 1), nth >> 1 & 1);
      if (m >= S) {  // no query of this consumer: it only takes part in the rings
        for (int block = 0; block <= blocks; ++block) {
          barrier_wait(k_full + 8 * k.stage, k.parity);
          if (block) {
            take_turn(me);
            give_turn(me);
          }
          if (lane == 0) barrier_arrive(k_empty + 8 * k.stage);
          k.next();
          barrier_wait(v_full + 8 * v.stage, v.parity);
          if (lane == 0) barrier_arrive(v_empty + 8 * v.stage);
          v.next();
        }
        if (lane == 0) {
          stores_read();
          if (nth) barrier_arrive(q_empty + 8 * (~nth & 1));
        }
        continue;
      }
      // The narrow block has arrays of its own: ptxas finds no registers for wgmma in parts of the others.
      float first_s[FIRST / 2], s[BN / 2], y[D / 2];
      u32 first_p[FIRST / 4], p[BN / 4];
      Rows rows;
      barrier_wait(k_full + 8 * k.stage, k.parity);
      wgmma_fence();
      begin_scores<true>(first_s, q, k_ring + k.stage * K_BYTES);
      if (lane == 0) {  // the tile before this one has been stored by now: its place is free
        stores_read();
        if (nth) barrier_arrive(q_empty + 8 * (~nth & 1));
      }
      __syncwarp();
      wgmma_wait<0>();
      pin(first_s);
      if (lane == 0) barrier_arrive(k_empty + 8 * k.stage);
      k.next();
      soften<FIRST, true, MASKED>(first_s, rows, scale, keys);
      pack_weights<FIRST>(first_p, first_s);

      // The scores of the next block, and meanwhile y of the one before it.
#define NEXT_BLOCK(N, BEGIN, WEIGHTS)                                           \
  {                                                                             \
    barrier_wait(k_full + 8 * k.stage, k.parity);                               \
    barrier_wait(v_full + 8 * v.stage, v.parity);                               \
    take_turn(me);                                                              \
    wgmma_fence(); /* right before: with a loop between, ptxas serialises */    \
    begin_scores<false>(s, q, k_ring + k.stage * K_BYTES);                      \
    begin_weighing<N, BEGIN>(y, WEIGHTS, v_ring + v.stage * K_BYTES);           \
    give_turn(me);                                                              \
    wgmma_wait<1>();                                                            \
    pin(s);                                                                     \
    if (lane == 0) barrier_arrive(k_empty + 8 * k.stage);                       \
    k.next();                                                                   \
    const float2 shrink = soften<BN, false, false>(s, rows, scale, BN);         \
    wgmma_wait<0>();                                                            \
    pin(y);                                                                     \
    pin(s);                                                                     \
    if (lane == 0) barrier_arrive(v_empty + 8 * v.stage);                       \
    v.next();                                                                   \
    pack_weights<BN>(p, s);                                                     \
    if (__any_sync(0xffffffff, shrink.x != 1.0f || shrink.y != 1.0f))           \
      _Pragma("unroll") for (int i = 0; i < D / 2; ++i) y[i] *= i & 2 ? shrink.y : shrink.x; \
  }
      if (blocks) {
        NEXT_BLOCK(FIRST, true, first_p)
#pragma unroll 1
        for (int block = 1; block < blocks; ++block) NEXT_BLOCK(BN, false, p)
        barrier_wait(v_full + 8 * v.stage, v.parity);
        wgmma_fence();
        begin_weighing<BN, false>(y, p, v_ring + v.stage * K_BYTES);
      } else {
        barrier_wait(v_full + 8 * v.stage, v.parity);
        wgmma_fence();
        begin_weighing<FIRST, true>(y, first_p, v_ring + v.stage * K_BYTES);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        rows.total[r] += __shfl_xor_sync(0xffffffff, rows.total[r], 1);
        rows.total[r] += __shfl_xor_sync(0xffffffff, rows.total[r], 2);
        rows.total[r] = 1.0f / rows.total[r];
      }
      wgmma_wait<0>();
      pin(y);
      if (lane == 0) barrier_arrive(v_empty + 8 * v.stage);
      v.next();

      // -------------------- y takes the place of q, which all four warps have read
      asm volatile("bar.sync %0, 128;" ::"r"(group) : "memory");
#pragma unroll
      for (int c = 0; c < D / 8; c += 2) {
        u32 out[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = (c + i / 2) * 4 + i % 2 * 2;
          out[i] = at < D / 2 ? pack(y[at] * rows.total[i & 1], y[at + 1] * rows.total[i & 1]) : 0;
        }
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                         (q + c / 8 * (64 * 128) + my_row) ^ (c % 8 << 4)),
                     "r"(out[0]), "r"(out[1]), "r"(out[2]), "r"(out[3])
                     : "memory");
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      __syncwarp();
      if (lane == 0 && m + warp * 16 < S)
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
          store_tile(&y_map, q + part * (64 * 128) + warp * (16 * 128), part * 64, head, m + warp * 16, batch);
    }
    if (lane == 0) stores_read();  // shared memory must outlive them
  }
}
