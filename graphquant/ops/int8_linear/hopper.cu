// int8_linear for Hopper (sm_90a), for NVRTC and nvcc.
//
//   acc[m, n] = sum_k xq[m, k] * wq[n, k]                                         exact int32
//   y[m, n]   = fma(float(acc) * x_scale[m], w_scale[n], fma(x_shift[m], w_sum[n], bias[n]))
//               + residual[m, n]                                  float32, rounded once to y's type
//
// Every specialization does these operations in this order, so all give the same bits.
//
// A CTA is one producer and two consumer warp groups. One thread of the producer loads tiles of xq and wq into a
// ring of STAGES buffers with the tensor memory accelerator (TMA); two of its other warps load scales, shifts, sums
// and bias. Consumers multiply (wgmma) and write y, again by TMA. CTAs are persistent, over a grid-stride loop of
// tiles.
//
//   PINGPONG 1   each consumer has a [BM, BN] tile of its own; one's epilogue overlaps with the other's main loop.
//                An epilogue then takes no time of its own as long as it is shorter than a main loop.
//   PINGPONG 0   cooperative: each consumer has half the rows of one tile, for tiles whose accumulators would not
//                fit into one's registers.
//   CLUSTER_M 2  two CTAs, one above the other, share a tile of wq: each loads half of it into both (multicast).
//   CLUSTER_N 2  the same side by side, with a tile of xq.
//   SPLIT_K s    s CTAs of a cluster take a share of K each, then of the columns: they send each other their int32
//                accumulators through distributed shared memory. Exact, and without a workspace.
//
// Macros (hopper_tiles.py beside this file defines them):
//   BM BN STAGES PINGPONG CLUSTER_M CLUSTER_N SPLIT_K   as above; BN a multiple of 32 up to 256
//   CHUNK         bytes of a row of y that are staged together: 128 or 64
//   BUFFERS       such chunks in flight in each warp
//   Y             BF16, FP16 or FP32: type of y and residual
//   BIAS          NONE, BF16, FP16 or FP32
//   RESIDUAL      0 or 1
//   NUM_ROWS      0 or 1: is num_rows given?
//   SHARED_BYTES  dynamic shared memory of the launch
// and wgmma_shapes.cuh has wgmma_ss for N of BN.
//
// Launch (hopper_tiles.py has the numbers: `descriptors` and HopperTile's cover, grid, threads and shared):
//   int8_linear_hopper(x_map, w_map, y_map, residual_map, x_scale, x_shift, w_scale, w_sum, bias,
//                      M, N, down, right, height, steps[, num_rows])
//   *_map     CUtensorMap by value (128 bytes, aligned to 64). uint8 [M, K] and [N, K], boxes of BK columns;
//             y's type [M, N] twice, boxes of a warp's chunk. Zeros outside, no interleave, L2 promotion of
//             128 bytes: with 256, rows that do not start at multiples of 128 bytes cost 16 % at K = 4304.
//             Without RESIDUAL the fourth is not read.
//   pointers  float32, contiguous, bias as BIAS says (not read without); aligned to their elements
//   integers  32 bits: M, N; clusters' tiles down and right; tiles down before one right; BKs of a CTA's share of K
//   num_rows  with NUM_ROWS: int32 on the device; tiles that begin behind so many rows are neither computed nor written
//   grid (clusters * CTAS, 1, 1), block (384, 1, 1). The cluster size is compiled in. Dynamic shared memory is over
//   48 KiB: raise the function's limit first. May be launched with programmatic stream serialization (saves 1 us a
//   launch): nothing is read or written before griddepcontrol.wait.

#include "hopper/ptx.cuh"
#include "hopper/smem.cuh"
#include "hopper/wgmma.cuh"
#include "wgmma_shapes.cuh"

