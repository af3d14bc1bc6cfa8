// What becomes of an int32 sum: the last step of the int8 products that write floats.
//
//     y[m,n] = sum'[m,n] * (x_scale[m] * w_scale[n]) + bias[n],    sum' = sum[m,n] - x_zero[m] * w_sum[n]
//
// sum[m,n] = sum_k qx[m,k] qw[n,k] is exact; w_sum[n] = sum_k qw[n,k] is known when the weight is packed, so a
// zero-point of the activations costs one multiplication per output and nothing inside the loop over K.
// Kinds of number: 0 int32 (the sum itself), 1 float16, 2 bfloat16, 3 float32. KIND, a define, is that of y.
#pragma once
#include "floats.cuh"

#ifndef KIND
#define KIND 0
#endif

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

__device__ __forceinline__ float number(const void* values, int kind, int at) {
    if (kind == 3) return ((const float*)values)[at];
    unsigned short bits = ((const unsigned short*)values)[at];
    return kind == 2 ? bfloat_value(bits) : half_value(bits);
}

// What the epilogue needs of column n, and of row m.
struct Column { float scale, bias; int sum; };
struct Row { float scale; int zero; };

__device__ __forceinline__ Column read_column(const Epilogue& e, int n) {
    Column c;
    c.scale = number(e.w_scale, e.w_kind, n * e.w_stride);
    c.bias = e.bias == nullptr ? 0.0f : number(e.bias, e.bias_kind, n);
    c.sum = e.x_zero == nullptr ? 0 : e.w_sum[n];
    return c;
}

__device__ __forceinline__ Row read_row(const Epilogue& e, int m) {
    if (KIND == 0) return {0.0f, 0};
    return {e.x_scale[m * e.x_stride], e.x_zero == nullptr ? 0 : e.x_zero[m * e.x_stride]};
}

__device__ __forceinline__ float scaled(int sum, Row r, Column c) {
    return fmaf((float)(sum - r.zero * c.sum), r.scale * c.scale, c.bias);
}

// A block's columns n0 to n0 + COUNT - 1, read once and by all its threads, into shared memory.
template <int COUNT, int THREADS>
__device__ __forceinline__ void read_columns(Column* columns, const Epilogue& e, int n0, int N) {
    if (KIND != 0)
        for (int i = threadIdx.x; i < COUNT; i += THREADS)
            columns[i] = n0 + i < N ? read_column(e, n0 + i) : Column{0.0f, 0.0f, 0};
}

// Two neighbours of 16 bits each, the first in the low half.
__device__ __forceinline__ unsigned pair(float first, float second) {
    return KIND == 1 ? two_halves(first, second) : two_bfloats(first, second);
}

// One output, at `at` = m N + n.
__device__ __forceinline__ void store(const Epilogue& e, int sum, Row r, Column c, size_t at) {
    if (KIND == 0) ((int*)e.out)[at] = sum;
    if (KIND == 1) ((unsigned short*)e.out)[at] = half_bits(scaled(sum, r, c));
    if (KIND == 2) ((unsigned short*)e.out)[at] = bfloat_bits(scaled(sum, r, c));
    if (KIND == 3) ((float*)e.out)[at] = scaled(sum, r, c);
}
