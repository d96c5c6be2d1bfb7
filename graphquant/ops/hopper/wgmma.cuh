// Warp group matrix multiply-accumulate (wgmma): what surrounds it. The multiplications themselves, wgmma_ss and
// wgmma_rs, are in wgmma_shapes.cuh, which wgmma.py writes for the shapes that a kernel needs.
#pragma once

#include "hopper/ptx.cuh"

// Before the first wgmma, and when registers that it takes were written by other instructions.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most the last Pending groups are still running.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// The same behind arithmetic with a result that is not negative. ptxas moves a wait up past arithmetic, which then does
// not overlap with the products any more, but not past a branch. This one is never taken.
template <int Pending>
__device__ __forceinline__ void wgmma_wait_behind(float result) {
  if (result < 0.0f) asm volatile("trap;");
  wgmma_wait<Pending>();
}

// D[64, N] (+)= A B, rows of 64 for a warp group; a thread has N / 2 elements of D, and of A where it is in
// registers. With `accumulate` 0 D is overwritten. Specialized for the shapes in use.
template <int N>  // A [64, 32] and B^T [N, 32] in int8
__device__ void wgmma_ss(int* d, u64 a, u64 b, int accumulate);
template <int N>  // A [64, 16] and B^T [N, 16] in fp16 or bf16
__device__ void wgmma_ss(float* d, u64 a, u64 b, int accumulate);
template <int N>  // A [64, 16] and B [16, N] in fp16 or bf16
__device__ void wgmma_rs(float* d, const u32* a, u64 b, int accumulate);

// Keeps the compiler from moving reads of accumulators to before wgmma has written them.
template <int N>
__device__ __forceinline__ void fence_accumulators(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N>
__device__ __forceinline__ void fence_accumulators(int (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// Descriptor of a matrix in shared memory with TMA's swizzle of 128 bytes. `stride`: bytes from 8 rows to the
// next 8. `leading`: bytes from one 128-byte column to the next, read only where the contiguous dimension is not
// the one that is summed over.
__device__ __forceinline__ u64 wgmma_descriptor(u32 address, u32 leading, u32 stride) {
  return (u64)((address & 0x3FFFF) >> 4) | ((u64)(leading >> 4) << 16) | ((u64)(stride >> 4) << 32) | ((u64)1 << 62);
}

// Descriptors of the parts of one matrix: they differ in the low word alone.
template <u32 Leading>
struct Operand {
  u32 low;
  __device__ __forceinline__ explicit Operand(u32 address) : low((u32)wgmma_descriptor(address, Leading, 1024)) {}
  __device__ __forceinline__ u64 at(u32 bytes) const {
    const u32 high = (u32)(wgmma_descriptor(0, Leading, 1024) >> 32);
    return (u64)high << 32 | (low + (bytes >> 4));
  }
};
