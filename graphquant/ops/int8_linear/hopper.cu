// int8_linear for Hopper (sm_90a), one source for NVRTC and nvcc, no headers.
//
//   acc[m, n] = sum_k xq[m, k] * wq[n, k]                                         exact int32
//   y[m, n]   = fma(float(acc) * x_scale[m], w_scale[n], fma(x_shift[m], w_sum[n], bias[n]))
//               + residual[m, n]                                  float32, rounded once to y's type
//
// Every specialisation does these operations in this order, so all give the same bits.
//
// A block is a producer and two consumer warpgroups. One thread of the producer streams tiles of xq and wq
// through a ring of STAGES shared buffers with the tensor memory accelerator (TMA); two of its other warps
// bring scales, shifts, sums and bias. Consumers multiply (wgmma) and write y, again by TMA. Blocks are
// persistent: each takes every so-manyth tile.
//
//   PINGPONG 1   each consumer owns a [BM, BN] tile; one multiplies while the other writes. An epilogue then
//                costs no time of its own as long as it is shorter than a main loop.
//   PINGPONG 0   the consumers halve the rows of one tile: for wide tiles, whose sums would not fit.
//   CLUSTER_M 2  two blocks, one above the other, share a tile of wq: each loads half of it into both.
//   CLUSTER_N 2  the same side by side, with a tile of xq.
//   SPLIT_K s    s blocks of a cluster take a share of K each, then of the columns: they send each other
//                their int32 sums through distributed shared memory. Exact, and without a workspace.
//
// Macros (hopper_tiles.py beside this file defines them):
//   BM BN STAGES PINGPONG CLUSTER_M CLUSTER_N SPLIT_K   as above; BN 64, 96, 128, 160, 192, 224 or 256
//   CHUNK     bytes of a row of y that are staged together: 128 or 64
//   BUFFERS   such chunks in flight in each warp
//   Y         1 bfloat16, 2 float16, 3 float32: type of y and residual
//   BIAS      0 none, 1 bfloat16, 2 float16, 3 float32
//   RESIDUAL  0 or 1
//
// Launch (hopper_tiles.py has the numbers: `descriptors` and HopperTile's cover, grid, threads and shared):
//   int8_linear_hopper(x_map, w_map, y_map, residual_map, x_scale, x_shift, w_scale, w_sum, bias,
//                      M, N, down, right, height, steps)
//   *_map     CUtensorMap by value (128 bytes, aligned to 64). uint8 [M, K] and [N, K], boxes of BK columns;
//             y's type [M, N] twice, boxes of a warp's chunk. Zeros outside, no interleave, L2 promotion of
//             128 bytes: with 256, rows that do not start at multiples of 128 bytes cost 16 % at K = 4304.
//             Without RESIDUAL the fourth is not looked at.
//   pointers  float32, contiguous, bias as BIAS says (not looked at when 0); aligned to their elements
//   integers  32 bits: M, N; clusters' tiles down and right; tiles down before one right; steps of a block
//   grid (clusters * BLOCKS, 1, 1), block (384, 1, 1). The cluster size is compiled in. Dynamic shared
//   memory is over 48 KiB: raise the function's limit first. May be launched with programmatic stream
//   serialization (saves 1 us a launch): nothing is read or written before griddepcontrol.wait.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
struct __align__(64) TensorMap { u64 word[16]; };

#define BK 128                                              // bytes of K in a stage: one row of the 128-byte swizzle
#define SHARERS (CLUSTER_M * CLUSTER_N)
#define BLOCKS (SHARERS * SPLIT_K)
#define ROWS (PINGPONG ? BM : BM / 2)                       // of a consumer
#define MI (ROWS / 64)                                      // wgmma's 64-row blocks of a consumer
#define PART (BN / SPLIT_K)                                 // columns that a consumer finishes
#define X_BYTES (BM * BK)
#define W_BYTES (BN * BK)
#define STAGE_BYTES (X_BYTES + W_BYTES)
#define Y_SIZE (Y == 3 ? 4 : 2)
#define CHUNK_COLUMNS (CHUNK / Y_SIZE)
#define WARP_ROWS (16 * MI)                                 // of a consumer's warp
#define CHUNK_BYTES (WARP_ROWS * CHUNK)
#define CHUNKS (PART / CHUNK_COLUMNS)
#define GROUP_COLUMNS (16 / MI)                             // of a chunk, stored by one stmatrix
#define STRIDE ((PINGPONG ? 2 : 1) * (gridDim.x / BLOCKS))  // from a consumer's tile to its next
#define VECTOR_BYTES (BN * 12 + ROWS * 8)                   // w_scale, w_sum, bias; x_scale, x_shift
#define SUMS_BYTES ((SPLIT_K - 1) * ROWS * PART * 4)        // what a consumer receives

