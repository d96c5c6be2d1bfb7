// Attention for Hopper (sm_90a), for NVRTC and nvcc.
//
//   y = softmax(scale q k^T) v              for each head; scores, softmax and accumulators in float32
//
// A CTA is one producer warp group and GROUPS consumer warp groups of 64 queries each. One thread of the producer
// loads q, k and v with the tensor memory accelerator (TMA), k and v into rings of STAGES blocks. Consumers
// multiply (wgmma) with online softmax, and write y, again by TMA. Their softmax overlaps with the products of
// other consumers and with their own y += p v of the block before. CTAs are persistent, over a grid-stride loop of
// tiles: GROUPS * 64 queries of one head.
//
// Two or three consumers take turns in issuing products (ping-pong). Four do not: there is nearly always one whose
// products can run. They have 112 registers a thread, so their blocks are short, and work per block counts:
//   STALE_MAX  Later blocks' maxima are not computed. Probabilities are relative to the first block's, until a sum of
//              them is too large: then that block's scores are computed once more, and its maximum (softmax.cuh).
//   AHEAD      The first scores of the next tile are computed while y is normalized and written.
//   WIDENED    The first block's probabilities are followed by zeros up to BN, so that all blocks have one loop. It
//              takes fewer registers.
//
// The first block of keys is the narrow one: the T % BN last keys, if that is not 0. All other blocks are full, so
// that they need no mask. The only padding that is computed is rows of queries beyond S, the first block's keys up
// to a multiple of 16, and columns of a head beyond D up to a multiple of 16 in the scores.
//
// Macros (hopper_tiles.py beside this file defines them):
//   GROUPS        consumer warp groups: 2, 3 or 4
//   BN            keys of a block, a multiple of 16
//   FIRST         keys of the first block, BN or the narrow one's rounded up to a multiple of 16
//   MASKED        1: the first block has fewer keys than FIRST
//   D             width of a head, a multiple of 8 up to 128
//   STAGES        blocks in flight, of k and of v each
//   DTYPE         BF16 or FP16: of q, k, v and y
//   SHARED_BYTES  dynamic shared memory of the launch
// and wgmma_shapes.cuh has wgmma_ss for N of FIRST and BN, wgmma_rs for N of D.
//
// Launch: attention_hopper(q_map, k_map, v_map, y_map, S, first_keys, kv_blocks, query_tiles, heads, tiles, scale)
//   *_map        CUtensorMap by value: (D, H, S or T, B), boxes of 64 columns of one head by 64, BN, BN and 16
//                tokens. Zeros outside, swizzle of 128 bytes.
//   S            queries
//   first_keys   in the first block       kv_blocks   of BN keys that follow it
//   query_tiles  of a head                heads       H          tiles   query_tiles * H * B
//   scale        of the scores, times log2(e)
//   block ((GROUPS + 1) * 128, 1, 1). May be launched with programmatic stream serialization.

#include "hopper/ptx.cuh"
#include "hopper/smem.cuh"
#include "hopper/softmax.cuh"
#include "hopper/wgmma.cuh"
#include "wgmma_shapes.cuh"

// Enumerators, since NVRTC puts each constexpr variable into global memory.
enum : int {
  WARP_GROUP = 128,                        // threads
  BM = 64,                                 // queries of a consumer: rows of a wgmma
  SWIZZLE = 128,                           // bytes of a row of a swizzled tile,
  COLUMNS = 64,                            // of a head in it,
  PARTS = (D + COLUMNS - 1) / COLUMNS,     // and such tiles side by side hold a head
  K_STEPS = (D + 15) / 16,                 // wgmmas that sum q k^T over D
  Q_PART = BM * SWIZZLE,                   // bytes
  KV_PART = BN * SWIZZLE,
  Q_BYTES = PARTS * Q_PART,                // of a consumer
  KV_BYTES = PARTS * KV_PART,              // of a stage, of k and v each
  WARP_ROWS = 16,                          // of a wgmma's 64
  IN_TURN = GROUPS < 4,                    // see above
  STALE_MAX = GROUPS == 4,
  AHEAD = GROUPS == 4,
  WIDENED = GROUPS == 4,
  // The producer's registers go to the consumers: multiples of 8, and all together no more than at launch.
  PRODUCER_REGISTERS = GROUPS == 4 ? 32 : 24,
  CONSUMER_REGISTERS = GROUPS == 4 ? 112 : GROUPS == 3 ? 160 : 240
};

