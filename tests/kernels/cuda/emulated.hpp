// The CUDA that our kernels use, in plain C++: a block's threads are fibers, taking turns; the functions of ptx.cuh and
// wgmma_half.cuh do what the PTX manual says. For tests where no GPU is: it checks what a kernel computes and whether
// it waits for what it reads, not its speed, and not what the hardware makes of an instruction.
//
// EAGER copies land as soon as they are asked for, so that a ring that is refilled too early spoils what is still read;
// lazy ones land when somebody waits for them, so that a missing wait reads what was there before (0xFF bytes: NaN).
#pragma once
#define EMULATED
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <vector>

#ifndef XTYPE
#define XTYPE 1
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { int x, y, z; };
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

#define DEVICE inline
#define __global__
#define __shared__
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __grid_constant__
#define SHARED_MEMORY(alignment)

// ---- blocks, threads, fibers ----
constexpr int SHARED_BYTES = 256 * 1024;
[[noreturn]] inline void fail(const char* what) {
    fprintf(stderr, "emulator: %s\n", what);
    abort();
}

struct Meeting {  // of the threads of a warp, a warpgroup, a block or a cluster
    int arrived = 0, left = 0;
    unsigned generation = 0;
    const char* kind = nullptr;
    std::vector<void*> brought;
};

struct MemoryBarrier {
    int count = 0, pending = 0;
    long bytes = 0;
    unsigned phase = 0;
    std::vector<std::function<void()>> copies;
};

struct Block {
    std::vector<u8> memory;
    u8* base = nullptr;
    dim3 index;
    u32 rank = 0;
    Meeting all;
    std::vector<Meeting> warps, groups;
    std::map<u32, MemoryBarrier> barriers;
};

struct Product { float* d; u32 a[4]; u64 b; bool keep; };

struct Thread {
    ucontext_t context;
    std::vector<u8> stack;
    Block* block;
    dim3 index;
    bool done = false;
    std::vector<std::vector<std::function<void()>>> copy_groups{1};
    std::vector<std::vector<Product>> products{1};  // by group; the last is the open one
};

inline std::vector<std::unique_ptr<Thread>> threads;
inline std::vector<std::unique_ptr<Block>> blocks;  // of one cluster
inline Thread* self;
inline u8* shared;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline bool eager;
inline Meeting cluster_meeting;
inline dim3 grid_size, block_size;
#define threadIdx (self->index)
#define blockIdx (self->block->index)
#define gridDim grid_size
#define blockDim block_size

inline void yield() { swapcontext(&self->context, &scheduler); }

// Waits for `count` threads at a meeting of one kind; the last to come acts for all.
inline void meet(Meeting& meeting, int count, const char* kind, void* mine, const std::function<void()>& act) {
    if (meeting.arrived && strcmp(meeting.kind, kind)) fail("threads of one group are at different instructions");
    meeting.kind = kind;
    if (!meeting.arrived) meeting.brought.assign(count, nullptr);
    meeting.brought[self->index.x % count] = mine;
    if (++meeting.arrived == count) {
        act();
        meeting.arrived = 0, ++meeting.generation;
        return;
    }
    for (unsigned generation = meeting.generation; generation == meeting.generation;) yield();
}

inline Meeting& warp() { return self->block->warps[self->index.x / 32]; }
inline Meeting& warpgroup() { return self->block->groups[self->index.x / 128]; }
inline void __syncwarp(u32 = ~0u) { meet(warp(), 32, "syncwarp", nullptr, [] {}); }
inline void __syncthreads() { meet(self->block->all, block_size.x, "syncthreads", nullptr, [] {}); }

inline float __shfl_xor_sync(u32, float value, int mask) {
    float pair[2] = {value, 0};
    Meeting& meeting = warp();
    meet(meeting, 32, "shuffle", pair, [&] {
        for (int lane = 0; lane < 32; ++lane)
            static_cast<float*>(meeting.brought[lane])[1] = static_cast<float*>(meeting.brought[lane ^ mask])[0];
    });
    return pair[1];
}

// ---- shared addresses: 1 KiB belongs to the system, the upper byte is the rank in the cluster ----
inline u32 shared_address(const void* pointer) {
    return static_cast<u32>(static_cast<const u8*>(pointer) - shared) + 1024 + (self->block->rank << 24);
}
inline u8* at_address(u32 address) {
    if (address >> 24 >= blocks.size()) fail("a shared address of no block");
    return blocks[address >> 24]->base + (address & 0xFFFFFF) - 1024;
}
inline u32 load_shared(u32 address) {
    if (address >> 24 != self->block->rank) fail("ld.shared outside the block's own memory");
    u32 word;
    memcpy(&word, at_address(address), 4);
    return word;
}