static_assert(BM % (PINGPONG ? 64 : 128) == 0 && PART % CHUNK_COLUMNS == 0, "tile");
static_assert(MI <= 2 && MI * BN <= 384, "a consumer's sums take MI * BN / 2 of 240 registers");
static_assert(SHARERS <= 2 && BLOCKS <= 8, "cluster");

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
// The same address in another block of the cluster.
__device__ __forceinline__ u32 peer(u32 address, u32 block) {
  u32 a;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(a) : "r"(address), "r"(block));
  return a;
}
// Without .release.cluster: that is a fence of the whole GPU, and what these arrivals follow are reads that
// wgmma has finished.
__device__ __forceinline__ void barrier_arrive_peer(u32 barrier, u32 block) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(peer(barrier, block)) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier), "r"(parity)
      : "memory");
}
// For barriers that say that other blocks have read or written memory by ordinary instructions.
__device__ __forceinline__ void barrier_wait_cluster(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void load_tile(u32 to, const TensorMap* map, u32 barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}
__device__ __forceinline__ void load_tile_multicast(
    u32 to, const TensorMap* map, u32 barrier, int column, int row, u16 blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}
__device__ __forceinline__ void store_tile(const TensorMap* map, u32 from, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\n"
      "cp.async.bulk.commit_group;" ::"l"(map), "r"(from), "r"(column), "r"(row)
      : "memory");
}
template <int N>  // until at most the last N stores still read shared memory
__device__ __forceinline__ void stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ void prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// from[i] to shared memory without a register; zero where i is not below `end`.
__device__ __forceinline__ void copy_float(u32 to, const float* from, int i, int end) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from + (i < end ? i : 0)), "r"(i < end ? 4 : 0)
               : "memory");
}

// wgmma's matrix descriptor: K-major, 128-byte swizzle; `stride` bytes from 8 rows to the next 8.
__device__ __forceinline__ u64 descriptor(u32 address, u32 stride) {
  return (u64)((address & 0x3FFFF) >> 4) | ((u64)1 << 16) | ((u64)(stride >> 4) << 32) | ((u64)1 << 62);
}

// d (+)= x[64, 32] w[BN, 32]^T. PTX wants each of a thread's BN / 2 sums named: TENS(3) is %30 to %39.
#define TENS(d) "%" #d "0, %" #d "1, %" #d "2, %" #d "3, %" #d "4, %" #d "5, %" #d "6, %" #d "7, %" #d "8, %" #d "9, "
#define UNITS "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, "
#define OUT4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define OUT16(i) OUT4(i), OUT4(i + 4), OUT4(i + 8), OUT4(i + 12)
#define OUT32(i) OUT16(i), OUT16(i + 16)
#define WGMMA(shape, sums, x, w, keep, ...)                                                                     \
  asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, " keep ", 0;\n"                                          \
               "wgmma.mma_async.sync.aligned." shape "k32.s32.s8.s8 {" sums "}, " x ", " w ", keep;\n}"         \
               : __VA_ARGS__                                                                                    \
               : "l"(x_tile), "l"(w_tile), "r"(keep_sums))