static_assert(BN % 16 == 0 && FIRST % 16 == 0 && FIRST <= BN && BN <= 256 && D % 8 == 0 && D <= 128, "tile");

struct SharedStorage {
  // Two tiles of q, so that the next one is loaded meanwhile. A consumer's y takes the place of its q.
  unsigned char q[2][GROUPS][Q_BYTES];
  unsigned char k[STAGES][KV_BYTES];
  unsigned char v[STAGES][KV_BYTES];
  // mbarriers
  u64 q_full[2], q_empty[2];
  u64 k_full[STAGES], k_empty[STAGES];
  u64 v_full[STAGES], v_empty[STAGES];
};
static_assert(SMEM_ALIGN + sizeof(SharedStorage) == SHARED_BYTES, "HopperTile.shared in hopper_tiles.py");

// Where the members of SharedStorage are.
struct Addresses {
  u32 q, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty;
};
__device__ __forceinline__ Addresses addresses(u32 smem) {
  return {SMEM(q), SMEM(k), SMEM(v), SMEM(q_full), SMEM(q_empty), SMEM(k_full), SMEM(k_empty), SMEM(v_full), SMEM(v_empty)};
}

// Of bar.sync; 0 is __syncthreads.
enum NamedBarrier : u32 {
  CONSUMER = 1,  // one for each consumer's own threads
  PING_PONG = 8  // one for each consumer: its turn to issue products
};

// ------------------------------------------------------------------------------------ softmax

// Scores of the keys from number `keys` on, which are among the last 16, count nothing.
template <int N>
__device__ __forceinline__ void hide_keys(float (&s)[N / 2], int keys) {
  const int column = (threadIdx.x & 3) * 2;
#pragma unroll
  for (int c = 0; c < N / 8; ++c)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (c >= N / 8 - 2 && c * 8 + column + (i & 1) >= keys) s[c * 4 + i] = __int_as_float(0xff800000);
}

// 1 / row_sum.
__device__ __forceinline__ void normalizers(SoftmaxState& state) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum_lanes(state, r);
    state.row_sum[r] = 1.0f / state.row_sum[r];
  }
}

// ------------------------------------------------------------------------------------ products

// Issues s = q k^T for N keys at address k.
template <int N>
__device__ __forceinline__ void issue_scores(float (&s)[N / 2], u32 q, u32 k) {
  const Operand<16> queries(q), keys(k);
#pragma unroll
  for (int i = 0; i < K_STEPS; ++i)
    wgmma_ss<N>(s, queries.at(i / 4 * Q_PART + i % 4 * 32), keys.at(i / 4 * KV_PART + i % 4 * 32), i > 0);
  wgmma_commit();
}

// Issues y += p v for N keys; with FIRST_BLOCK y = p v.
template <int N, bool FIRST_BLOCK>
__device__ __forceinline__ void issue_output(float (&y)[D / 2], const u32 (&p)[N / 4], u32 v) {
  const Operand<KV_PART> values(v);
#pragma unroll
  for (int i = 0; i < N / 16; ++i) wgmma_rs<D>(y, p + 4 * i, values.at(i * (16 * SWIZZLE)), !FIRST_BLOCK || i > 0);
  wgmma_commit();
}

// Consumers issue their products one after the other, so that one's softmax overlaps the others' products.
__device__ __forceinline__ void ping_pong_wait(int me) {
  if constexpr (IN_TURN) named_barrier_sync<2 * WARP_GROUP>(PING_PONG + me);
}
__device__ __forceinline__ void ping_pong_signal(int me) {
  if constexpr (IN_TURN) named_barrier_arrive<2 * WARP_GROUP>(PING_PONG + (me + 1) % GROUPS);
}

// ------------------------------------------------------------------------------------ tiles

