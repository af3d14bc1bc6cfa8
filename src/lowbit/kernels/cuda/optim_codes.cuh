// Codes of states of 8 or 4 bits: read from tables, and found again without a search (optim_blockwise.cu).
//
//    decode   level = levels[code] * absmax         256 floats in shared memory, REPLICAS copies: copy r serves the
//                                                   lanes l = r mod REPLICAS, so 32 copies have no bank conflicts
//    absmax   maximum over the warp: redux.sync on the bits, which order as unsigned where floats are not negative
//    encode   the upper 16 bits of x choose a bucket, each of which holds at most one boundary between levels:
//             code = below[bucket] + (x > bounds[below[bucket]]), the same code as torch.bucketize
//
//    shared memory   below: 48 KiB, a byte for each upper half of a float in [-1, 1]
//                      0x0000 ... 0x3f80   signed map, x >= 0        0x4000 ... 0x7f80   unsigned map
//                      0x8000 ... 0xbf80   signed map, x < 0
//                    levels, bounds of the signed map, then of the unsigned one: float [256][REPLICAS] each
//
// Compile-time: BITS 8 or 4; REPLICAS 1 to 32.
#pragma once

#include "optim_rule.cuh"

extern __shared__ u8 shared[];
#define ROW_SHIFT (REPLICAS == 32 ? 7 : REPLICAS == 16 ? 6 : REPLICAS == 8 ? 5 : REPLICAS == 4 ? 4 : REPLICAS == 2 ? 3 : 2)
#define LEVELS(state) ((float*)(shared + BELOW_BYTES) + 512 * REPLICAS * (state))
#define BOUNDS(state) (LEVELS(state) + 256 * REPLICAS)

// A float of table `floats` in this lane's copy; at: code * REPLICAS * 4, own: the copy's place in a row, both in bytes.
__device__ __forceinline__ float look_up(const float* floats, u32 at, u32 own) {
    return *(const float*)((const u8*)floats + (at | own));
}

#if BITS == 8
typedef uint2 Codes;       // of a lane's 8 elements
#define WORD(codes, i) ((i) < 4 ? (codes).x : (codes).y)
#define POSITION(i) (8 * ((i) % 4))
#else
typedef u32 Codes;
#define WORD(codes, i) (codes)
#define POSITION(i) (8 * ((i) / 2) + 4 * (1 - (i) % 2))
#endif

// Code i of a lane, times the bytes of a row.
__device__ __forceinline__ u32 row_of(Codes codes, int i) {
    const int shift = POSITION(i) - ROW_SHIFT;
    u32 word = WORD(codes, i);
    return (shift >= 0 ? word >> (shift & 31) : word << (-shift & 31)) & (((1u << BITS) - 1) << ROW_SHIFT);
}

// How many boundaries of the map lie below the bucket of x; x's code is this, or one more if x > its boundary.
template <int STATE>       // 0: signed map, 1: unsigned
__device__ __forceinline__ u32 bucket(float x) {
    return shared[(__float_as_uint(x) >> 16) + 16384 * STATE];
}

template <int STATE>
__device__ __forceinline__ u32 encode(float x, u32 own) {
    u32 index = bucket<STATE>(x);
    return index + (x > look_up(BOUNDS(STATE), index << ROW_SHIFT, own));
}

// 1 / absmax; 0 where that would overflow, so that a block of nothing but zeros and denormals becomes zeros.
__device__ __forceinline__ float inverse_of(float absmax) { return absmax >= 1.2e-38f ? 1.f / absmax : 0.f; }

// Codes of 8 elements. A block whose absmax is not finite gets codes 0, whose levels its absmax makes NaN or infinite
// again.
template <int STATE>
__device__ __forceinline__ Codes encode_row(const float* x, float absmax, u32 own) {
    Codes codes{};
    if (!(absmax <= 3.4e38f)) return codes;
    float scale = inverse_of(absmax);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float y = x[i] * scale;
        u32 index = bucket<STATE>(y);
        float bound = look_up(BOUNDS(STATE), index << ROW_SHIFT, own);
        u32& word = WORD(codes, i);
        word += index << POSITION(i);
        asm("{.reg .pred above; setp.gt.f32 above, %1, %2; @above add.u32 %0, %0, %3;}"  // one instruction less than +=
            : "+r"(word) : "f"(y), "f"(bound), "r"(1u << POSITION(i)));
    }
    return codes;
}

__device__ __forceinline__ Codes load_codes(const void* state, u32 at) {
#if BITS == 8
    return load8((const u8*)state + (unsigned long long)at * 8);
#else
    return __float_as_uint(load4((const u8*)state + (unsigned long long)at * 4));
#endif
}

__device__ __forceinline__ void store_codes(void* state, u32 at, Codes codes) {
#if BITS == 8
    store8((u8*)state + (unsigned long long)at * 8, codes);
#else
    store4((u8*)state + (unsigned long long)at * 4, __uint_as_float(codes));
#endif
}

// The maximum over the lanes of a block; x >= 0, or NaN, whose bits are larger than any number's.
__device__ __forceinline__ float block_max(float x) {
#if __CUDA_ARCH__ >= 800 && BITS == 8
    return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(x)));
#else
    u32 bits = __float_as_uint(x);
    for (int step = LANES / 2; step > 0; step /= 2) bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, step));
    return __uint_as_float(bits);
#endif
}

// max(a, |x|), NaN if either is.
__device__ __forceinline__ float larger(float a, float x) {
#if __CUDA_ARCH__ >= 800
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(fabsf(x)));
    return result;
#else
    return __uint_as_float(max(__float_as_uint(a), __float_as_uint(x) & 0x7fffffffu));
#endif
}

// The warp's largest value, which no lane's half matters to.
__device__ __forceinline__ float warp_max(float x) {
    u32 bits = __float_as_uint(x);
    for (int step = 16; step > 0; step /= 2) bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, step));
    return bits <= __float_as_uint(3.4e38f) ? __uint_as_float(bits) : __int_as_float(0x7fffffff);
}

// Where the absmax of a lane's block lies.
__device__ __forceinline__ float* absmax_of(float* absmax, u32 block, int lane) {
    return absmax + ((unsigned long long)block * HALVES + lane / LANES);
}

// The code of one element of few bits.
template <int STATE>
__device__ __forceinline__ float decode_one(const Tensor& t, u32 block, long long at, int half, u32 own) {
    u32 code = ((const u8*)t.state[STATE])[BITS == 8 ? at : at / 2];
    if (BITS == 4) code = at % 2 ? code & 15u : code >> 4;
    return look_up(LEVELS(STATE), code << ROW_SHIFT, own) * t.absmax[STATE][(unsigned long long)block * HALVES + half];
}

// Writes one element's code; with 4 bits the lane of an even element writes its neighbour's too.
template <int STATE>
__device__ __forceinline__ void encode_one(const Tensor& t, long long at, float x, float absmax, u32 own) {
    u32 code = absmax <= 3.4e38f && at < t.elements ? encode<STATE>(fminf(x * inverse_of(absmax), 1.f), own) : 0;
    u8* state = (u8*)t.state[STATE];
    if (BITS == 8) {
        if (at < t.elements) state[at] = code;
    } else {
        u32 next = __shfl_down_sync(0xffffffffu, code, 1);
        if (at % 2 == 0 && at < t.elements) state[at / 2] = code << 4 | next;
    }
}
