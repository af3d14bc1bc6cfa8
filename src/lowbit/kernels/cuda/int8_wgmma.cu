// Rung 5: Hopper. Four warps multiply out of shared memory, one thread copies, and blocks share what they copy (sm_90a;
// M from some 200 up).
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
//     Two blocks, 256 rows of y, form a cluster. Both need the same rows of w: each fetches a half and sends it to both.
//     Without that, 128 x 256 tiles ask 86 bytes per nanosecond and multiprocessor of the L2 at full rate, about twice
//     what it gives. Of four blocks only 30 clusters fit an H200, 120 of its 132 multiprocessors.
//
//     full[s]   the copy engine counts 48 KB of stage s in
//     empty[s]  two warpgroups of each of the two blocks are done with s
//
// Persistent: one block a multiprocessor; a cluster takes tiles in columns GROUP high, so that the rows of x stay in the
// L2 while w streams by. The copying thread runs ahead into the next tile while sums are scaled and written (int8_sums.cuh).
//
// QUANTIZE: x comes as it is, float16 or bfloat16; its rows become codes ahead of the tiles (int8_rows.cuh), those of the
// first FIRST pairs before all tiles.
#ifndef TILE_N
#define TILE_N 256
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef GROUP
#define GROUP 8
#endif
#ifndef FIRST
#define FIRST GROUP
#endif
#ifndef ALIGNED  // 0: rows of y are no multiple of 16 bytes
#define ALIGNED 1
#endif
#ifndef QUANTIZE
#define QUANTIZE 0
#endif
#include "hopper.cuh"
#include "int8_sums.cuh"
#include "wgmma_s8.cuh"
#if QUANTIZE
#include "int8_rows.cuh"
#endif

constexpr int TILE_M = 128, STEP = 128, PAIR = 2 * TILE_M;  // a cluster's rows
constexpr int X_BYTES = TILE_M * STEP, W_BYTES = TILE_N * STEP, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int COLUMNS_AT = STAGES * STAGE_BYTES;           // scale, bias and sum of the columns: [2][3][TILE_N]
constexpr int BARRIERS_AT = COLUMNS_AT + 2 * 3 * TILE_N * 4;
constexpr int A_THREAD = (TILE_N + 127) / 128;             // columns that a thread of a warpgroup reads

// Tile number `index` of a cluster: first FIRST pairs of blocks high, then GROUP, always down and then the next n.
struct Tile { int m0, n0; };
__device__ __forceinline__ Tile place(int index, int high, int wide) {
    int top = 0, height = min(FIRST, high);
    if (index >= height * wide) {
        int group = (index - height * wide) / (GROUP * wide);
        index -= height * wide + group * GROUP * wide;
        top = height + group * GROUP, height = min(GROUP, high - top);
    }
    return {(top + index % height) * PAIR, index / height * TILE_N};
}

// The columns of a tile that this thread reads, from global memory and then into shared memory.
struct Columns {
    Column mine[A_THREAD];

