// y[M, N] = x[M, K] W[N, K]^T + bias with wgmma m64nTk16 (sm_90a): 9 tokens and more.
//
// The weight is operand A from registers: what a warp decodes never goes back to shared memory. x is operand B, from
// shared memory, so the product computed is y^T, UNIT_ROWS = 64 GROUPS_OF_WARPS rows by TOKENS tokens in one block:
//
//              K ──────────────────►                       x: [TOKENS][K]
//        ┌────────┬────────┬────────┐                  128 columns a stage, two tiles of 64
//   64   │ wg0  ─ 4 warps x 16 rows  │                  (128 bytes a row, swizzled by the row), brought by the
//   rows ├──────────────────────────┤   x  stage  =    copy engine. Barriers `full` and `empty` for each stage
//   64   │ wg1                       │                  let a warp run two records ahead of another
//        └──────────────────────────┘
//
// Each warp has a ring of records of its own strip, filled by the copy engine before the kernel before has ended. While
// the tensor cores work on one batch of steps, the warp decodes the next: operand registers are double, wgmma waits for
// the batch before the last. A code becomes (code - zero) scale, rounded to x's type: the sums then run over all of K
// without a stop at each group. fp16: the scale is taken 2^-FAST_BITS smaller (no overflow), y's factor larger.
//
// Block (unit, token tile, rank); the `splits` blocks of a unit are a cluster, each with its slice of K. At the end all
// sums lie in shared memory, and each block of the cluster finishes its share of the outputs.
#include "wgmma_half.cuh"
#include "wna16_record.cuh"

// TOKENS 16, 32, 64 or 128; WARPGROUPS 2 or 4; PAIRED, see Work; STAGES (3 or 4) records of a warp and stages of x in flight
constexpr int WARPS = 4 * WARPGROUPS, THREADS = 32 * WARPS, UNIT_ROWS = 16 * WARPS;
constexpr int X_TILE = TOKENS * 128, X_STAGE = 2 * X_TILE;  // bytes
constexpr int RING_AT = STAGES * X_STAGE;
constexpr int WORK_BYTES = RING_AT + WARPS * STAGES * RECORD_BYTES;
constexpr int SUM_PITCH = UNIT_ROWS + 4;  // floats of one token; 4 more so that a quad's columns differ in bank
constexpr int SUMS_BYTES = TOKENS * SUM_PITCH * 4;  // in the place of x and the rings, at the end
constexpr int BARRIERS_AT = ((WORK_BYTES > SUMS_BYTES ? WORK_BYTES : SUMS_BYTES) + 127) / 128 * 128;
constexpr int FULL_AT = BARRIERS_AT + WARPS * STAGES * 8, EMPTY_AT = FULL_AT + STAGES * 8;
constexpr int TABLE_AT = (EMPTY_AT + STAGES * 8 + 127) / 128 * 128;
constexpr int X_AHEAD = STAGES - 2;  // x is asked for so many records before it is multiplied
constexpr int HALF_STEPS = 4, BATCH = 2, BATCHES = HALF_STEPS / BATCH;  // of 16 columns; 4 at once: ptxas does not end

SHARED_MEMORY(1024);

// what stands beside the codes of rows g and g + 8 in one group, each as a pair of equal halves
struct GroupPairs {
    u32 offset[2], scale[2], rest[2];  // rest: of a scale that one bf16 does not hold; tables only
};

DEVICE u32 offset_pair(u32 zero) {
    if constexpr (FORMAT == 8 && XTYPE) return to_x(static_cast<float>(static_cast<int>(zero) - 128)) * 0x00010001u;
    return MAGIC | zero * 0x00010001u;
}

DEVICE GroupPairs load_group(const u8* record, int group, int g) {
    GroupPairs pairs;
    u32 zeros[2] = {1u << (FAST_BITS - 1), 1u << (FAST_BITS - 1)};
    if constexpr (ASYM) {
        u32 both = *reinterpret_cast<const u16*>(record + CODE_BYTES + SCALE_BYTES + group * 16 + 2 * g);
        zeros[0] = both & 0xFF, zeros[1] = both >> 8;
    }
    Pair scales = load_scales(record, group, g);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float scale = row ? scales.high : scales.low;
        if constexpr (!XTYPE && !IS_LUT) scale *= 1.f / (1 << FAST_BITS);
        u16 rounded = to_x(scale);
        pairs.scale[row] = rounded * 0x00010001u;
        if constexpr (IS_LUT && XTYPE) pairs.rest[row] = to_x(scale - from_x(rounded)) * 0x00010001u;
        if constexpr (HAS_OFFSET) pairs.offset[row] = offset_pair(zeros[row]);
    }
    return pairs;
}