// Queries of one head, for all consumers.
struct Tile {
  u32 t, batch_head, head, batch;
  __device__ __forceinline__ u32 query(u32 query_tiles) const { return (t - batch_head * query_tiles) * (GROUPS * BM); }
};
__device__ __forceinline__ Tile tile_at(u32 t, u32 query_tiles, u32 heads) {
  const u32 batch_head = t / query_tiles;
  return {t, batch_head, batch_head % heads, batch_head / heads};
}

__device__ __forceinline__ void init_barriers(const Addresses& smem) {
  constexpr int WARPS = 4 * GROUPS;  // that free a buffer, one lane of each
  for (int i = 0; i < 2; ++i) {
    mbarrier_init(smem.q_full + 8 * i, 1);
    mbarrier_init(smem.q_empty + 8 * i, WARPS);
  }
  for (int i = 0; i < STAGES; ++i) {
    mbarrier_init(smem.k_full + 8 * i, 1);
    mbarrier_init(smem.k_empty + 8 * i, WARPS);
    mbarrier_init(smem.v_full + 8 * i, 1);
    mbarrier_init(smem.v_empty + 8 * i, WARPS);
  }
  fence_mbarrier_init();
}

using Position = PipelineState<STAGES>;

// ------------------------------------------------------------------------------------ producer

// One block of k or v into its ring. `block` counts as consumers do: 0 is the first, narrow one, the last in memory.
__device__ __forceinline__ void load_block(
    u32 ring, u32 full, u32 empty, const Position& at, const TensorMap* map, const Tile& tile, int block, int kv_blocks) {
  mbarrier_wait(empty + 8 * at.stage, at.parity);
  mbarrier_arrive_expect_tx(full + 8 * at.stage, KV_BYTES);
#pragma unroll
  for (int part = 0; part < PARTS; ++part)
    tma_load(ring + at.stage * KV_BYTES + part * KV_PART, map, full + 8 * at.stage, part * COLUMNS, tile.head,
             (block ? block - 1 : kv_blocks) * BN, tile.batch);
}

__device__ __forceinline__ void produce(
    const Addresses& smem, const TensorMap* q_map, const TensorMap* k_map, const TensorMap* v_map, int kv_blocks, u32 query_tiles,
    u32 heads, u32 tiles) {
  Position k = {0, 1}, v = {0, 1};
  u32 nth = 0;  // tile of this CTA
  for (u32 t = blockIdx.x; t < tiles; t += gridDim.x, ++nth) {
    const Tile tile = tile_at(t, query_tiles, heads);
    const u32 buffer = nth & 1, q = smem.q + buffer * (GROUPS * Q_BYTES), full = smem.q_full + 8 * buffer;
    mbarrier_wait(smem.q_empty + 8 * buffer, (nth >> 1 & 1) ^ 1);
    mbarrier_arrive_expect_tx(full, GROUPS * Q_BYTES);
#pragma unroll
    for (int g = 0; g < GROUPS; ++g)
#pragma unroll
      for (int part = 0; part < PARTS; ++part)
        tma_load(q + g * Q_BYTES + part * Q_PART, q_map, full, part * COLUMNS, tile.head,
                 tile.query(query_tiles) + g * BM, tile.batch);
    // k of a block, then v of the block before: in the order of their use
    for (int block = 0; block <= kv_blocks + 1; ++block) {
      if (block <= kv_blocks) {
        load_block(smem.k, smem.k_full, smem.k_empty, k, k_map, tile, block, kv_blocks);
        k.advance();
      }
      if (block) {
        load_block(smem.v, smem.v_full, smem.v_empty, v, v_map, tile, block - 1, kv_blocks);
        v.advance();
      }
    }
  }
  // The next kernel may start and set itself up while the last tiles are computed.
  griddepcontrol_launch_dependents();
}

// ------------------------------------------------------------------------------------ consumers

