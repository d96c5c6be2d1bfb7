// varlen_attention on the CPU: one tile of 64 queries of a head at a time, on any thread.
//
// Scores are transposed, [keys][queries], so that lanes are queries: maxima and sums over keys need no step across
// lanes, and both products take one operand as it is in memory. Keys are in blocks of KEYS from the first that the
// tile's queries see, with an online softmax; so the arithmetic of a row depends on its own sequence alone.
#include <cmath>
#include <limits>

#include "call.h"

namespace graphquant {
namespace {

constexpr int64_t TILE = 64;   // queries
constexpr int64_t KEYS = 128;  // whose scores are held at once
constexpr float LOG2_E = 1.44269504f;
constexpr float NOTHING = -1e38f;  // a row max that is subtracted where no key has been seen yet

struct Heads {  // [heads, rows, columns], strides in elements
  int64_t head, row, column;
  const void* data;
  template <class T>
  const T* at(int64_t h, int64_t i) const {
    return static_cast<const T*>(data) + h * head + i * row;
  }
};

struct Call {
  int64_t type, H, Hkv, D, T, n;
  Heads q, k, v;
  const int32_t *cu_seqlens, *position, (*tiles)[2];
  float scale;  // times log2(e)
  bool causal;
  int64_t window, bias_type;
  Heads bias;
  void* y;
};

struct Tile {  // of queries, and the keys that they see
  int64_t head, kv_head, start, rows;  // start: of the queries, among all rows; so are the keys
  int64_t from, to;
};

Tile tile_of(const Call& c, int64_t sequence, int64_t first, int64_t head) {
  int64_t begin = c.cu_seqlens[sequence], end = c.cu_seqlens[sequence + 1];
  Tile t{head, head / (c.H / c.Hkv), begin + first, std::min(TILE, end - begin - first), begin, end};
  const int32_t *p = c.position, last = p[t.start + t.rows - 1];
  if (c.window >= 0) {
    t.from = std::lower_bound(p + begin, p + t.start, p[t.start] - c.window) - p;
    t.to = std::upper_bound(p + t.start, p + end, last + c.window) - p;
  }
  if (c.causal) t.to = t.start + t.rows;
  return t;
}

// --- products in float32 ---------------------------------------------------------------------------

constexpr int VECTORS = W == 16 ? 4 : 2;  // of queries, in registers together
constexpr int AT_ONCE = 6;                // rows of a

// c [N][TILE] = a [N][K] b [K][TILE], or added to it, Q vectors of columns. a is in steps of `row` and `column`.
template <int N, int Q>
void block(const float* a, int64_t row, int64_t column, int64_t K, const float* b, float* c, bool add) {
  Vec s[N][Q];
  for (int n = 0; n < N; n++)
    for (int q = 0; q < Q; q++) s[n][q] = add ? load(c + n * TILE + q * W) : splat(0);
  for (int64_t k = 0; k < K; k++) {
    Vec v[Q];
    for (int q = 0; q < Q; q++) v[q] = load(b + k * TILE + q * W);
    for (int n = 0; n < N; n++) {
      Vec x = splat(a[n * row + k * column]);
      for (int q = 0; q < Q; q++) s[n][q] = fma(x, v[q], s[n][q]);
    }
  }
  for (int n = 0; n < N; n++)
    for (int q = 0; q < Q; q++) store(c + n * TILE + q * W, s[n][q]);
}

template <int N, int Q>
void columns(const float* a, int64_t row, int64_t column, int64_t K, const float* b, int64_t vectors, float* c, bool add) {
  if constexpr (Q > 0) {
    for (; vectors >= Q; vectors -= Q, b += Q * W, c += Q * W) block<N, Q>(a, row, column, K, b, c, add);
    columns<N, Q - 1>(a, row, column, K, b, vectors, c, add);
  }
}

template <int N = AT_ONCE>
void product(const float* a, int64_t row, int64_t column, int64_t M, int64_t K, const float* b, int64_t vectors, float* c,
             bool add) {
  if constexpr (N > 0) {
    for (; M >= N; M -= N, a += N * row, c += N * TILE) columns<N, VECTORS>(a, row, column, K, b, vectors, c, add);
    product<N - 1>(a, row, column, M, K, b, vectors, c, add);
  }
}

// The two products of a tile in float32; other types are converted, a block of keys at a time.
template <class T>
class Floats {
 public:
  explicit Floats(const Call& c) : c_(c) {
    struct Queries;
    struct Rows;
    queries_ = scratch<float, Queries>(up(c.D, W) * TILE);
    rows_ = scratch<float, Rows>(KEYS * up(c.D, W));
  }