// operand A of step j: weights, rounded to x's type
DEVICE void weights_of(u32 (&a)[4], const u32 (&words)[HALF_WORDS], int j, const GroupPairs& pairs, u32 magic, u32 column) {
    if constexpr (IS_LUT) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 at = masked<0x7F80u>(i == 0 ? words[j] << 7 : words[j] >> (8 * i - 7), column);
            a[i] = *reinterpret_cast<const u32*>(shared + TABLE_AT + at);
        }
    } else {
        decode(a, words, j, magic, 0);
        if constexpr (HAS_OFFSET)
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = sub2(a[i], pairs.offset[i % 2]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (IS_LUT && XTYPE) a[i] = fma2(a[i], pairs.scale[i % 2], mul2(a[i], pairs.rest[i % 2]));
        else a[i] = mul2(a[i], pairs.scale[i % 2]);
    }
}

// What a warpgroup multiplies: 64 rows from `row`, records `begin` to `end` - 1 of those that its block reads. PAIRED: two
// blocks share 7 x 64 rows; three warpgroups of each have 64 rows of their own, the fourth has half of K of the last 64.
struct Work {
    int row, begin, end;

    DEVICE Work(int unit, int rank, int warpgroup, int count) {
        row = unit * UNIT_ROWS + 64 * warpgroup, begin = 0, end = count;
        if constexpr (PAIRED) {
            const int middle = min((count / 2 + STAGES - 1) / STAGES * STAGES, count);  // both start at the first stage
            row = (unit * 7 + (warpgroup == 3 ? 6 : 3 * rank + warpgroup)) * 64;
            if (warpgroup == 3) begin = rank ? middle : 0, end = rank ? count : middle;
        }
    }
};

