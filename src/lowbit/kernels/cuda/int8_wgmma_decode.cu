// Hopper, few tokens: the weight streams past once, and everything else hides behind it (sm_90a; M up to some 200).
//
//     y = epilogue(x w^T)      x int8 [M, K], w int8 [N, K], rows padded to 16 bytes; any M and N
//
//     The product is turned over, y^T = w x^T, so that wgmma's 64 rows are rows of w and the tokens are its narrow side,
//     8 to 128 wide (wgmma_s8.cuh):
//
//              bytes along K, 128 a step           a block makes ROWS rows of y^T over its share of K:
//           +-------+-------+-- ... --+               warps 0-3, 4-7, ...  64 rows each
//    ROWS   | block | block |         |               the last warp        copies: one thread of it
//    of w   | rank 0| rank 1|         |
//           +-------+-------+-- ... --+            SPLIT blocks, a cluster, divide K. Each owns ROWS / SPLIT of the rows
//                                                  and adds up, and writes, their sums. Integers: the order does not
//                                                  matter, no workspace.
//
// Up to 16 tokens a block sends the others their sums as it finishes, counted on their barrier (st.async); a barrier of
// the cluster and loads from the others cost a round trip more, 0.5 us. Of more tokens the sums need room that another
// block of the next kernel could have: 4096 x 4096 at M=64 took 14.2 us for 9.1, so there they lie over the stages.
//
// blockIdx.y counts tiles of TOKENS tokens: more than one where K divided among blocks is worth reading w again.
// Small blocks with deep queues (several on a multiprocessor, STAGES boxes each) keep some 200 KB a multiprocessor in
// flight, which is what it takes to draw full bandwidth. The weight does not depend on the kernel before this one, so its
// first STAGES boxes are asked for before waiting for that, and PREFETCH more are brought into the L2.
//
// QUANTIZE: x comes as it is, float16 or bfloat16, and no kernel stands before this one. A block finds the largest value
// of its share of each token, tells the cluster, and writes the codes where the copy engine would have put them.
#include "hopper.cuh"
#include "int8_epilogue.cuh"
#include "wgmma_s8.cuh"

#ifndef TOKENS
#define TOKENS 16
#endif
#ifndef ROWS
#define ROWS 64
#endif
#ifndef STAGES
#define STAGES 5
#endif
#ifndef SPLIT
#define SPLIT 1
#endif
#ifndef PREFETCH
#define PREFETCH 0
#endif
#ifndef QUANTIZE
#define QUANTIZE 0
#endif
constexpr int STEP = 128, GROUPS = ROWS / 64, CONSUMERS = GROUPS * 128, THREADS = CONSUMERS + 32;
constexpr int W_BYTES = ROWS * STEP, X_BYTES = TOKENS * STEP, STAGE_BYTES = W_BYTES + (QUANTIZE ? 0 : X_BYTES);
constexpr bool SENT = SPLIT > 1 && TOKENS <= 16;       // of more tokens the sums stay, and their owners come for them
constexpr int OWN = ROWS / SPLIT, PITCH = SENT ? TOKENS + 2 : ROWS + 4;  // +: fewer bank conflicts
constexpr int SUMS_AT = SENT ? STAGES * STAGE_BYTES : 0;  // [SPLIT][OWN][PITCH]; else, over the stages, [TOKENS][PITCH]
constexpr int SUMS_BYTES = (ROWS * PITCH * 4 + 1023) / 1024 * 1024;            // of those that are sent
constexpr int CODES_AT = STAGES * STAGE_BYTES + (SENT ? SUMS_BYTES : 0);  // [steps][TOKENS][STEP]
constexpr bool MEETS = SENT || (QUANTIZE && SPLIT > 1);  // blocks send each other something: all must have their barriers

#if QUANTIZE
#include "int8_codes.cuh"

// A block's share of x: columns first_column to first_column + columns - 1 (those beyond K count as zeros) of `tokens` rows.
struct Share {
    const unsigned short* x;
    int x_row, K, first_column, chunks, tokens;

    // Chunk i of all: its row is i / chunks.
    __device__ __forceinline__ uint4 read(int i) const {
        int k = first_column + i % chunks * CHUNK;
        if (i >= tokens * chunks || k >= K) return make_uint4(0, 0, 0, 0);
        return *(const uint4*)(x + (size_t)(i / chunks) * x_row + k);
    }
};

// What the blocks of a cluster tell each other: the bits of the largest magnitudes, [rank][token].
struct Tops { unsigned mine[TOKENS], all[SPLIT][TOKENS]; float scales[TOKENS]; };

__device__ __forceinline__ void raise(Tops& tops, const Share& share, int i, uint4 chunk) {
    unsigned top = largest(chunk);
    bool counts = i < share.tokens * share.chunks;
    if (share.chunks % 32 == 0) {  // a warp's chunks are of one token
        top = __reduce_max_sync(0xffffffffu, top);
        counts = counts && threadIdx.x % 32 == 0;
    }
    if (counts) atomicMax(&tops.mine[i / share.chunks], top);
}

