// Eight activations of 16 bits to eight int8 codes, by a scale chosen for their token: numerics/affine.py, bit by bit.
//
//     scale = max|x| / 127.5 in float32, rounded to x's type; its epsilon where that is 0
//     code  = the nearest integer to x / scale, ties to even, within -128 .. 127
//
// x / scale is rounded correctly by one Newton step from x rn(1 / scale): a quotient of 11-bit numbers stays away from
// the midpoints of float32 numbers (Markstein, IBM J. R&D 34, 1990). A tiny scale is lifted first, so that its reciprocal
// is finite. Adding 1.5 x 2^23 to a value leaves its nearest integer in the low byte.
// KIND says the type of x: 1 float16, 2 bfloat16. A chunk is 16 bytes: 8 values, the first in the lowest bits.
#pragma once
#include "int8_epilogue.cuh"

// epsilon of x's type
constexpr float SCALE_OF_ZEROS = KIND == 1 ? 0.0009765625f : 0.0078125f;
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

struct Grid { float scale, lift, lifted, inverse; };

__device__ __forceinline__ Grid grid_of(unsigned largest_bits) {
    float scale = __fdiv_rn(__uint_as_float(largest_bits), 127.5f);
    scale = widened(KIND == 1 ? half_bits(scale) : bfloat_bits(scale));
    if (scale == 0.0f) scale = SCALE_OF_ZEROS;
    float lift = scale < 5.421010862427522e-20f ? 18446744073709551616.0f : 1.0f;  // 2^-64, 2^64
    return {scale, lift, scale * lift, __fdiv_rn(1.0f, scale * lift)};
}

__device__ __forceinline__ unsigned code_of(float y, Grid g) {
    y *= g.lift;
    float first = y * g.inverse, quotient = fmaf(fmaf(-first, g.lifted, y), g.inverse, first);
    return __float_as_uint(fminf(fmaxf(quotient, -128.0f), 127.0f) + 12582912.0f) & 0xffu;
}

__device__ __forceinline__ unsigned four_codes(unsigned a, unsigned b, Grid g) {
    return code_of(low(a), g) | code_of(high(a), g) << 8 | code_of(low(b), g) << 16 | code_of(high(b), g) << 24;
}

__device__ __forceinline__ uint2 codes_of(uint4 chunk, Grid g) {
    return make_uint2(four_codes(chunk.x, chunk.y, g), four_codes(chunk.z, chunk.w, g));
}