// Enumerators, since NVRTC puts each constexpr variable into global memory.
enum : int {
  BK = 128,                                    // bytes of K in a stage: one row of the 128-byte swizzle
  SHARERS = CLUSTER_M * CLUSTER_N,             // CTAs that share a tile by multicast
  CTAS = SHARERS * SPLIT_K,                    // of a cluster
  CONSUMERS = 2,                               // warp groups
  ROWS = PINGPONG ? BM : BM / 2,               // of a consumer
  MI = ROWS / 64,                              // wgmmas below each other that cover them
  COLUMNS = BN / SPLIT_K,                      // that a CTA finishes
  X_BYTES = BM * BK,
  W_BYTES = BN * BK,
  STAGE_BYTES = X_BYTES + W_BYTES,
  Y_SIZE = (int)Y == FP32 ? 4 : 2,             // bytes
  WARP_ROWS = 16 * MI,                         // of a consumer's warp
  CHUNK_BYTES = WARP_ROWS * CHUNK,
  CHUNK_COLUMNS = CHUNK / Y_SIZE,
  CHUNKS = COLUMNS / CHUNK_COLUMNS,            // of a warp's rows
  MATRIX_COLUMNS = 16 / MI,                    // of a chunk, stored by one stmatrix
  VECTOR_BYTES = BN * 12 + ROWS * 8,
  PARTIAL_BYTES = ROWS * COLUMNS * 4,          // accumulators that a consumer gets from one other CTA
  PARTIALS_BYTES = (SPLIT_K - 1) * PARTIAL_BYTES,
  // The producer's registers go to the consumers: multiples of 8, and all together no more than 65,536.
  PRODUCER_REGISTERS = 24,
  CONSUMER_REGISTERS = 240
};

static_assert(BM % (PINGPONG ? 64 : 128) == 0 && COLUMNS % CHUNK_COLUMNS == 0, "tile");
static_assert(MI <= 2 && MI * BN <= 384, "a consumer's accumulators take MI * BN / 2 of 240 registers");
static_assert(SHARERS <= 2 && CTAS <= 8, "cluster");

// What an epilogue multiplies by and adds.
struct Vectors {
  float4 w[BN / 2];  // w_scale, w_scale, w_sum, w_sum of two neighboring columns
  float bias[BN];
  float2 x[ROWS];  // x_scale, x_shift
};
static_assert(sizeof(Vectors) == VECTOR_BYTES, "Vectors");

struct SharedStorage {
  struct {
    unsigned char x[X_BYTES], w[W_BYTES];
  } ring[STAGES];
  unsigned char chunks[CONSUMERS][4][BUFFERS][CHUNK_BYTES];  // of y and residual, for each warp
#if SPLIT_K > 1
  unsigned char partials[CONSUMERS][SPLIT_K - 1][PARTIAL_BYTES];  // accumulators from the other CTAs
#endif
  Vectors vectors[CONSUMERS];
  // mbarriers
  u64 full[STAGES], empty[STAGES];
  u64 ping_pong[CONSUMERS];  // its turn to multiply
  u64 partials_full[CONSUMERS], partials_empty[CONSUMERS];
  u64 vectors_full[CONSUMERS], vectors_empty[CONSUMERS];
  u64 residual_full[CONSUMERS][4][BUFFERS];
};
static_assert(SMEM_ALIGN + sizeof(SharedStorage) == SHARED_BYTES, "HopperTile.shared in hopper_tiles.py");

// Where the members of SharedStorage are.
struct Addresses {
  u32 ring, chunks, partials, vectors, full, empty, ping_pong, partials_full, partials_empty, vectors_full,
      vectors_empty, residual_full;
};
__device__ __forceinline__ Addresses addresses(u32 smem) {
  return {
      SMEM(ring), SMEM(chunks),
#if SPLIT_K > 1
      SMEM(partials),
#else
      0,
#endif
      SMEM(vectors), SMEM(full), SMEM(empty), SMEM(ping_pong), SMEM(partials_full), SMEM(partials_empty),
      SMEM(vectors_full), SMEM(vectors_empty), SMEM(residual_full)};
}

