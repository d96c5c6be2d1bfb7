// Attention of packed sequences for Hopper (sm_90a), for NVRTC and nvcc.
//
//   y_i = sum_j softmax_j(scale q_i k_j + bias[p_i, p_j]) v_j      i, j in one sequence; for each head, with scores,
//                                                                  softmax and accumulators in float32
//
// A team is two consumer warp groups of 64 queries each and two producer warps, of keys and of values. Teams, one or
// two in a CTA, are persistent, over a grid-stride loop of items. An item is what both consumers compute at a time:
// two tiles of a sequence for one head, which share its keys; or, of a tile that has no second one beside it, two
// heads, each with keys of its own. Sequences are short, so latency counts: while an item is computed, the producers
// load the next ones, as many as fit the rings. Consumers overlap each other's products and softmax.
//
// The tensor memory accelerator (TMA) loads rows in boxes of 8, each lane of a producer one: larger boxes would also
// read the next sequence, most of it from memory, since it is computed at another time. Blocks of keys go from the
// last to the first. So all that a plain or causal mask hides is in the block that comes first, and only there rows
// of v are missing, or another sequence's: they become zeros, as their probabilities are.
//
// Macros (hopper.py defines them):
//   D             width of a head, a multiple of 8 up to 128
//   TEAMS         in a CTA
//   STAGES        blocks in flight, of k and of v each, a power of 2
//   DTYPE         BF16 or FP16: of q, k, v and y
//   CAUSAL        1: a query sees no keys behind it
//   WINDOW        1: a query sees keys whose positions are at most `window` away
//   BIAS          NONE or the dtype of the bias
//   SHARED_BYTES  dynamic shared memory of the launch
// and wgmma_shapes.cuh has wgmma_ss for N of 16, 32, 48 and 64, wgmma_rs for N of D.
//
// Launch: varlen_attention_hopper(q_map, k_map, v_map, y, cu_seqlens, position, tiles, bias, strides of the bias,
//                                 heads, sharing, entries, window, scale)
//   *_map        CUtensorMap by value: (D, heads, T, 1), boxes of 64 columns of one head by 8 rows. Zeros outside,
//                swizzle of 128 bytes.
//   y            [T, heads, D]
//   cu_seqlens, position, tiles    int32, as in op.py. The first entry of -1 ends `tiles`.
//   strides      int64, in bytes: head, row, column
//   heads        H           sharing   so many share a head of k and v            entries   of `tiles`
//   scale        of the scores, times log2(e)
//   grid any, block 128 (2 TEAMS + 1). May be launched with programmatic stream serialization.

#include "hopper/ptx.cuh"
#include "hopper/smem.cuh"
#include "hopper/softmax.cuh"
#include "hopper/wgmma.cuh"
#include "wgmma_shapes.cuh"

using i64 = long long;

// Enumerators, since NVRTC puts each constexpr variable into global memory.
enum : int {
  CONSUMERS = 2,                           // of a team
  PRODUCERS = 2,                           // warps, of a team
  WARP_GROUP = 128,                        // threads
  WARPS = 4 * CONSUMERS,                   // of a team's consumers
  THREADS = (TEAMS * CONSUMERS + 1) * WARP_GROUP,
  BM = 64,                                 // queries of a tile: rows of a wgmma
  BN = 64,                                 // keys of a block
  SWIZZLE = 128,                           // bytes of a row of a swizzled tile,
  COLUMNS = 64,                            // of a head in it,
  PARTS = (D + COLUMNS - 1) / COLUMNS,     // and such tiles side by side hold a head
  K_STEPS = (D + 15) / 16,                 // wgmmas that sum q k^T over D
  PART = BM * SWIZZLE,                     // bytes
  TILE = PARTS * PART,                     // of q, k and v alike
  BOX = 8,                                 // rows that TMA loads at a time
  WARP_ROWS = 16,                          // of a wgmma's 64
  POSITIONS = WINDOW || BIAS != NONE,      // Are positions read?
  // The producers' registers go to the consumers: multiples of 8, and all together no more than 65,536.
  PRODUCER_REGISTERS = TEAMS == 2 ? 32 : 64,
  CONSUMER_REGISTERS = TEAMS == 2 ? 112 : 216
};

static_assert(BM == BN && D % 8 == 0 && D <= 128 && (STAGES & (STAGES - 1)) == 0, "tile");

