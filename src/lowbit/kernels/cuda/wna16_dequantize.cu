// The weight [N, K] in fp16 or bf16 from its records: bound by what it writes. Computed in float32, rounded once.
//
// A warp decodes a record (16 rows x 128 columns) as its lanes hold it, puts the values in a tile of shared memory, and
// writes rows of 256 bytes, 16 bytes a lane.
#include "wna16_record.cuh"

constexpr int WARPS = 8, PITCH = RECORD_K + 8;  // halves; rows 16 bytes apart in bank

__shared__ __align__(16) u16 tiles[WARPS][STRIP * PITCH];
__shared__ float table[16][32];  // levels, a copy for each lane

// the code of element p of operand a_i of step j
DEVICE u32 code_of(const u32 (&words)[HALF_WORDS], int j, int i, int p) {
    if constexpr (IS_LUT) return words[j] >> (8 * i + 4 * p) & 15;
    else if constexpr (FORMAT == 4) return words[j] >> (4 * i + 16 * p) & 15;
    else if constexpr (FORMAT == 2) return words[j / 2] >> (2 * (4 * (j % 2) + i) + 16 * p) & 3;
    else return words[2 * j + i / 2] >> (8 * (i % 2) + 16 * p) & 255;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
wna16_dequantize(const u8* records, const float* levels, const float* factor, u16* w, int N, int K) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
    if constexpr (IS_LUT) {
        for (int i = threadIdx.x; i < 512; i += 32 * WARPS) table[i / 32][i % 32] = levels[i / 32];
        __syncthreads();
    }
    const int per_strip = (K + RECORD_K - 1) / RECORD_K, strips = (N + STRIP - 1) / STRIP;
    const bool vectors = K % 8 == 0;
    const float unit_scale = *factor;
    u16* tile = tiles[warp];
    for (int at = blockIdx.x * WARPS + warp; at < strips * per_strip; at += gridDim.x * WARPS) {
        const u8* record = records + record_index(at / per_strip, at % per_strip, per_strip) * RECORD_BYTES;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 words[HALF_WORDS];
            load_codes(words, record, half, lane);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int group = (4 * half + j) / GROUP_STEPS;
                Pair scale = load_scales(record, group, g);
                float zero[2] = {1 << (FAST_BITS - 1), 1 << (FAST_BITS - 1)};
                if constexpr (ASYM) {
                    u32 both = *reinterpret_cast<const u16*>(record + CODE_BYTES + SCALE_BYTES + group * 16 + 2 * g);
                    zero[0] = both & 0xFF, zero[1] = both >> 8;
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    u32 pair = 0;
#pragma unroll
                    for (int p = 0; p < 2; ++p) {
                        u32 u = code_of(words, j, i, p);
                        float value = IS_LUT ? table[u][lane] : static_cast<float>(u) - zero[i % 2];
                        pair |= static_cast<u32>(to_x(value * ((i % 2 ? scale.high : scale.low) * unit_scale))) << (16 * p);
                    }
                    int row = g + 8 * (i % 2), column = 64 * half + 16 * j + 8 * (i / 2) + 2 * (lane % 4);
                    *reinterpret_cast<u32*>(tile + row * PITCH + column) = pair;
                }
            }
        }
        __syncwarp();
        const int n0 = at / per_strip * STRIP, k0 = at % per_strip * RECORD_K;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            int row = 2 * i + lane / 16, column = lane % 16 * 8, n = n0 + row, k = k0 + column;
            uint4 v = *reinterpret_cast<const uint4*>(tile + row * PITCH + column);
            if (n >= N || k >= K) continue;
            u16* to = w + static_cast<size_t>(n) * K + k;
            if (vectors) *reinterpret_cast<uint4*>(to) = v;
            else
                for (int e = 0; e < 8 && k + e < K; ++e) to[e] = tile[row * PITCH + column + e];
        }
        __syncwarp();
    }
}