// Probabilities of the next block, relative to maxima of blocks before it, while y of the block before is computed.
// Where they are too large, from the block's scores once more: probabilities are in the place of the first ones.
__device__ __forceinline__ void stale_probabilities(
    float (&s)[BN / 2], u32 q, u32 k, int me, float scale, SoftmaxState& state, float (&y)[D / 2], u32 (&p)[BN / 4]) {
  float sums[2];
  exponentials<BN>(s, sums, state, scale);
  wgmma_wait<0>();
  fence_accumulators(y);
  to_operand<DTYPE, BN>(p, s);
  if (named_barrier_any<WARP_GROUP>(CONSUMER + me, fmaxf(sums[0], sums[1]) > sum_limit<DTYPE>())) {
    wgmma_fence();
    issue_scores<BN>(s, q, k);
    wgmma_wait<0>();
    fence_accumulators(s);
    rescale(y, raise_max<BN>(s, sums, state, scale, sum_limit<DTYPE>()));
    exponentials<BN>(s, sums, state, scale);
    to_operand<DTYPE, BN>(p, s);
  }
  state.row_sum[0] += sums[0], state.row_sum[1] += sums[1];
}

// Scores and probabilities of the next block, and meanwhile y of the block before it, which has N keys.
template <int N, bool FIRST_BLOCK>
__device__ __forceinline__ void next_block(
    const Addresses& smem, u32 q, Position& k, Position& v, int me, int lane, float scale, SoftmaxState& state, float (&y)[D / 2],
    const u32 (&p_before)[N / 4], float (&s)[BN / 2], u32 (&p)[BN / 4]) {
  mbarrier_wait(smem.k_full + 8 * k.stage, k.parity);
  mbarrier_wait(smem.v_full + 8 * v.stage, v.parity);
  ping_pong_wait(me);
  wgmma_fence();  // right before the products: with a loop in between, ptxas serializes them
  issue_scores<BN>(s, q, smem.k + k.stage * KV_BYTES);
  issue_output<N, FIRST_BLOCK>(y, p_before, smem.v + v.stage * KV_BYTES);
  ping_pong_signal(me);
  wgmma_wait<1>();
  fence_accumulators(s);
  if constexpr (STALE_MAX) {
    stale_probabilities(s, q, smem.k + k.stage * KV_BYTES, me, scale, state, y, p);
    if (lane == 0) mbarrier_arrive(smem.k_empty + 8 * k.stage);
    if (lane == 0) mbarrier_arrive(smem.v_empty + 8 * v.stage);
  } else {
    if (lane == 0) mbarrier_arrive(smem.k_empty + 8 * k.stage);
    const float2 factors = online_softmax<BN, false, false>(s, state, scale);
    if constexpr (GROUPS == 3)
      wgmma_wait_behind<0>(state.row_sum[0] + state.row_sum[1]);
    else  // two fill the tensor cores without, and were slower with it
      wgmma_wait<0>();
    fence_accumulators(y);
    fence_accumulators(s);
    if (lane == 0) mbarrier_arrive(smem.v_empty + 8 * v.stage);
    to_operand<DTYPE, BN>(p, s);
    rescale(y, factors);
  }
  k.advance();
  v.advance();
}

// Issues y of the last block, of N keys, and with AHEAD the first scores of the tile behind it. If there is none, of
// whatever is in shared memory: ptxas serializes products that are issued in a branch.
template <int N, bool FIRST_BLOCK>
__device__ __forceinline__ void last_output(
    const Addresses& smem, const Position& k, const Position& v, u32 next, bool ahead, u32 next_q, float (&y)[D / 2],
    const u32 (&p)[N / 4], float (&first_s)[FIRST / 2]) {
  if (ahead) {
    mbarrier_wait(smem.q_full + 8 * (next & 1), next >> 1 & 1);
    mbarrier_wait(smem.k_full + 8 * k.stage, k.parity);
  }
  mbarrier_wait(smem.v_full + 8 * v.stage, v.parity);
  wgmma_fence();
  issue_output<N, FIRST_BLOCK>(y, p, smem.v + v.stage * KV_BYTES);
  if constexpr (AHEAD) issue_scores<FIRST>(first_s, next_q, smem.k + k.stage * KV_BYTES);
}