struct __align__(SMEM_ALIGN) SharedStorage {  // of a team
  // Two, so that the next item's is loaded meanwhile. A consumer's y takes the place of its q.
  unsigned char q[2][CONSUMERS][TILE];
  unsigned char k[STAGES][TILE];
  unsigned char v[STAGES][TILE];
  int q_position[2][CONSUMERS][BM];
  int k_position[STAGES][BN];
  int4 item[2];
  // mbarriers
  u64 q_full[2], q_empty[2];
  u64 k_full[STAGES], k_empty[STAGES];
  u64 v_full[STAGES], v_empty[STAGES];
};
static_assert(SMEM_ALIGN + TEAMS * sizeof(SharedStorage) == SHARED_BYTES, "Variant.shared in hopper.py");

struct Bias {
  const unsigned char* base;
  i64 head, row, column;
};

struct Problem {
  const TensorMap *q, *k, *v;
  unsigned char* y;
  const int* cu_seqlens;
  const int* position;
  const int2* tiles;
  Bias bias;
  u32 heads, sharing, entries;
  int window;
  float scale;
};

// ------------------------------------------------------------------------------------ items

struct Range {
  int low, high;
  __device__ __forceinline__ int size() const { return high - low; }
};

// Work for both consumers. In shared memory it is the int4 of its members, in order.
struct Item {
  int start;   // first row of the sequence
  int row;     // first query in it
  int length;  // of the sequence. 0: there are no more items
  int code;    // 2 head + (both tiles are of this head)

  __device__ __forceinline__ bool paired() const { return code & 1; }
  __device__ __forceinline__ u32 head() const { return code >> 1; }
  // Heads whose keys are loaded: blocks of k and v that each step takes.
  __device__ __forceinline__ int loaded(u32 heads) const { return paired() || head() + 1 >= heads ? 1 : 2; }

  // Blocks of keys that `tiles` tiles of queries from `first` on see.
  __device__ __forceinline__ Range blocks(int first, int tiles, int window) const {
    int low = 0, high = length;
    if constexpr (CAUSAL) high = min(high, first + tiles * BM);
    if constexpr (WINDOW) {
      low = max(0, first - window);
      high = min(high, first + tiles * BM + window);
    }
    return {low / BN, (high + BN - 1) / BN};
  }
  __device__ __forceinline__ Range blocks(int window) const { return blocks(row, paired() ? 2 : 1, window); }
};

// Item number `w`. Each entry of `tiles` has as many as there are pairs of heads. If a tile is the neighbor of
// another one in its sequence, its own items are one of each two heads, of both tiles; the neighbor has the others.
__device__ __forceinline__ Item item_at(u32 w, const Problem& of) {
  const u32 pairs = (of.heads + 1) / 2, entry = w / pairs;
  if (entry >= of.entries) return {};
  const int2 tile = of.tiles[entry];
  if (tile.x < 0) return {};
  const int start = of.cu_seqlens[tile.x], length = of.cu_seqlens[tile.x + 1] - start;
  const int odd = tile.y / BM & 1, row = tile.y - odd * BM, paired = row + BM < length;
  return {start, row, length, (int)((w - entry * pairs) * 4 + 2 * (paired & odd) + paired)};
}

__device__ __forceinline__ Item from_lane(const Item& item, int lane) {
  return {__shfl_sync(0xffffffff, item.start, lane), __shfl_sync(0xffffffff, item.row, lane),
          __shfl_sync(0xffffffff, item.length, lane), __shfl_sync(0xffffffff, item.code, lane)};
}

// Number of a team's n-th item: back and forth, since items become shorter.
__device__ __forceinline__ u32 nth_item(u32 n, u32 team) {
  const u32 teams = TEAMS * gridDim.x, me = team * gridDim.x + blockIdx.x;
  return n * teams + (n & 1 ? teams - 1 - me : me);
}

// ------------------------------------------------------------------------------------ shared memory

// Place in a ring of blocks, which are counted from the kernel's start.
__device__ __forceinline__ u32 stage_of(u32 block) { return block % STAGES; }
__device__ __forceinline__ u32 parity_of(u32 block) { return block / STAGES & 1; }