// ------------------------------------------------------------------------------------ tiles

// What a CTA computes: of `tiles` tiles of clusters the `first` and then every `clusters`-th.
struct Work {
  u32 down, right, height, tiles, first, clusters;
  u32 sharer, share;  // which of a multicast tile; which share of K
  int steps;
};

// From a consumer's tile to its next.
__device__ __forceinline__ u32 stride(const Work& work) { return (PINGPONG ? 2 : 1) * work.clusters; }

// In tiles of clusters.
struct Tile {
  u32 row, column;
};
// The t-th: tiles of clusters come `height` down before one right, so that those in flight share rows and columns.
__device__ __forceinline__ Tile tile_at(u32 t, const Work& work) {
  const u32 first = t / (work.height * work.right) * work.height, inside = t - first * work.right;
  const u32 height = min(work.down - first, work.height);
  const u32 column = inside / height, row = first + inside - column * height;
  return {row, column};
}
// First row and column of this CTA's part.
__device__ __forceinline__ u32 first_row(const Tile& tile, const Work& work) {
  return (tile.row * CLUSTER_M + (CLUSTER_M == 2 ? work.sharer : 0)) * BM;
}
__device__ __forceinline__ u32 first_column(const Tile& tile, const Work& work) {
  return (tile.column * CLUSTER_N + (CLUSTER_N == 2 ? work.sharer : 0)) * BN;
}

__device__ __forceinline__ void init_barriers(const Addresses& smem) {
  for (int i = 0; i < STAGES; ++i) {
    mbarrier_init(smem.full + 8 * i, 1);
    mbarrier_init(smem.empty + 8 * i, SHARERS * (PINGPONG ? 4 : 8));  // warps
  }
  for (int i = 0; i < CONSUMERS; ++i) {
    mbarrier_init(smem.ping_pong + 8 * i, 4);
    mbarrier_init(smem.vectors_full + 8 * i, 64);
    mbarrier_init(smem.vectors_empty + 8 * i, 4);
    mbarrier_init(smem.partials_full + 8 * i, 1);
    mbarrier_init(smem.partials_empty + 8 * i, SPLIT_K > 1 ? 4 * (SPLIT_K - 1) : 1);
  }
  for (int i = 0; i < CONSUMERS * 4 * BUFFERS; ++i) mbarrier_init(smem.residual_full + 8 * i, 1);
  fence_mbarrier_init();
}

// ------------------------------------------------------------------------------------ producer