// Takes part in the rings and in the ping-pong of a tile in which this consumer has no queries.
__device__ __forceinline__ void skip_tile(const Addresses& smem, Position& k, Position& v, int me, int lane, int kv_blocks) {
  for (int block = 0; block <= kv_blocks; ++block) {
    mbarrier_wait(smem.k_full + 8 * k.stage, k.parity);
    if (block) {
      ping_pong_wait(me);
      ping_pong_signal(me);
    }
    if (lane == 0) mbarrier_arrive(smem.k_empty + 8 * k.stage);
    k.advance();
    mbarrier_wait(smem.v_full + 8 * v.stage, v.parity);
    if (lane == 0) mbarrier_arrive(smem.v_empty + 8 * v.stage);
    v.advance();
  }
}

// Once y of the tile before has been read by TMA, q may be loaded into its place.
__device__ __forceinline__ void release_tile_before(const Addresses& smem, u32 nth) {
  tma_store_commit();
  tma_store_wait_read<0>();
  if (nth) mbarrier_arrive(smem.q_empty + 8 * (~nth & 1));
}

// y, normalized, into the place of q and from there to global memory, each warp its 16 rows.
__device__ __forceinline__ void epilogue(
    const float (&y)[D / 2], const float (&normalizer)[2], u32 q, u32 row_address, const TensorMap* y_map,
    const Tile& tile, int query, int S, int me, int warp, int lane) {
  named_barrier_sync<WARP_GROUP>(CONSUMER + me);  // all four warps have read q
#pragma unroll
  for (int c = 0; c < D / 8; c += 2) {
    u32 out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = (c + i / 2) * 4 + i % 2 * 2;
      out[i] = at < D / 2 ? pack<DTYPE>(y[at] * normalizer[i & 1], y[at + 1] * normalizer[i & 1]) : 0;
    }
    stmatrix_x4((q + c / 8 * Q_PART + row_address) ^ (c % 8 << 4), out);
  }
  fence_async_proxy();
  __syncwarp();
  if (lane == 0 && query + warp * WARP_ROWS < S)
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
      tma_store(y_map, q + part * Q_PART + warp * (WARP_ROWS * SWIZZLE), part * COLUMNS, tile.head,
                query + warp * WARP_ROWS, tile.batch);
}

// Where the consumer's q of this CTA's n-th tile is.
__device__ __forceinline__ u32 query_address(const Addresses& smem, u32 nth, int me) {
  return smem.q + (nth & 1) * (GROUPS * Q_BYTES) + me * Q_BYTES;
}

