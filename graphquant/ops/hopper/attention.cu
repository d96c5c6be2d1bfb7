// Attention of packed sequences, or with PADDED of a padded batch, for Hopper (sm_90a), for NVRTC and nvcc.
//
//   y_i = sum_j softmax_j(scale q_i k_j + bias[p_i, p_j]) v_j      i, j in one sequence; for each head, with scores,
//                                                                  softmax and accumulators in float32
//
// A team is two consumer warp groups of 64 queries each and two producer warps, of keys and of values. Teams, one or
// two in a CTA, are persistent, over a grid-stride loop of items. An item is what both consumers compute at a time:
// two tiles of a sequence for one head, which share its keys; or, of a tile that has no second one beside it, two
// heads, each with keys of its own. Sequences are short, so latency counts: while an item is computed, the producers
// load the next ones, as many as fit the rings. Consumers overlap each other's products and softmax, and the softmax
// of a block with y of the block before.
//
// The tensor memory accelerator (TMA) loads rows in boxes of 8, each lane of a producer one: larger boxes would also
// read the next sequence, most of it from memory, since it is computed at another time. Blocks of keys go from the
// last to the first. So all that a plain or causal mask hides is in the block that comes first, and only there rows
// of v are missing, or another sequence's: they become zeros, as their probabilities are.
//
// In a padded batch all sequences have the same sizes, places are positions, and TMA loads whole tiles. A mask may
// hide keys. Producers read it: a sequence ends for them behind the last key that is seen, and begins with the block
// of the first one. So padding is not computed; bits hide keys only where a mask has holes.
//
// Of a padded batch of heads of 64, without masks and bias, maxima of later blocks are not computed (STALE_MAX):
// probabilities are relative to the first block's, until a sum of them is too large. Then that block's scores are
// computed once more, and its maximum (softmax.cuh). Only this form was measured to be faster so, and queries that may
// see no key of the first block could not do it: they have no maximum there.
//
// Macros (attention.py defines them):
//   D             width of a head, a multiple of 8 up to 128
//   TEAMS         in a CTA
//   STAGES        blocks in flight, of k and of v each, a power of 2
//   DTYPE         BF16 or FP16: of q, k, v and y
//   CAUSAL        1: a query sees no keys behind it
//   WINDOW        1: a query sees keys whose positions are at most `window` away
//   BIAS          NONE or the dtype of the bias
//   PADDED        1: a batch of sequences of one length in place of packed ones
//   KEY_MASK      1: with a mask of keys, of MAX_KEYS at most. Needs PADDED.
//   BIAS_PAIRS    1: the bias of keys 2i and 2i + 1 is read at once, with PADDED
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
//
// With PADDED: attention_padded_hopper(q_map, k_map, v_map, y, key_mask, its stride, bias, strides of the bias, heads,
//                                      sharing, batch, queries, keys, window, scale)
//   *_map        (D, heads, queries or keys, batch), boxes of 64 columns of one head by 64 rows
//   y            [batch, queries, heads, D]
//   key_mask     [batch, keys], bytes of 0 and 1
//   strides      int64, in bytes: of the mask from row to row, of the bias batch, head, row, column

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
  POSITIONS = !PADDED && (WINDOW || BIAS != NONE),    // Are positions read?
  MAY_SEE_NONE = WINDOW || BIAS != NONE || KEY_MASK,  // May a query see no key of a block?
  STALE_MAX = PADDED && D == 64 && !CAUSAL && !MAY_SEE_NONE,  // see above
  MAX_KEYS = 4096,                         // of a mask
  BIAS_AHEAD = TEAMS == 1,                 // Are there registers for a bias while products run?
  LANE_KEYS = 16,                          // of a mask that a lane reads at a time
  // The producers' registers go to the consumers: multiples of 8, and all together no more than 65,536.
  PRODUCER_REGISTERS = TEAMS == 2 ? 32 : 64,
  CONSUMER_REGISTERS = TEAMS == 2 ? 112 : 216
};