__device__ __forceinline__ void init_barriers(u32 smem) {
  for (int i = 0; i < 2; ++i) {
    mbarrier_init(SMEM(q_full) + 8 * i, PRODUCERS + (POSITIONS ? PRODUCERS * 32 : 0));  // lanes load positions
    mbarrier_init(SMEM(q_empty) + 8 * i, WARPS);
  }
  for (int i = 0; i < STAGES; ++i) {
    mbarrier_init(SMEM(k_full) + 8 * i, 1 + (POSITIONS ? 32 : 0));
    mbarrier_init(SMEM(k_empty) + 8 * i, WARPS);
    mbarrier_init(SMEM(v_full) + 8 * i, 1);
    mbarrier_init(SMEM(v_empty) + 8 * i, WARPS);
  }
  fence_mbarrier_init();
}

// Of bar.sync; 0 is __syncthreads.
enum NamedBarrier : u32 { CONSUMER = 1 };  // one for each consumer's own threads

// ------------------------------------------------------------------------------------ producer

// Up to 64 rows of a head, of which there are `rows`.
__device__ __forceinline__ void load_tile(u32 to, u32 full, const TensorMap* map, u32 head, int row, int rows, int lane) {
  const int boxes = min((rows + BOX - 1) / BOX, BN / BOX);
  if (lane == 0) mbarrier_arrive_expect_tx(full, boxes * (PARTS * BOX * SWIZZLE));
  __syncwarp();
  if (lane < boxes)
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
      tma_load(to + part * PART + lane * (BOX * SWIZZLE), map, full, part * COLUMNS, head, row + lane * BOX, 0);
}

__device__ __forceinline__ void load_positions(u32 to, u32 full, const int* from, int rows, int lane) {
#pragma unroll
  for (int i = lane; i < BN; i += 32) cp_async(to + 4 * i, (const float*)from, i, rows);
  mbarrier_arrive_cp_async(full);
}

// A producer's ring, of keys or of values.
struct Ring {
  u32 tiles, full, empty;
  u32 block;  // of all so far
};

// Tells consumers what comes next, and loads one's queries.
template <bool KEYS>
__device__ __forceinline__ void load_item(u32 smem, const Problem& of, const Item& item, u32 buffer, int lane) {
  const u32 consumer = KEYS ? 0 : 1, full = SMEM(q_full) + 8 * buffer, at = buffer * CONSUMERS + consumer;
  const int row = item.row + (item.paired() ? consumer * BM : 0), rows = item.length - row;
  const u32 head = item.head() + (item.paired() ? 0 : consumer);
  if (KEYS && lane == 0)
    st_shared(SMEM(item) + 16 * buffer, make_int4(item.start, item.row, item.length, item.code));
  if (head < of.heads && item.length)
    load_tile(SMEM(q) + at * TILE, full, of.q, head, item.start + row, rows, lane);
  else if (lane == 0)
    mbarrier_arrive(full);
  if constexpr (POSITIONS)
    load_positions(SMEM(q_position) + at * (4 * BM), full, of.position + item.start + row, rows, lane);
}

template <bool KEYS>
__device__ __forceinline__ void load_blocks(u32 smem, const Problem& of, const Item& item, Ring& ring, int lane) {
  const Range blocks = item.blocks(of.window);
  const u32 loaded = item.loaded(of.heads), first = item.head() / of.sharing;
  const u32 second = first + (item.head() + 1 == (first + 1) * of.sharing);
  for (int block = blocks.high - 1; block >= blocks.low; --block) {
    const int row = item.start + block * BN, rows = item.length - block * BN;
    for (u32 i = 0; i < loaded; ++i, ++ring.block) {
      const u32 stage = stage_of(ring.block), full = ring.full + 8 * stage;
      mbarrier_wait(ring.empty + 8 * stage, parity_of(ring.block) ^ 1);
      load_tile(ring.tiles + stage * TILE, full, KEYS ? of.k : of.v, i ? second : first, row, rows, lane);
      if constexpr (KEYS && POSITIONS)
        load_positions(SMEM(k_position) + stage * (4 * BN), full, of.position + row, rows, lane);
    }
  }
}

