// attention on the CPU: each batch is a sequence (ops/cpu/attention.cpp has the kernel).
#include "attention.h"

#include <cstring>

namespace graphquant {
namespace {

// The numbers of those that are set
std::vector<int32_t> indices(const bool* mask, int64_t n) {
  std::vector<int32_t> found;
  for (int64_t i = 0; i < n; i++)
    if (mask[i]) found.push_back(i);
  return found;
}

}  // namespace

PyObject* attention(PyObject*, PyObject* const* values, Py_ssize_t n) {
  Arguments given(values, n);
  Attention all{};
  all.type = given.integer(), all.window = -1;
  int64_t B = given.integer(), S = given.integer(), T = given.integer();
  all.H = all.Hkv = given.integer(), all.D = given.integer();
  struct {
    int64_t batch;
    Heads heads;
  } q, k, v;
  for (auto x : {&q, &k, &v}) x->batch = given.integer(), x->heads = heads(given);
  all.scale = scale_of(given);
  auto key_mask = given.address<bool>();  // [B, T]
  void* y = given.address();
  return without_gil(given, [&] {
    std::vector<Sequence> sequences;
    std::vector<Tile> tiles;
    std::vector<std::vector<int32_t>> seen(key_mask ? B : 0);
    for (int64_t b = 0; b < B; b++) {
      auto own = [&](const auto& x) {
        Heads one = x.heads;
        one.data = moved(one.data, all.type, b * x.batch);
        return one;
      };
      int64_t elements = S * all.H * all.D, keys = T;
      void* results = moved(y, all.type, b * elements);
      const int32_t* index = nullptr;
      if (key_mask) {
        seen[b] = indices(key_mask + b * T, T);
        keys = seen[b].size();
        bool are_first = keys == 0 || seen[b][keys - 1] == keys - 1;
        index = are_first ? nullptr : seen[b].data();
      }
      sequences.push_back({S, keys, own(q), own(k), own(v), nullptr, index, results});
      if (keys == 0) {
        std::memset(results, 0, elements * (all.type == FLOAT32 ? 4 : 2));
        continue;
      }
      for (int64_t first = 0; first < S; first += TILE) tiles.push_back({b, first});
    }
    attend(all, sequences, tiles);
  });
}

}  // namespace graphquant