// y of this block's share: items (token, 8 rows), the sums of all that have any added in an order that hangs on the item
// alone. Each block starts with its own sums: if all read the first block's at once, its memory was the limit.
DEVICE void finish(const float* factor, const u16* bias, u16* y, int M, int N, int splits, int unit, int rank, int first_token) {
    constexpr int PIECES = UNIT_ROWS / 8;
    const int items = min(M - first_token, TOKENS) * PIECES;
    const int first = PAIRED ? 0 : items * rank / splits, last = PAIRED ? items : items * (rank + 1) / splits;
    const float unit_scale = *factor * (XTYPE || IS_LUT ? 1.f : static_cast<float>(1 << FAST_BITS));
    for (int item = first + threadIdx.x; item < last; item += THREADS) {
        int token = item / PIECES, row = item % PIECES * 8, n = unit * UNIT_ROWS + row, ranks = splits;
        if constexpr (PAIRED) {
            bool shared_rows = row >= 192;  // of which a block finishes every second token
            if (shared_rows && token % 2 != rank) continue;
            n = unit * 448 + (shared_rows ? 192 : 192 * rank) + row, ranks = shared_rows ? 2 : 1;
        }
        if (n >= N) continue;
        float sum[8] = {};
#pragma unroll 4
        for (int i = 0; i < ranks; ++i) {
            int other = rank + i < splits ? rank + i : rank + i - splits;
            u32 from = shared_address(shared) + (token * SUM_PITCH + row) * 4;
            float4 low = load_four_from_rank(from, other), high = load_four_from_rank(from + 16, other);
            sum[0] += low.x, sum[1] += low.y, sum[2] += low.z, sum[3] += low.w;
            sum[4] += high.x, sum[5] += high.y, sum[6] += high.z, sum[7] += high.w;
        }
        u16* to = y + static_cast<size_t>(first_token + token) * N + n;
        u32 out[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = to_x(sum[i] * unit_scale + (bias && n + i < N ? from_x(bias[n + i]) : 0.f));
        if (N % 8 == 0)
            *reinterpret_cast<uint4*>(to) = make_uint4(out[0] | out[1] << 16, out[2] | out[3] << 16,
                                                       out[4] | out[5] << 16, out[6] | out[7] << 16);
        else
            for (int i = 0; i < 8 && n + i < N; ++i) to[i] = static_cast<u16>(out[i]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
wna16_wgmma(const u8* records, const __grid_constant__ TensorMap x, const u16* levels, const float* factor, const u16* bias, u16* y, int M,
            int N, int K, int splits, int token_tiles) {
    let_next_kernel_start();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
    const int rank = blockIdx.x % splits, unit = blockIdx.x / splits / token_tiles;
    const int first_token = blockIdx.x / splits % token_tiles * TOKENS;
    const int per_strip = (K + RECORD_K - 1) / RECORD_K;
    const int begin = PAIRED ? 0 : rank * per_strip / splits;
    const int count = PAIRED ? per_strip : (rank + 1) * per_strip / splits - begin;
    const Work work(unit, rank, warp / 4, count);
    const u32 base = shared_address(shared), arrivals = base + BARRIERS_AT + warp * STAGES * 8;
    const int strip = min(work.row / STRIP + warp % 4, (N + STRIP - 1) / STRIP - 1);
    const u8* from = records + (static_cast<size_t>(strip) * per_strip + begin) * RECORD_BYTES;
    u8* ring = shared + RING_AT + warp * STAGES * RECORD_BYTES;
    const u64 policy = token_tiles == 1 ? evict_first_policy() : evict_last_policy();
    auto fetch = [&](int i, int slot) {
        if (lane == 0 && i < work.end) {
            barrier_expect(arrivals + 8 * slot, RECORD_BYTES);
            bulk_copy(shared_address(ring + slot * RECORD_BYTES), from + static_cast<size_t>(i) * RECORD_BYTES,
                      RECORD_BYTES, arrivals + 8 * slot, policy);
        }
    };
    if (lane == 0) {
        for (int i = 0; i < STAGES; ++i) barrier_init(arrivals + 8 * i, 1);
        for (int i = 0; warp == 0 && i < STAGES; ++i) {
            barrier_init(base + FULL_AT + 8 * i, 1);
            barrier_init(base + EMPTY_AT + 8 * i, WARPS);
        }
        barrier_init_fence();
    }
    __syncwarp();
    for (int i = 0; i < STAGES; ++i) fetch(work.begin + i, i);
    if constexpr (IS_LUT)  // one byte -> two levels, a copy for each lane
        for (int i = threadIdx.x; i < TABLE_WORDS; i += THREADS)
            reinterpret_cast<u32*>(shared + TABLE_AT)[i] = levels[i / 32 & 15] | static_cast<u32>(levels[i / 32 >> 4]) << 16;
    __syncthreads();

    wait_for_kernel_before();
    auto fetch_x = [&](int i, int stage) {  // by one lane
        const u32 to = base + stage * X_STAGE, full = base + FULL_AT + stage * 8;
        const int byte = (begin + i) * RECORD_K * 2;
        barrier_expect(full, X_STAGE);
        copy_box(to, &x, byte, first_token, full);
        copy_box(to + X_TILE, &x, byte + 128, first_token, full);
    };
    if (threadIdx.x == 0)
        for (int i = 0; i < min(X_AHEAD, count); ++i) fetch_x(i, i);

    float acc[TOKENS / 2] = {};
    u32 a[2][BATCH][4];
    const u32 magic = opaque(MAGIC), column = 4 * lane;
    const u64 x_tiles = descriptor_of(base);
    for (int first = 0; first < count; first += STAGES) {
        const u32 parity = first / STAGES & 1, ring_parity = (first - work.begin) / STAGES & 1;
#pragma unroll
        for (int stage = 0; stage < STAGES; ++stage) {  // unrolled, so that a stage's addresses are constants
            const int i = first + stage;
            if (i >= count) break;
            if (warp == i % WARPS && lane == 0 && i + X_AHEAD < count) {  // each in its turn
                constexpr int LAST = STAGES - X_AHEAD;  // stages before this one still fill this round's
                if (first > 0 || stage >= LAST)
                    barrier_wait(base + EMPTY_AT + (stage + X_AHEAD) % STAGES * 8, stage < LAST ? parity ^ 1 : parity);
                fetch_x(i + X_AHEAD, (stage + X_AHEAD) % STAGES);
            }
            if (PAIRED && (i < work.begin || i >= work.end)) {
                wgmma_wait<0>();
                if (i > 0 && lane == 0) barrier_arrive(base + EMPTY_AT + (stage + STAGES - 1) % STAGES * 8);
                barrier_wait(base + FULL_AT + stage * 8, parity);
                continue;
            }
            barrier_wait(arrivals + 8 * stage, ring_parity);
            const u8* record = ring + stage * RECORD_BYTES;
            GroupPairs pairs;
            u32 words[HALF_WORDS];
#pragma unroll
            for (int batch = 0; batch < 2 * BATCHES; ++batch) {
                u32(&operands)[BATCH][4] = a[batch % 2];
                if (batch % BATCHES == 0) load_codes(words, record, batch / BATCHES, lane);
                wgmma_wait<1>();  // of the batch before the last, whose registers these are
                if (batch == 1 && i > 0 && lane == 0) barrier_arrive(base + EMPTY_AT + (stage + STAGES - 1) % STAGES * 8);
#pragma unroll
                for (int at = 0; at < BATCH; ++at) {
                    int step = batch * BATCH + at;
                    if (step % GROUP_STEPS == 0) pairs = load_group(record, step / GROUP_STEPS, g);
                    weights_of(operands[at], words, step % HALF_STEPS, pairs, magic, column);
                }
                if (batch == 0) barrier_wait(base + FULL_AT + stage * 8, parity);
                wgmma_fence();
#pragma unroll
                for (int at = 0; at < BATCH; ++at)
                    wgmma(acc, operands[at], x_tiles + (stage * X_STAGE + batch / BATCHES * X_TILE) / 16 + 2 * ((batch * BATCH + at) % HALF_STEPS));
                wgmma_commit();
            }
            __syncwarp();
            fetch(i + STAGES, stage);
        }
    }
    wgmma_wait<0>();
    __syncthreads();  // nobody needs x or records any more: their place takes the sums
    float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i)
        sums[(i / 4 * 8 + 2 * (lane % 4) + i % 2) * SUM_PITCH + 16 * warp + g + i % 4 / 2 * 8] = acc[i];
    if (splits > 1) cluster_sync();
    else __syncthreads();
    finish(factor, bias, y, M, N, splits, unit, rank, first_token);
    if (splits > 1) cluster_sync();  // nobody leaves while others read its sums
}
