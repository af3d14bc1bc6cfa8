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
// How codes are read and found stands in optim_codes.cuh, the records and the rule in optim_rule.cuh.
//
// Tensors whose states are float32, tails and unaligned tensors go element by element (slow_block), in the same launch.
//
// Compile-time: BITS 8 or 4; RULE 0 adam, 1 lion, 2 momentum; PARAM 0 float32, 1 bfloat16, 2 float16; THREADS; REPLICAS;
// AHEAD; SETS.

#include "optim_codes.cuh"

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