// ---- numbers ----
inline float __uint_as_float(u32 bits) { float f; memcpy(&f, &bits, 4); return f; }
inline u32 __float_as_uint(float f) { u32 bits; memcpy(&bits, &f, 4); return bits; }
inline float from_f16(u16 bits) { _Float16 h; memcpy(&h, &bits, 2); return static_cast<float>(h); }
inline float from_x(u16 bits) { return XTYPE ? __uint_as_float(static_cast<u32>(bits) << 16) : from_f16(bits); }
inline u16 to_x(float value) {
    if (XTYPE) {
        u32 word = __float_as_uint(value);
        return value != value ? 0x7FC0 : (word + 0x7FFF + (word >> 16 & 1)) >> 16;
    }
    _Float16 h = static_cast<_Float16>(value);
    u16 bits;
    memcpy(&bits, &h, 2);
    return bits;
}
inline u32 sub2(u32 a, u32 b) {
    return to_x(from_x(a & 0xFFFF) - from_x(b & 0xFFFF)) | static_cast<u32>(to_x(from_x(a >> 16) - from_x(b >> 16))) << 16;
}
inline u32 mul2(u32 a, u32 b) {
    return to_x(from_x(a & 0xFFFF) * from_x(b & 0xFFFF)) | static_cast<u32>(to_x(from_x(a >> 16) * from_x(b >> 16))) << 16;
}
inline u32 fma2(u32 a, u32 b, u32 c) {
    return to_x(from_x(a & 0xFFFF) * from_x(b & 0xFFFF) + from_x(c & 0xFFFF)) |
           static_cast<u32>(to_x(from_x(a >> 16) * from_x(b >> 16) + from_x(c >> 16))) << 16;
}
template <u32 MASK> u32 masked(u32 a, u32 b) { return (a & MASK) | b; }
template <u32 MASK> u32 masked_not(u32 a, u32 b) { return (~a & MASK) | b; }
inline u32 opaque(u32 constant) { return constant; }
inline u32 uniform(u32 value) { return value; }
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    u64 both = a | static_cast<u64>(b) << 32;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) result |= (both >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
    return result;
}
inline float half_of(const u32* pairs, int element) { return from_x(pairs[element / 2] >> (16 * (element % 2))); }

// ---- tensor cores ----
// a[row][k] of a 16 x 16 tile from lanes' registers: a0 (g, 2c), a1 (g+8, 2c), a2 (g, 2c+8), a3 (g+8, 2c+8)
inline float a_at(const std::function<const u32*(int)>& of_lane, int row, int k) {
    const u32* a = of_lane(row % 8 * 4 + k % 8 / 2);
    return half_of(a + row / 8 + 2 * (k / 8), k % 2);
}

struct Mma { float* d; const u32* a; u32 b[2]; };

inline void mma_16816(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    Mma mine = {d, a, {b0, b1}};
    Meeting& meeting = warp();
    meet(meeting, 32, "mma", &mine, [&] {
        auto lane = [&](int l) { return static_cast<Mma*>(meeting.brought[l]); };
        for (int row = 0; row < 16; ++row)
            for (int n = 0; n < 8; ++n) {
                double sum = 0;
                for (int k = 0; k < 16; ++k)
                    sum += static_cast<double>(a_at([&](int l) { return lane(l)->a; }, row, k)) *
                           half_of(&lane(n * 4 + k % 8 / 2)->b[k / 8], k % 2);
                lane(row % 8 * 4 + n / 2)->d[row / 8 * 2 + n % 2] += static_cast<float>(sum);
            }
    });
}

struct Matrices { u32* r; u32 address; };

inline void ldmatrix_x4(u32 (&r)[4], u32 address) {
    Matrices mine = {r, address};
    Meeting& meeting = warp();
    meet(meeting, 32, "ldmatrix", &mine, [&] {
        for (int matrix = 0; matrix < 4; ++matrix)
            for (int l = 0; l < 32; ++l) {
                u32 row = static_cast<Matrices*>(meeting.brought[8 * matrix + l / 4])->address;
                if (row % 16) fail("ldmatrix row not at a multiple of 16 bytes");
                memcpy(&static_cast<Matrices*>(meeting.brought[l])->r[matrix], at_address(row) + l % 4 * 4, 4);
            }
    });
}

inline u32 transpose_8x8(u32 pair) {
    u32 both[2] = {pair, 0};
    Meeting& meeting = warp();
    meet(meeting, 32, "transpose", both, [&] {
        auto lane = [&](int l) { return static_cast<u32*>(meeting.brought[l]); };
        for (int row = 0; row < 8; ++row)
            for (int column = 0; column < 8; ++column)
                lane(column * 4 + row / 2)[1] |= (lane(row * 4 + column / 2)[0] >> (16 * (column % 2)) & 0xFFFF) << (16 * (row % 2));
    });
    return both[1];
}

