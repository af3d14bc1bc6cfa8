// Rung 5: Hopper. Four warps multiply out of shared memory, one thread copies, and two blocks share what they copy
// (sm_90a; M from some 200 up).
//
//     y = epilogue(x w^T)      x int8 [M, K], w int8 [N, K], rows padded to 16 bytes; any M and N
//
//     The instruction is wgmma.m64n256k32 (wgmma_s8.cuh). A block makes 128 x 256 outputs:
//
//                      256 n, bytes k..k+127 of w: 32 KB              warps 0-3   copy: one thread of them
//                  +---------------------------+                      warps 4-7   rows 0-63
//                  |  half 0     |   half 1    |                      warps 8-11  rows 64-127
//        +------+  +---------------------------+
//        | 64 x |  | warps 4-7:  64 x 256      |   128 registers of sums a thread
//        | 64   |  | warps 8-11: 64 x 256      |   a stage is 16 + 32 KB; four stages are in flight
//        +------+  +---------------------------+
//         16 KB
//
//     Two blocks that stand one below the other in y (a cluster) need the same 256 rows of w: each fetches one half and
//     sends it to both. Without that, 128 x 256 tiles ask 86 bytes per nanosecond and multiprocessor of the L2 at full
//     rate, about twice what it gives.
//
//     full[s]   the copy engine counts 48 KB of stage s in          (its own half from here, the other from the peer)
//     empty[s]  four warpgroups, two of each block, are done with s (a half may only be sent where both are done)
//
// Persistent: one block a multiprocessor; a cluster takes tiles in columns of GROUP pairs, so that the rows of x stay in
// the L2 while w streams by. The copying thread runs ahead into the next tile while the sums are written.
#include "hopper.cuh"
#include "int8_epilogue.cuh"
#include "wgmma_s8.cuh"

constexpr int TILE_M = 128, STEP = 128;
#ifndef TILE_N
#define TILE_N 256
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef GROUP
#define GROUP 8
#endif
constexpr int X_BYTES = TILE_M * STEP, W_BYTES = TILE_N * STEP, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int SUMS = TILE_N / 2;  // registers a thread

struct Tile { int m0, n0; };

// Tile `index` for this block of the cluster: pairs of tiles along m, GROUP pairs high, then the next n.
__device__ __forceinline__ Tile place(int index, int pairs, int columns, int rank) {
    int in_group = GROUP * columns, group = index / in_group, height = min(GROUP, pairs - group * GROUP);
    int pair_index = group * GROUP + index % in_group % height;
    return {(pair_index * 2 + rank) * TILE_M, index % in_group / height * TILE_N};
}

// The four lanes that share a row hold neighbours 2t, 2t + 1 of four groups of 8 columns; afterwards lane t holds all 8
// of group t: a 4 x 4 transposition of registers, so that a lane writes 16 bytes and the four write 64 in a row.
__device__ __forceinline__ void transpose(unsigned (&v)[4], int t) {
    bool odd = t & 1, upper = t & 2;
    unsigned give0 = odd ? v[0] : v[1], give1 = odd ? v[2] : v[3];
    give0 = __shfl_xor_sync(~0u, give0, 1);
    give1 = __shfl_xor_sync(~0u, give1, 1);
    if (odd) { v[0] = give0; v[2] = give1; } else { v[1] = give0; v[3] = give1; }
    give0 = upper ? v[0] : v[2], give1 = upper ? v[1] : v[3];
    give0 = __shfl_xor_sync(~0u, give0, 2);
    give1 = __shfl_xor_sync(~0u, give1, 2);
    if (upper) { v[0] = give0; v[1] = give1; } else { v[2] = give0; v[3] = give1; }
}

// Write a warp's 16 rows. m, m + 8: this lane's rows; columns: those of the tile, in shared memory.
__device__ __forceinline__ void write(const int (&d)[SUMS], const Epilogue& e, const Column* columns, int m, int n0, int M,
                                      int N) {
    int t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row_index = m + half * 8;
        bool inside = row_index < M;
        Row r = inside ? read_row(e, row_index) : Row{0.0f, 0};
        size_t start = (size_t)row_index * N;
        if ((KIND == 1 || KIND == 2) && N % 8 == 0) {
#pragma unroll
            for (int j = 0; j < TILE_N / 8; j += 4) {
                unsigned v[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int c = (j + i) * 8 + t * 2, at = (j + i) * 4 + half * 2;
                    v[i] = pair(scaled(d[at], r, columns[c]), scaled(d[at + 1], r, columns[c + 1]));
                }
                transpose(v, t);
                int n = n0 + (j + t) * 8;
                if (inside && n < N)
                    *(uint4*)((unsigned short*)e.out + start + n) = make_uint4(v[0], v[1], v[2], v[3]);
            }
        } else {
#pragma unroll
            for (int j = 0; j < SUMS / 4; j++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    int n = j * 8 + t * 2 + c;
                    if (inside && n0 + n < N) store(e, d[j * 4 + half * 2 + c], r, columns[n], start + n0 + n);
                }
        }
    }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
