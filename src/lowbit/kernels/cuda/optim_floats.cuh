// Parameters and gradients of an optimizer's step (optim_blockwise.cu): their bits as floats, and how they are moved.
//
// Compile-time: PARAM 0 float32, 1 bfloat16, 2 float16.
#pragma once

typedef unsigned char u8;
typedef unsigned int u32;

#if PARAM == 0
typedef float Param;
#define PACKED 8           // 32-bit words for 8 elements
#else
typedef unsigned short Param;
#define PACKED 4
#endif

__device__ __forceinline__ float widen(u32 bits) {
#if PARAM == 1
    return __uint_as_float(bits << 16);
#elif PARAM == 2
    float x;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(x) : "r"(bits));
    return x;
#else
    return __uint_as_float(bits);
#endif
}

__device__ __forceinline__ u32 narrow(float x) {
#if PARAM == 1
#if __CUDA_ARCH__ >= 800
    u32 bits;
    asm("{.reg .b16 h; cvt.rn.bf16.f32 h, %1; cvt.u32.u16 %0, h;}" : "=r"(bits) : "f"(x));
    return bits;
#else
    u32 bits = __float_as_uint(x);
    return x != x ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // ties to even
#endif
#elif PARAM == 2
    u32 bits;
    asm("{.reg .b16 h; cvt.rn.f16.f32 h, %1; cvt.u32.u16 %0, h;}" : "=r"(bits) : "f"(x));
    return bits;
#else
    return __float_as_uint(x);
#endif
}

// Two 16-bit floats in a word. One conversion of a pair runs at full rate, one of a single float at an eighth of it.
__device__ __forceinline__ u32 narrow_pair(float low, float high) {
#if PARAM == 1 && __CUDA_ARCH__ >= 800
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#elif PARAM == 2 && __CUDA_ARCH__ >= 800
    u32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    return narrow(low) | narrow(high) << 16;
#endif
}

// Element i of 8 packed ones.
__device__ __forceinline__ float element(const u32* words, int i) {
#if PARAM == 0
    return __uint_as_float(words[i]);
#elif PARAM == 1
    u32 word = words[i / 2];
    return __uint_as_float(i & 1 ? word & 0xffff0000u : word << 16);
#else
    return widen(i & 1 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu);
#endif
}

// Loads and stores that the compiler knows to be of global memory. Hints that bytes are used once (no_allocate,
// streaming stores) changed nothing: 0.76 and 0.75 ms beside 0.75 (docs/log-training.md).
__device__ __forceinline__ uint4 load16(const void* at) {
    uint4 x;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(__cvta_generic_to_global(at)));
    return x;
}

__device__ __forceinline__ uint2 load8(const void* at) {
    uint2 x;
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(__cvta_generic_to_global(at)));
    return x;
}

__device__ __forceinline__ float load4(const void* at) {
    float x;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(__cvta_generic_to_global(at)));
    return x;
}

__device__ __forceinline__ void store16(void* at, uint4 x) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "l"(__cvta_generic_to_global(at)), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

__device__ __forceinline__ void store8(void* at, uint2 x) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" :: "l"(__cvta_generic_to_global(at)), "r"(x.x), "r"(x.y) : "memory");
}

__device__ __forceinline__ void store4(void* at, float x) {
    asm volatile("st.global.f32 [%0], %1;" :: "l"(__cvta_generic_to_global(at)), "f"(x) : "memory");
}
