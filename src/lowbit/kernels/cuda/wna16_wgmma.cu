// y[M, N] = x[M, K] W[N, K]^T + bias with wgmma m64nTk16 (sm_90a): 16 to some hundred tokens.
//
// The weight is operand A from registers: what a warp decodes never goes back to shared memory. x is operand B, from
// shared memory, so the product computed is y^T, 256 rows of the weight by TOKENS tokens in one block:
//
//              K ──────────────────►                       x: [TOKENS][K]
//        ┌────────┬────────┬────────┐                  128 columns a stage, two tiles of 64
//   256  │ wg0  ─ 4 warps x 16 rows  │                  (128 bytes a row, swizzled by the row),
//   rows │ wg1                       │   x  stage  =    loaded by all threads with cp.async,
//        │ wg2                       │                  read by the four warpgroups
//        │ wg3                       │
//        └────────┴────────┴────────┘
//
// Each warp has a ring of records of its own strip, filled by the copy engine before the kernel before has ended.
// Block (unit, split, token tile); splits > 1 write float32 partial sums, which `wna16_sum` of wna16_mma.cu adds.
// Codes are exact in the products (the zero-point is taken off first), a group's sum is scaled when it is complete.
#include "wgmma_half.cuh"
#include "wna16_record.cuh"

// TOKENS 16, 32 or 64; WEIGHT_STAGES records and X_STAGES tiles in flight
constexpr int WARPS = 16, THREADS = 512, UNIT_ROWS = 256;
constexpr int X_TILE = TOKENS * 128, X_STAGE = 2 * X_TILE;  // bytes
constexpr int RING_AT = X_STAGES * X_STAGE;
constexpr int BARRIERS_AT = RING_AT + WARPS * WEIGHT_STAGES * RECORD_BYTES;
constexpr int TABLE_AT = BARRIERS_AT + WARPS * WEIGHT_STAGES * 8;  // [16 levels][32 lanes]
constexpr int SUMS = TOKENS / 2;  // accumulators of a thread
constexpr int OUT_PITCH = UNIT_ROWS + 8;

SHARED_MEMORY(1024);

// 128 columns of x from k0, to a stage: row t of tile h at 128 t, its 16-byte piece c at c xor (t mod 8)
DEVICE void load_x(u32 stage, const u16* x, int tokens, int k0, int K) {
#pragma unroll
    for (int at = threadIdx.x; at < TOKENS * 16; at += THREADS) {
        int token = at / 16, piece = at % 16, k = k0 + 8 * piece;
        bool valid = token < tokens && k < K;
        u32 to = stage + piece / 8 * X_TILE + token * 128 + ((piece % 8 ^ token % 8) << 4);
        copy_16_or_zeros(to, valid ? x + static_cast<size_t>(token) * K + k : x, valid);
    }
}

// what has to be taken off the decoded operands of rows g and g + 8, as pairs of halves
DEVICE u32 offset_pair(u32 zero) {
    if constexpr (FORMAT == 8 && XTYPE) return to_x(static_cast<float>(static_cast<int>(zero) - 128)) * 0x00010001u;
    return MAGIC | zero * 0x00010001u;
}

