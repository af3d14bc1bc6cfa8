// One step of an optimizer with block-wise states of 8 or 4 bits, over any number of tensors in one launch.
//
// 256 elements of a tensor are one warp's work: lane l takes elements 8l ... 8l+7. With 8 bits they are one block; with
// 4 bits they are two blocks of 128, one for each half of the warp, and a lane's codes are 4 bytes, the first of each
// pair in the high nibble.
//
//            p, g  bf16       m, v codes       absmax
//    lane 0  |16 bytes each|  |8 bytes each|   one float per state and block, read by all lanes
//    lane 1  |16 bytes each|  |8 bytes each|
//    ...
//    read    2 + 2 + 1 + 1 bytes an element, written 2 + 1 + 1, and 16/256 for the absmax: 10.06
//
// The grid is persistent: as many thread blocks as the device holds, each warp striding over all blocks of all tensors,
// its next block's loads in flight while it works on the present one, and the block AHEAD of that one on its way to L2.
//
//    decode   level = levels[code] * absmax         256 floats in shared memory, REPLICAS copies: copy r serves the
//                                                   lanes l = r mod REPLICAS, so 32 copies have no bank conflicts
//    step     rules.py, in float32
//    absmax   maximum over the warp: redux.sync on the bits, which order as unsigned where floats are not negative
//    encode   the upper 16 bits of x choose a bucket, each of which holds at most one boundary between levels:
//             code = below[bucket] + (x > bounds[below[bucket]]), the same code as torch.bucketize
//
//    shared memory   below: 48 KiB, a byte for each upper half of a float in [-1, 1]
//                      0x0000 ... 0x3f80   signed map, x >= 0        0x4000 ... 0x7f80   unsigned map
//                      0x8000 ... 0xbf80   signed map, x < 0
//                    levels, bounds of the signed map, then of the unsigned one: float [256][REPLICAS] each
//
// Tensors whose states are float32, tails and unaligned tensors go element by element (slow_block), in the same launch.
//
// Compile-time: BITS 8 or 4; RULE 0 adam, 1 lion, 2 momentum; PARAM 0 float32, 1 bfloat16, 2 float16; THREADS; REPLICAS;
// AHEAD; SETS.

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

// Where the absmax of a lane's block lies.
__device__ __forceinline__ float* absmax_of(float* absmax, u32 block, int lane) {
    return absmax + ((unsigned long long)block * HALVES + lane / LANES);
}

struct Row {               // what one lane loads of a block
    u32 p[PACKED], g[PACKED];
    Codes codes[STATES];
    float absmax[STATES];
};

__device__ __forceinline__ void load(Row& row, const Tensor& t, u32 block, int lane) {
    u32 at = block * 32 + lane;                    // in units of 8 elements: below 2^35 elements in a tensor
    const u8* p = (const u8*)t.p + (unsigned long long)at * (PACKED * 4);
    const u8* g = (const u8*)t.g + (unsigned long long)at * (PACKED * 4);
#pragma unroll
    for (int i = 0; i < PACKED / 4; ++i) {
        *(uint4*)(row.p + 4 * i) = load16(p + 16 * i);
        *(uint4*)(row.g + 4 * i) = load16(g + 16 * i);
    }
#pragma unroll
    for (int s = 0; s < STATES; ++s) {
        row.codes[s] = load_codes(t.state[s], at);
        row.absmax[s] = load4(absmax_of(t.absmax[s], block, lane));
    }
}

