// Attention on the CPU: some tiles of 64 queries of a head at a time, on any thread.
//
// Scores are transposed, [keys][queries], so that lanes are queries: maxima and sums over keys need no step across
// lanes, and both products take one operand as it is in memory. Keys are in blocks of KEYS from their sequence's first,
// with an online softmax. So the arithmetic of a row depends on its own sequence alone; how many tiles share a block of
// keys, on the number of threads.
#include "attention.h"

#include <cmath>
#include <limits>

namespace graphquant {
namespace {

constexpr int64_t KEYS = 128;  // whose scores are held at once
constexpr int64_t STEP = 32;   // keys, or columns, that one AMX instruction takes
constexpr int64_t SHARING = 4;  // tiles at most that share a block of keys
constexpr float LOG2_E = 1.44269504f;
constexpr float NOTHING = -1e38f;  // a row max that is subtracted where no key has been seen yet

struct Call : Attention, Sequence {};

struct Part {  // of a sequence: queries, and the keys that they see
  int64_t start, rows, from, to;
};

struct Block {  // of keys
  int64_t kv_head, from, keys;
};

// `from` is a whole number of steps.
Part part_of(const Call& c, int64_t first) {
  Part t{first, std::min(TILE, c.queries - first), 0, c.keys};
  const int32_t* p = c.position;
  if (c.window >= 0) {
    t.from = std::lower_bound(p, p + t.start, p[t.start] - c.window) - p;
    t.from -= t.from % STEP;
    t.to = std::upper_bound(p + t.start, p + c.keys, p[t.start + t.rows - 1] + c.window) - p;
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

// The two products in float32; other types are converted, a block of keys at a time. Tiles are numbered.
template <class T>
class Floats {
 public:
  static Vec power(Vec x) { return exp2(x); }

  explicit Floats(const Call& c) : c_(c), width_(up(c.D, W)) {
    struct Queries;
    struct Keys;
    struct Values;
    queries_ = scratch<float, Queries>(SHARING * width_ * TILE);
    keys_ = scratch<float, Keys>(KEYS * width_), values_ = scratch<float, Values>(KEYS * width_);
  }

  void queries(int64_t number, int64_t head, const Part& t) {
    float* to = queries_ + number * width_ * TILE;
    for (int64_t i = 0; i < t.rows; i += W)
      for (int64_t d = 0; d < c_.D; d += W) {
        Vec v[W];
        for (int64_t r = 0; r < W; r++) v[r] = i + r < t.rows ? part(c_.q, head, t.start + i + r, d) : splat(0);
        transpose(v);
        for (int64_t r = 0; r < W; r++) store(to + (d + r) * TILE + i, v[r]);
      }
  }
  void keys(const Block& b) {
    k_ = floats(c_.k, b, keys_, k_row_);
    v_ = floats(c_.v, b, values_, v_row_);
  }
  // s [n][TILE] of the block's keys from number `skip` on
  void scores(int64_t number, int64_t rows, int64_t skip, int64_t n, float* s) {
    product(k_ + skip * k_row_, k_row_, 1, n, c_.D, queries_ + number * width_ * TILE, over(rows, W), s, false);
  }
  void probabilities(float* s, int64_t key, int64_t v, Vec p, Vec next) {
    store(s + key * TILE + v * W, p), store(s + (key + 1) * TILE + v * W, next);
  }
  void values(int64_t rows, int64_t skip, int64_t n, const float* s, float* o, bool add) {
    product(v_ + skip * v_row_, 1, v_row_, c_.D, n, s, over(rows, W), o, add);
  }
  // W rows of results from `number` on, o [D][TILE] times `share`
  void write(const Part& t, int64_t head, int64_t number, const float* o, Vec share) const {
    for (int64_t d = 0; d < c_.D; d += W) {
      Vec v[W];
      for (int64_t k = 0; k < W; k++) v[k] = load(o + (d + k) * TILE + number) * share;
      transpose(v);
      for (int64_t k = 0; k < std::min(W, t.rows - number); k++)
        store(static_cast<T*>(c_.y) + ((t.start + number + k) * c_.H + head) * c_.D + d, v[k], std::min(W, c_.D - d));
    }
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
  const float* floats(const Heads& x, const Block& b, float* made, int64_t& row) {
    row = x.row;
    if constexpr (std::is_same_v<T, float>)
      if (x.column == 1 && !c_.index) return x.at<float>(b.kv_head, b.from);
    row = width_;
    for (int64_t i = 0; i < b.keys; i++)
      for (int64_t d = 0; d < c_.D; d += W) store(made + i * row + d, part(x, b.kv_head, c_.row_of(b.from + i), d));
    return made;
  }
  const Call& c_;
  int64_t width_, k_row_ = 0, v_row_ = 0;
  float *queries_, *keys_, *values_;
  const float *k_ = nullptr, *v_ = nullptr;
};

// --- products of bfloat16 in AMX tiles -------------------------------------------------------------

#if defined(__AMX_BF16__)

constexpr int64_t CELL = 16 * 16;     // 32-bit values, or pairs of bfloat16, in an AMX tile
constexpr int64_t ACROSS = TILE / 16;  // AMX tiles of queries

class Bfloat16Tiles {
 public:
  static Vec power(Vec x) { return rough_exp2(x); }  // rounded to bfloat16 after that

  explicit Bfloat16Tiles(const Call& c) : c_(c), depth_(over(c.D, STEP)), height_(over(c.D, 16)) {
    struct Queries;
    struct Keys;
    struct Probabilities;
    struct Values;
    queries_ = scratch<uint32_t, Queries>(SHARING * depth_ * ACROSS * CELL);
    keys_ = scratch<uint32_t, Keys>(KEYS / 16 * depth_ * CELL);
    probabilities_ = scratch<uint32_t, Probabilities>(KEYS / STEP * ACROSS * CELL);
    values_ = scratch<uint32_t, Values>(up(height_, 2) * KEYS / STEP * CELL);
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

  void queries(int64_t number, int64_t head, const Part& t) {  // [D / 32][queries / 16][16 pairs of columns][16 queries]
    uint32_t* to = queries_ + number * depth_ * ACROSS * CELL;
    for (int64_t d = 0; d < depth_; d++)
      for (int64_t g = 0; g * 16 < t.rows; g++) {
        Vec v[16];
        for (int64_t r = 0; r < 16; r++)
          v[r] = g * 16 + r < t.rows ? bits(part(c_.q, head, t.start + g * 16 + r, d)) : splat(0);
        put(v, to + (d * ACROSS + g) * CELL);
      }
  }

  void keys(const Block& b) {  // [keys / 16][D / 32][16 keys][32 columns]; of values, [D / 16][keys / 32][16 columns][32 keys]
    for (int64_t j = 0; j < b.keys; j += 16)
      for (int64_t d = 0; d < depth_; d++) {
        Vec v[16];
        for (int64_t r = 0; r < 16; r++) v[r] = j + r < b.keys ? bits(key(c_.k, b, j + r, d)) : splat(0);
        for (int64_t r = 0; r < 16; r++) _mm512_storeu_ps(keys_ + (j / 16 * depth_ + d) * CELL + r * 16, v[r]);
      }
    steps_ = over(b.keys, STEP);
    for (int64_t d = 0; d < depth_; d++)
      for (int64_t k = 0; k < steps_; k++) pack_values(b, k, d);
  }

  void scores(int64_t number, int64_t rows, int64_t skip, int64_t n, float* s) {
    const uint32_t* q = queries_ + number * depth_ * ACROSS * CELL;
    for (int64_t j = 0; j < n; j += 16)
      multiply(keys_ + (skip + j) / 16 * depth_ * CELL, q, depth_, over(rows, 16), s + j * TILE, false);
    if (n % STEP)  // the last product takes all of its step
      std::memset(probabilities_ + n / STEP * ACROSS * CELL, 0, ACROSS * CELL * sizeof(uint32_t));
  }
  void probabilities(float*, int64_t key, int64_t v, Vec p, Vec next) {  // pairs of keys, rounded half up: p >= 0
    auto rounded = [](Vec x) { return _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000)); };
    uint32_t* to = probabilities_ + (key / STEP * ACROSS + v) * CELL + key % STEP / 2 * 16;
    _mm512_storeu_si512(to, upper_halves(rounded(p), rounded(next)));
  }
  void values(int64_t rows, int64_t skip, int64_t n, const float*, float* o, bool add) {
    for (int64_t h = 0; h < height_; h++)
      multiply(values_ + (h * steps_ + skip / STEP) * CELL, probabilities_, over(n, STEP), over(rows, 16), o + h * 16 * TILE,
               add);
  }
  // 16 rows of results from `number` on, o [D][TILE] times `share`
  void write(const Part& t, int64_t head, int64_t number, const float* o, Vec share) const {
    for (int64_t d = 0; d < c_.D; d += STEP) {
      Vec v[16];
      for (int64_t k = 0; k < 16; k++) {
        const float* pair = o + (d + 2 * k) * TILE + number;
        v[k] = bits(upper_halves(bfloat16_above(load(pair) * share), bfloat16_above(load(pair + TILE) * share)));
      }
      transpose(v);
      for (int64_t k = 0; k < std::min<int64_t>(16, t.rows - number); k++) {
        auto to = static_cast<uint16_t*>(c_.y) + ((t.start + number + k) * c_.H + head) * c_.D + d;
        _mm512_mask_storeu_epi16(to, columns(c_.D - d), _mm512_castps_si512(v[k]));
      }
    }
  }

 private:
  static Vec bits(__m512i x) { return _mm512_castsi512_ps(x); }
  static __mmask32 columns(int64_t n) { return 0xffffffffu >> (STEP - std::min(STEP, n)); }
  static __m512i upper_halves(__m512i low, __m512i high) {  // of both, in pairs
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low, 16), high);
  }
  static void put(Vec (&v)[16], uint32_t* to) {
    transpose(v);
    for (int r = 0; r < 16; r++) _mm512_storeu_ps(to + r * 16, v[r]);
  }
  __m512i part(const Heads& x, int64_t h, int64_t i, int64_t step) {  // 32 columns, 0 behind the last
    return _mm512_maskz_loadu_epi16(columns(c_.D - step * STEP), x.at<uint16_t>(h, i) + step * STEP);
  }
  __m512i key(const Heads& x, const Block& b, int64_t j, int64_t step) {
    return part(x, b.kv_head, c_.row_of(b.from + j), step);
  }
  // 32 keys of 32 columns. Pairs of keys come in two vectors, of every other four columns.
  void pack_values(const Block& b, int64_t step, int64_t d) {
    auto row = [&](int64_t j) {  // 0 behind the last key
      return j < b.keys ? key(c_.v, b, j, d) : _mm512_setzero_si512();
    };
    Vec v[2][16];
    for (int64_t r = 0; r < 16; r++) {
      __m512i x = row(step * STEP + 2 * r), next = row(step * STEP + 2 * r + 1);
      v[0][r] = bits(_mm512_unpacklo_epi16(x, next)), v[1][r] = bits(_mm512_unpackhi_epi16(x, next));
    }
    for (int64_t i = 0; i < 2; i++) {
      transpose(v[i]);
      for (int64_t r = 0; r < 16; r++) {
        int64_t column = r / 4 * 8 + i * 4 + r % 4, tile = 2 * d + column / 16;
        _mm512_storeu_ps(values_ + (tile * steps_ + step) * CELL + column % 16 * 16, v[i][r]);
      }
    }
  }

  // c [16][TILE] = a [steps][16][32] b [steps][ACROSS][16][16][2], or added to it, `across` tiles of columns
  static void multiply(const uint32_t* a, const uint32_t* b, int64_t steps, int64_t across, float* c, bool add) {
    constexpr int64_t NEXT = TILE * sizeof(float);
    if (add) {
      _tile_loadd(0, c, NEXT);
      _tile_loadd(1, c + 16, NEXT);
      _tile_loadd(2, c + 32, NEXT);
      _tile_loadd(3, c + 48, NEXT);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < steps; k++, a += CELL, b += ACROSS * CELL) {
      _tile_loadd(4, a, 64);
      _tile_loadd(5, b, 64);
      _tile_dpbf16ps(0, 4, 5);
      if (across > 1) {
        _tile_loadd(6, b + CELL, 64);
        _tile_dpbf16ps(1, 4, 6);
      }
      if (across > 2) {
        _tile_loadd(5, b + 2 * CELL, 64);
        _tile_dpbf16ps(2, 4, 5);
      }
      if (across > 3) {
        _tile_loadd(6, b + 3 * CELL, 64);
        _tile_dpbf16ps(3, 4, 6);
      }
    }
    _tile_stored(0, c, NEXT);
    if (across > 1) _tile_stored(1, c + 16, NEXT);
    if (across > 2) _tile_stored(2, c + 32, NEXT);
    if (across > 3) _tile_stored(3, c + 48, NEXT);
  }

  const Call& c_;
  int64_t depth_, height_, steps_ = 0;  // steps of columns, AMX tiles of columns, steps of keys
  uint32_t *queries_, *keys_, *probabilities_, *values_;
};

#endif

// --- softmax and the tile as a whole ---------------------------------------------------------------

struct Rows {  // of each query
  float position[TILE], top[TILE], total[TILE], shrink[TILE];
};

// The bias of the tile's queries and n keys, [keys][TILE], transposed in registers if the keys have no gaps
template <class T>
void transpose_bias(const Call& c, int64_t head, int64_t rows, const int32_t* p, int64_t n, const Rows& r, float* to) {
  bool dense = c.bias.column == 1 && p[n - 1] - p[0] == n - 1;
  for (int64_t i = 0; i < rows; i += W) {
    const T* row[W];
    for (int64_t k = 0; k < W; k++) row[k] = c.bias.at<T>(head, static_cast<int64_t>(r.position[i + k]));
    for (int64_t j = 0; dense && j < n; j += W) {
      int64_t columns = std::min(W, n - j);
      Vec v[W];
      for (int64_t k = 0; k < W; k++) v[k] = load(row[k] + p[j], columns);
      transpose(v);
      for (int64_t k = 0; k < columns; k++) store(to + (j + k) * TILE + i, v[k]);
    }
    for (int64_t j = 0; !dense && j < n; j++) {
      T some[W];
      for (int64_t k = 0; k < W; k++) some[k] = row[k][p[j] * c.bias.column];
      store(to + j * TILE + i, load(some));
    }
  }
}

// Adds the bias and hides keys: s [keys][TILE]. With a bias the scores are scaled, too.
void adjust(const Call& c, int64_t head, const Part& t, int64_t from, int64_t keys, const Rows& r, float* s) {
  struct Bias;
  const int32_t *p = c.position, low = p[t.start], high = p[t.start + t.rows - 1];
  float* bias = c.bias.data ? scratch<float, Bias>(KEYS * TILE) : nullptr;
  if (bias)
    by_type(c.bias_type, [&](auto type) { transpose_bias<decltype(type)>(c, head, t.rows, p + from, keys, r, bias); });
  const Vec hidden = splat(-std::numeric_limits<float>::infinity());
  for (int64_t j = 0; j < keys; j++) {
    int64_t at = p[from + j];
    bool early = !c.causal || at <= low, near = c.window < 0 || std::max(high - at, at - low) <= c.window;
    if (!bias && early && near) continue;
    Vec key = splat(at);
    for (int64_t i = 0; i < t.rows; i += W) {
      Vec x = load(s + j * TILE + i), query = load(r.position + i);
      if (bias) x = fma(x, splat(c.scale), load(bias + j * TILE + i) * splat(LOG2_E));
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
    Vec x = Engine::power(fma(load(s + j * TILE + (v + q) * W), splat(unit), splat(0) - top[q]));
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

// One tile and the block's keys among those that it sees
template <class Engine>
void attend_to(const Call& c, Engine& engine, int64_t head, int64_t number, const Part& t, const Block& b, Rows& r, float* o) {
  struct Scores;
  float* s = scratch<float, Scores>(KEYS * TILE);
  int64_t from = std::max(t.from, b.from), keys = std::min(t.to, b.from + b.keys) - from;
  if (keys <= 0) return;
  int64_t vectors = over(t.rows, W), v = 0;
  bool first = from == t.from;
  engine.scores(number, t.rows, from - b.from, keys, s);
  if (c.bias.data || c.causal || c.window >= 0) adjust(c, head, t, from, keys, r, s);
  float unit = c.bias.data ? 1 : c.scale;
  for (; v + 4 <= vectors; v += 4) softmax<4>(engine, s, keys, v, unit, first, r);
  for (; v < vectors; v++) softmax<1>(engine, s, keys, v, unit, first, r);
  if (!first)
    for (int64_t d = 0; d < c.D; d++)
      for (v = 0; v < vectors; v++) store(o + d * TILE + v * W, load(o + d * TILE + v * W) * load(r.shrink + v * W));
  engine.values(t.rows, from - b.from, keys, s, o, !first);
}

// n tiles of one sequence and one head
template <class Engine>
void attend(const Call& c, const Tile* tiles, int64_t n, int64_t head) {
  struct Results;
  int64_t from = c.keys, to = 0, each = up(c.D, STEP) * TILE;
  float* o = scratch<float, Results>(SHARING * each);
  Rows r[SHARING];
  Part t[SHARING];
  Engine engine(c);
  for (int64_t i = 0; i < n; i++) {
    t[i] = part_of(c, tiles[i].first);
    from = std::min(from, t[i].from), to = std::max(to, t[i].to);
    for (int64_t q = 0; c.position && q < TILE; q++) r[i].position[q] = c.position[t[i].start + std::min(q, t[i].rows - 1)];
    engine.queries(i, head, t[i]);
  }
  for (int64_t at = from - from % KEYS; at < to; at += KEYS) {
    Block b{head / (c.H / c.Hkv), at, std::min(KEYS, to - at)};
    engine.keys(b);
    for (int64_t i = 0; i < n; i++) attend_to(c, engine, head, i, t[i], b, r[i], o + i * each);
  }
  for (int64_t i = 0; i < n; i++)
    for (int64_t q = 0; q < t[i].rows; q += W) engine.write(t[i], head, q, o + i * each, splat(1) / load(r[i].total + q));
}

template <class Engine>
void run(const Attention& all, const std::vector<Sequence>& sequences, const std::vector<Tile>& tiles) {
  constexpr int64_t GRAIN = 16384;  // elements of q below which another thread does not pay
  int64_t n = tiles.size(), rows = 0;
  int64_t sharing = std::clamp<int64_t>(n * all.H / (4 * threads()), 1, SHARING);
  std::vector<int64_t> starts;
  for (int64_t i = 0; i < n; i++)
    if (starts.empty() || i - starts.back() == sharing || tiles[i].sequence != tiles[i - 1].sequence) starts.push_back(i);
  int64_t parts = starts.size();
  starts.push_back(n);
  for (const Sequence& s : sequences) rows += s.queries;
  parallel_each(parts * all.H, over(rows * all.H * all.D, GRAIN), [&](int64_t i) {
    int64_t start = starts[i / all.H];
    const Call c{all, sequences[tiles[start].sequence]};
    attend<Engine>(c, tiles.data() + start, starts[i / all.H + 1] - start, i % all.H);
  });
}

}  // namespace

void attend(const Attention& all, const std::vector<Sequence>& sequences, const std::vector<Tile>& tiles) {
#if defined(__AMX_BF16__)
  const Sequence* s = sequences.data();
  if (all.type == BFLOAT16 && !sequences.empty() && s->q.column == 1 && s->k.column == 1 && s->v.column == 1)
    return run<Bfloat16Tiles>(all, sequences, tiles);
#endif
  by_type(all.type, [&](auto type) { run<Floats<decltype(type)>>(all, sequences, tiles); });
}

}  // namespace graphquant
