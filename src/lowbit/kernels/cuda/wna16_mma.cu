// y[M, N] = x[M, K] W[N, K]^T + bias with mma.sync m16n8k16 (m16n8k8 on Turing): few tokens, bound by the weight's bytes.
//
// The weight is operand A, 16 rows of it at a time; the tokens are the 8 columns of operand B. A block owns units of
// UNIT_ROWS = 16 ROW_TILES rows, round robin. Their records, unit after unit along K, make one sequence, which is cut
// into equal runs, one for each warp:
//
//              K ─────────────────►
//   unit 0   │ w0 w0 w0 w0 w0 w1 │      a run crosses few units; at each crossing the warp deposits its sums
//   unit 1   │ w1 w1 w1 w1 w2 w2 │      [tokens][rows] in a slot of shared memory and goes on: no warp waits for
//   unit 2   │ w2 w2 w2 w3 w3 w3 │      another until all have finished, once per kernel (per round)
//
// Slot of warp w and unit u: u + w. Then the slots of a unit are added in the order of the warps: no atomics, the same
// bits every time.
//
// Every warp has a ring of records of its own (wna16_ring.cuh); x lies in shared memory (wna16_x.cuh). Where it does not
// fit, `splits` blocks share the units, each a slice of K. On sm_90 they are a cluster and add up through each other's
// shared memory; elsewhere they write float32 partial sums that `wna16_sum` adds. More than 8 TOKEN_TILES tokens:
// blockIdx.y. The sum of a group is scaled after it is added up, so codes and x meet exactly in the products.
#include "wna16_x.cuh"

// table[byte][lane] = the two levels that the byte's codes stand for
DEVICE void build_table(const u16* levels) {
    u32* table = reinterpret_cast<u32*>(table_of_block());
    for (int i = threadIdx.x; i < TABLE_WORDS; i += THREADS) {
        int byte = i / 32;
        table[i] = levels[byte & 15] | static_cast<u32>(levels[byte >> 4]) << 16;
    }
}

using Sums = float[ROW_TILES][TOKEN_TILES][4];

// acc += scale (sums - offset * sum of x) for the group that has ended
DEVICE void scale_group(Sums& acc, const Sums& sums, const u8* (&record)[ROW_TILES], const float* x_sums, int group,
                        int lane) {
    float2 of_x[TOKEN_TILES];
    if constexpr (HAS_OFFSET)
#pragma unroll
        for (int nt = 0; nt < TOKEN_TILES; ++nt)
            of_x[nt] = *reinterpret_cast<const float2*>(x_sums + group * TOKENS + 8 * nt + 2 * (lane % 4));
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile) {
        Pair scale = load_scales(record[tile], group, lane / 4), offset = load_offsets(record[tile], group, lane / 4);
#pragma unroll
        for (int nt = 0; nt < TOKEN_TILES; ++nt)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float sum = sums[tile][nt][i];
                if constexpr (HAS_OFFSET) sum -= (i < 2 ? offset.low : offset.high) * (i % 2 ? of_x[nt].y : of_x[nt].x);
                acc[tile][nt][i] += (i < 2 ? scale.low : scale.high) * sum;
            }
    }
}