static_assert(BM == BN && D % 8 == 0 && D <= 128 && (STAGES & (STAGES - 1)) == 0, "tile");
static_assert(PADDED || !KEY_MASK, "mask");

struct __align__(SMEM_ALIGN) SharedStorage {  // of a team
  // Two, so that the next item's is loaded meanwhile. A consumer's y takes the place of its q.
  unsigned char q[2][CONSUMERS][TILE];
  unsigned char k[STAGES][TILE];
  unsigned char v[STAGES][TILE];
  union {
    int q_position[2][CONSUMERS][BM];
    u32 seen[2][MAX_KEYS / 32];  // keys of the sequence, a bit each
  };
  int k_position[STAGES][BN];
  int4 item[2];
  // mbarriers
  u64 q_full[2], q_empty[2];
  u64 k_full[STAGES], k_empty[STAGES];
  u64 v_full[STAGES], v_empty[STAGES];
};
static_assert(SMEM_ALIGN + TEAMS * sizeof(SharedStorage) == SHARED_BYTES, "Variant.shared in attention.py");

struct Bias {
  const unsigned char* base;
  i64 head, row, column, batch;
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
  // of a padded batch
  const unsigned char* key_mask;
  i64 mask_row;
  int queries, keys;
};

// ------------------------------------------------------------------------------------ items

struct Range {
  int low, high;
  __device__ __forceinline__ int size() const { return high - low; }
};

// Work for both consumers. In shared memory it is the int4 of its members, in order.
struct Item {
  int start;   // first row of the sequence, or its number in a padded batch
  int row;     // first query in it
  int length;  // of the sequence, as far as keys are seen. 0: there are no more items
  int code;    // 2 head + (both tiles are of this head), and in higher bits what a mask of keys says

  enum : int { HEAD_BITS = 20, HOLES = 1 << HEAD_BITS, FIRST_BLOCK_BIT = HEAD_BITS + 1 };
  __device__ __forceinline__ bool paired() const { return code & 1; }
  __device__ __forceinline__ u32 head() const { return (KEY_MASK ? code & (HOLES - 1) : code) >> 1; }
  // Does the mask hide keys before the last one that is seen?
  __device__ __forceinline__ bool has_holes() const { return code & HOLES; }
  // Rows of queries in the sequence.
  __device__ __forceinline__ int queries(int all) const { return PADDED ? all : length; }
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
    if constexpr (!KEY_MASK) return {low / BN, (high + BN - 1) / BN};
    high = (high + BN - 1) / BN;
    return {min(max(low / BN, code >> FIRST_BLOCK_BIT), high - 1), high};  // one at least: its keys are hidden then
  }
  __device__ __forceinline__ Range blocks(int window) const { return blocks(row, paired() ? 2 : 1, window); }
  // Those of one of these tiles.
  __device__ __forceinline__ Range blocks_of_tile(int first, const Range& all, int window) const {
    const Range own = blocks(first, 1, window);
    if constexpr (!KEY_MASK) return own;
    const int high = max(own.high, all.low + 1);
    return {min(max(own.low, all.low), high - 1), high};
  }
};