  void begin(const Tile& t) {
    for (int64_t i = 0; i < t.rows; i += W)
      for (int64_t d = 0; d < c_.D; d += W) {
        Vec v[W];
        for (int64_t r = 0; r < W; r++) v[r] = i + r < t.rows ? part(c_.q, t.head, t.start + i + r, d) : splat(0);
        transpose(v);
        for (int64_t r = 0; r < W; r++) store(queries_ + (d + r) * TILE + i, v[r]);
      }
  }
  void scores(const Tile& t, int64_t from, int64_t keys, float* s) {
    int64_t row;
    const float* k = floats(c_.k, t.kv_head, from, keys, row);
    product(k, row, 1, keys, c_.D, queries_, over(t.rows, W), s, false);
  }
  void probabilities(float* s, int64_t key, int64_t v, Vec p, Vec next) {
    store(s + key * TILE + v * W, p), store(s + (key + 1) * TILE + v * W, next);
  }
  void values(const Tile& t, int64_t from, int64_t keys, const float* s, float* o, bool add) {
    int64_t row;
    const float* v = floats(c_.v, t.kv_head, from, keys, row);
    product(v, 1, row, c_.D, keys, s, over(t.rows, W), o, add);
  }

 private:
  Vec part(const Heads& x, int64_t h, int64_t i, int64_t d) {  // W columns from d on, 0 behind the last
    const T* p = x.at<T>(h, i);
    int64_t n = std::min(W, c_.D - d);
    if (x.column == 1) return load(p + d, n);
    T some[W] = {};
    for (int64_t k = 0; k < n; k++) some[k] = p[(d + k) * x.column];
    return load(some);
  }
  const float* floats(const Heads& x, int64_t h, int64_t from, int64_t n, int64_t& row) {
    row = x.row;
    if constexpr (std::is_same_v<T, float>)
      if (x.column == 1) return x.at<float>(h, from);
    row = up(c_.D, W);
    for (int64_t i = 0; i < n; i++)
      for (int64_t d = 0; d < c_.D; d += W) store(rows_ + i * row + d, part(x, h, from + i, d));
    return rows_;
  }
  const Call& c_;
  float *queries_, *rows_;
};

// --- products of bfloat16 in AMX tiles -------------------------------------------------------------

#if defined(__AMX_BF16__)

constexpr int64_t PAIRS = 16, STEP = 32;         // rows of a tile that holds pairs of a dim; that dim's part
constexpr int64_t CELL = 16 * PAIRS;             // 32-bit values in a tile
constexpr int64_t ACROSS = TILE / 16;            // tiles of queries

class Bfloat16Tiles {
 public:
  explicit Bfloat16Tiles(const Call& c) : c_(c), depth_(over(c.D, STEP)), height_(over(c.D, 16)) {
    struct Queries;
    struct Keys;
    struct Probabilities;
    struct Values;
    queries_ = scratch<uint32_t, Queries>(depth_ * ACROSS * CELL);
    keys_ = scratch<uint16_t, Keys>(16 * depth_ * STEP);
    probabilities_ = scratch<uint32_t, Probabilities>(KEYS / STEP * ACROSS * CELL);
    values_ = scratch<uint32_t, Values>(height_ * KEYS / STEP * CELL);
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
    asm volatile("" ::"m"(config));  // the intrinsic does not tell the compiler that it reads all of it
    _tile_loadconfig(&config);
  }
  ~Bfloat16Tiles() { _tile_release(); }
  Bfloat16Tiles(const Bfloat16Tiles&) = delete;

  void begin(const Tile& t) {  // pairs of columns, [D / 32][queries / 16][16 pairs][16 queries]
    for (int64_t d = 0; d < depth_; d++)
      for (int64_t g = 0; g * 16 < t.rows; g++) {
        Vec v[16];
        for (int64_t r = 0; r < 16; r++)
          v[r] = g * 16 + r < t.rows ? bits(part(c_.q, t.head, t.start + g * 16 + r, d)) : splat(0);
        put(v, queries_ + (d * ACROSS + g) * CELL);
      }
  }

