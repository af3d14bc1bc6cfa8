// Rows of activations quantized by the prefill product itself (int8_wgmma.cu), ahead of the tiles that need them (sm_90a).
//
//     x [M, K] float16 or bfloat16 -> q int8 [M, K], scale float32 [M]               int8_codes.cuh
//
//     first rows     all warps of all blocks, before the first tile: those of the first FIRST clusters of rows
//     the others     three warps of each block, which have nothing else to do, while the tensor cores multiply
//
// Rows are taken by number from a counter, so that blocks that have not started yet keep nobody waiting: two products may
// share the chip. A tile's copying thread waits until the rows of its 128 are counted as ready. Counters, all zero before
// and after a launch:
//
//     0  next of the first rows     1  next of the others     2  blocks that are done     READY + i  ready of 128 rows i
#pragma once
#include "hopper.cuh"
#include "int8_codes.cuh"

#ifndef WARPS
#define WARPS 1  // that hold one of the first rows together: 1 up to 4096 columns, 2 up to 8192, else 4
#endif
constexpr int TEAM = WARPS * 32, TEAMS = 12 / WARPS, HELD = 16, READY = 16;

struct Rows {
    const unsigned short* x;
    int x_row, M, K;
    signed char* q;
    float* scale;
    unsigned* counters;

    // Tell that row m is written. By one thread of those that wrote it, after a barrier among them: what they wrote is
    // released with it.
    __device__ __forceinline__ void count(int m) const { add_one(counters + READY + m / 128); }
    // Until the 128 rows from m on are ready for the copy engine.
    __device__ __forceinline__ void wait(int m) const {
        unsigned wanted = min(128, M - m);
        wait_until(counters + READY + m / 128, wanted);
        all_proxies();
    }
};

// Row m by a team, whose threads hold HELD chunks each; what is longer is read twice. `thread` within the team, `id` the
// team's barrier, `tops` a word for each of its warps.
__device__ __forceinline__ void quantize_row(const Rows& rows, int m, int thread, int id, unsigned* tops) {
    const unsigned short* x = rows.x + (size_t)m * rows.x_row;
    signed char* q = rows.q + (size_t)m * rows.K;
    int chunks = rows.K / CHUNK;
    uint4 held[HELD];
    unsigned top = 0;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int c = i * TEAM + thread;
        held[i] = c < chunks ? *(const uint4*)(x + c * CHUNK) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) top = max(top, largest(held[i]));
    for (int c = HELD * TEAM + thread; c < chunks; c += TEAM) top = max(top, largest(*(const uint4*)(x + c * CHUNK)));
    top = __reduce_max_sync(0xffffffffu, top);
    if (WARPS > 1) {
        if (thread % 32 == 0) tops[thread / 32] = top;
        named_barrier(id, TEAM);
#pragma unroll
        for (int i = 0; i < WARPS; i++) top = max(top, tops[i]);
    }
    Grid grid = grid_of(top);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int c = i * TEAM + thread;
        if (c < chunks) *(uint2*)(q + c * CHUNK) = codes_of(held[i], grid);
    }
    for (int c = HELD * TEAM + thread; c < chunks; c += TEAM)
        *(uint2*)(q + c * CHUNK) = codes_of(*(const uint4*)(x + c * CHUNK), grid);
    if (thread == 0) rows.scale[m] = grid.scale;
    all_proxies();  // the copy engine will read this
    if (WARPS > 1) named_barrier(id, TEAM);
    else __syncwarp();
    if (thread == 0) rows.count(m);
}

// By all threads of a block: rows below `first_rows`, each team for itself. A block has no more teams at work than it takes
// for all blocks to have one row each.
__device__ __forceinline__ void quantize_first_rows(const Rows& rows, int first_rows) {
    struct Board { unsigned taken[TEAMS], tops[12]; };
    SHARED(Board, board);
    int team = threadIdx.x / TEAM, thread = threadIdx.x % TEAM;
    if (team > (first_rows - 1) / (int)gridDim.x) return;
    unsigned next = thread == 0 ? atomicAdd(&rows.counters[0], 1) : 0;
    while (true) {
        int m = __shfl_sync(0xffffffffu, next, 0);
        if (WARPS > 1) {
            if (thread == 0) board.taken[team] = m;
            named_barrier(3 + team, TEAM);
            m = board.taken[team];
        }
        if (m >= first_rows) return;
        if (thread == 0) next = atomicAdd(&rows.counters[0], 1);  // asked for early: it takes a while
        quantize_row(rows, m, thread, 3 + team, board.tops + team * WARPS);
    }
}

// By a warp with few registers: rows from `first_rows` on, each read twice, 8 chunks a lane at once.
__device__ __forceinline__ void quantize_other_rows(const Rows& rows, int first_rows) {
    constexpr int AT_ONCE = 8;
    int lane = threadIdx.x % 32, chunks = rows.K / CHUNK;
    unsigned next = lane == 0 ? atomicAdd(&rows.counters[1], 1) : 0;
    while (true) {
        int m = first_rows + (int)__shfl_sync(0xffffffffu, next, 0);
        if (m >= rows.M) return;
        if (lane == 0) next = atomicAdd(&rows.counters[1], 1);
        const unsigned short* x = rows.x + (size_t)m * rows.x_row;
        signed char* q = rows.q + (size_t)m * rows.K;
        uint4 chunk[AT_ONCE];
        unsigned top = 0;
        for (int start = lane; start < chunks; start += AT_ONCE * 32) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                int c = start + i * 32;
                chunk[i] = c < chunks ? *(const uint4*)(x + c * CHUNK) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) top = max(top, largest(chunk[i]));
        }
        Grid grid = grid_of(__reduce_max_sync(0xffffffffu, top));
        for (int start = lane; start < chunks; start += AT_ONCE * 32) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                if (start + i * 32 < chunks) chunk[i] = *(const uint4*)(x + (start + i * 32) * CHUNK);
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                if (start + i * 32 < chunks) *(uint2*)(q + (start + i * 32) * CHUNK) = codes_of(chunk[i], grid);
        }
        if (lane == 0) rows.scale[m] = grid.scale;
        all_proxies();
        __syncwarp();
        if (lane == 0) rows.count(m);
    }
}

// By all threads, once this block has read all that it will: the last block of the grid leaves the counters at zero.
__device__ __forceinline__ void reset_counters(const Rows& rows) {
    SHARED(bool, is_last);
    if (threadIdx.x == 0) {
        __threadfence();
        is_last = atomicAdd(&rows.counters[2], 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (is_last)
        for (int i = threadIdx.x; i < READY + (rows.M + 127) / 128; i += blockDim.x) rows.counters[i] = 0;
}