__device__ __forceinline__ void fast_block(const Row& row, const Tensor& t, u32 block, int lane) {
    const u32 own = (lane & (REPLICAS - 1)) * 4;
    const Numbers n = t.numbers;
    float m[8], v[8], m_max = 0.f, v_max = 0.f;
    float m_scale = row.absmax[0] * m_beta(n), v_scale = row.absmax[STATES - 1] * n.beta2;
    u32 out[PACKED];
    float before = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        m[i] = look_up(LEVELS(0), row_of(row.codes[0], i), own);
#if RULE == 0
        v[i] = look_up(LEVELS(1), row_of(row.codes[1], i), own);
#endif
        float p = element(row.p, i);
        step(p, element(row.g, i), m[i], v[i], n, m_scale, v_scale);
        m_max = larger(m_max, m[i]);
#if RULE == 0
        v_max = larger(v_max, v[i]);
#endif
#if PARAM == 0
        out[i] = __float_as_uint(p);
#else
        if (i & 1) out[i / 2] = narrow_pair(before, p);
        before = p;
#endif
    }
    u32 at = block * 32 + lane;
    u8* p = (u8*)t.p + (unsigned long long)at * (PACKED * 4);
#pragma unroll
    for (int i = 0; i < PACKED / 4; ++i) store16(p + 16 * i, *(uint4*)(out + 4 * i));
    m_max = block_max(m_max);
    store_codes(t.state[0], at, encode_row<0>(m, m_max, own));
    if (lane % LANES == 0) store4(absmax_of(t.absmax[0], block, lane), m_max);
#if RULE == 0
    v_max = block_max(v_max);
    store_codes(t.state[1], at, encode_row<1>(v, v_max, own));
    if (lane % LANES == 0) store4(absmax_of(t.absmax[1], block, lane), v_max);
#endif
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

// The warp's largest value, which no lane's half matters to.
__device__ __forceinline__ float warp_max(float x) {
    u32 bits = __float_as_uint(x);
    for (int step = 16; step > 0; step /= 2) bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, step));
    return bits <= __float_as_uint(3.4e38f) ? __uint_as_float(bits) : __int_as_float(0x7fffffff);
}

// The same for float32 states, the last elements of a tensor, and pointers off 16 bytes: lane l takes elements l, l + 32,
// ..., so that with 4 bits the first four are of the first block.
__device__ __noinline__ void slow_block(const Tensor& t, u32 block, int lane) {
    const u32 own = (lane & (REPLICAS - 1)) * 4;
    const bool wide = t.wide;
    float m[8], v[8], m_max[HALVES] = {}, v_max[HALVES] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int half = i * HALVES / 8;
        long long at = (long long)block * BLOCK + i * 32 + lane;
        m[i] = v[i] = 0.f;
        if (at >= t.elements) continue;
        float p = widen(sizeof(Param) == 2 ? ((const unsigned short*)t.p)[at] : ((const u32*)t.p)[at]);
        float g = widen(sizeof(Param) == 2 ? ((const unsigned short*)t.g)[at] : ((const u32*)t.g)[at]);
        if (wide) {
            m[i] = ((float*)t.state[0])[at];
            if (RULE == 0) v[i] = ((float*)t.state[1])[at];
        } else {
            m[i] = decode_one<0>(t, block, at, half, own);
#if RULE == 0
            v[i] = decode_one<1>(t, block, at, half, own);
#endif
        }
        step(p, g, m[i], v[i], t.numbers, m_beta(t.numbers), t.numbers.beta2);
        if (sizeof(Param) == 2) ((unsigned short*)t.p)[at] = narrow(p);
        else ((u32*)t.p)[at] = narrow(p);
        m_max[half] = larger(m_max[half], m[i]);
        v_max[half] = larger(v_max[half], v[i]);
    }
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
        m_max[half] = warp_max(m_max[half]);
        v_max[half] = warp_max(v_max[half]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int half = i * HALVES / 8;
        long long at = (long long)block * BLOCK + i * 32 + lane;
        if (!wide) {
            encode_one<0>(t, at, m[i], m_max[half], own);
#if RULE == 0
            encode_one<1>(t, at, v[i], v_max[half], own);
#endif
        } else if (at < t.elements) {
            ((float*)t.state[0])[at] = m[i];
            if (RULE == 0) ((float*)t.state[1])[at] = v[i];
        }
    }
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
        unsigned long long at = (unsigned long long)block * HALVES + half;
        if (lane != 0 || wide || at * (BLOCK / HALVES) >= t.elements) continue;
        t.absmax[0][at] = m_max[half];
        if (RULE == 0) t.absmax[1][at] = v_max[half];
    }
}