// acc += one record of ROW_TILES strips times 128 columns of x
DEVICE void multiply(Sums& acc, const u8* (&record)[ROW_TILES], u32 x_address, u32 tile_pitch, const float* x_sums,
                     int lane, u32 magic, u32 table) {
    Sums sums;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32 b[TOKEN_TILES][2][4];
#pragma unroll
        for (int nt = 0; nt < TOKEN_TILES; ++nt) {
            ldmatrix_x4(b[nt][0], x_address + nt * tile_pitch + half * 128);
            ldmatrix_x4(b[nt][1], x_address + nt * tile_pitch + half * 128 + 64);
        }
        u32 words[ROW_TILES][HALF_WORDS];
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) load_codes(words[tile], record[tile], half, lane);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            int step = 4 * half + j;
#pragma unroll
            for (int tile = 0; tile < ROW_TILES; ++tile) {
                if (step % GROUP_STEPS == 0)
#pragma unroll
                    for (int nt = 0; nt < TOKEN_TILES; ++nt)
#pragma unroll
                        for (int i = 0; i < 4; ++i) sums[tile][nt][i] = 0.f;
                u32 a[4];
                decode(a, words[tile], j, magic, table);
#pragma unroll
                for (int nt = 0; nt < TOKEN_TILES; ++nt)
                    mma_16816(sums[tile][nt], a, b[nt][j / 2][2 * (j % 2)], b[nt][j / 2][2 * (j % 2) + 1]);
            }
            if (step % GROUP_STEPS == GROUP_STEPS - 1)
                scale_group(acc, sums, record, x_sums, step / GROUP_STEPS, lane);
        }
    }
}

// a warp's sums to its slot [token][SUM_PITCH]; acc is zero afterwards
DEVICE void deposit(Sums& acc, float* slot, int tokens, int lane) {
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile)
#pragma unroll
        for (int nt = 0; nt < TOKEN_TILES; ++nt)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int row = STRIP * tile + lane / 4 + 8 * (i / 2), token = 8 * nt + 2 * (lane % 4) + i % 2;
                if (token < tokens) slot[token * SUM_PITCH + row] = acc[tile][nt][i];
                acc[tile][nt][i] = 0.f;
            }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