// Item number `w`. Each entry of `tiles` has as many as there are pairs of heads. If a tile is the neighbor of
// another one in its sequence, its own items are one of each two heads, of both tiles; the neighbor has the others.
__device__ __forceinline__ Item item_at(u32 w, const Problem& of) {
  const u32 pairs = (of.heads + 1) / 2, entry = w / pairs;
  if (entry >= of.entries) return {};
  int2 tile;
  int start, length;
  if constexpr (PADDED) {
    const u32 each = (of.queries + BM - 1) / BM;
    start = entry / each, length = of.keys;
    tile = {start, (int)(entry - start * each) * BM};
  } else {
    tile = of.tiles[entry];
    if (tile.x < 0) return {};
    start = of.cu_seqlens[tile.x], length = of.cu_seqlens[tile.x + 1] - start;
  }
  const int odd = tile.y / BM & 1, row = tile.y - odd * BM, paired = row + BM < (PADDED ? of.queries : length);
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

// Up to 64 rows of a head from `row` of a sequence on, of which there are `rows`.
__device__ __forceinline__ void load_tile(
    u32 to, u32 full, const TensorMap* map, u32 head, int start, int row, int rows, int lane) {
  if constexpr (PADDED) {
    if (lane == 0) {
      mbarrier_arrive_expect_tx(full, TILE);
#pragma unroll
      for (int part = 0; part < PARTS; ++part) tma_load(to + part * PART, map, full, part * COLUMNS, head, row, start);
    }
    __syncwarp();
    return;
  }
  const int boxes = min((rows + BOX - 1) / BOX, BN / BOX);
  if (lane == 0) mbarrier_arrive_expect_tx(full, boxes * (PARTS * BOX * SWIZZLE));
  __syncwarp();
  if (lane < boxes)
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
      tma_load(to + part * PART + lane * (BOX * SWIZZLE), map, full, part * COLUMNS, head, start + row + lane * BOX, 0);
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

// A bit for each of this lane's 16 keys, those of other lanes before them: is it seen? The first lane's are from
// `first` on. Reads words, and so up to 3 bytes before and behind the keys.
__device__ __forceinline__ u32 seen_keys(const Problem& of, int sequence, int first, int lane) {
  const unsigned char* const row = of.key_mask + sequence * of.mask_row;
  const int key = first + lane * LANE_KEYS;
  const u32 shift = ((u32)(u64)(row + key) & 3) * 8;
  const u32* const words = (const u32*)((u64)(row + key) & ~(u64)3);
  u32 bits = 0, word = 0;
#pragma unroll
  for (int i = 0; i <= LANE_KEYS / 4; ++i) {
    const u32 next = (const unsigned char*)(words + i) < row + of.keys ? words[i] : 0;
    const u32 four = __funnelshift_r(word, next, shift) & 0x01010101;  // there may be anything behind the last row
    if (i) bits |= (four * 0x01020408 >> 24) << 4 * (i - 1);
    word = next;
  }
  return bits & (1u << max(0, min(of.keys - key, LANE_KEYS))) - 1;
}

// What the mask of its sequence makes of an item. The producer of keys leaves the bits to consumers.
template <bool KEYS>
__device__ __forceinline__ Item masked(u32 smem, const Problem& of, Item item, u32 buffer, int lane) {
  constexpr u32 all = 0xffffffff;
  int first = -1, end = 0, seen = 0;
#pragma unroll 1
  for (int at = 0; at < of.keys; at += 32 * LANE_KEYS) {
    const u32 bits = seen_keys(of, item.start, at, lane);
    if constexpr (KEYS) st_shared_u16(SMEM(seen) + buffer * (MAX_KEYS / 8) + at / 8 + lane * (LANE_KEYS / 8), bits);
    const u32 any = __ballot_sync(all, bits);
    seen += __reduce_add_sync(all, __popc(bits));
    if (!any) continue;
    if (first < 0) first = at + (__ffs(any) - 1) * LANE_KEYS;
    const int last = 31 - __clz(any);
    end = at + last * LANE_KEYS + 32 - __clz(__shfl_sync(all, bits, last));
  }
  __syncwarp();
  item.length = max(end, 1);
  if (seen < item.length) item.code |= Item::HOLES;
  item.code |= max(first, 0) / BN << Item::FIRST_BLOCK_BIT;
  return item;
}

// Tells consumers what comes next, and loads one's queries.
template <bool KEYS>
__device__ __forceinline__ void load_item(u32 smem, const Problem& of, const Item& item, u32 buffer, int lane) {
  const u32 consumer = KEYS ? 0 : 1, full = SMEM(q_full) + 8 * buffer, at = buffer * CONSUMERS + consumer;
  const int row = item.row + (item.paired() ? consumer * BM : 0), rows = item.queries(of.queries) - row;
  const u32 head = item.head() + (item.paired() ? 0 : consumer);
  if (KEYS && lane == 0)
    st_shared(SMEM(item) + 16 * buffer, make_int4(item.start, item.row, item.length, item.code));
  if (head < of.heads && item.length)
    load_tile(SMEM(q) + at * TILE, full, of.q, head, item.start, row, rows, lane);
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
    const int rows = item.length - block * BN;
    for (u32 i = 0; i < loaded; ++i, ++ring.block) {
      const u32 stage = stage_of(ring.block), full = ring.full + 8 * stage;
      mbarrier_wait(ring.empty + 8 * stage, parity_of(ring.block) ^ 1);
      load_tile(ring.tiles + stage * TILE, full, KEYS ? of.k : of.v, i ? second : first, item.start, block * BN, rows, lane);
      if constexpr (KEYS && POSITIONS)
        load_positions(SMEM(k_position) + stage * (4 * BN), full, of.position + (item.start + block * BN), rows, lane);
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
      Item item = from_lane(mine, team && i < found ? found - 1 - i : i);
      if (item.head() >= of.heads) continue;  // the last pair of an odd number
      const u32 buffer = items & 1;
      mbarrier_wait(SMEM(q_empty) + 8 * buffer, (items >> 1 & 1) ^ 1);
      if (KEY_MASK && item.length) item = masked<KEYS>(smem, of, item, buffer, lane);
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
  int start;        // the item's
  u32 seen;         // bits of keys, 0: none is hidden before `length`
  int queries, keys;  // of a padded batch
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
    if constexpr (WINDOW && POSITIONS) position = ld_shared_int2_ordered(positions + 4 * (c * 8 + tile.column));
    if constexpr (PADDED) position.x = block * BN + c * 8 + tile.column, position.y = position.x + 1;
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

// In a padded batch: does this warp's part of a block have keys that are outside of a query's window?
__device__ __forceinline__ bool leaves_window(const Tile& tile, int block, int window) {
  const int row = tile.row[0] & ~(WARP_ROWS - 1), key = block * BN;
  return key + BN - 1 - row > window || row + WARP_ROWS - 1 - key > window;
}

// Scores of keys that the mask hides count nothing.
template <int N>
__device__ __forceinline__ void hide_unseen(float (&s)[N / 2], const Tile& tile, int block) {
  const int2 both = ld_shared_int2_ordered(tile.seen + block * (BN / 8));
  if ((both.x & both.y) == -1) return;
  const u32 bits[2] = {(u32)both.x >> tile.column, (u32)both.y >> tile.column};
#pragma unroll
  for (int c = 0; c < N / 8; ++c)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!(bits[c / 4] >> (c % 4 * 8 + (i & 1)) & 1)) s[c * 4 + i] = __int_as_float(0xff800000);
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

// Of a padded batch: a thread's part of the bias of N keys, as it is in memory. Its loads are issued ahead.
template <int N>
struct BiasBlock {
  u32 words[!PADDED || BIAS == NONE ? 1 : BIAS == FP32 ? N / 2 : N / 4];
};

// CLAMPED: keys beyond the last one may be among them; what is loaded for those does not matter.
template <int N, bool CLAMPED>
__device__ __forceinline__ void load_bias_block(BiasBlock<N>& to, const Tile& tile, const Bias& bias, int block) {
  constexpr int BYTES = BIAS == FP32 ? 4 : 2;
  const int first = block * BN + tile.column;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const unsigned char* const row =
        bias.base + tile.start * bias.batch + tile.head * bias.head + min(tile.row[r], tile.queries - 1) * bias.row;
#pragma unroll
    for (int c = 0; c < N / 8; ++c) {
      u32* const words = to.words + (2 * c + r) * (BYTES / 2);
      if constexpr (BIAS_PAIRS) {
        const unsigned char* from = row + (CLAMPED ? min(first + c * 8, tile.keys - 2) : first + c * 8) * BYTES;
        if constexpr (BIAS == FP32) {
          const int2 pair = *(const int2*)from;
          words[0] = pair.x, words[1] = pair.y;
        } else {
          words[0] = *(const u32*)from;
        }
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = CLAMPED ? min(first + c * 8 + i, tile.keys - 1) : first + c * 8 + i;
          const unsigned char* from = row + key * bias.column;
          if constexpr (BIAS == FP32)
            words[i] = *(const u32*)from;
          else
            words[0] = i ? words[0] | (u32) * (const u16*)from << 16 : *(const u16*)from;
        }
      }
    }
  }
}

// s = scale s + log2(e) bias
template <int N>
__device__ __forceinline__ void add_bias_block(float (&s)[N / 2], const BiasBlock<N>& bias, float scale) {
  const float log2_e = 1.4426950408889634f;
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    float2 pair;
    if constexpr (BIAS == FP32)
      pair = make_float2(__uint_as_float(bias.words[2 * i]), __uint_as_float(bias.words[2 * i + 1]));
    else
      pair = unpack<BIAS>(bias.words[i]);
    s[2 * i] = __fmaf_rn(s[2 * i], scale, log2_e * pair.x);
    s[2 * i + 1] = __fmaf_rn(s[2 * i + 1], scale, log2_e * pair.y);
  }
}

// ------------------------------------------------------------------------------------ softmax

// 1 / row_sum.
__device__ __forceinline__ void normalizers(SoftmaxState& state) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum_lanes(state, r);
    const bool sees_none = PADDED && MAY_SEE_NONE && state.row_sum[r] == 0.0f;
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(state.row_sum[r]));
    if (sees_none) state.row_sum[r] = 0.0f;
  }
}