// One thread: tiles of xq and wq.
__device__ __forceinline__ void produce_tiles(
    const Addresses& smem, const Work& work, const TensorMap* x_map, const TensorMap* w_map) {
  int stage = 0;
  u32 parity = 1;
  for (u32 t = work.first; t < work.tiles; t += work.clusters) {
    const Tile tile = tile_at(t, work);
    const int m = first_row(tile, work), n = first_column(tile, work);
    int k = work.share * work.steps * BK;
#pragma unroll 1
    for (int step = 0; step < work.steps; ++step, k += BK) {
      const u32 x = smem.ring + stage * STAGE_BYTES, w = x + X_BYTES, full = smem.full + 8 * stage;
      mbarrier_wait(smem.empty + 8 * stage, parity);
      mbarrier_arrive_expect_tx(full, STAGE_BYTES);  // both halves of the shared tile count
      const u16 sharers = 3 << (work.share * SHARERS);
      if constexpr (CLUSTER_N == 2) {
        tma_load_multicast(x + work.sharer * (X_BYTES / 2), x_map, full, k, m + work.sharer * (BM / 2), sharers);
      } else {
        tma_load(x, x_map, full, k, m);
      }
      if constexpr (CLUSTER_M == 2) {
        tma_load_multicast(w + work.sharer * (W_BYTES / 2), w_map, full, k, n + work.sharer * (BN / 2), sharers);
      } else {
        tma_load(w, w_map, full, k, n);
      }
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
  }
}

__device__ __forceinline__ float load_bias(const void* bias, int n) {
  if constexpr (BIAS == NONE) {
    return 0.0f;
  } else if constexpr (BIAS == BF16) {
    return __uint_as_float((u32)__ldg((const u16*)bias + n) << 16);
  } else if constexpr (BIAS == FP16) {
    return half_to_float(__ldg((const u16*)bias + n));
  } else {
    return __ldg((const float*)bias + n);
  }
}

// One warp: the Vectors at address `to`, asynchronously but for the biases, which may have to be converted.
__device__ __forceinline__ void load_vectors(
    u32 to, int m, int n, int lane, const float* x_scale, const float* x_shift, const float* w_scale,
    const float* w_sum, int M, int N) {
#pragma unroll 1
  for (int i = 0; i < BN; i += 32) {
    const int c = i + lane;
    cp_async(to + (c >> 1) * 16 + (c & 1) * 4, w_scale, n + c, N);
    cp_async(to + (c >> 1) * 16 + (c & 1) * 4 + 8, w_sum, n + c, N);
  }
#pragma unroll 1
  for (int i = 0; i < ROWS; i += 32) {
    const int r = i + lane;
    cp_async(to + BN * 12 + r * 8, x_scale, m + r, M);
    cp_async(to + BN * 12 + r * 8 + 4, x_shift, m + r, M);
  }
}
__device__ __forceinline__ void load_biases(u32 to, int n, int lane, const void* bias, int N) {
  if constexpr (BIAS != NONE) {
#pragma unroll 2
    for (int i = 0; i < BN; i += 32) {
      const float b = n + i + lane < N ? load_bias(bias, n + i + lane) : 0.0f;
      st_shared(to + BN * 8 + (i + lane) * 4, b);
    }
  }
}

// ------------------------------------------------------------------------------------ main loop

// A consumer, and what of shared memory is its own or its warp's.
struct Consumer {
  int group, me, thread, warp, lane;
  u32 chunks, lane_chunk;  // lane_chunk: where this lane writes (stmatrix: where it points at) in the first chunk;
                           // ^ 16 * u is u 16-byte units further on
  u32 residual_full, vectors, partials;
};

// Position of 16 bytes `unit` of row `row` in a chunk, as TMA's swizzle has it: no bank conflicts.
__device__ __forceinline__ u32 swizzled(int row, int unit) {
  return row * CHUNK + ((unit ^ (CHUNK == 128 ? row & 7 : row >> 1 & 3)) << 4);
}

// To all CTAs that load into the stage. No release: all that is to be ordered is what wgmma has read.
__device__ __forceinline__ void release_stage(u32 empty, const Work& work, int lane) {
  if constexpr (SHARERS > 1) {
    if (lane < SHARERS) mbarrier_arrive_cluster(map_to_cta(empty, work.share * SHARERS + lane));
  } else {
    if (lane == 0) mbarrier_arrive(empty);
  }
}

// acc = xq wq^T of one tile, whose first stage is the position-th of the ring since the start.
__device__ __forceinline__ void main_loop(
    const Addresses& smem, const Work& work, const Consumer& c, u32 position, u32 nth, int (&acc)[MI][BN / 2]) {
  if (PINGPONG) mbarrier_wait(smem.ping_pong + 8 * c.me, (nth & 1) ^ (1 - c.me));
  int stage = position % STAGES;
  u32 parity = position / STAGES & 1;
  u32 last = 0;  // stage's mbarrier
#pragma unroll 1
  for (int step = 0; step < work.steps; ++step) {
    mbarrier_wait(smem.full + 8 * stage, parity);
    // Of 128 rows, every other 8: a warp's rows of both wgmmas are then 32 neighbors, stored at once.
    const u64 x = wgmma_descriptor(smem.ring + stage * STAGE_BYTES + (PINGPONG ? 0 : c.me * ROWS) * BK, 16, MI * 1024);
    const u64 w = wgmma_descriptor(smem.ring + stage * STAGE_BYTES + X_BYTES, 16, 1024);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int i = 0; i < MI; ++i) wgmma_ss<BN>(acc[i], x + i * 64 + k * 2, w + k * 2, (step | k) != 0);
    wgmma_commit();
    wgmma_wait<1>();
    if (step > 0) release_stage(last, work, c.lane);  // the step before has been read
    last = smem.empty + 8 * stage;
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
  // All is issued: the other consumer's wgmmas queue up behind ours without a gap.
  if (PINGPONG && c.lane == 0) mbarrier_arrive(smem.ping_pong + 8 * (2 - c.group));
#pragma unroll
  for (int i = 0; i < MI; ++i) fence_accumulators(acc[i]);
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < MI; ++i) fence_accumulators(acc[i]);
  release_stage(last, work, c.lane);
}