  void scores(const Tile& t, int64_t from, int64_t keys, float* s) {
    const uint16_t* k = c_.k.at<uint16_t>(t.kv_head, from);
    bool whole = c_.D % STEP == 0;
    for (int64_t j = 0; j < keys; j += 16, k += 16 * c_.k.row) {
      if (whole && j + 16 <= keys)
        score(k, c_.k.row, over(t.rows, 16), s + j * TILE);
      else {
        for (int64_t d = 0; d < depth_; d++)
          for (int64_t r = 0; r < 16; r++)
            _mm512_storeu_si512(keys_ + (r * depth_ + d) * STEP,
                                j + r < keys ? part(c_.k, t.kv_head, from + j + r, d) : _mm512_setzero_si512());
        score(keys_, depth_ * STEP, over(t.rows, 16), s + j * TILE);
      }
    }
    int64_t end = up(keys, STEP);  // the last product takes all of its step
    for (int64_t j = keys / STEP * STEP; j < end; j += STEP)
      std::memset(probabilities_ + j / STEP * ACROSS * CELL, 0, ACROSS * CELL * sizeof(uint32_t));
  }

  void probabilities(float*, int64_t key, int64_t v, Vec p, Vec next) {  // pairs of keys, rounded half up: p >= 0
    const __m512i half = _mm512_set1_epi32(0x8000);
    __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(p), half), 16);
    __m512i high = _mm512_add_epi32(_mm512_castps_si512(next), half);
    uint32_t* to = probabilities_ + (key / STEP * ACROSS + v) * CELL + key % STEP / 2 * 16;
    _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaa, low, high));
  }

  void values(const Tile& t, int64_t from, int64_t keys, const float*, float* o, bool add) {
    int64_t steps = over(keys, STEP);
    for (int64_t h = 0; h < height_; h++)
      for (int64_t k = 0; k < steps; k++) pack(t, from + k * STEP, keys - k * STEP, h, values_ + (h * steps + k) * CELL);
    for (int64_t h = 0; h < height_; h++) {
      int64_t across = over(t.rows, 16);
      for (int64_t g = 0; g < across; g += 2)
        weigh(values_ + h * steps * CELL, probabilities_ + g * CELL, steps, g + 1 < across, o + h * 16 * TILE + g * 16, add);
    }
  }

 private:
  static Vec bits(__m512i x) { return _mm512_castsi512_ps(x); }
  static void put(Vec (&v)[16], uint32_t* to) {
    transpose(v);
    for (int r = 0; r < 16; r++) _mm512_storeu_ps(to + r * 16, v[r]);
  }
  __m512i part(const Heads& x, int64_t h, int64_t i, int64_t step) {  // 32 columns, 0 behind the last
    int64_t n = std::min(STEP, c_.D - step * STEP);
    return _mm512_maskz_loadu_epi16(0xffffffffu >> (STEP - n), x.at<uint16_t>(h, i) + step * STEP);
  }
  // Values transposed, [16 columns][32 keys], 0 behind the last key
  void pack(const Tile& t, int64_t from, int64_t keys, int64_t h, uint32_t* to) {
    __mmask16 columns = 0xffffu >> std::max<int64_t>(0, 16 * (h + 1) - c_.D);
    auto row = [&](int64_t r) {
      auto p = c_.v.at<uint16_t>(t.kv_head, from + r) + h * 16;
      return _mm512_cvtepu16_epi32(r < keys ? _mm256_maskz_loadu_epi16(columns, p) : _mm256_setzero_si256());
    };
    Vec v[16];
    for (int64_t r = 0; r < 16; r++) v[r] = bits(_mm512_or_si512(row(2 * r), _mm512_slli_epi32(row(2 * r + 1), 16)));
    put(v, to);
  }
  // 16 keys times all queries: s [16][TILE]
  void score(const uint16_t* k, int64_t row, int64_t across, float* s) {
    const uint32_t* q = queries_;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < depth_; d++, q += ACROSS * CELL) {
      _tile_loadd(4, k + d * STEP, row * 2);
      _tile_loadd(5, q, 64);
      _tile_dpbf16ps(0, 4, 5);
      if (across > 1) {
        _tile_loadd(6, q + CELL, 64);
        _tile_dpbf16ps(1, 4, 6);
      }
      if (across > 2) {
        _tile_loadd(5, q + 2 * CELL, 64);
        _tile_dpbf16ps(2, 4, 5);
      }
      if (across > 3) {
        _tile_loadd(6, q + 3 * CELL, 64);
        _tile_dpbf16ps(3, 4, 6);
      }
    }
    constexpr int64_t NEXT = TILE * sizeof(float);
    _tile_stored(0, s, NEXT);
    if (across > 1) _tile_stored(1, s + 16, NEXT);
    if (across > 2) _tile_stored(2, s + 32, NEXT);
    if (across > 3) _tile_stored(3, s + 48, NEXT);
  }
  // 16 columns of values times the probabilities of 16 or 32 queries
  void weigh(const uint32_t* v, const uint32_t* p, int64_t steps, bool two, float* o, bool add) {
    constexpr int64_t NEXT = TILE * sizeof(float);
    _tile_zero(0);
    _tile_zero(1);
    if (add) {
      _tile_loadd(0, o, NEXT);
      if (two) _tile_loadd(1, o + 16, NEXT);
    }
    for (int64_t k = 0; k < steps; k++, v += CELL, p += ACROSS * CELL) {
      _tile_loadd(4, v, 64);
      _tile_loadd(5, p, 64);
      _tile_dpbf16ps(0, 4, 5);
      if (two) {
        _tile_loadd(6, p + CELL, 64);
        _tile_dpbf16ps(1, 4, 6);
      }
    }
    _tile_stored(0, o, NEXT);
    if (two) _tile_stored(1, o + 16, NEXT);
  }

  const Call& c_;
  int64_t depth_, height_;  // of a head: in steps, and in tiles
  uint32_t *queries_, *probabilities_, *values_;
  uint16_t* keys_;
};

