// x in shared memory, as wna16_mma.cu wants it: the slice of K that the block needs, whole, with its sum over each group.
#pragma once
#include "wna16_ring.cuh"

DEVICE float sum_of_eight(uint4 v) {
    float total = 0.f;
    for (u32 word : {v.x, v.y, v.z, v.w}) total += from_x(static_cast<u16>(word)) + from_x(static_cast<u16>(word >> 16));
    return total;
}

DEVICE uint4 eight_of_x(const u16* row, const int* order, int k, int K, bool vectors) {
    if (vectors) return k < K ? *reinterpret_cast<const uint4*>(row + k) : make_uint4(0, 0, 0, 0);
    u32 single[8];
    for (int i = 0; i < 8; ++i) {
        int from = k + i < K ? (order ? order[k + i] : k + i) : -1;
        single[i] = from < 0 ? 0 : row[from];
    }
    return make_uint4(single[0] | single[1] << 16, single[2] | single[3] << 16, single[4] | single[5] << 16,
                      single[6] | single[7] << 16);
}

// where in the slice a thread loads: 16 bytes of each chunk of a token; found without a division, for the loads wait for it
struct Chunk {
    int token, first;  // column

    DEVICE int column() const { return first + 8 * threadIdx.x; }
    DEVICE void next(int columns) {
        first += 8 * THREADS;
        if (first >= columns) first = 0, ++token;
    }
};

// `tokens` rows of x, columns of the block's slice, to shared memory [token][pitch], past K zeros; and the sum of each
// group, [group][TOKENS] floats. order: x[:, order[k]]. BATCH loads are in flight at once: one by one, each token took
// 0.4 us more (H200, K = 4096).
DEVICE void load_x(const u16* x, const int* order, int tokens, int K, const Work& work, int pitch, float* x_sums) {
    constexpr int BATCH = 4;
    u16* xs = reinterpret_cast<u16*>(x_of_block());
    const int columns = work.length() * RECORD_K, start = work.begin * RECORD_K;
    const bool vectors = order == nullptr && K % 8 == 0 && (reinterpret_cast<size_t>(x) & 15) == 0;
    for (Chunk load = {}, store = {}; store.token < tokens;) {
        uint4 v[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i, load.next(columns)) {
            v[i] = make_uint4(0, 0, 0, 0);
            if (load.token < tokens && load.column() < columns)
                v[i] = eight_of_x(x + static_cast<size_t>(load.token) * K, order, start + load.column(), K, vectors);
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i, store.next(columns)) {
            if (store.token >= tokens) continue;
            const int token = store.token, column = store.column();
            if (column < columns) *reinterpret_cast<uint4*>(xs + token * pitch + column) = v[i];
            if constexpr (HAS_OFFSET) {
                float total = sum_of_eight(v[i]);
#pragma unroll
                for (int other = 1; other < GROUP / 8; other *= 2) total += __shfl_xor_sync(~0u, total, other);
                if (column < columns && column % GROUP == 0) x_sums[column / GROUP * TOKENS + token] = total;
            }
        }
    }
}