// Loads one consumer's queries, and keys or values. A second team takes its items from the last to the first: long
// sequences wait for products, short ones for memory, so both are computed at the same time.
template <bool KEYS>
__device__ __forceinline__ void produce(u32 smem, const Problem& of, u32 team, int lane) {
  Ring ring = KEYS ? Ring{SMEM(k), SMEM(k_full), SMEM(k_empty), 0} : Ring{SMEM(v), SMEM(v_full), SMEM(v_empty), 0};
  u32 items = 0;  // so far
  for (u32 n = 0;; n += 32) {
    const Item mine = item_at(nth_item(n + lane, team), of);  // each lane looks up one
    const int found = __popc(__ballot_sync(0xffffffff, mine.length));
#pragma unroll 1
    for (int i = 0; i <= min(found, 31); ++i) {
      const Item item = from_lane(mine, team && i < found ? found - 1 - i : i);
      if (item.head() >= of.heads) continue;  // the last pair of an odd number
      const u32 buffer = items & 1;
      mbarrier_wait(SMEM(q_empty) + 8 * buffer, (items >> 1 & 1) ^ 1);
      load_item<KEYS>(smem, of, item, buffer, lane);
      if (!item.length) return;
      load_blocks<KEYS>(smem, of, item, ring, lane);
      ++items;
    }
  }
}

// ------------------------------------------------------------------------------------ masks and bias

// A consumer's part of an item, as far as one of its threads has to do with it.
struct Tile {
  int row[2];       // queries of this thread
  int position[2];  // theirs
  int column;       // first of this thread's columns in each eight
  int length;       // of the sequence
  u32 head;
  bool has_rows;    // Does this warp have rows of the sequence? It takes part in products if not.
};

template <int N, bool LAST>
__device__ __forceinline__ void hide_keys(
    float (&s)[N / 2], const Tile& tile, int block, u32 positions, int window) {
  const float minus_infinity = __int_as_float(0xff800000);
  int end[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) end[r] = (CAUSAL ? min(tile.length, tile.row[r] + 1) : tile.length) - block * BN - tile.column;
#pragma unroll
  for (int c = 0; c < N / 8; ++c) {
    int2 position = {0, 0};
    if constexpr (WINDOW) position = ld_shared_int2_ordered(positions + 4 * (c * 8 + tile.column));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bool seen = !LAST || c * 8 + (i & 1) < end[i >> 1];
      if constexpr (WINDOW) {
        const int distance = (i & 1 ? position.y : position.x) - tile.position[i >> 1];
        seen = seen && (u32)(distance + window) <= 2 * (u32)window;
      }
      if (!seen) s[c * 4 + i] = minus_infinity;
    }
  }
}

__device__ __forceinline__ float load_bias(const unsigned char* from) {
  if constexpr (BIAS == FP32) return *(const float*)from;
  const u32 bits = *(const u16*)from;
  return BIAS == BF16 ? __uint_as_float(bits << 16) : half_to_float(bits);
}

// s = scale s + log2(e) bias
template <int N>
__device__ __forceinline__ void add_bias(float (&s)[N / 2], const Tile& tile, const Bias& bias, u32 positions, float scale) {
  const float log2_e = 1.4426950408889634f;
  const unsigned char* const row[2] = {bias.base + tile.head * bias.head + tile.position[0] * bias.row,
                        bias.base + tile.head * bias.head + tile.position[1] * bias.row};
#pragma unroll
  for (int c = 0; c < N / 8; ++c) {
    const int2 position = ld_shared_int2_ordered(positions + 4 * (c * 8 + tile.column));
#pragma unroll
    for (int i = 0; i < 4; ++i)
      s[c * 4 + i] = __fmaf_rn(s[c * 4 + i], scale,
                               log2_e * load_bias(row[i >> 1] + (i & 1 ? position.y : position.x) * bias.column));
  }
}

// ------------------------------------------------------------------------------------ softmax

// 1 / row_sum.
__device__ __forceinline__ void normalizers(SoftmaxState& state) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum_lanes(state, r);
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(state.row_sum[r]));
  }
}

// ------------------------------------------------------------------------------------ consumers

// A swizzled tile in shared memory as wgmma takes it: the low word of its descriptor, to which a multiple of 16 bytes
// may be added. The leading dimension is read only where it is not the one that is summed over.
struct Operand {
  u32 low;
  __device__ __forceinline__ explicit Operand(u32 address) : low((u32)wgmma_descriptor(address, PART, 1024)) {}
  __device__ __forceinline__ u64 at(u32 bytes) const {
    const u32 high = (u32)(wgmma_descriptor(0, PART, 1024) >> 32);
    return (u64)high << 32 | (low + (bytes >> 4));
  }
};

