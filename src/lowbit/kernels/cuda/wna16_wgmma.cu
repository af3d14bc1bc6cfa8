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
// decodes the next: operand registers are double, wgmma waits for the batch before the last. A code becomes (code - zero)
// scale, rounded to x's type: the sums then run over all of K without a stop at each group. fp16: the scale is taken
// 2^-FAST_BITS smaller (no overflow), y's factor larger.
//
// Every multiprocessor gets the same number of steps (128 columns of one tile), wherever tiles begin and end (stream-K,
// arXiv:2301.03598); see Schedule. Nothing waits for a whole block, neither at a step nor at the end of a tile: a warp's
// sums stay in its registers, go to memory where another block finishes the tile, and come from there in the same order.
// CLUSTER 2: two blocks work as one of twice the rows; each brings half of x, into both, for x comes from the L2.
#include "wgmma_half.cuh"
#include "wna16_record.cuh"

// TOKENS 8 to 128; WARPGROUPS 2 or 4; STAGES, at least 3; CLUSTER 1 or 2; SCALED, see SCALED_SUMS
constexpr int WARPS = 4 * WARPGROUPS, THREADS = 32 * WARPS, UNIT_ROWS = 16 * WARPS;
constexpr int X_TILE = TOKENS * 128, X_STAGE = 2 * X_TILE;  // bytes
constexpr int RECORDS_STAGE = WARPS * RECORD_BYTES, RECORDS_AT = STAGES * X_STAGE;
constexpr int FULL_AT = (RECORDS_AT + STAGES * RECORDS_STAGE + 127) / 128 * 128, EMPTY_AT = FULL_AT + STAGES * 8;
constexpr int PIECES_AT = (EMPTY_AT + STAGES * 8 + 127) / 128 * 128, MOST_PIECES = 96;
constexpr int TABLE_AT = (PIECES_AT + MOST_PIECES * 20 + 127) / 128 * 128;
constexpr int AHEAD = STAGES - 2;  // a stage is asked for so many steps before it is multiplied
// steps of 16 columns at a time. 4: ptxas does not end; 2 where 64 registers are all: it lets every wgmma wait for itself
constexpr int HALF_STEPS = 4, BATCH = THREADS * BLOCKS >= 1024 && TOKENS > 8 ? 1 : 2, BATCHES = HALF_STEPS / BATCH;

// SCALED_SUMS: codes are multiplied as they are, and a group's sums are scaled when it ends: fewer instructions where tokens
// are few. Else a weight is scaled before it is multiplied, and the sums run over all of K.
constexpr bool SCALED_SUMS = SCALED && GROUP_STEPS % BATCH == 0;

SHARED_MEMORY(1024);

// what stands beside the codes of rows g and g + 8 in one group, each as a pair of equal halves
struct GroupPairs {
    u32 offset[2], scale[2], rest[2];  // rest: of a scale that one bf16 does not hold; tables only
    Pair of_sums;                      // SCALED_SUMS: the scales
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
    pairs.of_sums = scales;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        if constexpr (HAS_OFFSET) pairs.offset[row] = offset_pair(zeros[row]);
        if constexpr (SCALED_SUMS) continue;
        float scale = row ? scales.high : scales.low;
        if constexpr (!XTYPE && !IS_LUT) scale *= 1.f / (1 << FAST_BITS);
        u16 rounded = to_x(scale);
        pairs.scale[row] = rounded * 0x00010001u;
        if constexpr (IS_LUT && XTYPE) pairs.rest[row] = to_x(scale - from_x(rounded)) * 0x00010001u;
    }
    return pairs;
}

// operand A of step j: weights, rounded to x's type, or without their scale
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
    if constexpr (SCALED_SUMS) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (IS_LUT && XTYPE) a[i] = fma2(a[i], pairs.scale[i % 2], mul2(a[i], pairs.rest[i % 2]));
        else a[i] = mul2(a[i], pairs.scale[i % 2]);
    }
}