inline u32 descriptor_low(u32 address) {
    if (address % 1024) fail("a swizzled tile not at a multiple of 1024 bytes");
    return (address & 0x3FFFF) >> 4;
}
inline u64 descriptor(u32 low) { return low; }
inline void wgmma_fence() {}
inline void wgmma_commit() { self->products.emplace_back(); }
#ifdef TOKENS
inline void for_all(const std::function<void(int)>& act) { for (int thread = 0; thread < 128; ++thread) act(thread); }
// d += a b, performed at the wait: operands in shared memory must stand until then

template <bool KEEP>
void wgmma(float (&d)[TOKENS / 2], const u32 (&a)[4], u64 b) {
    self->products.back().push_back({d, {a[0], a[1], a[2], a[3]}, b, KEEP});
}
inline float b_at(u64 descriptor, int n, int k) {
    u32 address = (static_cast<u32>(descriptor) << 4) + (self->block->rank << 24);  // of the block that asks
    address += n / 8 * 1024 + n % 8 * 128 + 2 * k;
    address ^= (address >> 7 & 7) << 4;
    u16 bits;
    memcpy(&bits, at_address(address), 2);
    return from_x(bits);
}
template <int PENDING> void wgmma_wait() {
    Meeting& meeting = warpgroup();
    meet(meeting, 128, "wgmma", &self->products, [&] {
        auto of = [&](int thread) { return static_cast<std::vector<std::vector<Product>>*>(meeting.brought[thread]); };
        for (; static_cast<int>(of(0)->size()) > PENDING + 1;
             for_all([&](int thread) { of(thread)->erase(of(thread)->begin()); }))
            for (size_t i = 0; i < of(0)->front().size(); ++i)
                for (int row = 0; row < 64; ++row)
                    for (int n = 0; n < TOKENS; ++n) {
                        int first = row / 16 * 32;
                        double sum = 0;
                        for (int k = 0; k < 16; ++k)
                            sum += static_cast<double>(
                                       a_at([&](int l) { return of(first + l)->front()[i].a; }, row % 16, k)) *
                                   b_at(of(first)->front()[i].b, n, k);
                        Product& product = of(first + row % 8 * 4 + n % 8 / 2)->front()[i];
                        float& d = product.d[n / 8 * 4 + row % 16 / 8 * 2 + n % 2];
                        d = (product.keep ? d : 0.f) + static_cast<float>(sum);
                    }
    });
}
#endif

// ---- launches that overlap, clusters ----
inline void let_next_kernel_start() {}
inline void wait_for_kernel_before() {}
inline void cluster_sync() {
    int count = static_cast<int>(threads.size());
    if (++cluster_meeting.arrived == count) {
        cluster_meeting.arrived = 0, ++cluster_meeting.generation;
        return;
    }
    for (unsigned g = cluster_meeting.generation; g == cluster_meeting.generation;) yield();
}
inline float load_from_rank(u32 address, u32 rank) {
    float value;
    memcpy(&value, at_address((address & 0xFFFFFF) | rank << 24), 4);
    return value;
}

// ---- from block to block through memory: blocks run in their order, so whoever waits finds the flag raised ----
constexpr u64 RAISED = 0x9E6C63D0676A9A99ull;
inline void raise_flag(u64* flag) { *flag = RAISED; }
inline void await_flag(const u64* flag) { if (*flag != RAISED) fail("a flag that no block before has raised"); }
inline float4 load_fresh(const float4* from) { return *from; }

