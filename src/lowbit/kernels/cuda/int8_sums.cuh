// How a warpgroup's int32 sums leave the prefill product (int8_wgmma.cu): scaled, rounded, 16 bytes a lane (sm_90a).
//
//     Lane 4g + t has, of each 8 columns, two neighbours of row g and two of row g + 8 (wgmma_s8.cuh). The four lanes of a
//     row trade words, so that each has 16 bytes in a row and the four 64:
//
//     2-byte outputs, 4 groups of 8 columns      t0: 0 1 2 3      a word is two neighbours;
//       before: lane t has word t of each   ->   t1: 0 1 2 3      after: lane t has all of group t
//     4-byte outputs, 2 groups                   after: even lanes have the first group, 4 columns each, odd the second
//
// That is a chunk. Its scales are the tile's columns, in shared memory, and this lane's two rows, in registers.
#pragma once
#include "int8_epilogue.cuh"

constexpr int SUMS = TILE_N / 2;                      // registers a thread
constexpr int SIZE = KIND == 0 || KIND == 3 ? 4 : 2;  // bytes of an output
constexpr int GROUPS = SIZE == 2 ? 4 : 2, CHUNKS = TILE_N / 8 / GROUPS;

// What a warpgroup needs to write its 64 rows: scales of this lane's two, and the tile's columns in shared memory.
struct Target {
    const float* columns;  // scales, then biases, then sums of the codes
    Row rows[2];
    int m0, n0;
    bool plain;  // neither bias nor zero-point: of the columns, scales alone are there

    __device__ __forceinline__ Column column(int n) const {
        if (plain) return {columns[n], 0.0f, 0};
        return {columns[n], columns[TILE_N + n], ((const int*)columns)[2 * TILE_N + n]};
    }
};

// The first of this lane's two rows; the other is 8 below.
__device__ __forceinline__ int row_of(int m0) { return m0 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }

// Two neighbours of a row as they are stored: one word, or `first` and `second`.
struct Pair { unsigned first, second; };
template <bool PLAIN> __device__ __forceinline__ Pair made(int first, int second, Row r, Column left, Column right) {
    if (KIND == 0) return {(unsigned)first, (unsigned)second};
    float a = PLAIN ? (float)first * (r.scale * left.scale) : scaled(first, r, left);
    float b = PLAIN ? (float)second * (r.scale * right.scale) : scaled(second, r, right);
    if (SIZE == 2) return {pair(a, b), 0};
    return {__float_as_uint(a), __float_as_uint(b)};
}

// Lanes that differ in the bit `lanes` trade a word: the lower one keeps mine, the upper one other.
__device__ __forceinline__ void trade(unsigned& mine, unsigned& other, int lanes) {
    bool upper = threadIdx.x & lanes;
    unsigned got = __shfl_xor_sync(0xffffffffu, upper ? mine : other, lanes);
    if (upper) mine = got;
    else other = got;
}

// Write a tile, chunk after chunk.
template <bool PLAIN>
__device__ __forceinline__ void put(const int (&d)[SUMS], const Target& to, void* out, int M, int N) {
    int t = threadIdx.x % 4;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        unsigned w[2][4];
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
            int j = chunk * GROUPS + i, n = j * 8 + t * 2;
            Column left{}, right{};
            if (KIND != 0 && PLAIN) {
                float2 scales = *(const float2*)&to.columns[n];
                left.scale = scales.x, right.scale = scales.y;
            } else if (KIND != 0) left = to.column(n), right = to.column(n + 1);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int at = j * 4 + half * 2;
                Pair p = made<PLAIN>(d[at], d[at + 1], to.rows[half], left, right);
                w[half][i] = p.first;
                if (SIZE == 4) w[half][i + 2] = p.second;
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            unsigned(&v)[4] = w[half];
            trade(v[0], v[1], 1);
            trade(v[2], v[3], 1);
            if (SIZE == 2) {
                trade(v[0], v[2], 2);
                trade(v[1], v[3], 2);
            }
            uint4 words = SIZE == 2 ? make_uint4(v[0], v[1], v[2], v[3]) : make_uint4(v[0], v[2], v[1], v[3]);
            int m = row_of(to.m0) + half * 8;
            int n = to.n0 + chunk * GROUPS * 8 + (SIZE == 2 ? t * 8 : t % 2 * 8 + t / 2 * 4);
            if (m < M && n < N) *(uint4*)((unsigned char*)out + ((size_t)m * N + n) * SIZE) = words;
        }
    }
}

// Write a tile one output after the other: rows of y are no multiple of 16 bytes.
__device__ __forceinline__ void put_single(const int (&d)[SUMS], const Target& to, const Epilogue& e, int M, int N) {
#pragma unroll
    for (int i = 0; i < SUMS; i++) {
        int n = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2, half = i / 2 % 2, m = row_of(to.m0) + half * 8;
        if (m < M && to.n0 + n < N) store(e, d[i], to.rows[half], to.column(n), (size_t)m * N + to.n0 + n);
    }
}
