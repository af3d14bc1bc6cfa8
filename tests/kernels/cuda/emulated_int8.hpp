// The CUDA that the int8 wgmma kernels use, in plain C++: all blocks of a launch at once, their threads fibers that take
// turns where they wait. Defines what hopper.cuh, wgmma_s8.cuh and floats.cuh do, as the PTX manual says. For tests where
// no GPU is: it checks what a kernel computes and whether it waits for what it reads, not what the hardware makes of it.
//
// EAGER copies land as soon as they are asked for, so that a ring that is refilled too early spoils what is still read;
// lazy ones land when somebody waits for them, so that a missing wait reads what was there before (0xFF bytes). Products
// are done when they are waited for, whatever their operands hold then.
#pragma once
#define EMULATED
#define __CUDA_ARCH__ 900
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
struct int2 { int x, y; };
struct uint2 { u32 x, y; };
struct float2 { float x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct dim3 { int x, y, z; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline u32 max(u32 a, u32 b) { return a > b ? a : b; }
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__

// ---- blocks, threads, fibers ----
constexpr int SHARED_BYTES = 1 << 18, VARIABLES_AT = 228 * 1024;  // what the source declares stands behind the rest
[[noreturn]] inline void fail(const char* what) {
    fprintf(stderr, "emulator: %s\n", what);
    abort();
}

struct Meeting {
    int arrived = 0;
    unsigned generation = 0;
    std::vector<u32> brought;
};
struct MemoryBarrier {
    bool is_ready = false;
    int count = 0, pending = 0;
    long bytes = 0;
    unsigned phase = 0;
    std::vector<std::function<void()>> copies;
};
struct Block {
    std::vector<u8> memory;
    u8* base;
    dim3 index;
    int id, cluster;  // id of the first block of the cluster
    std::map<int, Meeting> named;
    std::vector<Meeting> warps;
    std::map<u32, MemoryBarrier> barriers;
    std::map<int, int> variables;  // line of the declaration -> place
    int used = VARIABLES_AT;
};
struct Product { int *d, columns; u64 a, b; bool accumulates; };
struct Thread {
    ucontext_t context;
    std::vector<u8> stack;
    Block* block;
    dim3 index;
    bool done = false;
    unsigned cluster_generation = 0;
    std::vector<std::vector<Product>> products{1};  // by group; the last is the open one
};
inline std::vector<std::unique_ptr<Thread>> threads;
inline std::vector<std::unique_ptr<Block>> blocks;
inline std::vector<Meeting> clusters;
inline Thread* self;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline bool eager;
inline int cluster_size;
inline dim3 grid_size, block_size;
#define threadIdx (self->index)
#define blockIdx (self->block->index)
#define gridDim grid_size
#define blockDim block_size
inline void yield() { swapcontext(&self->context, &scheduler); }

inline void meet(Meeting& meeting, int count) {
    if (++meeting.arrived == count) {
        meeting.arrived = 0, ++meeting.generation;
        return;
    }
    for (unsigned generation = meeting.generation; generation == meeting.generation;) yield();
}
inline void named_barrier(int id, int count) { meet(self->block->named[id], count); }
inline void __syncthreads() { named_barrier(0, block_size.x); }
inline Meeting& warp() { return self->block->warps[self->index.x / 32]; }
inline void __syncwarp() { meet(warp(), 32); }
inline std::vector<u32> told(u32 mine) {  // what each lane of the warp brought
    Meeting& meeting = warp();
    meeting.brought.resize(32);
    meeting.brought[self->index.x % 32] = mine;
    meet(meeting, 32);
    std::vector<u32> all = meeting.brought;
    meet(meeting, 32);
    return all;
}
inline u32 __shfl_xor_sync(u32, u32 value, int mask) { return told(value)[self->index.x % 32 ^ mask]; }
inline int __shfl_sync(u32, int value, int lane) { return static_cast<int>(told(value)[lane]); }
inline u32 __reduce_max_sync(u32, u32 value) {
    u32 top = 0;
    for (u32 other : told(value)) top = max(top, other);
    return top;
}
inline u32 atomicAdd(u32* at, u32 value) { return std::exchange(*at, *at + value); }
inline u32 atomicMax(u32* at, u32 value) { return std::exchange(*at, max(*at, value)); }
inline void __threadfence() {}
inline void all_proxies() {}
inline void add_one(u32* counter) { ++*counter; }
inline void wait_until(const u32* counter, u32 wanted) { while (*static_cast<const volatile u32*>(counter) < wanted) yield(); }
inline float load_fresh(const float* at) { return *at; }
inline void wait_for_previous() {}
inline void let_next_start() {}
template <int> void take_registers() {}
template <int> void give_registers() {}

// ---- numbers ----
inline float __uint_as_float(u32 bits) { float f; memcpy(&f, &bits, 4); return f; }
inline u32 __float_as_uint(float f) { u32 bits; memcpy(&bits, &f, 4); return bits; }
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    unsigned long long both = a | static_cast<unsigned long long>(b) << 32;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<u32>(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    return result;
}
inline float __fdiv_rn(float a, float b) { return a / b; }
inline unsigned short half_bits(float value) { _Float16 h = static_cast<_Float16>(value); unsigned short bits; memcpy(&bits, &h, 2); return bits; }
inline float half_value(unsigned short bits) { _Float16 h; memcpy(&h, &bits, 2); return static_cast<float>(h); }
inline unsigned short bfloat_bits(float value) {
    u32 bits = __float_as_uint(value);
    return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline u32 two_halves(float first, float second) { return half_bits(first) | static_cast<u32>(half_bits(second)) << 16; }
inline u32 two_bfloats(float first, float second) { return bfloat_bits(first) | static_cast<u32>(bfloat_bits(second)) << 16; }
inline u32 larger_halves(u32 a, u32 v) {  // of positive numbers the larger has the larger bits, in either type
    return max(a & 0xffff, v & 0x7fff) | max(a >> 16, v >> 16 & 0x7fff) << 16;
}
inline u32 larger_bfloats(u32 a, u32 v) { return larger_halves(a, v); }

// ---- shared memory: the upper bits of an address are the block ----
template <typename T> T& variable(int line) {
    Block& block = *self->block;
    if (!block.variables.count(line)) block.variables[line] = block.used, block.used += (sizeof(T) + 15) / 16 * 16;
    if (block.used > SHARED_BYTES) fail("more variables than shared memory");
    return *reinterpret_cast<T*>(block.base + block.variables[line]);
}
#define SHARED(type, name) type& name = variable<type>(__LINE__)
#define DYNAMIC_SHARED(name, alignment) unsigned char* name = self->block->base
inline u32 shared_address(const void* at) {
    return static_cast<u32>(static_cast<const u8*>(at) - self->block->base) | static_cast<u32>(self->block->id) << 18;
}
inline u8* at_address(u32 address) { return blocks[address >> 18]->base + address % SHARED_BYTES; }
inline u32 remote_address(u32 address, u32 rank) { return address % SHARED_BYTES | (self->block->cluster + rank) << 18; }
inline u32 cluster_rank() { return self->block->id - self->block->cluster; }
inline int2 load_remote(u32 address) { int2 value; memcpy(&value, at_address(address), 8); return value; }
inline Meeting& cluster() { return clusters[self->block->cluster / cluster_size]; }
inline void cluster_arrive() {
    self->cluster_generation = cluster().generation;
    if (++cluster().arrived == cluster_size * block_size.x) cluster().arrived = 0, ++cluster().generation;
}
inline void cluster_wait() { while (cluster().generation == self->cluster_generation) yield(); }
inline void cluster_barrier() { cluster_arrive(), cluster_wait(); }
inline void cluster_meet() { cluster_barrier(); }

inline MemoryBarrier& barrier_at(u32 address) {
    if (address % 8) fail("an mbarrier not at a multiple of 8 bytes");
    return blocks[address >> 18]->barriers[address];
}
inline void barrier_init(u32 at, int count) { barrier_at(at) = {true, count, count}; }
inline void barrier_init_fence() {}
inline void advance(MemoryBarrier& barrier) {
    if (!barrier.is_ready) fail("a barrier is used before it is initialized");
    if (barrier.pending < 0) fail("more arrivals than a barrier counts");
    if (barrier.pending == 0 && barrier.bytes == 0) ++barrier.phase, barrier.pending = barrier.count;
}
inline void barrier_expect(u32 at, int bytes) { MemoryBarrier& b = barrier_at(at); b.bytes += bytes, --b.pending, advance(b); }
inline void barrier_arrive(u32 at) { barrier_expect(at, 0); }
inline void barrier_arrive_remote(u32 at, u32 rank) { barrier_arrive(remote_address(at, rank)); }
inline void barrier_wait(u32 at, u32 parity) {
    MemoryBarrier& barrier = barrier_at(at);
    while (barrier.phase % 2 == parity) {
        for (auto& copy : std::exchange(barrier.copies, {})) copy();
        if (barrier.phase % 2 == parity) yield();
    }
}
struct TensorMap { u64 address; int rows, row_bytes, box_rows; u8 unused[108]; };  // as the tests write it
inline void copy_box(u32 to, const TensorMap* given, int byte, int row, u32 counted) {
    if (to % 1024) fail("a swizzled tile not at a multiple of 1024 bytes");
    MemoryBarrier* barrier = &barrier_at(counted);
    auto copy = [=, map = *given] {
        const u8* from = reinterpret_cast<const u8*>(map.address);
        for (int r = 0; r < map.box_rows; ++r)
            for (int i = 0; i < 128; ++i) {
                bool is_inside = row + r < map.rows && byte + i < map.row_bytes;
                at_address(to)[r * 128 + (i ^ r % 8 << 4)] =
                    is_inside ? from[static_cast<size_t>(row + r) * map.row_bytes + byte + i] : 0;
            }
        barrier->bytes -= map.box_rows * 128, advance(*barrier);
    };
    if (eager) copy();
    else barrier->copies.push_back(copy);
}
inline void copy_box_to_all(u32 to, const TensorMap* map, int byte, int row, u32 counted, unsigned short mask) {
    for (int rank = 0; rank < cluster_size; ++rank)
        if (mask >> rank & 1) copy_box(remote_address(to, rank), map, byte, row, remote_address(counted, rank));
}
inline void prefetch_map(const TensorMap*) {}

// ---- wgmma on int8 (wgmma_s8.cuh) ----
inline u64 descriptor(u32 address) {
    if (address % 1024) fail("a swizzled tile not at a multiple of 1024 bytes");
    return address % SHARED_BYTES >> 4;
}
inline void wgmma_fence() {}
inline void wgmma_commit() { self->products.emplace_back(); }
template <int COUNT> void wgmma(int (&d)[COUNT], u64 a, u64 b, int accumulates) {
    self->products.back().push_back({d, COUNT * 2, a, b, accumulates != 0});
}
inline int operand(u64 tile, int row, int k) {
    u32 at = static_cast<u32>(tile << 4) + row / 8 * 1024 + row % 8 * 128 + k;
    return static_cast<signed char>(self->block->base[at ^ (at >> 7 & 7) << 4]);
}
template <int PENDING> void wgmma_wait() {
    auto& groups = self->products;
    for (; static_cast<int>(groups.size()) > PENDING + 1; groups.erase(groups.begin()))
        for (Product& p : groups.front())
            for (int i = 0; i < p.columns / 2; ++i) {
                int thread = self->index.x % 128, row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, sum = 0;
                int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
                for (int k = 0; k < 32; ++k) sum += operand(p.a, row, k) * operand(p.b, column, k);
                p.d[i] = p.accumulates ? p.d[i] + sum : sum;
            }
}

// ---- a launch ----
inline void fiber() {
    body();
    self->done = true;
    yield();
}
inline void emulate(dim3 grid, int threads_per_block, int blocks_per_cluster, bool copies_are_eager, const std::function<void()>& kernel) {
    grid_size = grid, block_size = {threads_per_block, 1, 1}, eager = copies_are_eager, body = kernel;
    cluster_size = blocks_per_cluster;
    threads.clear(), blocks.clear(), clusters.assign(grid.x * grid.y / cluster_size, {});
    for (int id = 0; id < grid.x * grid.y; ++id) {
        blocks.push_back(std::make_unique<Block>());
        Block& block = *blocks.back();
        block.memory.assign(SHARED_BYTES + 1024, 0xFF);
        block.base = reinterpret_cast<u8*>((reinterpret_cast<uintptr_t>(block.memory.data()) + 1023) / 1024 * 1024);
        block.index = {id % grid.x, id / grid.x, 0}, block.id = id, block.cluster = id / cluster_size * cluster_size;
        block.warps.resize(block_size.x / 32);
        for (int i = 0; i < block_size.x; ++i) {
            threads.push_back(std::make_unique<Thread>());
            Thread& thread = *threads.back();
            thread.block = &block, thread.index = {i, 0, 0};
            thread.stack.resize(32 * 1024);
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.data(), thread.context.uc_stack.ss_size = thread.stack.size();
            thread.context.uc_link = &scheduler;
            makecontext(&thread.context, fiber, 0);
        }
    }
    for (size_t running = threads.size(); running;)
        for (auto& thread : threads) {
            if (thread->done) continue;
            self = thread.get();
            swapcontext(&scheduler, &thread->context);
            if (thread->done) --running;
        }
    for (auto& block : blocks)
        for (auto& [at, barrier] : block->barriers)
            if (!barrier.copies.empty()) fail("a copy was never waited for");
}