// ------------------------------------------------------------------------------------ split K

// Sends the other CTAs the accumulators of their columns, and adds theirs to ours.
__device__ __forceinline__ void reduce_partials(
    const Addresses& smem, const Work& work, const Consumer& c, u32 nth, int (&acc)[MI][BN / 2]) {
  if (c.thread == 0) mbarrier_arrive_expect_tx(smem.partials_full + 8 * c.me, PARTIALS_BYTES);
  if (nth > 0) mbarrier_wait_acquire_cluster(smem.partials_empty + 8 * c.me, (nth - 1) & 1);
#pragma unroll
  for (int part = 0; part < SPLIT_K; ++part) {
    if (part == work.share) continue;
    const u32 cta = part * SHARERS + work.sharer, to_full = map_to_cta(smem.partials_full + 8 * c.me, cta);
    const u32 to = map_to_cta(c.partials + (work.share - (work.share > part)) * PARTIAL_BYTES + c.thread * 16, cta);
#pragma unroll
    for (int i = 0; i < MI; ++i)
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; ++j)
        st_async(to + (i * (COLUMNS / 8) + j) * 2048, to_full, acc[i] + part * (COLUMNS / 2) + j * 4);
  }
  mbarrier_wait_acquire_cluster(smem.partials_full + 8 * c.me, nth & 1);
#pragma unroll
  for (int part = 0; part < SPLIT_K; ++part) {
    if (part != work.share) continue;
#pragma unroll
    for (int other = 0; other < SPLIT_K - 1; ++other)
#pragma unroll
      for (int i = 0; i < MI; ++i)
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; ++j) {
          int* d = acc[i] + part * (COLUMNS / 2) + j * 4;
          const int4 a =
              ld_shared_int4_ordered(c.partials + other * PARTIAL_BYTES + (i * (COLUMNS / 8) + j) * 2048 + c.thread * 16);
          d[0] += a.x, d[1] += a.y, d[2] += a.z, d[3] += a.w;
        }
  }
}

// ------------------------------------------------------------------------------------ epilogue

// One row's (x) and one column's (w) part of y; see the head of this file.
__device__ __forceinline__ float dequantize(int acc, float2 x, float w_scale, float w_sum, float bias) {
  const float rest = BIAS == NONE ? __fmul_rn(x.y, w_sum) : __fmaf_rn(x.y, w_sum, bias);
  return __fmaf_rn(__fmul_rn(__int2float_rn(acc), x.x), w_scale, rest);
}

// w_scale, w_scale, w_sum, w_sum of two columns, and their biases.
struct Columns {
  float4 w[2 / MI];
  float2 b[2 / MI];
};
__device__ __forceinline__ Columns load_columns(u32 column, int c) {
  Columns r;
#pragma unroll
  for (int i = 0; i < 2 / MI; ++i) {
    r.w[i] = ld_shared_float4(column + (c + i * 8) * 8);
    r.b[i] = make_float2(0.0f, 0.0f);
    if (BIAS != NONE) r.b[i] = ld_shared_float2(column - (threadIdx.x & 3) * 8 + BN * 8 + (c + i * 8) * 4);
  }
  return r;
}

