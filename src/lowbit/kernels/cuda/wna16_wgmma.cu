// y[M, N] = x[M, K] W[N, K]^T + bias with wgmma m64nTk16 (sm_90a): 9 tokens and more.
//
// The weight is operand A from registers: what a warp decodes never goes back to shared memory. x is operand B, from
// shared memory, so the product computed is y^T, a tile of UNIT_ROWS = 64 WARPGROUPS rows by TOKENS tokens in one block:
//
//              K ──────────────────►              a stage, brought by the copy engine: the unit's records of 128
//        ┌────────┬────────┬────────┐              columns, which lie together in memory, and 128 columns of x
//   64   │ wg0  ─ 4 warps x 16 rows  │              [TOKENS][K] as two tiles of 64 (128 bytes a row, swizzled by the
//   rows ├──────────────────────────┤              row). Barriers `full` and `empty` let a warp run ahead of another
//   64   │ wg1                       │              by some stages; the warps ask for the next one in turn
//        └──────────────────────────┘
//
// The first records come before the kernel before has ended. While the tensor cores work on one batch of steps, a warp
// decodes the next: operand registers are double, wgmma waits for the batch before the last. Every multiprocessor gets the
// same number of steps, wherever tiles begin and end (wna16_steps.cuh).
#include "wna16_record.cuh"

// TOKENS 8 to 128; WARPGROUPS 2 or 4; STAGES, at least 3; SCALED, see wna16_weights.cuh
constexpr int WARPS = 4 * WARPGROUPS, THREADS = 32 * WARPS, UNIT_ROWS = 16 * WARPS;
constexpr int X_TILE = TOKENS * 128, X_STAGE = 2 * X_TILE;  // bytes
constexpr int RECORDS_STAGE = WARPS * RECORD_BYTES, RECORDS_AT = STAGES * X_STAGE;
constexpr int FULL_AT = (RECORDS_AT + STAGES * RECORDS_STAGE + 127) / 128 * 128, EMPTY_AT = FULL_AT + STAGES * 8;
constexpr int PIECES_AT = (EMPTY_AT + STAGES * 8 + 127) / 128 * 128, MOST_PIECES = 96;
constexpr int TABLE_AT = (PIECES_AT + MOST_PIECES * 20 + 127) / 128 * 128;
// A stage is asked for AHEAD steps before it is multiplied, and left SLACK steps before that: who asks must not wait for
// slower warps. gate_up at 32 tokens, 8 stages: slack 2 28.7 us, 3 27.1, 4 25.9
constexpr int SLACK = (STAGES + 1) / 2, AHEAD = STAGES - SLACK;
// steps of 16 columns at a time. 4: ptxas does not end; 2 where 64 registers are all: it lets every wgmma wait for itself
constexpr int HALF_STEPS = 4, BATCH = THREADS * BLOCKS >= 1024 && TOKENS > 8 ? 1 : 2, BATCHES = HALF_STEPS / BATCH;
constexpr bool SCALED_SUMS = SCALED && GROUP_STEPS % BATCH == 0;

#include "wna16_steps.cuh"
#include "wna16_weights.cuh"

SHARED_MEMORY(1024);

DEVICE void add_scaled(Sums& acc, const Sums& of_group, const Pair& scales) {
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) acc[i] += (i % 4 < 2 ? scales.low : scales.high) * of_group[i];
}

// where sums go: y = sums scale + bias
struct Outputs {
    const u16* bias;
    u16* y;
    int M, N;
    float scale;