__device__ __forceinline__ void consume(
    const Addresses& smem, Position& k, Position& v, int thread, int group, int lane, const TensorMap* y_map, int S,
    int first_keys, int kv_blocks, u32 query_tiles, u32 heads, u32 tiles, float scale) {
  const int me = group - 1, warp = thread >> 5 & 3;
  // The 16 bytes whose address this lane gives stmatrix, swizzled: those of unit u to the right are at ^ 16 * u.
  const u32 row = warp * WARP_ROWS + (lane & 15), row_address = row * SWIZZLE + ((lane ^ row << 4) & 0x70);
  u32 nth = 0, t = blockIdx.x;                 // tile of this CTA, and of all
  if (me == GROUPS - 1) ping_pong_signal(me);  // the first consumer begins
  while (t < tiles) {
    Tile tile = tile_at(t, query_tiles, heads);
    mbarrier_wait(smem.q_full + 8 * (nth & 1), nth >> 1 & 1);
    if (tile.query(query_tiles) + me * BM >= S) {
      skip_tile(smem, k, v, me, lane, kv_blocks);
      if (lane == 0) release_tile_before(smem, nth);
      t += gridDim.x, ++nth;
      continue;
    }
    // The first block has arrays of its own: ptxas finds no registers for wgmma in parts of the others.
    float first_s[FIRST / 2];
    mbarrier_wait(smem.k_full + 8 * k.stage, k.parity);
    wgmma_fence();
    issue_scores<FIRST>(first_s, query_address(smem, nth, me), smem.k + k.stage * KV_BYTES);
    bool ahead;  // Are the first scores of the tile behind this one issued?
    do {
      const int query = tile.query(query_tiles) + me * BM;
      const u32 q = query_address(smem, nth, me);
      float s[BN / 2], y[D / 2];
      u32 first_p[FIRST / 4], p[BN / 4];
      SoftmaxState state;
      wgmma_wait<0>();
      fence_accumulators(first_s);
      if (lane == 0) mbarrier_arrive(smem.k_empty + 8 * k.stage);
      k.advance();
      if constexpr (MASKED) hide_keys<FIRST>(first_s, first_keys);
      online_softmax<FIRST, true, false>(first_s, state, scale);
      to_operand<DTYPE, FIRST>(first_p, first_s);
      if (lane == 0) release_tile_before(smem, nth);  // here, since its stores are done by now
      __syncwarp();

      const Tile next = AHEAD ? tile_at(t + gridDim.x, query_tiles, heads) : tile;
      ahead = AHEAD && next.t < tiles && next.query(query_tiles) + me * BM < S;
      const u32 next_q = query_address(smem, nth + 1, me);
      if constexpr (WIDENED) {
#pragma unroll
        for (int i = 0; i < BN / 4; ++i) p[i] = i < FIRST / 4 ? first_p[i] : 0;
#pragma unroll
        for (int i = 0; i < D / 2; ++i) y[i] = 0.0f;
#pragma unroll 1
        for (int block = 0; block < kv_blocks; ++block)
          next_block<BN, false>(smem, q, k, v, me, lane, scale, state, y, p, s, p);
        last_output<BN, false>(smem, k, v, nth + 1, ahead, next_q, y, p, first_s);
      } else if (kv_blocks) {
        next_block<FIRST, true>(smem, q, k, v, me, lane, scale, state, y, first_p, s, p);
#pragma unroll 1
        for (int block = 1; block < kv_blocks; ++block)
          next_block<BN, false>(smem, q, k, v, me, lane, scale, state, y, p, s, p);
        last_output<BN, false>(smem, k, v, nth + 1, ahead, next_q, y, p, first_s);
      } else {
        last_output<FIRST, true>(smem, k, v, nth + 1, ahead, next_q, y, first_p, first_s);
      }
      normalizers(state);
      wgmma_wait<AHEAD>();
      fence_accumulators(y);
      if (lane == 0) mbarrier_arrive(smem.v_empty + 8 * v.stage);
      v.advance();
      epilogue(y, state.row_sum, q, row_address, y_map, tile, query, S, me, warp, lane);
      t += gridDim.x, ++nth;
      tile = next;
    } while (ahead);
    if constexpr (AHEAD) wgmma_wait<0>();
  }
  if (lane == 0) {  // shared memory must outlive the last stores
    tma_store_commit();
    tma_store_wait_read<0>();
  }
}

extern "C" __global__ void __launch_bounds__((GROUPS + 1) * WARP_GROUP, 1)
    attention_hopper(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                     const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap y_map, int S,
                     int first_keys, int kv_blocks, u32 query_tiles, u32 heads, u32 tiles, float scale) {
  extern __shared__ unsigned char dynamic[];
  const Addresses smem = addresses(smem_base(dynamic));
  const int thread = threadIdx.x, lane = thread & 31;
  const int group = __shfl_sync(0xffffffff, thread >> 7, 0);  // so ptxas sees that it is the same in a warp
  if (thread == 0) {
    prefetch_tensor_map(&q_map);
    prefetch_tensor_map(&k_map);
    prefetch_tensor_map(&v_map);
    prefetch_tensor_map(&y_map);
    init_barriers(smem);
  }
  __syncthreads();
  griddepcontrol_wait();  // all of the above overlaps with the kernel before

  if (group == 0) {
    setmaxnreg_dec<PRODUCER_REGISTERS>();
    if (thread == 0) produce(smem, &q_map, &k_map, &v_map, kv_blocks, query_tiles, heads, tiles);
  } else {
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    Position k = {0, 0}, v = {0, 0};  // here: in `consume`, ptxas places registers otherwise
    consume(smem, k, v, thread, group, lane, &y_map, S, first_keys, kv_blocks, query_tiles, heads, tiles, scale);
  }
}