#endif

// --- softmax and the tile as a whole ---------------------------------------------------------------

struct Rows {  // of each query
  float position[TILE], top[TILE], total[TILE], shrink[TILE];
};

template <class T>
Vec gather(const T* p, const int64_t* at) {
  T some[W];
  for (int64_t i = 0; i < W; i++) some[i] = p[at[i]];
  return load(some);
}

// Adds the bias and hides keys: s [keys][TILE]. With a bias the scores are scaled, too.
void adjust(const Call& c, const Tile& t, int64_t from, int64_t keys, const Rows& r, float* s) {
  const int32_t *p = c.position, low = p[t.start], high = p[t.start + t.rows - 1];
  int64_t row[TILE];
  for (int64_t i = 0; i < up(t.rows, W); i++) row[i] = int64_t(r.position[i]) * c.bias.row;
  const Vec hidden = splat(-std::numeric_limits<float>::infinity());
  for (int64_t j = 0; j < keys; j++) {
    int64_t at = p[from + j];
    bool early = !c.causal || at <= low, near = c.window < 0 || std::max(high - at, at - low) <= c.window;
    if (!c.bias.data && early && near) continue;
    Vec key = splat(at);
    for (int64_t i = 0; i < t.rows; i += W) {
      Vec x = load(s + j * TILE + i), query = load(r.position + i);
      if (c.bias.data)
        by_type(c.bias_type, [&](auto type) {
          Vec b = gather(c.bias.at<decltype(type)>(t.head, 0) + at * c.bias.column, row + i);
          x = fma(x, splat(c.scale), b * splat(LOG2_E));
        });
      if (!early) x = if_at_most(key, query, x, hidden);
      if (!near) x = if_at_most(magnitude(query - key), splat(c.window), x, hidden);
      store(s + j * TILE + i, x);
    }
  }
}

// Online softmax of Q vectors of queries, v the first: probabilities of this block, and by what the others shrink
template <int Q, class Engine>
void softmax(Engine& engine, float* s, int64_t keys, int64_t v, float unit, bool first, Rows& r) {
  Vec top[Q], total[Q];
  for (int q = 0; q < Q; q++) top[q] = load(s + (v + q) * W);
  for (int64_t j = 1; j < keys; j++)
    for (int q = 0; q < Q; q++) top[q] = larger(load(s + j * TILE + (v + q) * W), top[q]);
  for (int q = 0; q < Q; q++) {
    int64_t at = (v + q) * W;
    Vec before = first ? splat(NOTHING) : load(r.top + at);
    top[q] = larger(top[q] * splat(unit), before);
    Vec shrink = exp2(before - top[q]);
    total[q] = first ? splat(0) : load(r.total + at) * shrink;
    store(r.top + at, top[q]), store(r.shrink + at, shrink);
  }
  auto p = [&](int64_t j, int q) {
    Vec x = exp2(fma(load(s + j * TILE + (v + q) * W), splat(unit), splat(0) - top[q]));
    total[q] = total[q] + x;
    return x;
  };
  int64_t j = 0;
  for (; j + 2 <= keys; j += 2)
    for (int q = 0; q < Q; q++) {
      Vec x = p(j, q);
      engine.probabilities(s, j, v + q, x, p(j + 1, q));
    }
  if (j < keys)
    for (int q = 0; q < Q; q++) engine.probabilities(s, j, v + q, p(j, q), splat(0));
  for (int q = 0; q < Q; q++) store(r.total + (v + q) * W, total[q]);
}

