// Eight activations of 16 bits to eight int8 codes, by a scale chosen for their token: numerics/affine.py, bit by bit.
//
//     scale = max|x| / 127.5 in float32, rounded to x's type; its epsilon where that is 0
//     code  = the nearest integer to x / scale, ties to even, within -128 .. 127
//
// What decides is whether x / scale is a tie, n + 1/2: two numbers of 11 bits (8 in bfloat16) whose quotient is none stay
// 2^-12 away from all. So x rn(1 / scale) + 1536, which is a multiple of 2^-13 and errs by less than 2^-13, tells ties from
// others, and adding 1.5 x 2^23 - 1536 leaves the nearest integer in the low byte (all pairs tried). Nothing is below -128
// unless the scale is subnormal; a tiny scale is lifted first, so that its reciprocal is finite.
// KIND says the type of x: 1 float16, 2 bfloat16. A chunk is 16 bytes: 8 values, the first in the lowest bits.
#pragma once
#include "int8_epilogue.cuh"

// epsilon of x's type
constexpr float SCALE_OF_ZEROS = KIND == 1 ? 0.0009765625f : 0.0078125f;
// the least scale that has all bits of its type, and whose reciprocal is finite
constexpr float LEAST_NORMAL = KIND == 1 ? 6.103515625e-05f : 5.421010862427522e-20f;
constexpr int CHUNK = 8;

__device__ __forceinline__ float widened(unsigned short bits) { return KIND == 1 ? half_value(bits) : bfloat_value(bits); }
__device__ __forceinline__ float low(unsigned two) { return widened((unsigned short)two); }
__device__ __forceinline__ float high(unsigned two) { return widened((unsigned short)(two >> 16)); }

// The larger of a and |v|, for both halves.
__device__ __forceinline__ unsigned larger(unsigned a, unsigned v) {
    return KIND == 1 ? larger_halves(a, v) : larger_bfloats(a, v);
}

// The largest magnitude of a chunk as the bits of a float32: comparing those as integers compares the magnitudes.
__device__ __forceinline__ unsigned largest(uint4 chunk) {
    unsigned two = larger(larger(larger(larger(0, chunk.x), chunk.y), chunk.z), chunk.w);
    return __float_as_uint(fmaxf(low(two), high(two)));
}

struct Grid { float scale, lift, inverse; bool is_tiny; };

__device__ __forceinline__ Grid grid_of(unsigned largest_bits) {
    float scale = __fdiv_rn(__uint_as_float(largest_bits), 127.5f);
    scale = widened(KIND == 1 ? half_bits(scale) : bfloat_bits(scale));
    if (scale == 0.0f) scale = SCALE_OF_ZEROS;
    float lift = scale < 5.421010862427522e-20f ? 18446744073709551616.0f : 1.0f;  // 2^-64, 2^64
    return {scale, lift, __fdiv_rn(1.0f, scale * lift), scale < LEAST_NORMAL};
}

// In the low byte of the result.
template <bool TINY> __device__ __forceinline__ unsigned code_of(float y, Grid g) {
    float lifted = fminf(fmaf(TINY ? y * g.lift : y, g.inverse, 1536.0f), 1536.0f + 127.0f);
    if (TINY) lifted = fmaxf(lifted, 1536.0f - 128.0f);
    return __float_as_uint(lifted + (12582912.0f - 1536.0f));
}

template <bool TINY> __device__ __forceinline__ unsigned four_codes(unsigned a, unsigned b, Grid g) {
    unsigned first = __byte_perm(code_of<TINY>(low(a), g), code_of<TINY>(high(a), g), 0x0040);
    unsigned second = __byte_perm(code_of<TINY>(low(b), g), code_of<TINY>(high(b), g), 0x0040);
    return __byte_perm(first, second, 0x5410);
}

__device__ __forceinline__ uint2 codes_of(uint4 chunk, Grid g) {
    if (g.is_tiny) return make_uint2(four_codes<true>(chunk.x, chunk.y, g), four_codes<true>(chunk.z, chunk.w, g));
    return make_uint2(four_codes<false>(chunk.x, chunk.y, g), four_codes<false>(chunk.z, chunk.w, g));
}
