// The fast layout from the canonical one: one thread writes one 32-bit word of a record (wna16_record.cuh draws it).
//
// codes   packed: int32 rows of dense BITS-bit codes, q + 2^(BITS-1), element 0 in the low bits (numerics/pack.py)
//         nibbles: bytes over the flattened weight, first code in the high nibble (numerics/codebook.py), BITS = 16
// scales  fp16 [N, C], zeros uint8 [N, C]: already normalized and spread, C = 128/GROUP per record
// order   int32 [K] or null: column k of the result is column order[k] of the codes (act-order)
//
// Reads of one warp fall in 16 rows x 32 bytes and stay in the L1; the writes are coalesced.
#define XTYPE 1
#include "wna16_record.cuh"

// the code of row n, column k as the record stores it; past the edges, zero
DEVICE u32 code_at(const u8* codes, const int* order, int n, int k, int N, int K, int words) {
    constexpr u32 MIDDLE = IS_LUT ? 0 : 1u << (FAST_BITS - 1);
    if (n >= N || k >= K) return MIDDLE;
    if (order) k = order[k];
    if constexpr (BITS == 16) {
        size_t at = static_cast<size_t>(n) * K + k;
        u32 byte = codes[at / 2];
        return at % 2 ? byte & 15 : byte >> 4;
    } else {
        const u32* row = reinterpret_cast<const u32*>(codes) + static_cast<size_t>(n) * words;
        int bit = k * BITS, word = bit / 32, shift = bit % 32;
        u32 value = row[word] >> shift;
        if (32 % BITS && shift + BITS > 32) value |= row[word + 1] << (32 - shift);
        return (value & ((1u << BITS) - 1)) + MIDDLE - (1u << (BITS - 1));
    }
}

// word `at` of the code part of a record: which lane, which step, which operands
DEVICE u32 code_word(const u8* codes, const int* order, int at, int row, int column, int N, int K, int words) {
    int vector = at % VECTOR, lane = at / VECTOR % 32, part = at / (32 * VECTOR) % PARTS, half = at / (32 * HALF_WORDS);
    int index = part * VECTOR + vector, g = lane / 4, c = lane % 4;
    u32 word = 0;
#pragma unroll
    for (int e = 0; e < 32 / FAST_BITS; ++e) {
        int p, i, j, shift;  // first or second of a pair; operand a_i; step
        if constexpr (FORMAT == 8) p = e / 2, i = 2 * (index % 2) + e % 2, j = index / 2, shift = 8 * (e % 2) + 16 * p;
        else if constexpr (FORMAT == 2) p = e / 8, i = e % 4, j = 2 * index + e / 4 % 2, shift = 2 * (e % 8) + 16 * p;
        else if constexpr (IS_LUT) p = e % 2, i = e / 2, j = index, shift = 4 * e;
        else p = e / 4, i = e % 4, j = index, shift = 4 * i + 16 * p;
        int k = column + 64 * half + 16 * j + 8 * (i / 2) + 2 * c + p;
        word |= code_at(codes, order, row + g + 8 * (i % 2), k, N, K, words) << shift;
    }
    return word;
}

extern "C" __global__ void wna16_layout(const u8* codes, const u16* scales, const u8* zeros, const int* order,
                                        u32* records, int N, int K, int words) {
    constexpr int RECORD_WORDS = RECORD_BYTES / 4, CODE_WORDS = CODE_BYTES / 4, SCALE_WORDS = SCALE_BYTES / 4;
    const int per_row = (K + RECORD_K - 1) / RECORD_K, columns = per_row * GROUPS;
    const int strip = blockIdx.y, row = strip * STRIP;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < per_row * RECORD_WORDS; i += gridDim.x * blockDim.x) {
        int record = i / RECORD_WORDS, at = i % RECORD_WORDS;
        u32 word = 0;
        if (at < CODE_WORDS) {
            word = code_word(codes, order, at, row, record * RECORD_K, N, K, words);
        } else if (at < CODE_WORDS + SCALE_WORDS) {
            int g = (at - CODE_WORDS) % 8, group = (at - CODE_WORDS) / 8;
            const u16* from = scales + record * GROUPS + group;
            u32 low = row + g < N ? from[static_cast<size_t>(row + g) * columns] : 0;
            u32 high = row + g + 8 < N ? from[static_cast<size_t>(row + g + 8) * columns] : 0;
            word = low | high << 16;
        } else {  // two lanes' pairs of bytes
            int pair = 2 * (at - CODE_WORDS - SCALE_WORDS);
            for (int e = 0; e < 4; ++e) {
                int g = (pair + e / 2) % 8, group = (pair + e / 2) / 8, n = row + g + 8 * (e % 2);
                u32 zero = n < N ? zeros[static_cast<size_t>(n) * columns + record * GROUPS + group] : 0;
                word |= zero << (8 * e);
            }
        }
        records[record_index(strip, record, per_row) * RECORD_WORDS + at] = word;
    }
}