__device__ __forceinline__ void load_residual(const Consumer& c, int buffer, const TensorMap* residual_map, int n, int m) {
  mbarrier_arrive_expect_tx(c.residual_full + 8 * buffer, CHUNK_BYTES);
  tma_load(c.chunks + buffer * CHUNK_BYTES, residual_map, c.residual_full + 8 * buffer, n, m);
}

// What the epilogue reads, loaded while the other consumer multiplies. One lane of the warp.
__device__ __forceinline__ void begin_tile(const Consumer& c, const Work& work, const TensorMap* residual_map, int m, int n) {
  tma_store_wait_read<0>();
  if constexpr (RESIDUAL) {
    const int y_n = n + (SPLIT_K > 1 ? work.share * COLUMNS : 0);
#pragma unroll
    for (int q = 0; q < (BUFFERS < CHUNKS ? BUFFERS : CHUNKS); ++q)
      load_residual(c, q, residual_map, y_n + q * CHUNK_COLUMNS, m);
  }
}

// y of one tile from acc: each warp for itself, its rows by CHUNK bytes at a time.
__device__ __forceinline__ void epilogue(
    const Addresses& smem, const Work& work, const Consumer& c, u32 nth, int (&acc)[MI][BN / 2], const TensorMap* y_map,
    const TensorMap* residual_map, int m, int n) {
  mbarrier_wait(smem.vectors_full + 8 * c.me, nth & 1);
  // The addresses below are the same for every tile. Unless told that they are new, the compiler works out dozens
  // of them ahead of the loop over tiles, and spills.
  u32 lane_chunk = c.lane_chunk, column = c.vectors + (c.lane & 3) * 16;
  u32 row_at = c.vectors + BN * 12 + (c.warp * WARP_ROWS + (c.lane >> 2)) * 8;
  asm volatile("" : "+r"(lane_chunk), "+r"(column), "+r"(row_at));
  float2 row[2 * MI];  // x_scale, x_shift of rows 0, 8 (, 16, 24) below this lane's first
#pragma unroll
  for (int i = 0; i < 2 * MI; ++i) row[i] = ld_shared_float2(row_at + i * 64);
#pragma unroll
  for (int part = 0; part < SPLIT_K; ++part) {
    if (SPLIT_K > 1 && part != work.share) continue;
    Columns next = load_columns(column, part * COLUMNS);
#pragma unroll
    for (int q = 0; q < CHUNKS; ++q) {
      const int c0 = part * COLUMNS + q * CHUNK_COLUMNS;
      const u32 chunk = lane_chunk + q % BUFFERS * CHUNK_BYTES;
      if constexpr (RESIDUAL) {
        const int uses = (CHUNKS - q % BUFFERS + BUFFERS - 1) / BUFFERS;  // of this buffer in a tile
        mbarrier_wait(c.residual_full + 8 * (q % BUFFERS), (nth * uses + q / BUFFERS) & 1);
      } else if (q >= BUFFERS) {
        if (c.lane == 0) tma_store_wait_read<BUFFERS - 1>();
        __syncwarp();
      }
#pragma unroll
      for (int c1 = 0; c1 < CHUNK_COLUMNS; c1 += MATRIX_COLUMNS) {
        const Columns now = next;
        // Ahead of the stores below, past which the compiler would not move it.
        if (c0 + c1 + MATRIX_COLUMNS < (part + 1) * COLUMNS) next = load_columns(column, c0 + c1 + MATRIX_COLUMNS);
        const u32 matrices = chunk ^ c1 / 8 << 4;
        u32 out[4], r[4];
        if constexpr (Y != FP32 && RESIDUAL) ldmatrix_x4(r, matrices);
#pragma unroll
        for (int v = 0; v < 4; ++v) {  // 8 rows by 8 columns each: below each other, or in a square
          const int down8 = MI == 2 ? v : v & 1, right8 = MI == 2 ? 0 : v >> 1;
          const int* d = acc[MI == 2 ? v & 1 : 0] + (c0 + c1) / 2 + right8 * 4 + (MI == 2 ? v >> 1 : v & 1) * 2;
          const float4 w = now.w[right8];
          const float2 b = now.b[right8];
          float low = dequantize(d[0], row[down8], w.x, w.z, b.x);
          float high = dequantize(d[1], row[down8], w.y, w.w, b.y);
          if constexpr (Y == FP32) {
            const u32 to = (chunk + down8 * (8 * CHUNK)) ^ (c1 / 4 + right8 * 2) << 4;
            if constexpr (RESIDUAL) {
              const float2 more = ld_shared_float2_ordered(to);
              low = __fadd_rn(low, more.x), high = __fadd_rn(high, more.y);
            }
            st_shared(to, low, high);
          } else {
            if constexpr (RESIDUAL) {
              const float2 more = unpack<Y>(r[v]);
              low = __fadd_rn(low, more.x), high = __fadd_rn(high, more.y);
            }
            out[v] = pack<Y>(low, high);
          }
        }
        if constexpr (Y != FP32) stmatrix_x4(matrices, out);
      }
      fence_async_proxy();
      __syncwarp();
      if (c.lane == 0) {
        tma_store(y_map, c.chunks + q % BUFFERS * CHUNK_BYTES, n + c0, m);
        tma_store_commit();
        if constexpr (RESIDUAL) {
          // The chunk to come next goes into the buffer stored before this one: that store has had time.
          const int lag = BUFFERS > 1 ? 1 : 0, next_q = q - lag + BUFFERS;
          if (q >= lag && next_q < CHUNKS) {
            tma_store_wait_read<lag>();
            load_residual(c, next_q % BUFFERS, residual_map, n + part * COLUMNS + next_q * CHUNK_COLUMNS, m);
          }
        }
      }
    }
  }
  __syncwarp();
  if (c.lane == 0) mbarrier_arrive(smem.vectors_empty + 8 * c.me);
}