__device__ __forceinline__ void multiply(int (&d)[BN / 2], u64 x_tile, u64 w_tile, int keep_sums) {
#if BN == 64
  WGMMA("m64n64", UNITS TENS(1) TENS(2) "%30, %31", "%32", "%33", "%34", OUT32(0));
#elif BN == 96
  WGMMA("m64n96", UNITS TENS(1) TENS(2) TENS(3) "%40, %41, %42, %43, %44, %45, %46, %47", "%48", "%49", "%50",
        OUT32(0), OUT16(32));
#elif BN == 128
  WGMMA("m64n128", UNITS TENS(1) TENS(2) TENS(3) TENS(4) TENS(5) "%60, %61, %62, %63", "%64", "%65", "%66",
        OUT32(0), OUT32(32));
#elif BN == 160
  WGMMA("m64n160", UNITS TENS(1) TENS(2) TENS(3) TENS(4) TENS(5) TENS(6) "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79",
        "%80", "%81", "%82", OUT32(0), OUT32(32), OUT16(64));
#elif BN == 192
  WGMMA("m64n192",
        UNITS TENS(1) TENS(2) TENS(3) TENS(4) TENS(5) TENS(6) TENS(7) TENS(8) "%90, %91, %92, %93, %94, %95",
        "%96", "%97", "%98", OUT32(0), OUT32(32), OUT32(64));
#elif BN == 224
  WGMMA("m64n224",
        UNITS TENS(1) TENS(2) TENS(3) TENS(4) TENS(5) TENS(6) TENS(7) TENS(8) TENS(9) TENS(10) "%110, %111",
        "%112", "%113", "%114", OUT32(0), OUT32(32), OUT32(64), OUT16(96));
#elif BN == 256
  WGMMA("m64n256",
        UNITS TENS(1) TENS(2) TENS(3) TENS(4) TENS(5) TENS(6) TENS(7) TENS(8) TENS(9) TENS(10) TENS(11)
        "%120, %121, %122, %123, %124, %125, %126, %127",
        "%128", "%129", "%130", OUT32(0), OUT32(32), OUT32(64), OUT32(96));
#else
#error "BN"
#endif
}
// Keeps the compiler from moving reads of the sums to before wgmma has written them.
__device__ __forceinline__ void pin(int (&d)[BN / 2]) {
#pragma unroll
  for (int i = 0; i < BN / 2; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// ------------------------------------------------------------------------------------ types

__device__ __forceinline__ float from_half(u32 bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((u16)bits));
  return f;
}
__device__ __forceinline__ float load_bias(const void* bias, int n) {
#if BIAS == 0
  return 0.0f;
#elif BIAS == 1
  return __uint_as_float((u32)__ldg((const u16*)bias + n) << 16);
#elif BIAS == 2
  return from_half(__ldg((const u16*)bias + n));
#else
  return __ldg((const float*)bias + n);
#endif
}
// Two neighbours of y or residual in 32 bits (Y 1 and 2).
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 r;
#if Y == 1
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
  return r;
}
__device__ __forceinline__ float2 unpack(u32 v) {
#if Y == 1
  return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
#else
  return make_float2(from_half(v & 0xffffu), from_half(v >> 16));
#endif
}

// ------------------------------------------------------------------------------------ tiles

// Row and column of the t-th tile, in tiles of a cluster: `height` down before one right.
__device__ __forceinline__ void place(u32 t, u32 down, u32 right, u32 height, u32& m, u32& n) {
  const u32 first = t / (height * right) * height, inside = t - first * right;
  height = min(down - first, height);
  n = inside / height;
  m = first + inside - n * height;
}

// Position of 16 bytes `unit` of row `row` in a chunk, as TMA's swizzle has it: no bank conflicts.
__device__ __forceinline__ u32 swizzled(int row, int unit) {
  return row * CHUNK + ((unit ^ (CHUNK == 128 ? row & 7 : row >> 1 & 3)) << 4);
}

// One row's (x) and one column's (w) part of the epilogue; see the head of this file.
__device__ __forceinline__ float finish(int acc, float x_scale, float x_shift, float w_scale, float w_sum, float bias) {
#if BIAS
  const float rest = __fmaf_rn(x_shift, w_sum, bias);
#else
  const float rest = __fmul_rn(x_shift, w_sum);
#endif
  return __fmaf_rn(__fmul_rn(__int2float_rn(acc), x_scale), w_scale, rest);
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
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(r.w[i].x), "=f"(r.w[i].y), "=f"(r.w[i].z), "=f"(r.w[i].w)
                 : "r"(column + (c + i * 8) * 8));
    r.b[i] = make_float2(0.0f, 0.0f);
    if (BIAS)
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                   : "=f"(r.b[i].x), "=f"(r.b[i].y)
                   : "r"(column - (threadIdx.x & 3) * 8 + BN * 8 + (c + i * 8) * 4));
  }
  return r;
}

extern "C" __global__ void __launch_bounds__(384, 1)
#if BLOCKS > 1
    __cluster_dims__(BLOCKS, 1, 1)
