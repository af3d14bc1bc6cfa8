// What a step is told of a tensor, and the step of one element: rules.py, in float32.
//
// Compile-time: BITS 8 or 4; RULE 0 adam, 1 lion, 2 momentum; SETS of numbers in one launch.
#pragma once

#include "optim_floats.cuh"

struct Numbers {           // Scalars of optim.py
    float shrink, l2, beta1, rest1, beta2, rest2, eps, rate, correction, first;
};
struct NumberSets { Numbers of[SETS]; };

struct Record {            // 80 bytes, written by optim.py
    void* p;
    const void* g;
    void* state[2];        // uint8 codes, or float32
    float* absmax[2];
    long long elements;
    int end;               // one past its last block in the order of all tensors' blocks
    int flags;             // 1: states are float32, 2: not aligned to 16 bytes
    int numbers;           // which of the NumberSets
    int unused[3];
};

struct __align__(16) Tensor {  // 112 bytes of shared memory, a Record made ready
    void* p;
    const void* g;
    void* state[2];
    float* absmax[2];
    int begin, end;        // its blocks in the order of all tensors' blocks
    int fast_end;          // one past the last block that fast_block takes
    int wide;
    Numbers numbers;
    long long elements;
};

#define BLOCK 256              // elements of a warp
#define HALVES (8 / BITS)      // blocks among them, each with its own absmax
#define LANES (32 / HALVES)    // of a block
#define BELOW_BYTES 49152
#define STATES (RULE == 0 ? 2 : 1)

// p, m, v after one step with gradient g, where m and v are still levels, to be multiplied by their block's absmax
// times beta (m_scale, v_scale). eps and correction are divided by rate already: one division does all.
__device__ __forceinline__ void step(float& p, float g, float& m, float& v, const Numbers& n, float m_scale, float v_scale) {
    g += n.l2 * p;
#if RULE == 0
    m = m * m_scale + n.rest1 * g;
    v = v * v_scale + n.rest2 * g * g;
    float root, inverse;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(v));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(root * n.correction + n.eps));
    p = p * n.shrink + m * inverse;
#elif RULE == 1
    float u = m * m_scale * n.beta1 + n.rest1 * g;
    p = p * n.shrink + (u > 0.f ? n.rate : u < 0.f ? -n.rate : 0.f);
    m = m * m_scale * n.beta2 + n.rest2 * g;
#else
    m = n.first != 0.f ? g : m * m_scale + g;
    p = p * n.shrink + n.rate * m;
#endif
}

// What a block's absmax is multiplied by before a step: the beta, where it enters only once.
__device__ __forceinline__ float m_beta(const Numbers& n) { return RULE == 1 ? 1.f : n.beta1; }