// ------------------------------------------------------------------------------------ consumers

__device__ __forceinline__ void consume(
    const Addresses& smem, const Work& work, const Consumer& c, const TensorMap* y_map, const TensorMap* residual_map) {
  u32 position = PINGPONG ? c.me * work.steps : 0;  // of the tile's first step in the ring
  u32 nth = 0;                                      // tile of this consumer
  for (u32 t = work.first + (PINGPONG ? c.me * work.clusters : 0); t < work.tiles; t += stride(work), ++nth) {
    const Tile tile = tile_at(t, work);
    const int m = first_row(tile, work) + (PINGPONG ? 0 : c.me * ROWS) + c.warp * WARP_ROWS, n = first_column(tile, work);
    if (c.lane == 0) begin_tile(c, work, residual_map, m, n);
    int acc[MI][BN / 2];
    main_loop(smem, work, c, position, nth, acc);
    position += (PINGPONG ? 2 : 1) * work.steps;
    if constexpr (SPLIT_K > 1) {
      reduce_partials(smem, work, c, nth, acc);
      if (t + stride(work) < work.tiles) {  // room for the next tile's
        __syncwarp();
        if ((threadIdx.x & 31) < SPLIT_K && (threadIdx.x & 31) != work.share)
          mbarrier_arrive_release_cluster(
              map_to_cta(smem.partials_empty + 8 * c.me, c.lane * SHARERS + work.sharer));
      }
    }
    epilogue(smem, work, c, nth, acc, y_map, residual_map, m, n);
  }
  if (c.lane == 0) tma_store_wait_read<0>();  // shared memory must outlive the last stores
}

extern "C" __global__ void __launch_bounds__(384, 1)
#if CLUSTER_M * CLUSTER_N * SPLIT_K > 1
    __cluster_dims__(CTAS, 1, 1)