#endif
    int8_linear_hopper(
        const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
        const __grid_constant__ TensorMap y_map, const __grid_constant__ TensorMap residual_map,
        const float* __restrict__ x_scale, const float* __restrict__ x_shift, const float* __restrict__ w_scale,
        const float* __restrict__ w_sum, const void* __restrict__ bias, int M, int N, u32 down, u32 right, u32 height, int steps) {
  extern __shared__ unsigned char memory[];
  const u32 ring = (shared_address(memory) + 1023u) & ~1023u;  // swizzled tiles start at multiples of 1024
  const u32 chunks = ring + STAGES * STAGE_BYTES;
  const u32 sums = chunks + 8 * BUFFERS * CHUNK_BYTES;
  const u32 vectors = sums + 2 * SUMS_BYTES;
  const u32 full = vectors + 2 * VECTOR_BYTES;  // barriers: 8 bytes each
  const u32 empty = full + 8 * STAGES;
  const u32 turn = empty + 8 * STAGES;    // of a consumer to multiply
  const u32 received = turn + 16;         // SPLIT_K: the others' sums are here
  const u32 taken = received + 16;        //          and the others have added ours
  const u32 vectors_full = taken + 16;    // a consumer's w_scale to x_shift are here
  const u32 vectors_free = vectors_full + 16;
  const u32 fetched = vectors_free + 16;  // RESIDUAL: a warp's chunk is here
  const int thread = threadIdx.x, group = thread >> 7, lane = thread & 31;
  u32 rank = 0;
#if BLOCKS > 1
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  const u32 sharer = rank % SHARERS, share = rank / SHARERS;  // of a multicast tile; of K

  if (thread == 0) {
    prefetch(&x_map);
    prefetch(&w_map);
    prefetch(&y_map);
    if (RESIDUAL) prefetch(&residual_map);
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, SHARERS * (PINGPONG ? 4 : 8));  // warps
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(turn + 8 * i, 4);
      barrier_init(vectors_full + 8 * i, 64);
      barrier_init(vectors_free + 8 * i, 4);
      barrier_init(received + 8 * i, 1);
      barrier_init(taken + 8 * i, SPLIT_K > 1 ? 4 * (SPLIT_K - 1) : 1);
    }
    for (int i = 0; i < 8 * BUFFERS; ++i) barrier_init(fetched + 8 * i, 1);
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
  }