__device__ __forceinline__ void put(Tops& tops, const Share& share, int i, uint4 chunk, unsigned codes) {
    if (i >= share.tokens * share.chunks) return;
    int token = i / share.chunks, c = i % share.chunks;
    unsigned top = tops.mine[token];
    if (SPLIT > 1)
#pragma unroll
        for (int other = 0; other < SPLIT; other++) top = max(top, tops.all[other][token]);
    Grid grid = grid_of(top);
    if (c == 0) tops.scales[token] = grid.scale;
    uint2 made = codes_of(chunk, grid);  // of 8 columns: half of a 16-byte piece of the swizzle (wgmma_s8.cuh)
    unsigned to = codes + c / 16 * X_BYTES + token * STEP + (c % 16 / 2 ^ token % 8) * 16 + c % 2 * 8;
    store_shared(to, made);
}

// By the consumers: the codes of a share into shared memory, in wgmma's layout. `told`: the barrier of tops.all.
__device__ __forceinline__ void quantize_share(Tops& tops, const Share& share, unsigned codes, unsigned told, int rank) {
    constexpr int HELD = 4;
    uint4 held[HELD], chunk[HELD];  // the first chunks stay in registers, others are read again
#pragma unroll
    for (int i = 0; i < HELD; i++) held[i] = share.read(i * CONSUMERS + threadIdx.x);
#pragma unroll
    for (int i = 0; i < HELD; i++) raise(tops, share, i * CONSUMERS + threadIdx.x, held[i]);
    for (int start = HELD * CONSUMERS; start < share.tokens * share.chunks; start += HELD * CONSUMERS) {
#pragma unroll
        for (int i = 0; i < HELD; i++) chunk[i] = share.read(start + i * CONSUMERS + threadIdx.x);
#pragma unroll
        for (int i = 0; i < HELD; i++) raise(tops, share, start + i * CONSUMERS + threadIdx.x, chunk[i]);
    }
    named_barrier(1, CONSUMERS);
    if (SPLIT > 1) {
        cluster_wait();  // all blocks have their barriers ready
        if (threadIdx.x < share.tokens * SPLIT) {
            int token = threadIdx.x / SPLIT, other = threadIdx.x % SPLIT;
            send(remote_address(shared_address(&tops.all[rank][token]), other), tops.mine[token], remote_address(told, other));
        }
        barrier_wait(told, 0);
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) put(tops, share, i * CONSUMERS + threadIdx.x, held[i], codes);
    for (int start = HELD * CONSUMERS; start < share.tokens * share.chunks; start += HELD * CONSUMERS) {
#pragma unroll
        for (int i = 0; i < HELD; i++) chunk[i] = share.read(start + i * CONSUMERS + threadIdx.x);
#pragma unroll
        for (int i = 0; i < HELD; i++) put(tops, share, start + i * CONSUMERS + threadIdx.x, chunk[i], codes);
    }
    shared_to_copy_engine();  // wgmma reads shared memory as the copy engine does
    named_barrier(1, CONSUMERS);
}
#endif

