// Hopper's machinery as functions (sm_90a): mbarriers, the bulk tensor copy engine (TMA), clusters, programmatic launch.
// PTX ISA 8.x, sections "mbarrier", "cp.async.bulk.tensor", "barrier.cluster", "griddepcontrol", "setmaxnreg".
#pragma once
#ifndef EMULATED  // tests/kernels/cuda/emulated_int8.hpp defines the same in C++

// A block's shared memory: of a fixed type, and what the launch asks for.
#define SHARED(type, name) __shared__ __align__(16) type name
#define DYNAMIC_SHARED(name, alignment) extern __shared__ __align__(alignment) unsigned char name[]

struct alignas(64) TensorMap { unsigned char opaque[128]; };  // CUtensorMap, filled by cuTensorMapEncodeTiled

__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

__device__ __forceinline__ unsigned cluster_rank() {
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// The address of the same place in the shared memory of another block of the cluster.
__device__ __forceinline__ unsigned remote_address(unsigned address, unsigned rank) {
    unsigned remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    return remote;
}

__device__ __forceinline__ int2 load_remote(unsigned remote) {
    int2 value;
    asm volatile("ld.shared::cluster.v2.s32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(remote) : "memory");
    return value;
}

__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same without ordering any memory: nobody goes on before all have come here.
__device__ __forceinline__ void cluster_meet() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ __forceinline__ void barrier_init(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}

// Makes freshly initialized barriers visible to the copy engine and to the cluster.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(unsigned barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

// Says that this thread, and those it was in a barrier with, have read; it orders no writes before it. With
// .release.cluster it would, by a MEMBAR.GPU that waits until all that was written to global memory has arrived there.
__device__ __forceinline__ void barrier_arrive_remote(unsigned barrier, unsigned rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];"
                 :: "r"(remote_address(barrier, rank)) : "memory");
}

// Returns once the phase of this parity has completed; the phase before the first counts as completed with parity 1.
__device__ __forceinline__ void barrier_wait(unsigned barrier, int parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again_%=:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra finished_%=;\nbra again_%=;\nfinished_%=:\n}"
        :: "r"(barrier), "r"(parity) : "memory");
}

// A box of the map's matrix, from column k (bytes) and row r, into shared memory; its bytes count on `barrier`.
__device__ __forceinline__ void copy_box(unsigned to, const TensorMap* map, int k, int r, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        :: "r"(to), "l"(map), "r"(k), "r"(r), "r"(barrier) : "memory");
}

// The same box into every block of the cluster named by `mask`, counting on each block's own barrier.
__device__ __forceinline__ void copy_box_to_all(unsigned to, const TensorMap* map, int k, int r, unsigned barrier,
                                                unsigned short mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;"
        :: "r"(to), "l"(map), "r"(k), "r"(r), "r"(barrier), "h"(mask) : "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory");
}

// Programmatic dependent launch: what stands before wait_for_previous may run while the previous kernel still does.
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// A barrier among `threads` threads of the block (a multiple of 32); id 1 to 15, 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

template <int REGISTERS> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(REGISTERS));
}
template <int REGISTERS> __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(REGISTERS));
}

// ---- blocks that work for each other within a launch, through global memory ----
// What this thread wrote, and read, made known to the copy engine, and its writes to this thread.
__device__ __forceinline__ void all_proxies() { asm volatile("fence.proxy.async;" ::: "memory"); }

// Who sees the sum sees what stood before.
__device__ __forceinline__ void add_one(unsigned* counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(counter) : "memory");
}
__device__ __forceinline__ void wait_until(const unsigned* counter, unsigned wanted) {
    unsigned have;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(have) : "l"(counter) : "memory");
    while (have < wanted);
}

// A number that another block may have written while this kernel ran.
__device__ __forceinline__ float load_fresh(const float* at) {
    float value;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(value) : "l"(at) : "memory");
    return value;
}
#endif