// Which steps a block multiplies, and in which order. The last `waves` x blocks tiles go round robin, a whole tile at a
// time. The steps of the `shared_tiles` before them are one sequence, cut into a run for each block:
//
//   tile 0            tile 1            tile 2          A tile is finished by the block that has its last step. Where a
//   ├───────────┬─────┼───────┬─────────┼───┬───────    run ends inside a tile, the block does that piece first and hands
//   │  block 0  │  block 1    │  block 2    │  ...      its sums on: they are there long before they are wanted, and
//                                                       blocks wait for lower ones alone, which have started before.
//
// Where many blocks share a tile (`parts` each, evenly), one would be long at adding up: there all hand on, and the
// parts of the next tile finish a share of it each; `parts` blocks more, which have no steps, do so for the last tile.
//
// A block's order is a sequence of pieces: the one to hand on, what remains of its first tile, whole tiles. They are
// listed in shared memory: in registers the list cost the loop 30.
struct Piece {
    int unit, first_token, step, start, left;  // first step in the tile, first position, how many; none after the last
};

struct Schedule {
    u32 blocks;
    int per_tile, shared_tiles, token_tiles;

    DEVICE int first_of(u32 block) const { return shared_tiles * per_tile * block / blocks; }  // the plan: below 2^32
    DEVICE int block_of(u32 step) const { return ((step + 1) * blocks - 1) / (u32(shared_tiles) * per_tile); }
    DEVICE Piece piece(u32 block, int index, int waves) const {
        if (block >= blocks) return {};
        const int begin = first_of(block), length = first_of(block + 1) - begin, first = begin / per_tile;
        const int head = min((begin + length) % per_tile, length), head_at = begin + length - head;
        const int rest = min(per_tile - begin % per_tile, length - head), whole = (length - head - rest) / per_tile;
        if (head > 0 && index-- == 0) return of_tile(head_at / per_tile, head_at % per_tile, 0, head);
        if (rest > 0 && index-- == 0) return of_tile(first, begin % per_tile, head, rest);
        const int tile = index < whole ? first + 1 + index : shared_tiles + (index - whole) * blocks + block;
        const int start = head + rest + index * per_tile;
        return of_tile(tile, 0, start, index < whole + waves ? per_tile : 0);
    }
    DEVICE Piece of_tile(int tile, int step, int start, int left) const {
        return {tile / token_tiles, tile % token_tiles * TOKENS, step, start, left};
    }
};

using Sums = float[TOKENS / 2];

DEVICE void add_scaled(Sums& acc, const Sums& of_group, const Pair& scales) {
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) acc[i] += (i % 4 < 2 ? scales.low : scales.high) * of_group[i];
}

// a warp's sums in memory: [block][warp][TOKENS / 8][lane] float4; flags [block][warp][TOKENS / 8] behind them all
constexpr int OCTETS = TOKENS / 8;
DEVICE float4* sums_of(float4* partial, int block, int warp, int lane) {
    return partial + (static_cast<size_t>(block) * WARPS + warp) * (OCTETS * 32) + lane;
}
DEVICE u64* flag_of(float4* partial, int block, int warp) {
    return reinterpret_cast<u64*>(sums_of(partial, gridDim.x, 0, 0)) + (block * WARPS + warp) * OCTETS;
}

// flags: one, or one for every eight tokens where several warps take them over
DEVICE void hand_on(const Sums& acc, float4* partial, int warp, int lane, int flags) {
    float4* to = sums_of(partial, blockIdx.x, warp, lane);
#pragma unroll
    for (int i = 0; i < OCTETS; ++i) to[32 * i] = {acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]};
    __syncwarp();
    if (lane < flags) raise_flag(flag_of(partial, blockIdx.x, warp) + lane);
}

// the sums of eight tokens that `count` blocks from `first` on have handed on, added up in their order; eight loads at once
DEVICE float4 added_up(float4* partial, int first, int count, int warp, int octet, int lane) {
    float4 total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
        float4 more = load_fresh(sums_of(partial, first + CLUSTER * i, warp, lane) + 32 * octet);
        total.x += more.x, total.y += more.y, total.z += more.z, total.w += more.w;
    }
    return total;
}

// acc += all that one block has handed on; loads one by one took 0.7 us each: 11 us at 128 tokens
DEVICE void take_over(Sums& acc, float4* partial, int block, int warp, int lane) {
    constexpr int AT_ONCE = OCTETS < 8 ? OCTETS : 8;
    const float4* from = sums_of(partial, block, warp, lane);
#pragma unroll
    for (int first = 0; first < OCTETS; first += AT_ONCE) {
        float4 more[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) more[i] = load_fresh(from + 32 * (first + i));
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            float* to = acc + 4 * (first + i);
            to[0] += more[i].x, to[1] += more[i].y, to[2] += more[i].z, to[3] += more[i].w;
        }
    }
}