DEVICE void exact_operand(u32 (&a)[4], const u32 (&words)[HALF_WORDS], int j, u32 low, u32 high, u32 magic, u32 table) {
    if constexpr (IS_LUT) {  // one level at a time, each lane from its own bank
        u32 w = words[j];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 first = load_shared(table + ((w >> (8 * i) & 15) << 7));
            u32 second = load_shared(table + ((w >> (8 * i + 4) & 15) << 7));
            a[i] = __byte_perm(first, second, 0x5410);
        }
    } else {
        decode(a, words, j, magic, 0);
        if constexpr (HAS_OFFSET)
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = sub2(a[i], i % 2 ? high : low);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
wna16_wgmma(const u8* records, const u16* x, const u16* levels, const float* factor, const u16* bias, u16* y,
            float* partial, int M, int N, int K, int splits) {
    let_next_kernel_start();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
    const int unit = blockIdx.x / splits, split = blockIdx.x % splits, first_token = blockIdx.y * TOKENS;
    const int tokens = min(M - first_token, TOKENS), per_strip = (K + RECORD_K - 1) / RECORD_K;
    const int begin = split * per_strip / splits, end = (split + 1) * per_strip / splits;
    const int strip = min(unit * WARPS + warp, (N + STRIP - 1) / STRIP - 1);
    const u8* from = records + static_cast<size_t>(strip) * per_strip * RECORD_BYTES;
    const u32 base = shared_address(shared), barriers = base + BARRIERS_AT + warp * WEIGHT_STAGES * 8;
    u8* ring = shared + RING_AT + warp * WEIGHT_STAGES * RECORD_BYTES;
    const u64 policy = evict_first_policy();
    auto fetch = [&](int record, int slot) {
        if (lane == 0 && record < end) {
            barrier_expect(barriers + 8 * slot, RECORD_BYTES);
            bulk_copy(shared_address(ring + slot * RECORD_BYTES), from + static_cast<size_t>(record) * RECORD_BYTES,
                      RECORD_BYTES, barriers + 8 * slot, policy);
        }
    };
    if (lane == 0) {
        for (int i = 0; i < WEIGHT_STAGES; ++i) barrier_init(barriers + 8 * i, 1);
        barrier_init_fence();
    }
    __syncwarp();
    for (int i = 0; i < WEIGHT_STAGES; ++i) fetch(begin + i, i);
    if constexpr (IS_LUT)
        reinterpret_cast<u32*>(shared + TABLE_AT)[threadIdx.x] = levels[threadIdx.x / 32] * 0x00010001u;
    wait_for_kernel_before();
    x += static_cast<size_t>(first_token) * K;
#pragma unroll
    for (int i = 0; i < X_STAGES - 1; ++i) {
        if (begin + i < end) load_x(base + i * X_STAGE, x, tokens, (begin + i) * RECORD_K, K);
        copies_commit();
    }

    float acc[SUMS] = {}, sums[SUMS];
    const u32 magic = opaque(MAGIC), table = base + TABLE_AT + 4 * lane;
    int slot = 0, x_slot = 0;
    u32 parity = 0;
    for (int record = begin; record < end; ++record) {
        copies_wait<X_STAGES - 2>();
        proxy_fence();  // cp.async wrote, wgmma reads
        __syncthreads();  // x has come for all, and all are done with the stage that is filled next
        int ahead = record + X_STAGES - 1, ahead_slot = (x_slot + X_STAGES - 1) % X_STAGES;
        if (ahead < end) load_x(base + ahead_slot * X_STAGE, x, tokens, ahead * RECORD_K, K);
        copies_commit();
        barrier_wait(barriers + 8 * slot, parity);
        const u8* mine = ring + slot * RECORD_BYTES;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 words[HALF_WORDS], a[4][4];
            load_codes(words, mine, half, lane);
            u32 low = 0, high = 0;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int step = 4 * half + j;
                if (HAS_OFFSET && (j == 0 || step % GROUP_STEPS == 0)) {
                    u32 zeros = 0x00010001u << (FAST_BITS - 1);
                    if constexpr (ASYM) {
                        u32 both = *reinterpret_cast<const u16*>(mine + CODE_BYTES + SCALE_BYTES + step / GROUP_STEPS * 16 + 2 * g);
                        zeros = (both & 0xFF) | (both >> 8) << 16;
                    }
                    low = offset_pair(zeros & 0xFFFF), high = offset_pair(zeros >> 16);
                }
                exact_operand(a[j], words, j, low, high, magic, table);
            }
            const u64 b = descriptor_of(base + x_slot * X_STAGE + half * X_TILE);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int step = 4 * half + j;
                if (j == 0 || step % GROUP_STEPS == 0) wgmma_fence();
                wgmma(sums, a[j], b + 2 * j, step % GROUP_STEPS != 0);
                if (step % GROUP_STEPS == GROUP_STEPS - 1) {
                    wgmma_commit();
                    Pair scale = load_scales(mine, step / GROUP_STEPS, g);
                    wgmma_wait();
#pragma unroll
                    for (int i = 0; i < SUMS; ++i) acc[i] += (i % 4 < 2 ? scale.low : scale.high) * sums[i];
                } else if (j == 3) {
                    wgmma_commit();
                }
            }
        }
        __syncwarp();
        fetch(record + WEIGHT_STAGES, slot);
        if (++slot == WEIGHT_STAGES) slot = 0, parity ^= 1;
        if (++x_slot == X_STAGES) x_slot = 0;
    }

    const int row = 16 * warp + g, n0 = unit * UNIT_ROWS;
    if (splits > 1) {
#pragma unroll
        for (int i = 0; i < SUMS; ++i) {
            int token = i / 4 * 8 + 2 * (lane % 4) + i % 2, n = n0 + row + i % 4 / 2 * 8;
            if (token < tokens && n < N)
                partial[(static_cast<size_t>(split) * M + first_token + token) * N + n] = acc[i];
        }
        return;
    }
    copies_wait<0>();
    __syncthreads();  // x is not needed any more: its place holds y, [TOKENS][OUT_PITCH]
    u16* out = reinterpret_cast<u16*>(shared);
    const float unit_scale = *factor;
#pragma unroll
    for (int i = 0; i < SUMS; ++i) {
        int token = i / 4 * 8 + 2 * (lane % 4) + i % 2, at = row + i % 4 / 2 * 8;
        float b = bias && n0 + at < N ? from_x(bias[n0 + at]) : 0.f;
        out[token * OUT_PITCH + at] = to_x(acc[i] * unit_scale + b);
    }
    __syncthreads();
    const bool vectors = N % 8 == 0 && n0 + UNIT_ROWS <= N;
    for (int at = threadIdx.x; at < tokens * (UNIT_ROWS / 8); at += THREADS) {
        int token = at / (UNIT_ROWS / 8), piece = at % (UNIT_ROWS / 8) * 8;
        u16* to = y + static_cast<size_t>(first_token + token) * N + n0 + piece;
        const u16* mine = out + token * OUT_PITCH + piece;
        if (vectors) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(mine);
        else
            for (int i = 0; i < 8 && n0 + piece + i < N; ++i) to[i] = mine[i];
    }
}
