// The fast layout of a weight beside 16-bit activations, and how a lane turns its part of it into tensor-core operands.
//
// A weight [N, K] is cut in strips of 16 rows, a strip in records of 16 rows x 128 columns. The records of 16 strips that
// hold the same columns lie together (a unit: 256 rows), so a block reads its part of K as one stream of 17 KB pieces.
// A record is what one warp multiplies at a time:
//
//   codes   [2 halves of 64 columns][PARTS][32 lanes][VECTOR words]      FAST_BITS/4 KiB: 512, 1024 or 2048 bytes
//   scales  [128/GROUP][8 g] (row g, row g + 8)                          fp16 pairs
//   zeros   [128/GROUP][8 g] (row g, row g + 8)                          bytes, only where ASYM
//
// A lane l = 4 g + c owns, of the 16 x 16 tile of step j, what mma.m16n8k16 wants of it as operand A:
//   a0 = (g, k) (g, k+1)   a1 = (g+8, ..)   a2 = (g, k+8) (g, k+9)   a3 = (g+8, ..)        k = 64 half + 16 j + 2 c
// and the bits of a code stand where one shift and one mask make a pair of halves of them:
//   4 bits  word j of 4       a_i in bits 4i..4i+3 (first of the pair) and 16+4i.. (second)
//   2 bits  word j/2 of 2     a_i in bits 2s..2s+1 and 16+2s.., s = 4 (j mod 2) + i
//   8 bits  words 2j, 2j+1    a0 in bytes 0, 2 and a1 in bytes 1, 3 of the first; a2, a3 so of the second
//   lut     word j of 4       byte i holds the two codes of a_i: first in the low nibble
//
// Integers are made by a magic number: 0x6400 | u is the half 1024 + u, 0x4300 | u (u < 128) is the bf16 128 + u.
#pragma once
#include "ptx.cuh"

// FORMAT: 2, 4, 8 integers of so many bits, stored as q + 2^(FORMAT-1); 16: 4-bit codes of a 16-level table
#define IS_LUT (FORMAT == 16)
#define FAST_BITS (IS_LUT ? 4 : FORMAT)

constexpr int STRIP = 16, RECORD_K = 128, UNIT_STRIPS = 16;
constexpr int GROUPS = RECORD_K / GROUP;             // scales per row of a record
constexpr int GROUP_STEPS = GROUP / 16;              // mma steps under one scale
constexpr int HALF_WORDS = FAST_BITS;                // words of a lane per 64 columns
constexpr int VECTOR = HALF_WORDS < 4 ? HALF_WORDS : 4;
constexpr int PARTS = HALF_WORDS / VECTOR;
constexpr int CODE_BYTES = STRIP * RECORD_K * FAST_BITS / 8;
constexpr int SCALE_BYTES = GROUPS * STRIP * 2;
constexpr int ZERO_BYTES = ASYM ? GROUPS * STRIP : 0;
constexpr int RECORD_BYTES = CODE_BYTES + SCALE_BYTES + ZERO_BYTES;
constexpr u32 MAGIC = XTYPE ? 0x43004300u : 0x64006400u;
// one byte -> two levels, a copy for each lane's bank; at a fixed shared address, so that a row's is made by one OR
constexpr int TABLE_WORDS = IS_LUT ? 256 * 32 : 0;
constexpr u32 TABLE_ADDRESS = 0x8000;

// where the record of a strip lies among all
DEVICE size_t record_index(int strip, int record, int per_strip) {
    return (static_cast<size_t>(strip / UNIT_STRIPS) * per_strip + record) * UNIT_STRIPS + strip % UNIT_STRIPS;
}
DEVICE int strips_of(int rows) { return (rows + STRIP * UNIT_STRIPS - 1) / (STRIP * UNIT_STRIPS) * UNIT_STRIPS; }

// the codes of a lane for 64 columns
DEVICE void load_codes(u32 (&words)[HALF_WORDS], const u8* record, int half, int lane) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const u8* from = record + ((half * PARTS + part) * 32 + lane) * VECTOR * 4;
        if constexpr (VECTOR == 4) {
            uint4 v = *reinterpret_cast<const uint4*>(from);
            words[4 * part] = v.x, words[4 * part + 1] = v.y, words[4 * part + 2] = v.z, words[4 * part + 3] = v.w;
        } else {
            uint2 v = *reinterpret_cast<const uint2*>(from);
            words[0] = v.x, words[1] = v.y;
        }
    }
}

// What a decoded operand exceeds the code by; with the zero-point it is taken off afterwards, times the sum of x:
//   sum (u + MAGIC_VALUE) x - (zero + MAGIC_VALUE) sum x = sum (u - zero) x
constexpr float MAGIC_VALUE = FORMAT == 8 && XTYPE ? -128.f : XTYPE ? 128.f : 1024.f;
constexpr bool HAS_OFFSET = !IS_LUT && (ASYM || !(FORMAT == 8 && XTYPE));

struct Pair {
    float low, high;  // rows g and g + 8
};

DEVICE Pair load_offsets(const u8* record, int group, int g) {
    if constexpr (ASYM) {
        u32 pair = *reinterpret_cast<const u16*>(record + CODE_BYTES + SCALE_BYTES + group * 16 + 2 * g);
        return {MAGIC_VALUE + static_cast<float>(pair & 0xFF), MAGIC_VALUE + static_cast<float>(pair >> 8)};
    }
    constexpr float middle = MAGIC_VALUE + (1 << (FAST_BITS - 1));
    return {middle, middle};
}

DEVICE Pair load_scales(const u8* record, int group, int g) {
    u32 pair = *reinterpret_cast<const u32*>(record + CODE_BYTES + group * 32 + 4 * g);
    return {from_f16(static_cast<u16>(pair)), from_f16(static_cast<u16>(pair >> 16))};
}

// operand A of step j (0..3) of a half; magic: MAGIC in a register; table: address of the lane's column, LUT only
DEVICE void decode(u32 (&a)[4], const u32 (&words)[HALF_WORDS], int j, u32 magic, u32 table) {
    if constexpr (IS_LUT) {
        u32 w = words[j];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            a[i] = load_shared(masked<0x7F80u>(i == 0 ? w << 7 : w >> (8 * i - 7), table));
        }
    } else if constexpr (FORMAT == 4 || FORMAT == 2) {
        u32 w = FORMAT == 4 ? words[j] : words[j / 2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int shift = FORMAT == 4 ? 4 * i : 2 * (4 * (j % 2) + i);
            a[i] = masked<(FORMAT == 4 ? 0x000F000Fu : 0x00030003u)>(w >> shift, magic);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 w = words[2 * j + i / 2] >> (8 * (i % 2));
            if constexpr (XTYPE)  // bf16 holds 7 bits after the point: u - 128 = (128 + low bits) - (128 or 256)
                a[i] = sub2(masked<0x007F007Fu>(w, magic), masked_not<0x00800080u>(w, magic));
            else
                a[i] = masked<0x00FF00FFu>(w, magic);
        }
    }
}