wna16_mma(const u8* records, const u16* x, const int* order, const u16* levels, const float* factor, const u16* bias,
          u16* y, float* partial, int M, int N, int K, int splits, int per_round) {
    let_next_kernel_start();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, split = blockIdx.x % splits;
    Work work;
    const int strips = (N + STRIP - 1) / STRIP;
    work.records = (K + RECORD_K - 1) / RECORD_K;
    work.first = blockIdx.x / splits, work.stride = gridDim.x / splits;
    work.count = ((strips + ROW_TILES - 1) / ROW_TILES - work.first + work.stride - 1) / work.stride;
    work.begin = split * work.records / splits, work.end = (split + 1) * work.records / splits;
    work.per_round = per_round, work.rounds = (work.count + per_round - 1) / per_round;
    Ring ring;
    ring.start(records, work, warp, lane);
    if constexpr (IS_LUT) build_table(levels);
    const float unit_scale = *factor;  // here, not where it is used: 0.7 us from memory

    const int first_token = blockIdx.y * TOKENS, tokens = min(M - first_token, TOKENS);
    const int longest = (work.records + splits - 1) / splits, pitch = longest * RECORD_K + 8;
    float* x_sums = reinterpret_cast<float*>(x_of_block() + tokens * pitch * 2);
    float* slots = x_sums + (HAS_OFFSET ? longest * GROUPS * TOKENS : 0);
    const int slot_words = tokens * SUM_PITCH;
    wait_for_kernel_before();
    load_x(x + static_cast<size_t>(first_token) * K, order, tokens, K, work, pitch, x_sums);
    __syncthreads();

    // ldmatrix: lane l asks for token l mod 8, columns 8 (l / 8). Where there are fewer tokens it reads something else,
    // 16 bytes further for each lane: asking for one row twice is a bank conflict, and those sums are never used.
    const int my_token = lane % 8;
    const u32 row_at = (my_token < tokens ? my_token * pitch : 8 * my_token) * 2;
    const u32 second_at = (8 + my_token < tokens ? (8 + my_token) * pitch : 8 * my_token) * 2;
    const u32 x_address = shared_address(x_of_block()) + row_at + lane / 8 * 16, tile_pitch = second_at - row_at;
    const u32 table = table_address() + 4 * lane, magic = opaque(MAGIC);

    for (int round = 0; round < work.rounds; ++round) {
        const int base = round * per_round, total = work.in_round(round), units = total / work.length();
        Sums acc = {};
        Cursor at;
        at.start(records, work, warp, round);
        if (at.round == round) {
            while (true) {
                ring.wait();
                const u8* record[ROW_TILES];
#pragma unroll
                for (int tile = 0; tile < ROW_TILES; ++tile) record[tile] = ring.tile(at, tile);
                int column = at.record - work.begin;
                multiply(acc, record, x_address + column * RECORD_K * 2, tile_pitch, x_sums + column * GROUPS * TOKENS,
                         lane, magic, table);
                ring.refill(work);
                int local = at.local;
                if (at.step(records, work) || !at.left) deposit(acc, slots + (local - base + warp) * slot_words, tokens, lane);
                if (!at.left) break;
            }
        }
        __syncthreads();
        const bool by_cluster = splits > 1 && partial == nullptr;
        for (int out = threadIdx.x; out < units * UNIT_ROWS * tokens; out += THREADS) {
            int row = out % UNIT_ROWS, token = out / UNIT_ROWS % tokens, local = out / UNIT_ROWS / tokens;
            int n = (work.first + (base + local) * work.stride) * UNIT_ROWS + row;
            int from = Work::warp_of(local * work.length(), total);
            int to = Work::warp_of((local + 1) * work.length() - 1, total);
            float sum = 0.f;
            for (int first = from; first <= to; first += 8) {  // eight loads at once, then added in order
                float part[8];
#pragma unroll
                for (int i = 0; i < 8; ++i) {  // a round of fewer records than warps leaves some warps without a run
                    int w = first + i;
                    bool has_run = w <= to && total * w / WARPS < total * (w + 1) / WARPS;
                    part[i] = has_run ? slots[(local + w) * slot_words + token * SUM_PITCH + row] : 0.f;
                }
#pragma unroll
                for (int i = 0; i < 8; ++i) sum += part[i];
            }
            size_t at_y = static_cast<size_t>(first_token + token) * N + n;
            if (by_cluster) slots[(local + from) * slot_words + token * SUM_PITCH + row] = sum;
            else if (n < N && splits == 1) y[at_y] = to_x(sum * unit_scale + (bias ? from_x(bias[n]) : 0.f));
            else if (n < N) partial[static_cast<size_t>(split) * M * N + at_y] = sum;
        }
#if __CUDA_ARCH__ >= 900
        if (by_cluster) {  // rank r finishes every splits-th output, from all ranks' slots, in order
            cluster_sync();
            for (int out = threadIdx.x * splits + split; out < units * UNIT_ROWS * tokens; out += THREADS * splits) {
                int row = out % UNIT_ROWS, token = out / UNIT_ROWS % tokens, local = out / UNIT_ROWS / tokens;
                int n = (work.first + (base + local) * work.stride) * UNIT_ROWS + row;
                float sum = 0.f;
                for (int rank = 0; rank < splits; ++rank) {
                    int length = (rank + 1) * work.records / splits - rank * work.records / splits;
                    int from = Work::warp_of(local * length, units * length);
                    sum += load_from_rank(
                        shared_address(slots + (local + from) * slot_words + token * SUM_PITCH + row), rank);
                }
                size_t at_y = static_cast<size_t>(first_token + token) * N + n;
                if (n < N) y[at_y] = to_x(sum * unit_scale + (bias ? from_x(bias[n]) : 0.f));
            }
            cluster_sync();  // nobody leaves while others read its slots
        } else
#endif
        if (round + 1 < work.rounds) __syncthreads();
    }
}

// y = factor * sum of the partial sums, in order, + bias
extern "C" __global__ void wna16_sum(const float* partial, const float* factor, const u16* bias, u16* y, int M, int N,
                                     int splits) {
    let_next_kernel_start();
    wait_for_kernel_before();
    const size_t count = static_cast<size_t>(M) * N;
    for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count;
         i += static_cast<size_t>(gridDim.x) * blockDim.x) {
        float total = 0.f;
        for (int split = 0; split < splits; ++split) total += partial[split * count + i];
        y[i] = to_x(total * *factor + (bias ? from_x(bias[i % N]) : 0.f));
    }
}