    // 16 rows by 8 tokens of a warp: its two 8 x 8 pieces turned over, a lane has two rows of one token
    DEVICE void store(float4 sums, int row, int first_token, int lane) const {
        const int g = lane / 4, c = lane % 4, token = first_token + g;
        const float of[2][2] = {{sums.x, sums.y}, {sums.z, sums.w}};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float added = bias && row + g + 8 * i < N ? from_x(bias[row + g + 8 * i]) : 0.f;
            const u32 first = to_x(of[i][0] * scale + added), second = to_x(of[i][1] * scale + added);
            const u32 turned = transpose_8x8(first | second << 16);
            const int n = row + 8 * i + 2 * c;
            u16* to = y + static_cast<size_t>(token) * N + n;
            if (token >= M || n >= N) continue;
            if (N % 2 == 0) *reinterpret_cast<u32*>(to) = turned;
            else {
                to[0] = static_cast<u16>(turned);
                if (n + 1 < N) to[1] = static_cast<u16>(turned >> 16);
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
wna16_wgmma(const u8* records, const __grid_constant__ TensorMap x, const u16* levels, const float* factor, const u16* bias, u16* y,
            float4* partial, int M, int N, int K, int waves, int token_tiles, int parts) {
    let_next_kernel_start();
    const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32, g = lane / 4;
    const int strips = (N + STRIP - 1) / STRIP, per_strip = (K + RECORD_K - 1) / RECORD_K;
    const int tiles = (N + UNIT_ROWS - 1) / UNIT_ROWS * token_tiles;
    const int workers = gridDim.x - parts, worker = blockIdx.x;
    const Schedule schedule = {static_cast<u32>(workers), per_strip, tiles - waves * workers, token_tiles};
    if (threadIdx.x == 0) prefetch_map(&x);
    Piece* pieces = reinterpret_cast<Piece*>(shared + PIECES_AT);
    if (threadIdx.x < MOST_PIECES) pieces[threadIdx.x] = schedule.piece(worker, threadIdx.x, waves);
    const u32 base = shared_address(shared);
    const u64 policy = token_tiles == 1 ? evict_first_policy() : evict_last_policy();
    struct Step {
        int strip, record, first_token;
        bool exists;
    };
    auto step_at = [&](int position, int index) {  // index: of its piece, or of one before
        while (pieces[index].left > 0 && position >= pieces[index].start + pieces[index].left) ++index;
        const Piece piece = pieces[index];
        const int strip = min(piece.unit * WARPS, strips_of(N) - WARPS);
        return Step{strip, piece.step + position - piece.start, piece.first_token, piece.left > 0};
    };
    auto fetch_records = [&](const Step& step, int stage) {  // by one lane, as the others here
        const u32 full = base + FULL_AT + stage * 8;
        barrier_expect(full, X_STAGE + RECORDS_STAGE);
        bulk_copy(base + RECORDS_AT + stage * RECORDS_STAGE,
                  records + record_index(step.strip, step.record, per_strip) * RECORD_BYTES, RECORDS_STAGE, full, policy);
    };
    auto fetch_x = [&](const Step& step, int stage) {
        const u32 to = base + stage * X_STAGE, full = base + FULL_AT + stage * 8;
        const int byte = step.record * RECORD_K * 2;
        copy_box(to, &x, byte, step.first_token, full);
        copy_box(to + X_TILE, &x, byte + 128, step.first_token, full);
    };
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(base + FULL_AT + 8 * i, 1);
            barrier_init(base + EMPTY_AT + 8 * i, WARPS);
        }
        barrier_init_fence();
    }
    __syncthreads();
    const Step first_step = step_at(lane, 0);
    const bool starts = warp == 0 && lane < AHEAD && first_step.exists;  // a lane for each of the first steps
    if (starts) fetch_records(first_step, lane);
    if constexpr (IS_LUT) {  // one byte -> two levels, a copy for each lane
        for (int i = threadIdx.x; i < TABLE_WORDS; i += THREADS)
            reinterpret_cast<u32*>(shared + TABLE_AT)[i] = levels[i / 32 & 15] | static_cast<u32>(levels[i / 32 >> 4]) << 16;
        __syncthreads();
    }
    wait_for_kernel_before();
    if (starts) fetch_x(first_step, lane);

    constexpr bool IS_SMALLER = !XTYPE && !IS_LUT && !SCALED_SUMS;
    const Outputs outputs = {bias, y, M, N, *factor * (IS_SMALLER ? static_cast<float>(1 << FAST_BITS) : 1.f)};
    Sums acc = {}, of_group = {};
    Pair last = {};  // the scales of of_group
    u32 a[2][BATCH][4];
    const u32 magic = opaque(MAGIC), column = 4 * lane;
    const u32 x_tiles = descriptor_low(base);
    u32 stage = 0, parity = 0;
    for (int index = 0, position = 0; pieces[index].left > 0; ++index) {
        const int end = position + pieces[index].left;
        for (; position < end; ++position) {
            const u32 full = base + FULL_AT + stage * 8, before = stage > 0 ? stage - 1 : STAGES - 1;
            if (warp == position % WARPS && lane == 0) {
                const u32 next = stage < SLACK ? stage + AHEAD : stage - SLACK;
                if (const Step step = step_at(position + AHEAD, index); step.exists) {
                    if (position >= SLACK) barrier_wait(base + EMPTY_AT + next * 8, stage < SLACK ? parity ^ 1 : parity);
                    fetch_records(step, next);
                    fetch_x(step, next);
                }
            }
            const u8* record = shared + RECORDS_AT + stage * RECORDS_STAGE + warp * RECORD_BYTES;
            const u64 x_at = descriptor(uniform(x_tiles + stage * (X_STAGE / 16)));
            GroupPairs pairs;
            u32 words[HALF_WORDS];
            barrier_wait(full, parity);
#pragma unroll
            for (int batch = 0; batch < 2 * BATCHES; ++batch) {
                u32(&operands)[BATCH][4] = a[batch % 2];
                if (batch % BATCHES == 0) load_codes(words, record, batch / BATCHES, lane);
                wgmma_wait<1>();  // of the batch before the last, whose registers these are
                if (batch == 1 && position > 0 && lane == 0) barrier_arrive(base + EMPTY_AT + before * 8);
#pragma unroll
                for (int at = 0; at < BATCH; ++at) {
                    int step = batch * BATCH + at;
                    if (step % GROUP_STEPS == 0) pairs = load_group(record, step / GROUP_STEPS, g);
                    weights_of(operands[at], words, step % HALF_STEPS, pairs, magic, shared + TABLE_AT, column);
                }
                constexpr int GROUP_BATCHES = (GROUP_STEPS + BATCH - 1) / BATCH;
                const bool fresh = SCALED_SUMS && batch % GROUP_BATCHES == 0;
                if (fresh) {
                    wgmma_wait<0>();
                    add_scaled(acc, of_group, last);
                    last = pairs.of_sums;
                }
                wgmma_fence();
#pragma unroll
                for (int at = 0; at < BATCH; ++at) {
                    const u64 b = x_at + batch / BATCHES * (X_TILE / 16) + 2 * ((batch * BATCH + at) % HALF_STEPS);
                    if constexpr (!SCALED_SUMS) wgmma<true>(acc, operands[at], b);
                    else if (fresh && at == 0) wgmma<false>(of_group, operands[at], b);
                    else wgmma<true>(of_group, operands[at], b);
                }
                wgmma_commit();
            }
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        wgmma_wait<0>();
        if constexpr (SCALED_SUMS) add_scaled(acc, of_group, last), last = {};
        const Piece piece = pieces[index];
        if (parts > 0 || piece.step + piece.left < per_strip) hand_on(acc, partial, warp, lane, parts > 0 ? OCTETS : 1);
        else {
            const int tile = piece.unit * token_tiles + piece.first_token / TOKENS;
            const int others = piece.step > 0 ? worker - schedule.block_of(tile * per_strip) : 0;
            const int first = worker - others, row = (piece.unit * WARPS + warp) * STRIP;
            if (others > 0) await(partial, first, others, warp, 0, lane);
            for (int i = 0; i < others; ++i) take_over(acc, partial, first + i, warp, lane);
#pragma unroll
            for (int i = 0; i < OCTETS; ++i) {
                const float4 sums = {acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]};
                outputs.store(sums, row, piece.first_token + 8 * i, lane);
            }
            if (others > 0) lower(partial, first, others, warp, 0, lane);
        }
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) acc[i] = 0.f;
    }
    if (parts > 0 && worker >= parts) {  // a share of the tile before
        const int tile = worker / parts - 1, share = worker % parts, first = tile * parts;
        const int unit = tile / token_tiles, first_token = tile % token_tiles * TOKENS;
        const int begin = WARPS * OCTETS * share / parts + warp, end = WARPS * OCTETS * (share + 1) / parts;
        for (int i = begin; i < end; i += WARPS) await(partial, first, parts, i / OCTETS, i % OCTETS, lane);
        for (int i = begin; i < end; i += WARPS) {
            const int strip = i / OCTETS, octet = i % OCTETS;
            const float4 sums = added_up(partial, first, parts, strip, octet, lane);
            outputs.store(sums, (unit * WARPS + strip) * STRIP, first_token + 8 * octet, lane);
            lower(partial, first, parts, strip, octet, lane);
        }
    }
}