template <class T>
void write(const Call& c, const Tile& t, const float* o, const Rows& r) {
  for (int64_t i = 0; i < t.rows; i += W) {
    Vec share = splat(1) / load(r.total + i);
    for (int64_t d = 0; d < c.D; d += W) {
      Vec v[W];
      for (int64_t k = 0; k < W; k++) v[k] = load(o + (d + k) * TILE + i) * share;
      transpose(v);
      for (int64_t k = 0; k < std::min(W, t.rows - i); k++)
        store(static_cast<T*>(c.y) + ((t.start + i + k) * c.H + t.head) * c.D + d, v[k], std::min(W, c.D - d));
    }
  }
}

template <class T, class Engine>
void attend(const Call& c, const Tile& t, Engine& engine) {
  struct Scores;
  struct Results;
  float *s = scratch<float, Scores>(KEYS * TILE), *o = scratch<float, Results>(up(c.D, 16) * TILE);
  Rows r;
  for (int64_t i = 0; i < TILE; i++) r.position[i] = c.position[t.start + std::min(i, t.rows - 1)];
  int64_t vectors = over(t.rows, W);
  engine.begin(t);
  for (int64_t from = t.from; from < t.to; from += KEYS) {
    int64_t keys = std::min(KEYS, t.to - from), v = 0;
    bool first = from == t.from;
    engine.scores(t, from, keys, s);
    if (c.bias.data || c.causal || c.window >= 0) adjust(c, t, from, keys, r, s);
    float unit = c.bias.data ? 1 : c.scale;
    for (; v + 4 <= vectors; v += 4) softmax<4>(engine, s, keys, v, unit, first, r);
    for (; v < vectors; v++) softmax<1>(engine, s, keys, v, unit, first, r);
    if (!first)
      for (int64_t d = 0; d < c.D; d++)
        for (v = 0; v < vectors; v++) store(o + d * TILE + v * W, load(o + d * TILE + v * W) * load(r.shrink + v * W));
    engine.values(t, from, keys, s, o, !first);
  }
  write<T>(c, t, o, r);
}

template <class T, class Engine>
void run_with(const Call& c) {
  constexpr int64_t GRAIN = 16384;  // elements of q below which another thread does not pay
  int64_t used = 0;
  while (used < c.n && c.tiles[used][0] >= 0) used++;
  parallel_each(used * c.H, over(c.T * c.H * c.D, GRAIN), [&](int64_t i) {
    const int32_t* tile = c.tiles[i / c.H];
    Engine engine(c);
    attend<T>(c, tile_of(c, tile[0], tile[1], i % c.H), engine);
  });
}

void run(const Call& c) {
#if defined(__AMX_BF16__)
  if (c.type == BFLOAT16 && c.q.column == 1 && c.k.column == 1 && c.v.column == 1)
    return run_with<BFloat16, Bfloat16Tiles>(c);
#endif
  by_type(c.type, [&](auto type) { run_with<decltype(type), Floats<decltype(type)>>(c); });
}

}  // namespace

PyObject* varlen_attention(PyObject*, PyObject* const* values, Py_ssize_t n) {
  Arguments given(values, n);
  auto heads = [&] {
    int64_t head = given.integer(), row = given.integer(), column = given.integer();
    return Heads{head, row, column, given.address()};
  };
  Call c{};
  c.type = given.integer(), c.H = given.integer(), c.Hkv = given.integer();
  c.D = given.integer(), c.T = given.integer(), c.n = given.integer();
  c.q = heads(), c.k = heads(), c.v = heads();
  c.cu_seqlens = given.address<int32_t>(), c.position = given.address<int32_t>();
  c.tiles = reinterpret_cast<const int32_t(*)[2]>(given.address<int32_t>());
  c.scale = static_cast<float>(given.number() * 1.4426950408889634);
  c.causal = given.integer(), c.window = given.integer();
  c.bias_type = given.integer(), c.bias = heads();
  c.y = given.address();
  return without_gil(given, [&] { run(c); });
}

}  // namespace graphquant
