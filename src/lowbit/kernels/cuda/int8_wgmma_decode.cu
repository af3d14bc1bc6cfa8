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
//           +-------+-------+-- ... --+            SPLIT blocks, a cluster, divide K. Each leaves its int32 sums in its
//                                                  own shared memory; then every block adds up, and writes, one part of
//                                                  the outputs. Integers: the order does not matter, no workspace.
//
// blockIdx.y counts tiles of TOKENS tokens: more than one where K divided among blocks is worth reading w again.
// Small blocks with deep queues (several on a multiprocessor, STAGES boxes each) keep some 200 KB a multiprocessor in
// flight, which is what it takes to draw full bandwidth. The weight does not depend on the kernel before this one
// (which quantizes x), so its first STAGES boxes are asked for before waiting for that.
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
constexpr int STEP = 128, GROUPS = ROWS / 64, CONSUMERS = GROUPS * 128, THREADS = CONSUMERS + 32;
constexpr int W_BYTES = ROWS * STEP, X_BYTES = TOKENS * STEP, STAGE_BYTES = W_BYTES + X_BYTES;
constexpr int PITCH = ROWS + 4;  // of the sums [TOKENS][ROWS] in shared memory; + 4: no bank conflict

extern "C" __global__ void __cluster_dims__(SPLIT, 1, 1) __launch_bounds__(THREADS)
int8_wgmma_decode(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, EPILOGUE_PARAMETERS,
                  int M, int N, int K) {
    DYNAMIC_SHARED(memory, 16);
    struct Board { unsigned long long barriers[2 * STAGES]; Column columns[ROWS]; };
    SHARED(Board, board);
    Column* columns = board.columns;
    Epilogue e = EPILOGUE;
    unsigned stages = (shared_address(memory) + 1023) & ~1023u;
    int* sums = (int*)(memory + (stages - shared_address(memory)));  // over the stages, once they are consumed
    unsigned full = shared_address(board.barriers), empty = full + STAGES * 8;
    int group = threadIdx.x / 128, rank = blockIdx.x % SPLIT, n0 = blockIdx.x / SPLIT * ROWS;
    int t0 = blockIdx.y * TOKENS, tokens = min(TOKENS, M - t0);
    int steps = (K + STEP - 1) / STEP, first = steps * rank / SPLIT, count = steps * (rank + 1) / SPLIT - first;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + s * 8, 1);
            barrier_init(empty + s * 8, GROUPS);
        }
        barrier_init_fence();
    }
    read_columns<ROWS, THREADS>(columns, e, n0, N);
    __syncthreads();

    if (group == GROUPS) {
        if (threadIdx.x == CONSUMERS) {
            int ahead = min(count, STAGES);
            for (int i = 0; i < ahead; i++) {
                barrier_expect(full + i * 8, STAGE_BYTES);
                copy_box(stages + i * STAGE_BYTES, &w_map, (first + i) * STEP, n0, full + i * 8);
            }
            let_next_start();
            wait_for_previous();
            for (int i = 0; i < ahead; i++)
                copy_box(stages + i * STAGE_BYTES + W_BYTES, &x_map, (first + i) * STEP, t0, full + i * 8);
            int stage = 0, parity = 0;
            for (int i = ahead; i < count; i++) {
                unsigned to = stages + stage * STAGE_BYTES;
                barrier_wait(empty + stage * 8, parity);
                barrier_expect(full + stage * 8, STAGE_BYTES);
                copy_box(to, &w_map, (first + i) * STEP, n0, full + stage * 8);
                copy_box(to + W_BYTES, &x_map, (first + i) * STEP, t0, full + stage * 8);
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
        }
        __syncwarp();
    } else {
        int thread = threadIdx.x % 128, lane = thread % 32, stage = 0, parity = 0;
        int d[TOKENS / 2];
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) d[i] = 0;
        for (int i = 0; i < count; i++) {
            unsigned long long a = descriptor(stages + stage * STAGE_BYTES + group * 64 * STEP);
            unsigned long long b = descriptor(stages + stage * STAGE_BYTES + W_BYTES);
            barrier_wait(full + stage * 8, parity);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < STEP / 32; k++) wgmma(d, a + k * 2, b + k * 2, 1);
            wgmma_commit();
            wgmma_wait<0>();
            if (thread == 0) barrier_arrive(empty + stage * 8);
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        named_barrier(1, CONSUMERS);  // all stages have been read: their place is free for the sums
        int r = group * 64 + thread / 32 * 16 + lane / 4, t = lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
            sums[(j * 8 + t) * PITCH + r] = d[j * 4];
            sums[(j * 8 + t + 1) * PITCH + r] = d[j * 4 + 1];
            sums[(j * 8 + t) * PITCH + r + 8] = d[j * 4 + 2];
            sums[(j * 8 + t + 1) * PITCH + r + 8] = d[j * 4 + 3];
        }
    }
    if (SPLIT > 1) cluster_barrier(); else __syncthreads();
    wait_for_previous();  // the scales of x are the previous kernel's work too
    for (int i = rank * THREADS + threadIdx.x; i < tokens * ROWS / 2; i += SPLIT * THREADS) {
        int token = i / (ROWS / 2), r = i % (ROWS / 2) * 2, m = t0 + token;
        int2 sum = make_int2(0, 0);
        if (SPLIT == 1) sum = *(int2*)&sums[token * PITCH + r];
        else
#pragma unroll
            for (int other = 0; other < SPLIT; other++) {
                int2 part = load_remote(remote_address(stages + (token * PITCH + r) * 4, other));
                sum.x += part.x;
                sum.y += part.y;
            }
        if (n0 + r >= N) continue;
        Row scale = read_row(e, m);
        size_t at = (size_t)m * N + n0 + r;
        if ((KIND == 1 || KIND == 2) && N % 2 == 0)
            *(unsigned*)((unsigned short*)e.out + at) =
                pair(scaled(sum.x, scale, columns[r]), scaled(sum.y, scale, columns[r + 1]));
        else {
            store(e, sum.x, scale, columns[r], at);
            if (n0 + r + 1 < N) store(e, sum.y, scale, columns[r + 1], at + 1);
        }
    }
    if (SPLIT > 1) cluster_meet();  // a block must not leave while the others still read its sums
}
