// Loops on torch's threads. torch loads the OpenMP runtime that this is linked with, so both share one pool, and
// torch.set_num_threads counts.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace graphquant {

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t over(int64_t n, int64_t by) { return (n + by - 1) / by; }

inline int64_t threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

// body(from, to) over [0, n), in at most one range a thread, of at least `grain` each
template <class Body>
void parallel(int64_t n, int64_t grain, Body body) {
  int64_t parts = std::min(threads(), over(n, grain));
  if (parts <= 1) {
    if (n > 0) body(0, n);
    return;
  }
#pragma omp parallel num_threads(parts)
  {
    int64_t each = over(n, omp_get_num_threads()), from = each * omp_get_thread_num();
    if (from < n) body(from, std::min(n, from + each));
  }
}

// body(i) for every i of n, in order, each by the first of `most` threads that is free
template <class Body>
void parallel_each(int64_t n, int64_t most, Body body) {
  int64_t parts = std::min({threads(), n, most});
  if (parts <= 1) {
    for (int64_t i = 0; i < n; i++) body(i);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(parts)
  for (int64_t i = 0; i < n; i++) body(i);
}

// Memory of this thread, kept between calls: at least n elements, 64-byte aligned. One use of a Tag at a time.
template <class T, class Tag>
T* scratch(int64_t n) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> held;
  static thread_local int64_t bytes = 0;
  int64_t need = up(std::max<int64_t>(n, 1) * sizeof(T), 4096);
  if (need > bytes) {
    held.reset();
    bytes = 0;
    held.reset(std::aligned_alloc(64, need));
    if (!held) throw std::bad_alloc();
    bytes = need;
  }
  return static_cast<T*>(held.get());
}

}  // namespace graphquant
