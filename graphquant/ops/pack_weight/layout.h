// Weights as matrix kernels read them: `pack_weight` in op.py describes the layout.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace graphquant {

constexpr int64_t PANEL = 32;                // output channels of a panel: two tiles side by side
constexpr int64_t STEP = 64;                 // k of a tile
constexpr int64_t TILE = 16 * STEP;          // bytes
constexpr int64_t SUMS = PANEL * sizeof(int32_t);

inline int64_t panel_bytes(int64_t K) { return up(K, STEP) * PANEL + SUMS; }

// One panel of w [N, K]: channels n, n + 1, ...
void pack_panel(const int8_t* w, int64_t stride, int64_t n, int64_t N, int64_t K, int8_t* panel);

}  // namespace graphquant