// ------------------------------------------------------------------------------------ consumers

// Issues s = q k^T for N keys.
template <int N>
__device__ __forceinline__ void issue_scores(float (&s)[N / 2], u32 q, u32 k) {
  const Operand<PART> queries(q), keys(k);
#pragma unroll
  for (int i = 0; i < K_STEPS; ++i)
    wgmma_ss<N>(s, queries.at(i / 4 * PART + i % 4 * 32), keys.at(i / 4 * PART + i % 4 * 32), i > 0);
  wgmma_commit();
}

// Issues y += p v.
__device__ __forceinline__ void issue_output(float (&y)[D / 2], const u32 (&p)[BN / 4], u32 v) {
  const Operand<PART> values(v);
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
    float (&s)[N / 2], SoftmaxState& state, const Problem& of, const Tile& tile, int block, u32 positions,
    BiasBlock<N>& bias) {
  if constexpr (BIAS != NONE && PADDED && !BIAS_AHEAD) load_bias_block<N, FIRST_BLOCK>(bias, tile, of.bias, block);
  if constexpr (BIAS != NONE && PADDED) add_bias_block<N>(s, bias, of.scale);
  if constexpr (BIAS != NONE && !PADDED) add_bias<N>(s, tile, of.bias, positions, of.scale);
  if constexpr (FIRST_BLOCK || WINDOW)
    if (FIRST_BLOCK || !PADDED || leaves_window(tile, block, of.window))
      hide_keys<N, FIRST_BLOCK>(s, tile, block, positions, of.window);
  if constexpr (KEY_MASK)
    if (tile.seen) hide_unseen<N>(s, tile, block);
  return online_softmax<N, FIRST_BLOCK, MAY_SEE_NONE>(s, state, BIAS == NONE ? of.scale : 1.0f);
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
  BiasBlock<N> bias;
  if constexpr (BIAS != NONE && PADDED && BIAS_AHEAD)
    if (tile.has_rows) load_bias_block<N, true>(bias, tile, of.bias, block);
  mbarrier_wait(SMEM(k_full) + 8 * stage, parity_of(at));
  wgmma_fence();
  issue_scores<N>(s, q, SMEM(k) + stage * TILE);
  wgmma_wait<0>();
  fence_accumulators(s);
  if constexpr (!POSITIONS) release(SMEM(k_empty) + 8 * stage, lane, arrivals);
  if (tile.has_rows) probabilities<N, true>(s, state, of, tile, block, SMEM(k_position) + stage * (4 * BN), bias);
  if constexpr (POSITIONS) __syncwarp(), release(SMEM(k_empty) + 8 * stage, lane, arrivals);
  u32 first_p[N / 4];
  to_operand<DTYPE, N>(first_p, s);
#pragma unroll
  for (int i = 0; i < BN / 4; ++i) p[i] = i < N / 4 ? first_p[i] : 0;
}