#if BLOCKS > 1
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
  // With programmatic dependent launch all of the above overlaps the kernel before; a no-op otherwise.
  asm volatile("griddepcontrol.wait;" ::: "memory");

  const u32 tiles = down * right, first = blockIdx.x / BLOCKS, clusters = gridDim.x / BLOCKS;

  if (group == 0) {  // ------------------------------------------------------------ producer
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (thread == 0) {
      int stage = 0;
      u32 parity = 1;
      for (u32 t = first; t < tiles; t += clusters) {
        u32 tile_m, tile_n;
        place(t, down, right, height, tile_m, tile_n);
        const int m = (tile_m * CLUSTER_M + (CLUSTER_M == 2 ? sharer : 0)) * BM;
        const int n = (tile_n * CLUSTER_N + (CLUSTER_N == 2 ? sharer : 0)) * BN;
        int k = share * steps * BK;
#pragma unroll 1
        for (int step = 0; step < steps; ++step, k += BK) {
          const u32 x = ring + stage * STAGE_BYTES, w = x + X_BYTES, barrier = full + 8 * stage;
          barrier_wait(empty + 8 * stage, parity);
          barrier_expect(barrier, STAGE_BYTES);  // both halves of the shared tile count
#if SHARERS > 1
          const u16 sharers = 3 << (share * SHARERS);
#endif
#if CLUSTER_N == 2
          load_tile_multicast(x + sharer * (X_BYTES / 2), &x_map, barrier, k, m + sharer * (BM / 2), sharers);
#else
          load_tile(x, &x_map, barrier, k, m);
#endif
#if CLUSTER_M == 2
          load_tile_multicast(w + sharer * (W_BYTES / 2), &w_map, barrier, k, n + sharer * (BN / 2), sharers);
#else
          load_tile(w, &w_map, barrier, k, n);
#endif
          if (++stage == STAGES) stage = 0, parity ^= 1;
        }
      }
      // What waits for this kernel may come and set itself up while the last tiles are multiplied.
      asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    } else if (thread >= 32 && thread < 96) {
      // Two warps bring the consumers what their epilogues multiply by and add, one tile ahead. Layout, for each
      // two columns 16 bytes: scale, scale, sum, sum; then for each column 4: bias; for each row 8: scale, shift.
      const int me = (thread >> 5) - 1;
      const u32 to = vectors + me * VECTOR_BYTES;
      u32 parity = 1;
      for (u32 t = first + (PINGPONG ? me * (gridDim.x / BLOCKS) : 0); t < tiles; t += STRIDE, parity ^= 1) {
        u32 tile_m, tile_n;
        place(t, down, right, height, tile_m, tile_n);
        const int m = (tile_m * CLUSTER_M + (CLUSTER_M == 2 ? sharer : 0)) * BM + (PINGPONG ? 0 : me * ROWS);
        const int n = (tile_n * CLUSTER_N + (CLUSTER_N == 2 ? sharer : 0)) * BN;
        barrier_wait(vectors_free + 8 * me, parity);
#pragma unroll 1
        for (int i = 0; i < BN; i += 32) {
          const int c = i + lane;
          copy_float(to + (c >> 1) * 16 + (c & 1) * 4, w_scale, n + c, N);
          copy_float(to + (c >> 1) * 16 + (c & 1) * 4 + 8, w_sum, n + c, N);
        }
#pragma unroll 1
        for (int i = 0; i < ROWS; i += 32) {
          const int r = i + lane;
          copy_float(to + BN * 12 + r * 8, x_scale, m + r, M);
          copy_float(to + BN * 12 + r * 8 + 4, x_shift, m + r, M);
        }
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(vectors_full + 8 * me) : "memory");
#if BIAS
#pragma unroll 2
        for (int i = 0; i < BN; i += 32) {
          const float b = n + i + lane < N ? load_bias(bias, n + i + lane) : 0.0f;
          asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + BN * 8 + (i + lane) * 4), "f"(b) : "memory");
        }