// Issues s = q k^T for N keys.
template <int N>
__device__ __forceinline__ void issue_scores(float (&s)[N / 2], u32 q, u32 k) {
  const Operand queries(q), keys(k);
#pragma unroll
  for (int i = 0; i < K_STEPS; ++i)
    wgmma_ss<N>(s, queries.at(i / 4 * PART + i % 4 * 32), keys.at(i / 4 * PART + i % 4 * 32), i > 0);
  wgmma_commit();
}

// Issues y += p v.
__device__ __forceinline__ void issue_output(float (&y)[D / 2], const u32 (&p)[BN / 4], u32 v) {
  const Operand values(v);
#pragma unroll
  for (int i = 0; i < BN / 16; ++i) wgmma_rs<D>(y, p + 4 * i, values.at(i * (16 * SWIZZLE)), 1);
  wgmma_commit();
}

// What consumers have read, one lane of each warp frees: with 2 arrivals, also for the consumer that does not read it.
__device__ __forceinline__ void release(u32 empty, int lane, u32 arrivals) {
  if (lane == 0) mbarrier_arrive(empty, arrivals);
}

// Blocks of the item that the other consumer's tile sees, but not this one's.
__device__ __forceinline__ void skip_blocks(u32 smem, u32& block, int n, int lane) {
  for (; n > 0; --n, ++block) {
    const u32 at = 8 * stage_of(block);
    mbarrier_wait(SMEM(k_full) + at, parity_of(block));
    release(SMEM(k_empty) + at, lane, 1);
    mbarrier_wait(SMEM(v_full) + at, parity_of(block));
    release(SMEM(v_empty) + at, lane, 1);
  }
}

// Scores of N keys become probabilities. Returns the factors by which y has to be rescaled.
template <int N, bool FIRST_BLOCK>
__device__ __forceinline__ float2 probabilities(
    float (&s)[N / 2], SoftmaxState& state, const Problem& of, const Tile& tile, int block, u32 positions) {
  if constexpr (BIAS != NONE) add_bias<N>(s, tile, of.bias, positions, of.scale);
  if constexpr (FIRST_BLOCK || WINDOW) hide_keys<N, FIRST_BLOCK>(s, tile, block, positions, of.window);
  return online_softmax<N, FIRST_BLOCK, POSITIONS>(s, state, BIAS == NONE ? of.scale : 1.0f);
}

// Zeros in place of rows of v that are not the sequence's, for products with probabilities of 0.
__device__ __forceinline__ void clear_rows(u32 v, int rows, int thread, int group) {
  if (rows >= BN) return;
  constexpr int UNITS = PARTS * SWIZZLE / 16;  // in a row
  for (int i = rows * UNITS + thread; i < BN * UNITS; i += WARP_GROUP)
    st_shared(v + i % UNITS / 8 * PART + i / UNITS * SWIZZLE + i % 8 * 16, make_int4(0, 0, 0, 0));
  fence_async_proxy();
  named_barrier_sync<WARP_GROUP>(CONSUMER + group);
}

// Scores and probabilities of the first block, of N keys and zeros for the rest.
template <int N>
__device__ __forceinline__ void first_block(
    u32 smem, u32 q, u32 at, const Problem& of, const Tile& tile, int block, int lane, u32 arrivals, SoftmaxState& state,
    u32 (&p)[BN / 4]) {
  const u32 stage = stage_of(at);
  float s[N / 2];
  mbarrier_wait(SMEM(k_full) + 8 * stage, parity_of(at));
  wgmma_fence();
  issue_scores<N>(s, q, SMEM(k) + stage * TILE);
  wgmma_wait<0>();
  fence_accumulators(s);
  if constexpr (!POSITIONS) release(SMEM(k_empty) + 8 * stage, lane, arrivals);
  if (tile.has_rows) probabilities<N, true>(s, state, of, tile, block, SMEM(k_position) + stage * (4 * BN));
  if constexpr (POSITIONS) __syncwarp(), release(SMEM(k_empty) + 8 * stage, lane, arrivals);
  u32 first_p[N / 4];
  to_operand<DTYPE, N>(first_p, s);
#pragma unroll
  for (int i = 0; i < BN / 4; ++i) p[i] = i < N / 4 ? first_p[i] : 0;
}