DEVICE void await(float4* partial, int first, int count, int warp, int octet, int lane) {
    for (int i = lane; i < count; i += 32) await_flag(flag_of(partial, first + CLUSTER * i, warp) + octet);
    __syncwarp();
}

DEVICE void lower(float4* partial, int first, int count, int warp, int octet, int lane) {  // for the next launch
    __syncwarp();
    for (int i = lane; i < count; i += 32) flag_of(partial, first + CLUSTER * i, warp)[octet] = 0;
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
    const int tiles = (N + CLUSTER * UNIT_ROWS - 1) / (CLUSTER * UNIT_ROWS) * token_tiles;
    const int workers = gridDim.x / CLUSTER - parts, worker = blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER;
    const Schedule schedule = {static_cast<u32>(workers), per_strip, tiles - waves * workers, token_tiles};
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
        const int strip = min((piece.unit * CLUSTER + rank) * WARPS, strips_of(N) - WARPS);
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
        if constexpr (CLUSTER > 1) {  // half of it, into both blocks
            copy_box_to_both(to + rank * X_TILE, &x, byte + rank * 128, step.first_token, full);
        } else {
            copy_box(to, &x, byte, step.first_token, full);
            copy_box(to + X_TILE, &x, byte + 128, step.first_token, full);
        }
    };
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(base + FULL_AT + 8 * i, 1);
            barrier_init(base + EMPTY_AT + 8 * i, CLUSTER * WARPS);
        }
        barrier_init_fence();
    }
    if (CLUSTER > 1) cluster_sync();  // before anything arrives from the other block
    else __syncthreads();
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
    auto release = [&](u32 stage) {  // by a warp that has done with it, in both blocks
        if (CLUSTER == 1 && lane == 0) barrier_arrive(base + EMPTY_AT + stage * 8);
        if (CLUSTER > 1 && lane < CLUSTER) barrier_arrive_at(base + EMPTY_AT + stage * 8, lane);
    };

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
                const u32 next = stage < 2 ? stage + AHEAD : stage - 2;
                if (const Step step = step_at(position + AHEAD, index); step.exists) {
                    if (position >= 2) barrier_wait(base + EMPTY_AT + next * 8, stage < 2 ? parity ^ 1 : parity);
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
                if (batch == 1 && position > 0) release(before);
#pragma unroll
                for (int at = 0; at < BATCH; ++at) {
                    int step = batch * BATCH + at;
                    if (step % GROUP_STEPS == 0) pairs = load_group(record, step / GROUP_STEPS, g);
                    weights_of(operands[at], words, step % HALF_STEPS, pairs, magic, column);
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
            const int first = blockIdx.x - CLUSTER * others, row = ((piece.unit * CLUSTER + rank) * WARPS + warp) * STRIP;
            if (others > 0) await(partial, first, others, warp, 0, lane);
            for (int i = 0; i < others; ++i) take_over(acc, partial, first + CLUSTER * i, warp, lane);
#pragma unroll
            for (int i = 0; i < OCTETS; ++i) {
                const float4 sums = {acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]};
                outputs.store(sums, row, piece.first_token + 8 * i, lane);
            }
            if (others > 0) lower(partial, first, others, warp, 0, lane);
        }
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) acc[i] = 0.f;
    }    if (parts > 0 && worker >= parts) {  // a share of the tile before
        const int tile = worker / parts - 1, share = worker % parts, first = tile * parts * CLUSTER + rank;
        const int unit = tile / token_tiles * CLUSTER + rank, first_token = tile % token_tiles * TOKENS;
        for (int i = WARPS * OCTETS * share / parts + warp; i < WARPS * OCTETS * (share + 1) / parts; i += WARPS) {
            const int strip = i / OCTETS, octet = i % OCTETS;
            await(partial, first, parts, strip, octet, lane);
            const float4 sums = added_up(partial, first, parts, strip, octet, lane);
            outputs.store(sums, (unit * WARPS + strip) * STRIP, first_token + 8 * octet, lane);
            lower(partial, first, parts, strip, octet, lane);
        }
    }
    if (CLUSTER > 1) cluster_sync();  // nobody leaves while the other block may arrive here
}