int8_wgmma(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, EPILOGUE_PARAMETERS, int M,
           int N, int K) {
    extern __shared__ unsigned char memory[];
    __shared__ __align__(8) unsigned long long barriers[2 * STAGES];
    __shared__ Column columns[2][TILE_N];
    Epilogue e = EPILOGUE;
    unsigned stages = (shared_address(memory) + 1023) & ~1023u;
    unsigned full = shared_address(barriers), empty = full + STAGES * 8;
    int group = threadIdx.x / 128, rank = cluster_rank();
    int pairs = (M + 2 * TILE_M - 1) / (2 * TILE_M), across = (N + TILE_N - 1) / TILE_N;
    int tiles = pairs * across, steps = (K + STEP - 1) / STEP;

    if (threadIdx.x == 0) {
        prefetch_map(&x_map);
        prefetch_map(&w_map);
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + s * 8, 1);
            barrier_init(empty + s * 8, 4);
        }
        barrier_init_fence();
    }
    cluster_barrier();
    let_next_start();

    if (group == 0) {
        give_registers<40>();
        if (threadIdx.x == 0) {
            wait_for_previous();
            int stage = 0, parity = 1;
            for (int index = blockIdx.x / 2; index < tiles; index += gridDim.x / 2) {
                Tile tile = place(index, pairs, across, rank);
                for (int step = 0; step < steps; step++) {
                    unsigned x_to = stages + stage * STAGE_BYTES, w_to = x_to + X_BYTES + rank * (W_BYTES / 2);
                    barrier_wait(empty + stage * 8, parity);
                    barrier_expect(full + stage * 8, STAGE_BYTES);
                    copy_box(x_to, &x_map, step * STEP, tile.m0, full + stage * 8);
                    copy_box_to_all(w_to, &w_map, step * STEP, tile.n0 + rank * (TILE_N / 2), full + stage * 8, 3);
                    if (++stage == STAGES) stage = 0, parity ^= 1;
                }
            }
        }
        __syncwarp();
    } else {
        take_registers<232>();
        int thread = threadIdx.x % 128, lane = thread % 32, stage = 0, parity = 0;
        Column* mine = columns[group - 1];
        wait_for_previous();
        for (int index = blockIdx.x / 2; index < tiles; index += gridDim.x / 2) {
            Tile tile = place(index, pairs, across, rank);
            Column next[TILE_N / 128];
            if (KIND != 0)
#pragma unroll
                for (int i = 0; i < TILE_N / 128; i++) {
                    int n = tile.n0 + i * 128 + thread;
                    next[i] = n < N ? read_column(e, n) : Column{0.0f, 0.0f, 0};
                }
            int d[SUMS];
            int previous = -1;
            for (int step = 0; step < steps; step++) {
                unsigned long long a = descriptor(stages + stage * STAGE_BYTES + (group - 1) * 64 * STEP);
                unsigned long long b = descriptor(stages + stage * STAGE_BYTES + X_BYTES);
                barrier_wait(full + stage * 8, parity);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < STEP / 32; k++) wgmma(d, a + k * 2, b + k * 2, step > 0 || k > 0);
                wgmma_commit();
                wgmma_wait<1>();  // the step before this one is done: its stage may be filled again
                if (previous >= 0 && thread < 2) barrier_arrive_remote(empty + previous * 8, thread);
                previous = stage;
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
            wgmma_wait<0>();
            if (thread < 2) barrier_arrive_remote(empty + previous * 8, thread);
            if (KIND != 0) {
                named_barrier(group, 128);  // nobody still reads the last tile's columns
#pragma unroll
                for (int i = 0; i < TILE_N / 128; i++) mine[i * 128 + thread] = next[i];
                named_barrier(group, 128);
            }
            int m = tile.m0 + (group - 1) * 64 + thread / 32 * 16 + lane / 4;
            write(d, e, mine, m, tile.n0, M, N);
        }
    }
    cluster_barrier();  // a block must not leave while the other may still send to it
}