extern "C" __global__ void __cluster_dims__(SPLIT, 1, 1) __launch_bounds__(THREADS)
int8_wgmma_decode(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, EPILOGUE_PARAMETERS,
                  int M, int N, int K, const unsigned short* x, int x_row) {
    DYNAMIC_SHARED(memory, 16);
    struct Board { unsigned long long barriers[2 * STAGES + 2]; Column columns[ROWS]; };
    SHARED(Board, board);
    Column* columns = board.columns;
    Epilogue e = EPILOGUE;
    unsigned stages = (shared_address(memory) + 1023) & ~1023u;
    int* sums = (int*)(memory + (stages - shared_address(memory)) + SUMS_AT);
    unsigned full = shared_address(board.barriers), empty = full + STAGES * 8, told = empty + STAGES * 8, summed = told + 8;
    int group = threadIdx.x / 128, rank = blockIdx.x % SPLIT, n0 = blockIdx.x / SPLIT * ROWS;
    int t0 = blockIdx.y * TOKENS, tokens = min(TOKENS, M - t0);
    int steps = (K + STEP - 1) / STEP, first = steps * rank / SPLIT, count = steps * (rank + 1) / SPLIT - first;
#if QUANTIZE
    SHARED(Tops, tops);
    if (threadIdx.x < TOKENS) tops.mine[threadIdx.x] = 0;
#endif

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + s * 8, 1);
            barrier_init(empty + s * 8, GROUPS);
        }
        barrier_init(told, 1);
        barrier_init(summed, 1);
        barrier_expect(told, SPLIT * tokens * 4);
        barrier_expect(summed, ROWS * TOKENS * 4);
        barrier_init_fence();
    }
    read_columns<ROWS, THREADS>(columns, e, n0, N);
    __syncthreads();
    if (MEETS) cluster_arrive();

    if (group == GROUPS) {
        if (threadIdx.x == CONSUMERS) {
            int ahead = min(count, STAGES), stage = 0, parity = 0;
            for (int i = 0; i < ahead; i++) {
                barrier_expect(full + i * 8, STAGE_BYTES);
                copy_box(stages + i * STAGE_BYTES, &w_map, (first + i) * STEP, n0, full + i * 8);
            }
            let_next_start();
            for (int i = ahead; i < min(count, ahead + PREFETCH); i++) prefetch_box(&w_map, (first + i) * STEP, n0);
            if (!QUANTIZE) {
                wait_for_previous();
                for (int i = 0; i < ahead; i++)
                    copy_box(stages + i * STAGE_BYTES + W_BYTES, &x_map, (first + i) * STEP, t0, full + i * 8);
            }
            for (int i = ahead; i < count; i++) {
                unsigned to = stages + stage * STAGE_BYTES;
                barrier_wait(empty + stage * 8, parity);
                barrier_expect(full + stage * 8, STAGE_BYTES);
                copy_box(to, &w_map, (first + i) * STEP, n0, full + stage * 8);
                if (!QUANTIZE) copy_box(to + W_BYTES, &x_map, (first + i) * STEP, t0, full + stage * 8);
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
        }
        __syncwarp();
        if (MEETS) cluster_wait();
    } else {
        int thread = threadIdx.x % 128, lane = thread % 32, stage = 0, parity = 0;
#if QUANTIZE
        wait_for_previous();
        const unsigned short* rows = x + (size_t)t0 * x_row;
        quantize_share(tops, Share{rows, x_row, K, first * STEP, count * STEP / CHUNK, tokens}, stages + CODES_AT, told, rank);
#endif
        int d[TOKENS / 2];
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) d[i] = 0;
        for (int i = 0; i < count; i++) {
            unsigned here = stages + stage * STAGE_BYTES;
            unsigned long long a = descriptor(here + group * 64 * STEP);
            unsigned long long b = descriptor(QUANTIZE ? stages + CODES_AT + i * X_BYTES : here + W_BYTES);
            barrier_wait(full + stage * 8, parity);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < STEP / 32; k++) wgmma(d, a + k * 2, b + k * 2, 1);
            wgmma_commit();
            wgmma_wait<0>();
            if (thread == 0) barrier_arrive(empty + stage * 8);
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        if (!SENT) named_barrier(1, CONSUMERS);  // all stages have been read: their place is free for the sums
        else if (!QUANTIZE) cluster_wait();
        int r = group * 64 + thread / 32 * 16 + lane / 4, t = lane % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; half++, r += 8) {
            unsigned to = remote_address(shared_address(sums + (rank * OWN + r % OWN) * PITCH + t), r / OWN);
            unsigned counted = remote_address(summed, r / OWN);
#pragma unroll
            for (int j = 0; j < TOKENS / 8; j++) {
                int one = d[j * 4 + half * 2], two = d[j * 4 + half * 2 + 1];
                if (SENT) send(to + j * 32, one, two, counted);
                else sums[(j * 8 + t) * PITCH + r] = one, sums[(j * 8 + t + 1) * PITCH + r] = two;
            }
        }
    }
    if (SPLIT > 1 && !SENT) cluster_barrier();
    else __syncthreads();
    wait_for_previous();  // the scales of x are the previous kernel's work too, and it may read what is written now
    if (SENT) barrier_wait(summed, 0);
    constexpr int WIDE = SENT ? OWN : ROWS;  // of a token, the rows that are added up together
    int start = SENT ? threadIdx.x : rank * THREADS + threadIdx.x;
    for (int i = start; i < tokens * WIDE / 2; i += SENT ? THREADS : SPLIT * THREADS) {
        int token = i / (WIDE / 2), own = i % (WIDE / 2) * 2, m = t0 + token, r = (SENT ? rank * OWN : 0) + own;
        int2 sum = make_int2(0, 0);
#pragma unroll
        for (int other = 0; other < SPLIT; other++) {
            int2 part;
            if (SENT) {
                const int* first = sums + (other * OWN + own) * PITCH + token;
                part = make_int2(first[0], first[PITCH]);
            } else if (SPLIT == 1) part = *(const int2*)(sums + token * PITCH + r);
            else part = load_remote(remote_address(shared_address(sums + token * PITCH + r), other));
            sum.x += part.x;
            sum.y += part.y;
        }
        if (n0 + r >= N) continue;
#if QUANTIZE
        Row scale{tops.scales[token], 0};
#else
        Row scale = read_row(e, m);
#endif
        size_t at = (size_t)m * N + n0 + r;
        if ((KIND == 1 || KIND == 2) && N % 2 == 0)
            *(unsigned*)((unsigned short*)e.out + at) =
                pair(scaled(sum.x, scale, columns[r]), scaled(sum.y, scale, columns[r + 1]));
        else {
            store(e, sum.x, scale, columns[r], at);
            if (n0 + r + 1 < N) store(e, sum.y, scale, columns[r + 1], at + 1);
        }
    }
    if (SPLIT > 1 && !SENT) cluster_meet();  // a block must not leave while the others still read its sums
}