// ---- asynchronous copies ----
inline MemoryBarrier& barrier_at(u32 barrier) {
    if (barrier % 8) fail("an mbarrier not at a multiple of 8 bytes");
    return self->block->barriers[barrier];
}
inline void barrier_init(u32 barrier, u32 count) { barrier_at(barrier) = {static_cast<int>(count), static_cast<int>(count)}; }
inline void barrier_init_fence() {}
inline void barrier_check(MemoryBarrier& barrier) {
    if (barrier.pending == 0 && barrier.bytes == 0) ++barrier.phase, barrier.pending = barrier.count;
}
inline void barrier_expect(u32 at, u32 bytes) {
    MemoryBarrier& barrier = barrier_at(at);
    barrier.bytes += bytes, --barrier.pending;
    barrier_check(barrier);
}
inline void barrier_wait(u32 at, u32 parity) {
    MemoryBarrier& barrier = barrier_at(at);
    while (barrier.phase % 2 == parity) {
        auto copies = std::move(barrier.copies);
        barrier.copies.clear();
        for (auto& copy : copies) copy();
        if (barrier.phase % 2 == parity) yield();
    }
}
inline void barrier_arrive(u32 at) {
    MemoryBarrier& barrier = barrier_at(at);
    --barrier.pending;
    barrier_check(barrier);
}
struct TensorMap { u64 address; int rows, row_bytes, box_rows; u8 unused[108]; };  // as test_wna16_emulated.py writes it
inline void prefetch_map(const TensorMap*) {}
inline void copy_box(u32 to, const TensorMap* map, int byte, int row, u32 barrier) {
    if (to % 1024) fail("a swizzled tile not at a multiple of 1024 bytes");
    u8* target = at_address(to);
    MemoryBarrier* counted = &barrier_at(barrier);
    TensorMap copied = *map;
    auto copy = [=] {
        for (int r = 0; r < copied.box_rows; ++r)
            for (int i = 0; i < 128; ++i) {
                bool inside = row + r < copied.rows && byte + i < copied.row_bytes;
                const u8* from = reinterpret_cast<const u8*>(copied.address);
                target[r * 128 + (i ^ (r % 8) << 4)] =
                    inside ? from[static_cast<size_t>(row + r) * copied.row_bytes + byte + i] : 0;
            }
        counted->bytes -= copied.box_rows * 128;
        barrier_check(*counted);
    };
    if (eager) copy();
    else counted->copies.push_back(copy);
}
inline u64 evict_first_policy() { return 0; }
inline u64 evict_last_policy() { return 0; }
inline void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier, u64) {
    if (to % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) fail("a bulk copy not in units of 16 bytes");
    u8* target = at_address(to);
    MemoryBarrier* counted = &barrier_at(barrier);
    auto copy = [=] {
        memcpy(target, from, bytes);
        counted->bytes -= bytes;
        barrier_check(*counted);
    };
    if (eager) copy();
    else counted->copies.push_back(copy);
}
inline void later(const std::function<void()>& copy) {
    if (eager) copy();
    else self->copy_groups.back().push_back(copy);
}
inline void copy_16_or_zeros(u32 to, const void* from, bool valid) {
    if (to % 16 || (valid && reinterpret_cast<uintptr_t>(from) % 16)) fail("cp.async not in units of 16 bytes");
    u8* target = at_address(to);
    later([=] { valid ? memcpy(target, from, 16) : memset(target, 0, 16); });
}
inline void copy_16(u32 to, const void* from) { copy_16_or_zeros(to, from, true); }
inline void copies_commit() { self->copy_groups.emplace_back(); }
template <int PENDING> void copies_wait() {  // the last group is the open one
    auto& groups = self->copy_groups;
    while (static_cast<int>(groups.size()) > PENDING + 1) {
        for (auto& copy : groups.front()) copy();
        groups.erase(groups.begin());
    }
}

// ---- a launch: cluster after cluster, each thread's turn ends where it waits ----
inline void fiber() {
    body();
    self->done = true;
    yield();
}

inline void run_cluster(dim3 first, int cluster, int shared_bytes) {
    blocks.clear(), threads.clear();
    cluster_meeting = {};
    for (int rank = 0; rank < cluster; ++rank) {
        blocks.push_back(std::make_unique<Block>());
        Block& block = *blocks.back();
        block.memory.assign(SHARED_BYTES + 1024, 0xFF);
        block.base = reinterpret_cast<u8*>((reinterpret_cast<uintptr_t>(block.memory.data()) + 1023) / 1024 * 1024);
        block.index = {first.x + rank, first.y, first.z}, block.rank = rank;
        block.warps.resize(block_size.x / 32 + 1), block.groups.resize(block_size.x / 128 + 1);
        for (int i = 0; i < block_size.x; ++i) {
            threads.push_back(std::make_unique<Thread>());
            Thread& thread = *threads.back();
            thread.block = &block, thread.index = {i, 0, 0};
            thread.stack.resize(64 * 1024);
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.data(), thread.context.uc_stack.ss_size = thread.stack.size();
            thread.context.uc_link = &scheduler;
            makecontext(&thread.context, fiber, 0);
        }
    }
    for (size_t running = threads.size(); running;) {
        for (auto& thread : threads) {
            if (thread->done) continue;
            self = thread.get(), shared = thread->block->base;
            swapcontext(&scheduler, &thread->context);
            if (thread->done) --running;
        }
    }
    for (auto& block : blocks)
        for (int i = shared_bytes; i < SHARED_BYTES; ++i)
            if (block->base[i] != 0xFF) fail("shared memory beyond what the launch asked for was written");
}

inline void emulate(dim3 grid, int threads_per_block, int cluster, int shared_bytes, bool copies_are_eager,
                    const std::function<void()>& kernel) {
    grid_size = grid, block_size = {threads_per_block, 1, 1}, eager = copies_are_eager, body = kernel;
    for (int y = 0; y < grid.y; ++y)
        for (int x = 0; x < grid.x; x += cluster) run_cluster({x, y, 0}, cluster, shared_bytes);
}
