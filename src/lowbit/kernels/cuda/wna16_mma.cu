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
// Every warp has a ring of STAGES steps of its own, filled by the copy engine (sm_90: one lane asks for a record and a
// barrier tells when it has come; sm_80: cp.async; sm_75: no ring, plain loads). Filling starts before the kernel
// before has finished: the weight does not depend on it, x does.
//
// x, the slice of K that the block needs, lies in shared memory whole, with its sum over each group. Where it does not
// fit, `splits` blocks share the units, each a slice of K. On sm_90 they are a cluster and add up through each other's
// shared memory; elsewhere they write float32 partial sums that `wna16_sum` adds. More than 8 TOKEN_TILES tokens:
// blockIdx.y. The sum of a group is scaled after it is added up, so codes and x meet exactly in the products.
#include "wna16_record.cuh"

// WARPS, ROW_TILES (strips a warp works on at once), TOKEN_TILES (8 tokens each), STAGES
constexpr int THREADS = 32 * WARPS;
constexpr int UNIT_ROWS = STRIP * ROW_TILES;
constexpr int TOKENS = 8 * TOKEN_TILES;
constexpr int STEP_BYTES = RECORD_BYTES * ROW_TILES;
constexpr int SUM_PITCH = UNIT_ROWS + 4;  // floats; 4 apart so that the four columns of a lane's quad differ in bank
#if __CUDA_ARCH__ >= 800
constexpr int RING_BYTES = STEP_BYTES * STAGES * WARPS;
#else
constexpr int RING_BYTES = 0;
#endif
// shared memory: ring | barriers | x | sums of x | slots; with a table, FRONT warps' rings | table | rings | barriers ...
constexpr int FRONT_BYTES = TABLE_ADDRESS - 1024;  // up to the table; the system may own the first KiB
constexpr int FITTING = FRONT_BYTES / (STEP_BYTES * STAGES);
constexpr int FRONT = IS_LUT && RING_BYTES ? (FITTING < WARPS ? FITTING : WARPS) : 0;
constexpr int BARRIER_BYTES = (8 * STAGES * WARPS + 15) / 16 * 16;

SHARED_MEMORY(16);

// in a cluster the upper byte of a shared address is the block's rank: keep it (without: "illegal instruction")
DEVICE u32 table_address() { return (shared_address(shared) & 0xFF000000u) + TABLE_ADDRESS; }
DEVICE u8* table_of_block() { return shared + (table_address() - shared_address(shared)); }
DEVICE u8* after_table() { return IS_LUT ? table_of_block() + TABLE_WORDS * 4 : shared; }
DEVICE u8* ring_of(int warp) {
    return warp < FRONT ? shared + warp * STAGES * STEP_BYTES : after_table() + (warp - FRONT) * STAGES * STEP_BYTES;
}
DEVICE u8* barriers_of_block() { return after_table() + RING_BYTES - FRONT * STAGES * STEP_BYTES; }
DEVICE u8* x_of_block() { return barriers_of_block() + BARRIER_BYTES; }

// What a block does: local units 0..count-1, of which i is unit first + i stride; records begin..end-1 of K.
struct Work {
    int first, stride, count, records, begin, end, per_round, rounds;

    DEVICE int length() const { return end - begin; }
    DEVICE int in_round(int round) const { return min(per_round, count - round * per_round) * length(); }
    // the warp whose run holds record `index` of a round of `total` records
    DEVICE static int warp_of(int index, int total) { return ((index + 1) * WARPS - 1) / total; }
};

// A warp's place in its runs, round by round.
struct Cursor {
    const u8* from;  // the records of the unit's strips there; they lie side by side, of a last unit past the end in the padding
    int round, left, local, record;  // left: records to go in this run; local: unit; record: of K

    DEVICE void start(const u8* records, const Work& work, int warp, int first_round) {
        left = local = record = 0;
        for (round = first_round; round < work.rounds; ++round) {
            int total = work.in_round(round), index = total * warp / WARPS;
            left = total * (warp + 1) / WARPS - index;
            local = round * work.per_round + index / work.length(), record = work.begin + index % work.length();
            if (left) break;
        }
        find(records, work);
    }
    DEVICE void find(const u8* records, const Work& work) {
        const int strip = (work.first + local * work.stride) * ROW_TILES;
        from = records + record_index(strip, record, work.records) * RECORD_BYTES;
    }
    DEVICE bool step(const u8* records, const Work& work) {  // to the next record; true where that is in another unit
        --left, ++record, from += UNIT_STRIPS * RECORD_BYTES;
        const bool crossed = record == work.end;
        if (crossed) record = work.begin, ++local, find(records, work);
        return crossed;
    }
};

// The warp's ring of steps. `wait` waits for the oldest step; `refill` hands its place to the step STAGES ahead.
struct Ring {
    const u8* records;
    u8* slots;
    Cursor ahead;
    int slot, lane, warp;
#if __CUDA_ARCH__ >= 900
    u32 barriers, parity;
    u64 policy;
#endif

