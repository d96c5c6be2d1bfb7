// Attention of tiles of 64 queries (attention.cpp), which attention and varlen_attention share.
#pragma once

#include <type_traits>
#include <vector>

#include "call.h"

namespace graphquant {

constexpr int64_t TILE = 64;  // queries

struct Heads {  // [heads, rows, columns], strides in elements
  int64_t head, row, column;
  const void* data;
  template <class T>
  const T* at(int64_t h, int64_t i) const {
    return static_cast<const T*>(data) + h * head + i * row;
  }
};

// What all sequences share; as in varlen_attention.
struct Attention {
  int64_t type, H, Hkv, D;
  float scale;  // times log2(e)
  bool causal;
  int64_t window, bias_type;  // window: -1 for none
  Heads bias;
};

// Queries, and the keys that they see. position [queries] is that of the keys, too; it may be null where nothing of the
// Attention depends on it. index [keys]: the rows of k and v that are keys, in order; null: the first ones.
struct Sequence {
  int64_t queries, keys;
  Heads q, k, v;
  const int32_t *position, *index;
  void* y;  // [queries, H, D]
  int64_t row_of(int64_t key) const { return index ? index[key] : key; }
};

struct Tile {
  int64_t sequence, first;  // query in it
};

// Tiles of one sequence that follow each other may share keys that have been brought into order for the products.
void attend(const Attention& all, const std::vector<Sequence>& sequences, const std::vector<Tile>& tiles);

inline Heads heads(Arguments& given) {  // strides of heads, rows and columns, tensor
  int64_t head = given.integer(), row = given.integer(), column = given.integer();
  return {head, row, column, given.address()};
}

inline float scale_of(Arguments& given) { return static_cast<float>(given.number() * 1.4426950408889634); }

// Elements further on, of a type
template <class Void>
Void* moved(Void* data, int64_t type, int64_t elements) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
  return static_cast<Byte*>(data) + elements * (type == FLOAT32 ? 4 : 2);
}

}  // namespace graphquant