// Ask L2 for a later block of the same tensor: its lines of 128 bytes of p, g and each state, one a lane.
__device__ __forceinline__ void fetch(const Tensor& t, int at, int lane) {
    const int lines = BLOCK * sizeof(Param) / 128, code_lines = BLOCK * BITS / 8 / 128;
    if (at >= t.fast_end || lane >= 2 * lines + code_lines * STATES) return;
    const unsigned long long block = at - t.begin;
    const u8* line = lane < lines       ? (const u8*)t.p + block * (BLOCK * sizeof(Param)) + lane * 128
                     : lane < 2 * lines ? (const u8*)t.g + block * (BLOCK * sizeof(Param)) + (lane - lines) * 128
                                        : (const u8*)t.state[(lane - 2 * lines) / code_lines] +
                                              block * (BLOCK * BITS / 8) + lane % code_lines * 128;
    asm volatile("prefetch.global.L2 [%0];" :: "l"(__cvta_generic_to_global(line)));
}

// The tables and the tensors' records, made ready in shared memory.
__device__ __forceinline__ void prepare(
    Tensor* tensors, const Record* records, int count, const NumberSets& sets,
    const uint4* below, const float* levels, const float* bounds) {
    for (int i = threadIdx.x; i < BELOW_BYTES / 16; i += THREADS) ((uint4*)shared)[i] = below[i];
#pragma unroll
    for (int s = 0; s < STATES; ++s)
        for (int i = threadIdx.x; i < 256 * REPLICAS; i += THREADS) {
            LEVELS(s)[i] = levels[s * 256 + i / REPLICAS];
            BOUNDS(s)[i] = bounds[s * 256 + i / REPLICAS];
        }
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const Record r = records[i];
        Tensor& t = tensors[i];
        t.p = r.p;
        t.g = r.g;
        for (int s = 0; s < 2; ++s) {
            t.state[s] = r.state[s];
            t.absmax[s] = r.absmax[s];
        }
        t.begin = i == 0 ? 0 : records[i - 1].end;
        t.end = r.end;
        t.fast_end = t.begin + (r.flags == 0 ? (int)(r.elements / BLOCK) : 0);
        t.wide = r.flags & 1;
        t.numbers = sets.of[r.numbers];
        t.elements = r.elements;
    }
    __syncthreads();
}

// count: at most as many as the launch has shared memory for; total: blocks of all tensors, below 2^31.
// below: the bytes of shared memory; levels, bounds [2][256], the signed map's first.
extern "C" __global__ void __launch_bounds__(THREADS, 1) optim_blockwise(
    const Record* records, int count, int total, const uint4* below, const float* levels, const float* bounds,
    const __grid_constant__ NumberSets sets) {
    Tensor* tensors = (Tensor*)(shared + BELOW_BYTES + STATES * 512 * REPLICAS * 4);
    prepare(tensors, records, count, sets, below, levels, bounds);

    const int lane = threadIdx.x % 32;
    const int stride = gridDim.x * (THREADS / 32);
    int at = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (at >= total) return;
    const Tensor* t = tensors;
    while (at >= t->end) ++t;
    Row row;
    if (at < t->fast_end) load(row, *t, at - t->begin, lane);
    while (true) {
        const int following = at + stride;
        const Tensor* u = t;
        const Row now = row;
        if (following < total) {
            while (following >= u->end) ++u;
            if (following < u->fast_end) load(row, *u, following - u->begin, lane);
            fetch(*u, following + AHEAD * stride, lane);
        }
        if (at < t->fast_end) fast_block(now, *t, at - t->begin, lane);
        else slow_block(*t, at - t->begin, lane);
        if (following >= total) return;
        at = following;
        t = u;
    }
}
