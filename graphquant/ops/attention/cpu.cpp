// attention on the CPU: each batch is a sequence (ops/cpu/attention.cpp has the kernel).
#include "attention.h"

namespace graphquant {

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
  void* y = given.address();
  return without_gil(given, [&] {
    std::vector<Sequence> sequences;
    std::vector<Tile> tiles;
    for (int64_t b = 0; b < B; b++) {
      auto own = [&](const auto& x) {
        Heads one = x.heads;
        one.data = moved(one.data, all.type, b * x.batch);
        return one;
      };
      sequences.push_back({S, T, own(q), own(k), own(v), nullptr, moved(y, all.type, b * S * all.H * all.D)});
      for (int64_t first = 0; first < S; first += TILE) tiles.push_back({b, first});
    }
    attend(all, sequences, tiles);
  });
}

}  // namespace graphquant