    __device__ __forceinline__ void read(const Epilogue& e, int n0, int N) {
#pragma unroll
        for (int i = 0; i < A_THREAD; i++) {
            int n = n0 + i * 128 + threadIdx.x % 128;
            mine[i] = n < N ? read_column(e, n) : Column{0.0f, 0.0f, 0};
        }
    }
    __device__ __forceinline__ void share(float* columns, bool plain, int barrier) const {
        named_barrier(barrier, 128);  // nobody reads those of the tile before any more
#pragma unroll
        for (int i = 0; i < A_THREAD; i++) {
            int n = i * 128 + threadIdx.x % 128;
            if (n >= TILE_N) break;
            columns[n] = mine[i].scale;
            if (!plain) columns[TILE_N + n] = mine[i].bias, ((int*)columns)[2 * TILE_N + n] = mine[i].sum;
        }
        named_barrier(barrier, 128);
    }
};

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
int8_wgmma(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, EPILOGUE_PARAMETERS,
           int M, int N, int K, const unsigned short* x, int x_row, signed char* q, unsigned* counters) {
    DYNAMIC_SHARED(memory, 1024);
    Epilogue e = EPILOGUE;
    unsigned stages = shared_address(memory), full = stages + BARRIERS_AT, empty = full + STAGES * 8;
    int group = threadIdx.x / 128, rank = cluster_rank(), cluster = blockIdx.x / 2, clusters = gridDim.x / 2;
    int high = (M + PAIR - 1) / PAIR, wide = (N + TILE_N - 1) / TILE_N;
    int tiles = high * wide, steps = (K + STEP - 1) / STEP;

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
    int ahead = min(STAGES, steps);  // stages that have w before the loop comes to them
    if (threadIdx.x == 0) {
        int n = place(cluster, high, wide).n0 + rank * (TILE_N / 2);
        for (int s = 0; s < ahead; s++) {
            barrier_expect(full + s * 8, STAGE_BYTES);
            copy_box_to_all(stages + s * STAGE_BYTES + X_BYTES + rank * (W_BYTES / 2), &w_map, s * STEP, n, full + s * 8, 3);
        }
    }
#if QUANTIZE
    wait_for_previous();
    Rows rows{x, x_row, M, K, q, (float*)e.x_scale, counters};
    int first_rows = min(M, FIRST * PAIR);
    quantize_first_rows(rows, first_rows);
#endif

    if (group == 0) {
        give_registers<QUANTIZE ? 88 : 40>();
        if (threadIdx.x == 0) {
            int stage = 0, parity = 1;
            wait_for_previous();
            for (int index = cluster; index < tiles; index += clusters) {
                Tile tile = place(index, high, wide);
                int m = tile.m0 + rank * TILE_M, n = tile.n0 + rank * (TILE_N / 2);
#if QUANTIZE
                if (m < M) rows.wait(m);
#endif
                for (int step = 0; step < steps; step++) {
                    unsigned here = stages + stage * STAGE_BYTES, arrived = full + stage * 8;
                    if (ahead == 0) {
                        barrier_wait(empty + stage * 8, parity);
                        barrier_expect(arrived, STAGE_BYTES);
                    }
                    copy_box(here, &x_map, step * STEP, m, arrived);
                    if (ahead > 0) ahead--;
                    else copy_box_to_all(here + X_BYTES + rank * (W_BYTES / 2), &w_map, step * STEP, n, arrived, 3);
                    if (++stage == STAGES) stage = 0, parity ^= 1;
                }
            }
        }
#if QUANTIZE
        if (threadIdx.x >= 32) quantize_other_rows(rows, first_rows);
#endif
        __syncwarp();
    } else {
        take_registers<QUANTIZE ? 208 : 232>();
        int thread = threadIdx.x % 128, stage = 0, parity = 0;
        float* columns = (float*)(memory + COLUMNS_AT) + (group - 1) * 3 * TILE_N;
        Target to;
        to.columns = columns, to.plain = e.bias == nullptr && e.x_zero == nullptr;
        wait_for_previous();
        for (int index = cluster; index < tiles; index += clusters) {
            Tile tile = place(index, high, wide);
            to.m0 = tile.m0 + rank * TILE_M + (group - 1) * 64, to.n0 = tile.n0;
            Columns next;  // asked for now, needed once the products are done
            if (KIND != 0) next.read(e, to.n0, N);
            int d[SUMS];
            for (int step = 0; step < steps; step++) {
                unsigned long long a = descriptor(stages + stage * STAGE_BYTES + (group - 1) * 64 * STEP);
                unsigned long long b = descriptor(stages + stage * STAGE_BYTES + X_BYTES);
                barrier_wait(full + stage * 8, parity);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < STEP / 32; k++) wgmma(d, a + k * 2, b + k * 2, step > 0 || k > 0);
                wgmma_commit();
                if (KIND != 0 && step == 0) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {  // with QUANTIZE they are ready, since the stage is
                        int m = row_of(to.m0) + half * 8;
                        if (m >= M) to.rows[half] = Row{0.0f, 0};
                        else to.rows[half] = QUANTIZE ? Row{load_fresh(e.x_scale + m), 0} : read_row(e, m);
                    }
                }
                if (KIND != 0 && step == (steps > 1)) next.share(columns, to.plain, group);
                wgmma_wait<1>();  // the step before this one is done: its stage may be filled again
                int previous = stage == 0 ? STAGES - 1 : stage - 1;
                if (step > 0 && thread < 2) barrier_arrive_remote(empty + previous * 8, thread);
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
            wgmma_wait<0>();
            if (thread < 2) barrier_arrive_remote(empty + (stage == 0 ? STAGES - 1 : stage - 1) * 8, thread);
            if (!ALIGNED) put_single(d, to, e, M, N);
            else if (to.plain) put<true>(d, to, e.out, M, N);
            else put<false>(d, to, e.out, M, N);
        }
    }
    cluster_meet();  // a block must not leave while the other may still send to it
#if QUANTIZE
    reset_counters(rows);
#endif
}
