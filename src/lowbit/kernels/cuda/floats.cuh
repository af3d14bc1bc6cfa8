// 16-bit floats to and from float32, alone and two in a word, the first in the low half; in PTX, no CUDA header needed.
#pragma once
#ifndef EMULATED  // tests/kernels/cuda/emulated_int8.hpp defines the same in C++

__device__ __forceinline__ unsigned short half_bits(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ unsigned short bfloat_bits(float value) {
#if __CUDA_ARCH__ >= 800
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    unsigned bits = __float_as_uint(value), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (unsigned short)(value == value ? rounded : 0x7fc0u);
#endif
}

__device__ __forceinline__ float half_value(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ unsigned two_halves(float first, float second) {
#if __CUDA_ARCH__ >= 800
    unsigned two;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(second), "f"(first));
    return two;
#else
    return half_bits(first) | (unsigned)half_bits(second) << 16;
#endif
}

__device__ __forceinline__ unsigned two_bfloats(float first, float second) {
#if __CUDA_ARCH__ >= 800
    unsigned two;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(second), "f"(first));
    return two;
#else
    return bfloat_bits(first) | (unsigned)bfloat_bits(second) << 16;
#endif
}

#if __CUDA_ARCH__ >= 900
// The larger of a and |v|, for both halves.
__device__ __forceinline__ unsigned larger_halves(unsigned a, unsigned v) {
    unsigned made;
    asm("{\n.reg .b32 t;\nabs.f16x2 t, %2;\nmax.f16x2 %0, %1, t;\n}" : "=r"(made) : "r"(a), "r"(v));
    return made;
}
__device__ __forceinline__ unsigned larger_bfloats(unsigned a, unsigned v) {
    unsigned made;
    asm("{\n.reg .b32 t;\nabs.bf16x2 t, %2;\nmax.bf16x2 %0, %1, t;\n}" : "=r"(made) : "r"(a), "r"(v));
    return made;
}
#endif
#endif  // EMULATED

__device__ __forceinline__ float bfloat_value(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }
