// One step of an optimizer with block-wise 8-bit states, over any number of tensors in one launch.
//
// A block is 256 elements of a tensor, and one warp's work: lane l takes elements 8l ... 8l+7.
//
//            p, g  bf16       m, v codes       absmax
//    lane 0  |16 bytes each|  |8 bytes each|   one float per state and block, read by all lanes
//    lane 1  |16 bytes each|  |8 bytes each|
//    ...
//    read    2 + 2 + 1 + 1 bytes an element, written 2 + 1 + 1, and 16/256 for the absmax: 10.06
//
// The grid is persistent: as many thread blocks as the device holds, each warp striding over all blocks of all tensors,
// its next block's loads in flight while it works on the present one.
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
// Compile-time: RULE 0 adam, 1 lion, 2 momentum; PARAM 0 float32, 1 bfloat16, 2 float16; THREADS; REPLICAS.

typedef unsigned char u8;
typedef unsigned int u32;

struct Tensor {           // 128 bytes, written by optim.py
    void* p;
    const void* g;
    void* state[2];       // uint8 codes, or float32
    float* absmax[2];
    long long elements;
    long long end;        // one past its last block in the order of all tensors' blocks
    long long flags;      // 1: states are float32, 2: not aligned to 16 bytes
    struct Numbers {      // Scalars of optim.py
        float shrink, l2, beta1, rest1, beta2, rest2, eps, rate, correction, first;
    } numbers;
    long long unused[2];
};
typedef Tensor::Numbers Numbers;

#define BLOCK 256
#define BELOW_BYTES 49152
#define STATES (RULE == 0 ? 2 : 1)

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

__device__ __forceinline__ float warp_max(float x) {  // x >= 0, or NaN, whose bits are larger than any number's
#if __CUDA_ARCH__ >= 800
    return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(x)));
#else
    u32 bits = __float_as_uint(x);
    for (int step = 16; step > 0; step /= 2) bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, step));
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

// Code i of a word, times the bytes of a row.
__device__ __forceinline__ u32 row_of(u32 word, int i) {
    const int shift = 8 * i - ROW_SHIFT;
    return (shift >= 0 ? word >> (shift & 31) : word << (-shift & 31)) & (0xffu << ROW_SHIFT);
}

template <int STATE>       // 0: signed map, 1: unsigned
__device__ __forceinline__ u32 encode(float x, u32 own) {
    u32 index = shared[(__float_as_uint(x) >> 16) + 16384 * STATE];
    return index + (x > look_up(BOUNDS(STATE), index << ROW_SHIFT, own));
}

// 1 / absmax; 0 where that would overflow, so that a block of nothing but zeros and denormals becomes zeros.
__device__ __forceinline__ float inverse_of(float absmax) { return absmax >= 1.2e-38f ? 1.f / absmax : 0.f; }

// Codes of 8 elements, in two words. A block whose
// absmax is not finite gets codes 0, whose levels its absmax makes NaN or infinite again.
template <int STATE>
__device__ __forceinline__ uint2 encode_row(const float* x, float absmax, u32 own) {
    u32 word[2] = {0, 0};
    if (!(absmax <= 3.4e38f)) return make_uint2(0, 0);
    float scale = inverse_of(absmax);
#pragma unroll
    for (int i = 0; i < 8; ++i) word[i / 4] += encode<STATE>(x[i] * scale, own) << (8 * (i % 4));
    return make_uint2(word[0], word[1]);
}

struct Row {               // what one lane loads of a block
    u32 p[PACKED], g[PACKED];
    uint2 codes[STATES];
    float absmax[STATES];
};

__device__ __forceinline__ void load(Row& row, const Tensor& t, long long block, int lane) {
    long long at = block * 32 + lane;                    // in units of 8 elements
#pragma unroll
    for (int i = 0; i < PACKED / 4; ++i) {
        *(uint4*)(row.p + 4 * i) = ((const uint4*)t.p)[at * (PACKED / 4) + i];
        *(uint4*)(row.g + 4 * i) = __ldcs((const uint4*)t.g + at * (PACKED / 4) + i);
    }
#pragma unroll
    for (int s = 0; s < STATES; ++s) {
        row.codes[s] = ((const uint2*)t.state[s])[at];
        row.absmax[s] = t.absmax[s][block];
    }
}

__device__ __forceinline__ void fast_block(Row& row, const Tensor& t, long long block, int lane) {
    const u32 own = (lane & (REPLICAS - 1)) * 4;
    const Numbers n = t.numbers;
    float m[8], v[8], m_max = 0.f, v_max = 0.f;
    float m_scale = row.absmax[0] * m_beta(n), v_scale = row.absmax[STATES - 1] * n.beta2;
    u32 out[PACKED];
    float before = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        m[i] = look_up(LEVELS(0), row_of(i < 4 ? row.codes[0].x : row.codes[0].y, i % 4), own);
#if RULE == 0
        v[i] = look_up(LEVELS(1), row_of(i < 4 ? row.codes[1].x : row.codes[1].y, i % 4), own);
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
    long long at = block * 32 + lane;
#pragma unroll
    for (int i = 0; i < PACKED / 4; ++i) ((uint4*)t.p)[at * (PACKED / 4) + i] = *(uint4*)(out + 4 * i);
    m_max = warp_max(m_max);
    ((uint2*)t.state[0])[at] = encode_row<0>(m, m_max, own);
    if (lane == 0) t.absmax[0][block] = m_max;
#if RULE == 0
    v_max = warp_max(v_max);
    ((uint2*)t.state[1])[at] = encode_row<1>(v, v_max, own);
    if (lane == 0) t.absmax[1][block] = v_max;
#endif
}

// The same for float32 states, the last block of a tensor, and pointers off 16 bytes: lane l takes elements l, l + 32, ...
__device__ __noinline__ void slow_block(const Tensor& t, long long block, int lane) {
    const u32 own = (lane & (REPLICAS - 1)) * 4;
    const bool wide = t.flags & 1;
    float m[8], v[8], m_max = 0.f, v_max = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        long long at = block * BLOCK + i * 32 + lane;
        m[i] = v[i] = 0.f;
        if (at >= t.elements) continue;
        float p = widen(sizeof(Param) == 2 ? ((const unsigned short*)t.p)[at] : ((const u32*)t.p)[at]);
        float g = widen(sizeof(Param) == 2 ? ((const unsigned short*)t.g)[at] : ((const u32*)t.g)[at]);
        if (wide) {
            m[i] = ((float*)t.state[0])[at];
            if (RULE == 0) v[i] = ((float*)t.state[1])[at];
        } else {
            m[i] = look_up(LEVELS(0), row_of(((u8*)t.state[0])[at], 0), own) * t.absmax[0][block];
#if RULE == 0
            v[i] = look_up(LEVELS(1), row_of(((u8*)t.state[1])[at], 0), own) * t.absmax[1][block];
#endif
        }
        step(p, g, m[i], v[i], t.numbers, m_beta(t.numbers), t.numbers.beta2);
        if (sizeof(Param) == 2) ((unsigned short*)t.p)[at] = narrow(p);
        else ((u32*)t.p)[at] = narrow(p);
        m_max = larger(m_max, m[i]);
        v_max = larger(v_max, v[i]);
    }
    m_max = warp_max(m_max);
    v_max = warp_max(v_max);
    float m_scale = inverse_of(m_max), v_scale = inverse_of(v_max);
    if (!(m_max <= 3.4e38f)) m_max = __int_as_float(0x7fffffff);
    if (!(v_max <= 3.4e38f)) v_max = __int_as_float(0x7fffffff);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        long long at = block * BLOCK + i * 32 + lane;
        if (at >= t.elements) continue;
        if (wide) {
            ((float*)t.state[0])[at] = m[i];
            if (RULE == 0) ((float*)t.state[1])[at] = v[i];
        } else {
            ((u8*)t.state[0])[at] = m_max == m_max ? encode<0>(fminf(m[i] * m_scale, 1.f), own) : 0;
#if RULE == 0
            ((u8*)t.state[1])[at] = v_max == v_max ? encode<1>(fminf(v[i] * v_scale, 1.f), own) : 0;
#endif
        }
    }
    if (lane == 0 && !wide) {
        t.absmax[0][block] = m_max;
        if (RULE == 0) t.absmax[1][block] = v_max;
    }
}

__device__ __forceinline__ bool is_fast(const Tensor& t, long long block) {
    return t.flags == 0 && (block + 1) * BLOCK <= t.elements;
}

// below: the bytes of shared memory; levels, bounds [2][256], the signed map's first.
extern "C" __global__ void __launch_bounds__(THREADS, 1) optim_blockwise(
    const Tensor* tensors, int count, const uint4* below, const float* levels, const float* bounds) {
    for (int i = threadIdx.x; i < BELOW_BYTES / 16; i += THREADS) ((uint4*)shared)[i] = below[i];
#pragma unroll
    for (int s = 0; s < STATES; ++s)
        for (int i = threadIdx.x; i < 256 * REPLICAS; i += THREADS) {
            LEVELS(s)[i] = levels[s * 256 + i / REPLICAS];
            BOUNDS(s)[i] = bounds[s * 256 + i / REPLICAS];
        }
    __syncthreads();

    const int lane = threadIdx.x % 32;
    const long long stride = (long long)gridDim.x * (THREADS / 32), total = tensors[count - 1].end;
    long long at = (long long)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    int present = 0;
    Row row;
    bool loaded = false;
    for (; at < total; at += stride) {
        while (at >= tensors[present].end) ++present;
        const Tensor& t = tensors[present];
        long long block = at - (present == 0 ? 0 : tensors[present - 1].end);
        if (!is_fast(t, block)) {
            slow_block(t, block, lane);
            loaded = false;
            continue;
        }
        if (!loaded) load(row, t, block, lane);
        Row now = row;
        loaded = false;
        if (at + stride < total) {
            int following = present;
            while (at + stride >= tensors[following].end) ++following;
            const Tensor& u = tensors[following];
            long long ahead = at + stride - (following == 0 ? 0 : tensors[following - 1].end);
            if (is_fast(u, ahead)) {
                load(row, u, ahead, lane);
                loaded = true;
            }
        }
        fast_block(now, t, block, lane);
    }
}