#endif
    int8_linear_hopper(
        const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
        const __grid_constant__ TensorMap y_map, const __grid_constant__ TensorMap residual_map,
        const float* __restrict__ x_scale, const float* __restrict__ x_shift, const float* __restrict__ w_scale,
        const float* __restrict__ w_sum, const void* __restrict__ bias, int M, int N, u32 down, u32 right, u32 height, int steps
#if NUM_ROWS
        ,
        const int* num_rows
#endif
    ) {
  extern __shared__ unsigned char dynamic[];
  const Addresses smem = addresses(smem_base(dynamic));
  // Uniform, and with it wgmma's descriptors: moved there from ordinary registers in every step, they hold the tensor
  // cores up while the other consumer's epilogue issues as well.
  const int thread = threadIdx.x, group = warp_uniform(thread >> 7), lane = thread & 31;
  const u32 rank = CTAS > 1 ? cluster_cta_rank() : 0;
  const u32 sharer = rank % SHARERS, share = rank / SHARERS;

  if (thread == 0) {
    prefetch_tensor_map(&x_map);
    prefetch_tensor_map(&w_map);
    prefetch_tensor_map(&y_map);
    if (RESIDUAL) prefetch_tensor_map(&residual_map);
    init_barriers(smem);
  }
  if constexpr (CTAS > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  griddepcontrol_wait();  // all of the above overlaps with the kernel before
  // No griddepcontrol_launch_dependents: the next kernel sets itself up as blocks of this one end. Told earlier, its
  // blocks crowd on the SMs that have no tile of ours: at batch 1 encoders took 3 to 6 % longer.
#if NUM_ROWS
  down = min(down, (max(ld_global(num_rows), 0) + BM * CLUSTER_M - 1u) / (BM * CLUSTER_M));
#endif

  const Work work = {down, right, height, down * right, blockIdx.x / CTAS, gridDim.x / CTAS, sharer, share, steps};

  if (group == 0) {
    setmaxnreg_dec<PRODUCER_REGISTERS>();
    if (thread == 0) {
      produce_tiles(smem, work, &x_map, &w_map);
    } else if (thread >= 32 && thread < 96) {
      // A warp for each consumer: its Vectors, one tile ahead.
      const int me = (thread >> 5) - 1;
      const u32 to = smem.vectors + me * VECTOR_BYTES;
      u32 parity = 1;
      for (u32 t = work.first + (PINGPONG ? me * work.clusters : 0); t < work.tiles; t += stride(work), parity ^= 1) {
        const Tile tile = tile_at(t, work);
        const int m = first_row(tile, work) + (PINGPONG ? 0 : me * ROWS), n = first_column(tile, work);
        mbarrier_wait(smem.vectors_empty + 8 * me, parity);
        load_vectors(to, m, n, lane, x_scale, x_shift, w_scale, w_sum, M, N);
        mbarrier_arrive_cp_async(smem.vectors_full + 8 * me);
        load_biases(to, n, lane, bias, N);
        mbarrier_arrive(smem.vectors_full + 8 * me);
      }
    }
  } else {
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    const int me = group - 1, at = thread & 127, warp = at >> 5;
    const u32 chunks = smem.chunks + (me * 4 + warp) * (BUFFERS * CHUNK_BYTES);
    const u32 lane_chunk = chunks + (Y == FP32 ? swizzled(lane >> 2, lane >> 1 & 1) + (lane & 1) * 8
                                               : MI == 2 ? swizzled(lane, 0) : swizzled(lane & 15, lane >> 4));
    const Consumer consumer = {group, me, at, warp, lane, chunks, lane_chunk,
                               smem.residual_full + (me * 4 + warp) * (BUFFERS * 8), smem.vectors + me * VECTOR_BYTES,
                               smem.partials + me * PARTIALS_BYTES};
    consume(smem, work, consumer, &y_map, &residual_map);
  }
  if constexpr (CTAS > 1) cluster_sync_unaligned();  // no CTA leaves while another may write to it or arrive
}
