// Stream-K (arXiv:2301.03598) without atomics: every block gets the same number of steps (128 columns of one tile),
// wherever tiles begin and end, and a warp's sums pass from block to block through the L2, always in the same order.
// Nothing waits for a whole block. The including file says WARPS and TOKENS, the size of a tile.
#pragma once
#include "ptx.cuh"

// Which steps a block multiplies, and in which order. The last `waves` x blocks tiles go round robin, a whole tile at a
// time. The steps of the `shared_tiles` before them are one sequence, cut into a run for each block:
//
//   tile 0            tile 1            tile 2          A tile is finished by the block that has its last step. Where a
//   ├───────────┬─────┼───────┬─────────┼───┬───────    run ends inside a tile, the block does that piece first and hands
//   │  block 0  │  block 1    │  block 2    │  ...      its sums on: they are there long before they are wanted, and
//                                                       blocks wait for lower ones alone, which have started before.
//
// Where many blocks share a tile (`parts` each, evenly), one would be long at adding up: there all hand on, and the
// parts of the next tile finish a share of it each; `parts` blocks more, which have no steps, do so for the last tile.
//
// A block's order is a sequence of pieces: the one to hand on, what remains of its first tile, whole tiles. They are
// listed in shared memory: in registers the list cost the loop 30.
struct Piece {
    int unit, first_token, step, start, left;  // first step in the tile, first position, how many; none after the last
};

struct Schedule {
    u32 blocks;
    int per_tile, shared_tiles, token_tiles;

    DEVICE int first_of(u32 block) const { return shared_tiles * per_tile * block / blocks; }  // the plan: below 2^32
    DEVICE int block_of(u32 step) const { return ((step + 1) * blocks - 1) / (u32(shared_tiles) * per_tile); }
    DEVICE Piece piece(u32 block, int index, int waves) const {
        if (block >= blocks) return {};
        const int begin = first_of(block), length = first_of(block + 1) - begin, first = begin / per_tile;
        const int head = min((begin + length) % per_tile, length), head_at = begin + length - head;
        const int rest = min(per_tile - begin % per_tile, length - head), whole = (length - head - rest) / per_tile;
        if (head > 0 && index-- == 0) return of_tile(head_at / per_tile, head_at % per_tile, 0, head);
        if (rest > 0 && index-- == 0) return of_tile(first, begin % per_tile, head, rest);
        const int tile = index < whole ? first + 1 + index : shared_tiles + (index - whole) * blocks + block;
        const int start = head + rest + index * per_tile;
        return of_tile(tile, 0, start, index < whole + waves ? per_tile : 0);
    }
    DEVICE Piece of_tile(int tile, int step, int start, int left) const {
        return {tile / token_tiles, tile % token_tiles * TOKENS, step, start, left};
    }
};

using Sums = float[TOKENS / 2];

// a warp's sums in memory: [block][warp][TOKENS / 8][lane] float4; flags [block][warp][TOKENS / 8] behind them all
constexpr int OCTETS = TOKENS / 8;
DEVICE float4* sums_of(float4* partial, int block, int warp, int lane) {
    return partial + (static_cast<size_t>(block) * WARPS + warp) * (OCTETS * 32) + lane;
}
DEVICE u64* flag_of(float4* partial, int block, int warp) {
    return reinterpret_cast<u64*>(sums_of(partial, gridDim.x, 0, 0)) + (block * WARPS + warp) * OCTETS;
}

// flags: one, or one for every eight tokens where several warps take them over
DEVICE void hand_on(const Sums& acc, float4* partial, int warp, int lane, int flags) {
    float4* to = sums_of(partial, blockIdx.x, warp, lane);
#pragma unroll
    for (int i = 0; i < OCTETS; ++i) to[32 * i] = {acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]};
    __syncwarp();
    if (lane < flags) raise_flag(flag_of(partial, blockIdx.x, warp) + lane);
}

// the sums of eight tokens that `count` blocks from `first` on have handed on, added up in their order; eight loads at once
DEVICE float4 added_up(float4* partial, int first, int count, int warp, int octet, int lane) {
    float4 total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
        float4 more = load_fresh(sums_of(partial, first + i, warp, lane) + 32 * octet);
        total.x += more.x, total.y += more.y, total.z += more.z, total.w += more.w;
    }
    return total;
}

// acc += all that one block has handed on; loads one by one took 0.7 us each: 11 us at 128 tokens
DEVICE void take_over(Sums& acc, float4* partial, int block, int warp, int lane) {
    constexpr int AT_ONCE = OCTETS < 8 ? OCTETS : 8;
    const float4* from = sums_of(partial, block, warp, lane);
#pragma unroll
    for (int first = 0; first < OCTETS; first += AT_ONCE) {
        float4 more[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) more[i] = load_fresh(from + 32 * (first + i));
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            float* to = acc + 4 * (first + i);
            to[0] += more[i].x, to[1] += more[i].y, to[2] += more[i].z, to[3] += more[i].w;
        }
    }
}

DEVICE void await(float4* partial, int first, int count, int warp, int octet, int lane) {
    for (int i = lane; i < count; i += 32) await_flag(flag_of(partial, first + i, warp) + octet);
    __syncwarp();
}

DEVICE void lower(float4* partial, int first, int count, int warp, int octet, int lane) {  // for the next launch
    __syncwarp();
    for (int i = lane; i < count; i += 32) flag_of(partial, first + i, warp)[octet] = 0;
}
