// Shared memory: its layout, a struct SharedStorage in each kernel, and rings of stages in it.
//
// mbarriers, TMA and wgmma take 32-bit addresses, so a kernel never dereferences a SharedStorage: it adds a
// member's offset to the address where the struct begins.
#pragma once

#include "hopper/ptx.cuh"

// The 128-byte swizzle repeats every 1024 bytes, so swizzled tiles start at multiples of that. The runtime aligns
// dynamic shared memory to less: a launch asks for this many bytes more than sizeof(SharedStorage).
enum : int { SMEM_ALIGN = 1024 };

// Where a SharedStorage begins: the first multiple of SMEM_ALIGN in dynamic shared memory.
__device__ __forceinline__ u32 smem_base(const void* dynamic) {
  u32 address;
  asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(address) : "l"(dynamic));
  return (address + (SMEM_ALIGN - 1)) & ~(u32)(SMEM_ALIGN - 1);
}

// Address of a member of the SharedStorage at `smem`.
#define SMEM(member) (smem + (u32)(u64) &((SharedStorage*)nullptr)->member)

// Position in a ring of buffers, and the parity of its mbarriers' phase there. A producer starts with
// parity 1: its first waits, for buffers that nobody has used yet, pass at once.
template <int Stages>
struct PipelineState {
  u32 stage, parity;
  __device__ __forceinline__ void advance() {
    if (++stage == Stages) stage = 0, parity ^= 1;
  }
};
