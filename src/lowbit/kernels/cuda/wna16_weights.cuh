// Operand A of wgmma out of a record: what a warp decodes stays in its registers.
//
// A code becomes (code - zero) scale, rounded to x's type, and the sums run over all of K. fp16: the scale is taken
// 2^-FAST_BITS smaller (no overflow), y's factor larger. Or, SCALED_SUMS (the including file says which), codes are
// multiplied as they are and a group's sums are scaled when it ends: fewer instructions where tokens are few.
#pragma once
#include "wgmma_half.cuh"
#include "wna16_record.cuh"

// what stands beside the codes of rows g and g + 8 in one group, each as a pair of equal halves
struct GroupPairs {
    u32 offset[2], scale[2], rest[2];  // rest: of a scale that one bf16 does not hold; tables only
    Pair of_sums;                      // SCALED_SUMS: the scales
};

DEVICE u32 offset_pair(u32 zero) {
    if constexpr (FORMAT == 8 && XTYPE) return to_x(static_cast<float>(static_cast<int>(zero) - 128)) * 0x00010001u;
    return MAGIC | zero * 0x00010001u;
}

DEVICE GroupPairs load_group(const u8* record, int group, int g) {
    GroupPairs pairs;
    u32 zeros[2] = {1u << (FAST_BITS - 1), 1u << (FAST_BITS - 1)};
    if constexpr (ASYM) {
        u32 both = *reinterpret_cast<const u16*>(record + CODE_BYTES + SCALE_BYTES + group * 16 + 2 * g);
        zeros[0] = both & 0xFF, zeros[1] = both >> 8;
    }
    Pair scales = load_scales(record, group, g);
    pairs.of_sums = scales;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        if constexpr (HAS_OFFSET) pairs.offset[row] = offset_pair(zeros[row]);
        if constexpr (SCALED_SUMS) continue;
        float scale = row ? scales.high : scales.low;
        if constexpr (!XTYPE && !IS_LUT) scale *= 1.f / (1 << FAST_BITS);
        u16 rounded = to_x(scale);
        pairs.scale[row] = rounded * 0x00010001u;
        if constexpr (IS_LUT && XTYPE) pairs.rest[row] = to_x(scale - from_x(rounded)) * 0x00010001u;
    }
    return pairs;
}

// operand A of step j; table: one byte -> two levels, a copy for each lane; column: 4 times the lane
DEVICE void weights_of(u32 (&a)[4], const u32 (&words)[HALF_WORDS], int j, const GroupPairs& pairs, u32 magic,
                       const u8* table, u32 column) {
    if constexpr (IS_LUT) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 at = masked<0x7F80u>(i == 0 ? words[j] << 7 : words[j] >> (8 * i - 7), column);
            a[i] = *reinterpret_cast<const u32*>(table + at);
        }
    } else {
        decode(a, words, j, magic, 0);
        if constexpr (HAS_OFFSET)
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = sub2(a[i], pairs.offset[i % 2]);
    }
    if constexpr (SCALED_SUMS) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (IS_LUT && XTYPE) a[i] = fma2(a[i], pairs.scale[i % 2], mul2(a[i], pairs.rest[i % 2]));
        else a[i] = mul2(a[i], pairs.scale[i % 2]);
    }
}
