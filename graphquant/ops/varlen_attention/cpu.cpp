// varlen_attention on the CPU: sequences are rows of one tensor (ops/cpu/attention.cpp has the kernel).
#include "attention.h"

namespace graphquant {

PyObject* varlen_attention(PyObject*, PyObject* const* values, Py_ssize_t n) {
  Arguments given(values, n);
  Attention all{};
  all.type = given.integer(), all.H = given.integer(), all.Hkv = given.integer(), all.D = given.integer();
  int64_t num_sequences = given.integer(), num_tiles = given.integer();
  Heads q = heads(given), k = heads(given), v = heads(given);
  auto cu_seqlens = given.address<int32_t>(), position = given.address<int32_t>(), tiles = given.address<int32_t>();
  all.scale = scale_of(given);
  all.causal = given.integer(), all.window = given.integer();
  all.bias_type = given.integer(), all.bias = heads(given);
  void* y = given.address();
  return without_gil(given, [&] {
    std::vector<Sequence> sequences;
    std::vector<Tile> used;
    for (int64_t b = 0; b < num_sequences; b++) {
      int64_t row = cu_seqlens[b], length = cu_seqlens[b + 1] - row;
      auto own = [&](const Heads& x) { return Heads{x.head, x.row, x.column, moved(x.data, all.type, row * x.row)}; };
      void* results = moved(y, all.type, row * all.H * all.D);
      sequences.push_back({length, length, own(q), own(k), own(v), position + row, nullptr, results});
    }
    for (int64_t i = 0; i < num_tiles && tiles[2 * i] >= 0; i++) used.push_back({tiles[2 * i], tiles[2 * i + 1]});
    attend(all, sequences, used);
  });
}

}  // namespace graphquant