// Probabilities of the next block, relative to maxima of blocks before it, while y of the block before is computed.
// Where they are too large, from the block's scores once more: probabilities are in the place of the first ones.
__device__ __forceinline__ void stale_probabilities(
    float (&s)[BN / 2], u32 smem, u32 q, u32 k_stage, u32 v_stage, const Problem& of, bool has_rows, int lane,
    u32 arrivals, SoftmaxState& state, float (&y)[D / 2], u32 (&p)[BN / 4], int group) {
  float sums[2] = {0.0f, 0.0f};
  if (has_rows) exponentials<BN>(s, sums, state, of.scale);
  wgmma_wait<0>();
  fence_accumulators(y);
  fence_accumulators(s);
  release(SMEM(v_empty) + 8 * v_stage, lane, arrivals);
  to_operand<DTYPE, BN>(p, s);
  if (named_barrier_any<WARP_GROUP>(CONSUMER + group, fmaxf(sums[0], sums[1]) > sum_limit<DTYPE>())) {
    wgmma_fence();
    issue_scores<BN>(s, q, SMEM(k) + k_stage * TILE);
    wgmma_wait<0>();
    fence_accumulators(s);
    rescale(y, raise_max<BN>(s, sums, state, of.scale, sum_limit<DTYPE>()));
    exponentials<BN>(s, sums, state, of.scale);
    to_operand<DTYPE, BN>(p, s);
  }
  release(SMEM(k_empty) + 8 * k_stage, lane, arrivals);
  state.row_sum[0] += sums[0], state.row_sum[1] += sums[1];
}