    DEVICE void start(const u8* weight, const Work& work, int warp_, int lane_) {
        records = weight, warp = warp_, lane = lane_, slot = 0;
        slots = ring_of(warp);
        ahead.start(records, work, warp, 0);
#if __CUDA_ARCH__ >= 900
        barriers = shared_address(barriers_of_block()) + 8 * STAGES * warp, parity = 0, policy = evict_first_policy();
        if (lane == 0) {
            for (int i = 0; i < STAGES; ++i) barrier_init(barriers + 8 * i, 1);
            barrier_init_fence();
        }
        __syncwarp();
#endif
#if __CUDA_ARCH__ >= 800
        for (int i = 0; i < STAGES; ++i) fill(work, i);
#endif
    }

    DEVICE void fill(const Work& work, int into) {
#if __CUDA_ARCH__ >= 900
        if (lane == 0 && ahead.left) {
            barrier_expect(barriers + 8 * into, STEP_BYTES);
            bulk_copy(shared_address(slots + into * STEP_BYTES), ahead.from, STEP_BYTES, barriers + 8 * into, policy);
        }
#elif __CUDA_ARCH__ >= 800
        if (ahead.left) {
            u32 to = shared_address(slots + into * STEP_BYTES);
            for (int byte = 16 * lane; byte < STEP_BYTES; byte += 512) copy_16(to + byte, ahead.from + byte);
        }
        copies_commit();
#endif
        if (ahead.left) ahead.step(records, work);
        if (!ahead.left && ahead.round + 1 < work.rounds) ahead.start(records, work, warp, ahead.round + 1);
    }

    DEVICE void wait() {
#if __CUDA_ARCH__ >= 900
        barrier_wait(barriers + 8 * slot, parity);
#elif __CUDA_ARCH__ >= 800
        copies_wait<STAGES - 1>();
        __syncwarp();
#endif
    }

    DEVICE const u8* tile(const Cursor& at, int tile) const {
#if __CUDA_ARCH__ >= 800
        return slots + slot * STEP_BYTES + tile * RECORD_BYTES;
#else
        return at.from + tile * RECORD_BYTES;
#endif
    }

    DEVICE void refill(const Work& work) {
#if __CUDA_ARCH__ >= 800
        __syncwarp();  // every lane has read the slot
        fill(work, slot);
        if (++slot == STAGES) {
            slot = 0;
#if __CUDA_ARCH__ >= 900
            parity ^= 1;
#endif
        }
#endif
    }
};

DEVICE float sum_of_eight(uint4 v) {
    float total = 0.f;
    for (u32 word : {v.x, v.y, v.z, v.w}) total += from_x(static_cast<u16>(word)) + from_x(static_cast<u16>(word >> 16));
    return total;
}

DEVICE uint4 eight_of_x(const u16* row, const int* order, int k, int K, bool vectors) {
    if (vectors) return k < K ? *reinterpret_cast<const uint4*>(row + k) : make_uint4(0, 0, 0, 0);
    u32 single[8];
    for (int i = 0; i < 8; ++i) {
        int from = k + i < K ? (order ? order[k + i] : k + i) : -1;
        single[i] = from < 0 ? 0 : row[from];
    }
    return make_uint4(single[0] | single[1] << 16, single[2] | single[3] << 16, single[4] | single[5] << 16,
                      single[6] | single[7] << 16);
}

// where in the block's slice of x a thread loads: 16 bytes of each chunk of a token; no division, which costs 0.1 us here
struct Chunk {
    int token, first;  // column

    DEVICE int column() const { return first + 8 * threadIdx.x; }
    DEVICE void next(int columns) {
        first += 8 * THREADS;
        if (first >= columns) first = 0, ++token;
    }
};

// `tokens` rows of x, columns of the block's slice, to shared memory [token][pitch], past K zeros; and the sum of each
// group, [group][TOKENS] floats. order: x[:, order[k]]. BATCH loads are in flight at once: one by one, each token took
// 0.4 us more (H200, K = 4096).
DEVICE void load_x(const u16* x, const int* order, int tokens, int K, const Work& work, int pitch, float* x_sums) {
    constexpr int BATCH = 4;
    u16* xs = reinterpret_cast<u16*>(x_of_block());
    const int columns = work.length() * RECORD_K, start = work.begin * RECORD_K;
    const bool vectors = order == nullptr && K % 8 == 0 && (reinterpret_cast<size_t>(x) & 15) == 0;
    for (Chunk load = {}, store = {}; store.token < tokens;) {
        uint4 v[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i, load.next(columns)) {
            v[i] = make_uint4(0, 0, 0, 0);
            if (load.token < tokens && load.column() < columns)
                v[i] = eight_of_x(x + static_cast<size_t>(load.token) * K, order, start + load.column(), K, vectors);
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i, store.next(columns)) {
            if (store.token >= tokens) continue;
            const int token = store.token, column = store.column();
            if (column < columns) *reinterpret_cast<uint4*>(xs + token * pitch + column) = v[i];
            if constexpr (HAS_OFFSET) {
                float total = sum_of_eight(v[i]);
#pragma unroll
                for (int other = 1; other < GROUP / 8; other *= 2) total += __shfl_xor_sync(~0u, total, other);
                if (column < columns && column % GROUP == 0) x_sums[column / GROUP * TOKENS + token] = total;
            }
        }
    }
}

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