// Scores and probabilities of the next block, and y of the block before it.
__device__ __forceinline__ void next_block(
    u32 smem, u32 q, u32 k, u32 v, const Problem& of, const Tile& tile, int block, int lane, u32 arrivals,
    SoftmaxState& state, float (&y)[D / 2], u32 (&p)[BN / 4]) {
  const u32 k_stage = stage_of(k), v_stage = stage_of(v);
  float s[BN / 2];
  mbarrier_wait(SMEM(k_full) + 8 * k_stage, parity_of(k));
  mbarrier_wait(SMEM(v_full) + 8 * v_stage, parity_of(v));
  wgmma_fence();  // right before the products: with a loop in between, ptxas serializes them
  issue_scores<BN>(s, q, SMEM(k) + k_stage * TILE);
  issue_output(y, p, SMEM(v) + v_stage * TILE);
  wgmma_wait<0>();
  fence_accumulators(y);
  release(SMEM(v_empty) + 8 * v_stage, lane, arrivals);
  fence_accumulators(s);
  if constexpr (!POSITIONS) release(SMEM(k_empty) + 8 * k_stage, lane, arrivals);
  float2 factors = {1.0f, 1.0f};
  if (tile.has_rows) factors = probabilities<BN, false>(s, state, of, tile, block, SMEM(k_position) + k_stage * (4 * BN));
  if constexpr (POSITIONS) __syncwarp(), release(SMEM(k_empty) + 8 * k_stage, lane, arrivals);
  to_operand<DTYPE, BN>(p, s);
  rescale(y, factors);
}

// y of a warp's 16 rows, normalized, into the place of their q and from there to global memory, as far as there are
// rows of the sequence.
__device__ __forceinline__ void epilogue(
    const float (&y)[D / 2], const float (&normalizer)[2], u32 q, unsigned char* to, u32 row_bytes, int rows, int lane) {
  // The 16 bytes whose address this lane gives stmatrix, swizzled: those of unit u to the right are at ^ 16 * u.
  const u32 own = q + (lane & 15) * SWIZZLE + ((lane ^ lane << 4) & 0x70);
#pragma unroll
  for (int c = 0; c < D / 8; c += 2) {
    u32 out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = (c + i / 2) * 4 + i % 2 * 2;
      out[i] = at < D / 2 ? pack<DTYPE>(y[at] * normalizer[i & 1], y[at + 1] * normalizer[i & 1]) : 0;
    }
    stmatrix_x4((own + c / 8 * PART) ^ (c % 8 << 4), out);
  }
  __syncwarp();
  constexpr int UNITS = D / 8, EACH = (UNITS + 1) / 2;  // of 16 bytes: in a row, and of a lane
  int4 unit[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {  // all loads before the first store, since each of these waits for its own
    const int row = (i * 32 + lane) / UNITS, column = (i * 32 + lane) % UNITS;
    unit[i] = ld_shared_int4_ordered(q + column / 8 * PART + row % WARP_ROWS * SWIZZLE + ((column ^ row) & 7) * 16);
  }
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int row = (i * 32 + lane) / UNITS, column = (i * 32 + lane) % UNITS;
    if (row < min(rows, WARP_ROWS)) *(int4*)(to + (u64)row_bytes * (u32)row + column * 16) = unit[i];
  }
}