#endif
        barrier_arrive(vectors_full + 8 * me);
      }
    }
  } else {  // ----------------------------------------------------------------------- consumers
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int me = group - 1, at = thread & 127, warp = at >> 5;
    const int row0 = PINGPONG ? 0 : me * ROWS;
    const u32 my_chunks = chunks + (me * 4 + warp) * (BUFFERS * CHUNK_BYTES);
    // Where this lane writes (stmatrix: where it points at) in a chunk; ^ 16 * u is u 16-byte units further on.
    const u32 my_place = my_chunks + (Y == 3 ? swizzled(lane >> 2, lane >> 1 & 1) + (lane & 1) * 8
                                             : MI == 2 ? swizzled(lane, 0) : swizzled(lane & 15, lane >> 4));
#if RESIDUAL
    const u32 my_fetched = fetched + (me * 4 + warp) * (BUFFERS * 8);
#endif
    const u32 my_vectors = vectors + me * VECTOR_BYTES;
#if SPLIT_K > 1
    const u32 my_sums = sums + me * SUMS_BYTES;
#endif
    u32 position = PINGPONG ? me * steps : 0;  // of the tile's first step in the ring
    u32 nth = 0;                               // tile of this consumer
    for (u32 t = first + (PINGPONG ? me * clusters : 0); t < tiles; t += STRIDE, ++nth) {
      u32 tile_m, tile_n;
      place(t, down, right, height, tile_m, tile_n);
      const int m = (tile_m * CLUSTER_M + (CLUSTER_M == 2 ? sharer : 0)) * BM + row0 + warp * WARP_ROWS;
      const int n = (tile_n * CLUSTER_N + (CLUSTER_N == 2 ? sharer : 0)) * BN;

      // -------------------- what the epilogue needs, fetched while the other consumer multiplies
      if (lane == 0) {
        stores_read<0>();
#if RESIDUAL
        const int y_n = n + (SPLIT_K > 1 ? share * PART : 0);
#pragma unroll
        for (int q = 0; q < (BUFFERS < CHUNKS ? BUFFERS : CHUNKS); ++q) {
          barrier_expect(my_fetched + 8 * q, CHUNK_BYTES);
          load_tile(my_chunks + q * CHUNK_BYTES, &residual_map, my_fetched + 8 * q, y_n + q * CHUNK_COLUMNS, m);
        }
#endif
      }

      // -------------------- multiply
      int acc[MI][BN / 2];
      if (PINGPONG) barrier_wait(turn + 8 * me, (nth & 1) ^ (1 - me));
      int stage = position % STAGES;
      u32 parity = position / STAGES & 1;
      u32 last = 0;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        barrier_wait(full + 8 * stage, parity);
        // Of 128 rows, every other 8: a warp's rows of both wgmmas are then 32 neighbours, stored at once.
        const u64 x = descriptor(ring + stage * STAGE_BYTES + row0 * BK, MI * 1024);
        const u64 w = descriptor(ring + stage * STAGE_BYTES + X_BYTES, 1024);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int i = 0; i < MI; ++i) multiply(acc[i], x + i * 64 + k * 2, w + k * 2, (step | k) != 0);
        asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (step > 0) {  // the step before has been read
#if SHARERS > 1
          if (lane < SHARERS) barrier_arrive_peer(last, share * SHARERS + lane);
#else
          if (lane == 0) barrier_arrive(last);
#endif
        }
        last = empty + 8 * stage;
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
      // All is issued: the other consumer's multiplications queue up behind ours without a gap.
      if (PINGPONG && lane == 0) barrier_arrive(turn + 8 * (1 - me));
#pragma unroll
      for (int i = 0; i < MI; ++i) pin(acc[i]);
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
      for (int i = 0; i < MI; ++i) pin(acc[i]);
#if SHARERS > 1
      if (lane < SHARERS) barrier_arrive_peer(last, share * SHARERS + lane);
#else
      if (lane == 0) barrier_arrive(last);
#endif
      position += (PINGPONG ? 2 : 1) * steps;

      // -------------------- SPLIT_K: send the others their columns' sums, add theirs to ours
#if SPLIT_K > 1
      if (at == 0) barrier_expect(received + 8 * me, SUMS_BYTES);
      if (nth > 0) barrier_wait_cluster(taken + 8 * me, (nth - 1) & 1);
#pragma unroll
      for (int part = 0; part < SPLIT_K; ++part) {
        if (part == share) continue;
        const u32 block = part * SHARERS + sharer, to_barrier = peer(received + 8 * me, block);
        const u32 to = peer(my_sums + (share - (share > part)) * (ROWS * PART * 4) + at * 16, block);
#pragma unroll
        for (int i = 0; i < MI; ++i)
#pragma unroll
          for (int j = 0; j < PART / 8; ++j) {
            const int* d = acc[i] + part * (PART / 2) + j * 4;
            asm volatile(
                "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(
                    to + (i * (PART / 8) + j) * 2048),
                "r"(to_barrier), "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3])
                : "memory");
          }
      }
      barrier_wait_cluster(received + 8 * me, nth & 1);
#pragma unroll
      for (int part = 0; part < SPLIT_K; ++part) {
        if (part != share) continue;
#pragma unroll
        for (int other = 0; other < SPLIT_K - 1; ++other)
#pragma unroll
          for (int i = 0; i < MI; ++i)
#pragma unroll
            for (int j = 0; j < PART / 8; ++j) {
              int4 a;
              int* d = acc[i] + part * (PART / 2) + j * 4;
              asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
                           : "=r"(a.x), "=r"(a.y), "=r"(a.z), "=r"(a.w)
                           : "r"(my_sums + other * (ROWS * PART * 4) + (i * (PART / 8) + j) * 2048 + at * 16)
                           : "memory");
              d[0] += a.x, d[1] += a.y, d[2] += a.z, d[3] += a.w;
            }
      }
      if (t + STRIDE < tiles) {  // room for the next tile's sums
        __syncwarp();
        if (lane < SPLIT_K && lane != share)
          asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                           peer(taken + 8 * me, lane * SHARERS + sharer))
                       : "memory");
      }
#endif

      // -------------------- epilogue: each warp for itself, its rows by CHUNK bytes at a time
      barrier_wait(vectors_full + 8 * me, nth & 1);
      // The addresses below are the same for every tile. Unless told that they are new, the compiler works out
      // dozens of them ahead of the loop over tiles, and spills.
      u32 place = my_place, column = my_vectors + (lane & 3) * 16;
      u32 row_at = my_vectors + BN * 12 + (warp * WARP_ROWS + (lane >> 2)) * 8;
      asm volatile("" : "+r"(place), "+r"(column), "+r"(row_at));
      float2 row[2 * MI];  // x_scale, x_shift of rows 0, 8 (, 16, 24) below this lane's first
