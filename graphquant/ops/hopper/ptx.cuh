// PTX instructions that CUDA C++ of sm_90a has no functions for, under their PTX names: mbarriers, the tensor
// memory accelerator (TMA), clusters, named barriers, programmatic dependent launch. No other headers: NVRTC
// brings none.
//
// Addresses of shared memory are 32 bits, in the shared state space (smem.cuh).
#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// CUtensorMap of cuda.h; a kernel takes it by value, as a __grid_constant__.
struct __align__(64) TensorMap {
  u64 words[16];
};

enum Dtype { NONE, BF16, FP16, FP32 };

// ------------------------------------------------------------------------------------ mbarriers

__device__ __forceinline__ void mbarrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
// Makes initialized mbarriers visible to the cluster and to TMA.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Arrives, and `bytes` of asynchronous copies are still to come in this phase.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrives when all cp.async of this thread so far are complete. Counts as an arrival that was announced.
__device__ __forceinline__ void mbarrier_arrive_cp_async(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// Until the phase of this parity is complete.
__device__ __forceinline__ void mbarrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier), "r"(parity)
      : "memory");
}

// ------------------------------------------------------------------------------------ clusters

__device__ __forceinline__ u32 cluster_cta_rank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// For warps whose lanes do not arrive together.
__device__ __forceinline__ void cluster_sync_unaligned() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// The same address in another CTA of the cluster.
__device__ __forceinline__ u32 map_to_cta(u32 address, u32 cta) {
  u32 remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(cta));
  return remote;
}
// `barrier` may be another CTA's. Orders no memory: .release.cluster would be a fence of the whole GPU.
__device__ __forceinline__ void mbarrier_arrive_cluster(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// The same behind ordinary reads and writes of shared memory, which the cluster then sees as done.
__device__ __forceinline__ void mbarrier_arrive_release_cluster(u32 barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void mbarrier_wait_acquire_cluster(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// 16 bytes to another CTA's shared memory; its mbarrier counts them.
__device__ __forceinline__ void st_async(u32 to, u32 barrier, const int* from) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(to),
      "r"(barrier), "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
      : "memory");
}

// ------------------------------------------------------------------------------------ TMA

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void tma_load(u32 to, const TensorMap* map, u32 barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}
__device__ __forceinline__ void tma_load(
    u32 to, const TensorMap* map, u32 barrier, int column, int head, int token, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(head), "r"(token), "r"(batch)
      : "memory");
}
// To the same addresses, and mbarriers, of all CTAs of the cluster whose bit is set.
__device__ __forceinline__ void tma_load_multicast(
    u32 to, const TensorMap* map, u32 barrier, int column, int row, u16 ctas) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(ctas)
      : "memory");
}
__device__ __forceinline__ void tma_store(const TensorMap* map, u32 from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from),
               "r"(column), "r"(row)
               : "memory");
}
__device__ __forceinline__ void tma_store(const TensorMap* map, u32 from, int column, int head, int token, int batch) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map), "r"(from),
               "r"(column), "r"(head), "r"(token), "r"(batch)
               : "memory");
}
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most the last Pending groups of stores still read shared memory.
template <int Pending>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}
// Between ordinary writes of shared memory and what TMA or wgmma does with it.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ------------------------------------------------------------------------------------ warps

// `value`, which is the same in all lanes, and which the compiler then knows to be: it stays in uniform registers,
// with all that follows from it.
__device__ __forceinline__ int warp_uniform(int value) { return __shfl_sync(0xffffffff, value, 0); }
template <int Registers>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Threads>
__device__ __forceinline__ void named_barrier_sync(u32 barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(Threads) : "memory");
}
// The same, and whether any of the threads came with `value`.
template <int Threads>
__device__ __forceinline__ bool named_barrier_any(u32 barrier, bool value) {
  u32 any;
  asm volatile(
      "{\n.reg .pred mine, any;\nsetp.ne.b32 mine, %3, 0;\n"
      "bar.red.or.pred any, %1, %2, mine;\nselp.b32 %0, 1, 0, any;\n}"
      : "=r"(any)
      : "r"(barrier), "n"(Threads), "r"((u32)value)
      : "memory");
  return __any_sync(0xffffffff, any);  // so ptxas sees that a warp has one answer
}
template <int Threads>
__device__ __forceinline__ void named_barrier_arrive(u32 barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(Threads) : "memory");
}
// Programmatic dependent launch: until the kernel before has written its results. A no-op without it.
__device__ __forceinline__ void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Lets the kernel behind this one start. It waits for our results by griddepcontrol_wait.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ------------------------------------------------------------------------------------ numbers

__device__ __forceinline__ float half_to_float(u32 bits) {
  float number;
  asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"((u16)bits));
  return number;
}
// Two floats as neighbors in 32 bits, rounded to nearest even.
template <Dtype Type>
__device__ __forceinline__ u32 pack(float low, float high) {
  static_assert(Type == BF16 || Type == FP16, "16 bits each");
  u32 packed;
  if constexpr (Type == BF16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}
// The other way round.
template <Dtype Type>
__device__ __forceinline__ float2 unpack(u32 packed) {
  static_assert(Type == BF16 || Type == FP16, "16 bits each");
  if constexpr (Type == BF16) {
    return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
  } else {
    return make_float2(half_to_float(packed & 0xffffu), half_to_float(packed >> 16));
  }
}

// ------------------------------------------------------------------------------------ global memory

// Of what the kernel before may have written: not through the cache for constants, and not before
// griddepcontrol_wait.
__device__ __forceinline__ int ld_global(const int* from) {
  int v;
  asm volatile("ld.global.s32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
  return v;
}

// ------------------------------------------------------------------------------------ shared memory

// Four 8 x 8 matrices of 16 bits; each lane gives the address of one row.
__device__ __forceinline__ void stmatrix_x4(u32 to, const u32 (&from)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(from[0]), "r"(from[1]),
               "r"(from[2]), "r"(from[3])
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4(u32 (&to)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}
// The loads without a "memory" clobber may be moved past others' stores: for what no one writes meanwhile.
__device__ __forceinline__ float2 ld_shared_float2(u32 from) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(from));
  return v;
}
__device__ __forceinline__ float4 ld_shared_float4(u32 from) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(from));
  return v;
}
__device__ __forceinline__ float2 ld_shared_float2_ordered(u32 from) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(from) : "memory");
  return v;
}
__device__ __forceinline__ int ld_shared_int_ordered(u32 from) {
  int v;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
  return v;
}
__device__ __forceinline__ int2 ld_shared_int2_ordered(u32 from) {
  int2 v;
  asm volatile("ld.shared.v2.s32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(from) : "memory");
  return v;
}
__device__ __forceinline__ int4 ld_shared_int4_ordered(u32 from) {
  int4 v;
  asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}
__device__ __forceinline__ void st_shared_u16(u32 to, u32 v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"((u16)v) : "memory");
}
__device__ __forceinline__ void st_shared(u32 to, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(v) : "memory");
}
__device__ __forceinline__ void st_shared(u32 to, int4 v) {
  asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void st_shared(u32 to, float low, float high) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(low), "f"(high) : "memory");
}
// from[i] to shared memory without a register, or 0 where i is not below `end`.
__device__ __forceinline__ void cp_async(u32 to, const float* from, int i, int end) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from + (i < end ? i : 0)), "r"(i < end ? 4 : 0)
               : "memory");
}