// Scores and probabilities of the next block, and y of the block before it.
__device__ __forceinline__ void next_block(
    u32 smem, u32 q, u32 k, u32 v, const Problem& of, const Tile& tile, int block, int lane, u32 arrivals,
    SoftmaxState& state, float (&y)[D / 2], u32 (&p)[BN / 4], int group) {
  const u32 k_stage = stage_of(k), v_stage = stage_of(v);
  float s[BN / 2];
  BiasBlock<BN> bias;
  if constexpr (BIAS != NONE && PADDED && BIAS_AHEAD)
    if (tile.has_rows) load_bias_block<BN, false>(bias, tile, of.bias, block);
  mbarrier_wait(SMEM(k_full) + 8 * k_stage, parity_of(k));
  mbarrier_wait(SMEM(v_full) + 8 * v_stage, parity_of(v));
  wgmma_fence();  // right before the products: with a loop in between, ptxas serializes them
  issue_scores<BN>(s, q, SMEM(k) + k_stage * TILE);
  issue_output(y, p, SMEM(v) + v_stage * TILE);
  wgmma_wait<1>();
  fence_accumulators(s);
  if constexpr (STALE_MAX)
    return stale_probabilities(s, smem, q, k_stage, v_stage, of, tile.has_rows, lane, arrivals, state, y, p, group);
  if constexpr (!POSITIONS) release(SMEM(k_empty) + 8 * k_stage, lane, arrivals);
  float2 factors = {1.0f, 1.0f};
  if (tile.has_rows)
    factors = probabilities<BN, false>(s, state, of, tile, block, SMEM(k_position) + k_stage * (4 * BN), bias);
  if constexpr (POSITIONS) __syncwarp(), release(SMEM(k_empty) + 8 * k_stage, lane, arrivals);
  wgmma_wait<0>();
  fence_accumulators(y);
  fence_accumulators(s);
  release(SMEM(v_empty) + 8 * v_stage, lane, arrivals);
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
    const Item item = from_lane({shared.x, shared.y, shared.z, shared.w}, 0);  // as above
    if (!item.length) return;
    const bool paired = item.paired();
    const int first = item.row + (paired ? me * BM : 0), step = item.loaded(of.heads);
    const u32 head = item.head() + (paired ? 0 : me), arrivals = paired ? 1 : CONSUMERS;
    const Range all = item.blocks(of.window), seen = item.blocks_of_tile(first, all, of.window);
    u32 k = block + (paired ? 0 : me);
    block += all.size() * step;
    if (head >= of.heads) {  // this consumer's of an odd number
      __syncwarp();
      release(q_empty, lane, 1);
      continue;
    }
    const u32 q = SMEM(q) + (buffer * CONSUMERS + me) * TILE;
    const int queries = item.queries(of.queries);
    Tile tile = {{}, {}, (lane & 3) * 2, item.length, head, first + warp * WARP_ROWS < queries};
    if constexpr (PADDED) tile.start = item.start, tile.queries = queries, tile.keys = of.keys;
    if constexpr (KEY_MASK) tile.seen = item.has_holes() ? SMEM(seen) + buffer * (MAX_KEYS / 8) : 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp * WARP_ROWS + r * 8 + (lane >> 2);
      tile.row[r] = first + row;
      if constexpr (POSITIONS)
        tile.position[r] = ld_shared_int_ordered(SMEM(q_position) + 4 * ((buffer * CONSUMERS + me) * BM + row));
      else
        tile.position[r] = tile.row[r];
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
    if constexpr (!PADDED) clear_rows(SMEM(v) + stage_of(k) * TILE, keys, warp * 32 + lane, group);
#pragma unroll 1
    while (--next >= seen.low) {
      next_block(smem, q, k + step, k, of, tile, next, lane, arrivals, state, y, p, group);
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
      const u64 to = PADDED ? (u64)(u32)item.start * (u32)queries + (u32)row : (u64)(u32)(item.start + row);
      epilogue(y, state.row_sum, q + warp * (WARP_ROWS * SWIZZLE), of.y + (to * of.heads + head) * (2 * D),
               of.heads * (2 * D), queries - row, lane);
      fence_async_proxy();  // TMA loads over what was written
      __syncwarp();
    }
    release(q_empty, lane, 1);
  }
}