__device__ __forceinline__ void consume(u32 smem, const Problem& of, int group, int warp, int lane) {
  const int me = group % CONSUMERS;
  u32 block = 0;  // first of the item
  for (u32 nth = 0;; ++nth) {
    const u32 buffer = nth & 1, q_empty = SMEM(q_empty) + 8 * buffer;
    mbarrier_wait(SMEM(q_full) + 8 * buffer, nth >> 1 & 1);
    const int4 shared = ld_shared_int4_ordered(SMEM(item) + 16 * buffer);
    const Item item = {shared.x, shared.y, shared.z, shared.w};
    if (!item.length) return;
    const bool paired = item.paired();
    const int first = item.row + (paired ? me * BM : 0), step = item.loaded(of.heads);
    const u32 head = item.head() + (paired ? 0 : me), arrivals = paired ? 1 : CONSUMERS;
    const Range all = item.blocks(of.window), seen = item.blocks(first, 1, of.window);
    u32 k = block + (paired ? 0 : me);
    block += all.size() * step;
    if (head >= of.heads) {  // this consumer's of an odd number
      __syncwarp();
      release(q_empty, lane, 1);
      continue;
    }
    const u32 q = SMEM(q) + (buffer * CONSUMERS + me) * TILE;
    Tile tile = {{}, {}, (lane & 3) * 2, item.length, head, first + warp * WARP_ROWS < item.length};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp * WARP_ROWS + r * 8 + (lane >> 2);
      tile.row[r] = first + row;
      if constexpr (POSITIONS)
        tile.position[r] = ld_shared_int_ordered(SMEM(q_position) + 4 * ((buffer * CONSUMERS + me) * BM + row));
    }
    if constexpr (CAUSAL || WINDOW) skip_blocks(smem, k, all.high - seen.high, lane);

    float y[D / 2];
    SoftmaxState state;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) y[i] = 0.0f;
    u32 p[BN / 4];
    int next = seen.high - 1;
    const int keys = item.length - next * BN;
    if (keys <= 16)
      first_block<16>(smem, q, k, of, tile, next, lane, arrivals, state, p);
    else if (keys <= 32)
      first_block<32>(smem, q, k, of, tile, next, lane, arrivals, state, p);
    else if (keys <= 48)
      first_block<48>(smem, q, k, of, tile, next, lane, arrivals, state, p);
    else
      first_block<BN>(smem, q, k, of, tile, next, lane, arrivals, state, p);
    mbarrier_wait(SMEM(v_full) + 8 * stage_of(k), parity_of(k));
    clear_rows(SMEM(v) + stage_of(k) * TILE, keys, warp * 32 + lane, group);
#pragma unroll 1
    while (--next >= seen.low) {
      next_block(smem, q, k + step, k, of, tile, next, lane, arrivals, state, y, p);
      k += step;
    }
    mbarrier_wait(SMEM(v_full) + 8 * stage_of(k), parity_of(k));
    wgmma_fence();
    issue_output(y, p, SMEM(v) + stage_of(k) * TILE);
    normalizers(state);
    wgmma_wait<0>();
    fence_accumulators(y);
    release(SMEM(v_empty) + 8 * stage_of(k), lane, arrivals);
    if constexpr (WINDOW) skip_blocks(smem, ++k, seen.low - all.low, lane);
    named_barrier_sync<WARP_GROUP>(CONSUMER + group);  // all four warps have read q
    if (tile.has_rows) {
      const int row = first + warp * WARP_ROWS;
      epilogue(y, state.row_sum, q + warp * (WARP_ROWS * SWIZZLE),
               of.y + ((u64)(u32)(item.start + row) * of.heads + head) * (2 * D), of.heads * (2 * D), item.length - row,
               lane);
      fence_async_proxy();  // TMA loads over what was written
      __syncwarp();
    }
    release(q_empty, lane, 1);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    varlen_attention_hopper(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                            const __grid_constant__ TensorMap v_map, unsigned char* y, const int* cu_seqlens,
                            const int* position, const int2* tiles, const unsigned char* bias, i64 bias_head,
                            i64 bias_row, i64 bias_column, u32 heads, u32 sharing, u32 entries, int window, float scale) {
  extern __shared__ unsigned char dynamic[];
  const u32 smem = smem_base(dynamic);
  const int thread = threadIdx.x, group = thread >> 7, warp = thread >> 5 & 3, lane = thread & 31;
  if (thread == 0) {
    prefetch_tensor_map(&q_map);
    prefetch_tensor_map(&k_map);
    prefetch_tensor_map(&v_map);
    for (int team = 0; team < TEAMS; ++team) init_barriers(smem + team * (u32)sizeof(SharedStorage));
  }
  __syncthreads();
  griddepcontrol_wait();  // all of the above overlaps with the kernel before

  const Problem of = {&q_map, &k_map,   &v_map, y,      cu_seqlens, position, tiles, {bias, bias_head, bias_row, bias_column},
                      heads,  sharing, entries, window, scale};
  if (group == TEAMS * CONSUMERS) {
    setmaxnreg_dec<PRODUCER_REGISTERS>();
    const int team = warp / PRODUCERS;
    const u32 own = smem + team * (u32)sizeof(SharedStorage);
    if (team < TEAMS) {
      if (warp % PRODUCERS == 0)
        produce<true>(own, of, team, lane);
      else
        produce<false>(own, of, team, lane);
      // The next kernel may start and set itself up while the last items are computed.
      griddepcontrol_launch_dependents();
    }
  } else {
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    consume(smem + group / CONSUMERS * (u32)sizeof(SharedStorage), of, group, warp, lane);
  }
}