#pragma unroll
      for (int i = 0; i < 2 * MI; ++i)
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(row[i].x), "=f"(row[i].y) : "r"(row_at + i * 64));
#pragma unroll
      for (int part = 0; part < SPLIT_K; ++part) {
        if (SPLIT_K > 1 && part != share) continue;
        Columns next = load_columns(column, part * PART);
#pragma unroll
        for (int q = 0; q < CHUNKS; ++q) {
          const int c0 = part * PART + q * CHUNK_COLUMNS;
          const u32 chunk = place + q % BUFFERS * CHUNK_BYTES;
#if RESIDUAL
          const int uses = (CHUNKS - q % BUFFERS + BUFFERS - 1) / BUFFERS;  // of this buffer in a tile
          barrier_wait(my_fetched + 8 * (q % BUFFERS), (nth * uses + q / BUFFERS) & 1);
#else
          if (q >= BUFFERS) {
            if (lane == 0) stores_read<BUFFERS - 1>();
            __syncwarp();
          }
#endif
#pragma unroll
          for (int c = 0; c < CHUNK_COLUMNS; c += GROUP_COLUMNS) {
            const Columns now = next;
            // Ahead of the stores below, past which the compiler would not move it.
            if (c0 + c + GROUP_COLUMNS < (part + 1) * PART) next = load_columns(column, c0 + c + GROUP_COLUMNS);
#if Y != 3
            const u32 to = chunk ^ c / 8 << 4;
            u32 out[4];
#if RESIDUAL
            u32 r[4];
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                         : "r"(to)
                         : "memory");
#endif
#endif
#pragma unroll
            for (int v = 0; v < 4; ++v) {  // 8 rows by 8 columns each: below each other, or in a square
              const int down8 = MI == 2 ? v : v & 1, right8 = MI == 2 ? 0 : v >> 1;
              const int* d = acc[MI == 2 ? v & 1 : 0] + (c0 + c) / 2 + right8 * 4 + (MI == 2 ? v >> 1 : v & 1) * 2;
              const float4 w = now.w[right8];
              const float2 b = now.b[right8];
              float low = finish(d[0], row[down8].x, row[down8].y, w.x, w.z, b.x);
              float high = finish(d[1], row[down8].x, row[down8].y, w.y, w.w, b.y);
#if Y == 3
              const u32 to = (chunk + down8 * (8 * CHUNK)) ^ (c / 4 + right8 * 2) << 4;
#if RESIDUAL
              float2 more;
              asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(more.x), "=f"(more.y) : "r"(to) : "memory");
              low = __fadd_rn(low, more.x), high = __fadd_rn(high, more.y);
#endif
              asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(low), "f"(high) : "memory");
#else
#if RESIDUAL
              const float2 more = unpack(r[v]);
              low = __fadd_rn(low, more.x), high = __fadd_rn(high, more.y);
#endif
              out[v] = pack(low, high);
#endif
            }
#if Y != 3
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(out[0]),
                         "r"(out[1]), "r"(out[2]), "r"(out[3])
                         : "memory");
#endif
          }
          asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
          __syncwarp();
          if (lane == 0) {
            store_tile(&y_map, my_chunks + q % BUFFERS * CHUNK_BYTES, n + c0, m);
#if RESIDUAL
            // The chunk to come next goes into the buffer stored before this one: that store has had time.
            const int lag = BUFFERS > 1 ? 1 : 0, next_q = q - lag + BUFFERS;
            if (q >= lag && next_q < CHUNKS) {
              stores_read<lag>();
              const u32 barrier = my_fetched + 8 * (next_q % BUFFERS);
              barrier_expect(barrier, CHUNK_BYTES);
              load_tile(my_chunks + next_q % BUFFERS * CHUNK_BYTES, &residual_map, barrier,
                        n + part * PART + next_q * CHUNK_COLUMNS, m);
            }
#endif
          }
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(vectors_free + 8 * me);
    }
    if (lane == 0) stores_read<0>();  // shared memory must outlive them
  }
#if BLOCKS > 1  // no block leaves while another may write to it or arrive on its barriers
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}