// What all threads of a kernel do.
__device__ __forceinline__ void attend(const Problem& of, unsigned char* dynamic) {
  const u32 smem = smem_base(dynamic);
  const int thread = threadIdx.x, lane = thread & 31;
  const int nth_warp = __shfl_sync(0xffffffff, thread >> 5, 0);  // so ptxas sees that a warp has one
  const int group = nth_warp >> 2, warp = nth_warp & 3;
  if (thread == 0) {
    prefetch_tensor_map(of.q);
    prefetch_tensor_map(of.k);
    prefetch_tensor_map(of.v);
    for (int team = 0; team < TEAMS; ++team) init_barriers(smem + team * (u32)sizeof(SharedStorage));
  }
  __syncthreads();
  griddepcontrol_wait();  // all of the above overlaps with the kernel before

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

#if PADDED
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_padded_hopper(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                            const __grid_constant__ TensorMap v_map, unsigned char* y, const unsigned char* key_mask, i64 mask_row,
                            const unsigned char* bias, i64 bias_batch, i64 bias_head, i64 bias_row, i64 bias_column,
                            u32 heads, u32 sharing, u32 batch, int queries, int keys, int window, float scale) {
  extern __shared__ unsigned char dynamic[];
  const u32 entries = (queries + BM - 1) / BM * batch;
  attend({&q_map, &k_map, &v_map, y, nullptr, nullptr, nullptr, {bias, bias_head, bias_row, bias_column, bias_batch},
          heads, sharing, entries, window, scale, key_mask, mask_row, queries, keys}, dynamic);
}
#else
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    varlen_attention_hopper(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                            const __grid_constant__ TensorMap v_map, unsigned char* y, const int* cu_seqlens,
                            const int* position, const int2* tiles, const unsigned char* bias, i64 bias_head,
                            i64 bias_row, i64 bias_column, u32 heads, u32 sharing, u32 entries, int window, float scale) {
  extern __shared__ unsigned char dynamic[];
  attend({&q_map, &k_map, &v_map, y, cu_seqlens, position, tiles, {bias, bias_head, bias_row, bias_column, 0},
          heads, sharing, entries, window, scale, nullptr, 0, 0, 0}, dynamic);
}
#endif
