// What becomes of an int32 sum: the last step of the int8 products that write floats.
//
//     y[m,n] = sum'[m,n] * (x_scale[m] * w_scale[n]) + bias[n],    sum' = sum[m,n] - x_zero[m] * w_sum[n]
//
// sum[m,n] = sum_k qx[m,k] qw[n,k] is exact; w_sum[n] = sum_k qw[n,k] is known when the weight is packed, so a
// zero-point of the activations costs one multiplication per output and nothing inside the loop over K.
// Kinds of number: 0 int32 (the sum itself), 1 float16, 2 bfloat16, 3 float32.
#pragma once

struct Epilogue {
    void* out;             // [M, N], row-major
    const float* x_scale;  // [M], or [1] where x_stride is 0
    const int* x_zero;     // like x_scale, or null
    const void* w_scale;   // [N], or [1] where w_stride is 0, of kind w_kind
    const int* w_sum;      // [N]; read only beside x_zero
    const void* bias;      // [N] of kind bias_kind, or null
    int x_stride, w_stride, w_kind, bias_kind;
};

// A kernel takes the fields one by one, as the launcher passes them: EPILOGUE_PARAMETERS in its list, EPILOGUE to join.
#define EPILOGUE_PARAMETERS                                                                                       \
    void *out, const float *x_scale, const int *x_zero, const void *w_scale, const int *w_sum, const void *bias,  \
        int x_stride, int w_stride, int w_kind, int bias_kind
#define EPILOGUE Epilogue{out, x_scale, x_zero, w_scale, w_sum, bias, x_stride, w_stride, w_kind, bias_kind}

__device__ __forceinline__ unsigned short half_bits(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Round to nearest even by integer arithmetic: cvt.rn.bf16.f32 needs sm_80.
__device__ __forceinline__ unsigned short bfloat_bits(float value) {
    unsigned bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

__device__ __forceinline__ float number(const void* values, int kind, int at) {
    if (kind == 3) return ((const float*)values)[at];
    unsigned short bits = ((const unsigned short*)values)[at];
    if (kind == 2) return __uint_as_float((unsigned)bits << 16);
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// What the epilogue needs of column n, and of row m.
struct Column { float scale, bias; int sum; };
struct Row { float scale; int zero; };

__device__ __forceinline__ Column column(const Epilogue& e, int n) {
    Column c;
    c.scale = number(e.w_scale, e.w_kind, n * e.w_stride);
    c.bias = e.bias == nullptr ? 0.0f : number(e.bias, e.bias_kind, n);
    c.sum = e.x_zero == nullptr ? 0 : e.w_sum[n];
    return c;
}

__device__ __forceinline__ Row row(const Epilogue& e, int m) {
    return {e.x_scale[m * e.x_stride], e.x_zero == nullptr ? 0 : e.x_zero[m * e.x_stride]};
}

__device__ __forceinline__ float scaled(int sum, Row r, Column c) {
    return fmaf((float)(sum - r.zero * c.sum), r.scale * c.scale, c.bias);
}

// Two neighbours in 16 bits each, the first in the low half.
template <int KIND>
__device__ __forceinline__ unsigned pair(float first, float second) {
    unsigned both;
    if (KIND == 1) return half_bits(first) | (unsigned)half_bits(second) << 16;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
#else
    both = bfloat_bits(first) | (unsigned)bfloat_bits(second) << 16;
#endif
    return both;
}

// One output. m and n are inside the matrix.
template <int KIND>
__device__ __forceinline__ void store(const Epilogue& e, int sum, int m, int n, int N) {
    size_t at = (size_t)m * N + n;
    if (KIND == 0) {
        ((int*)e.out)[at] = sum;
        return;
    }
    float y = scaled(sum, row(e, m), column(e, n));
    if (KIND == 1) ((unsigned short*)e.out)[at] = half_bits(y);
    if (KIND == 2) ((unsigned short*)e.out)[at] = bfloat_bits(y);
    if (KIND == 3) ((float*)e.out)[at] = y;
}
