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
//     CLUSTER_M x CLUSTER_N blocks form a cluster. Those that stand below each other in y need the same rows of w, those
//     beside each other the same rows of x: each fetches a part and sends it to all that need it. Without that, 128 x 256
//     tiles ask 86 bytes per nanosecond and multiprocessor of the L2 at full rate, about twice what it gives. 2 x 1 won:
//     of four blocks only 30 clusters fit an H200, 120 of its 132 multiprocessors (664 us for 627).
//
//     full[s]   the copy engine counts 48 KB of stage s in
//     empty[s]  two warpgroups of each block that shares with this one are done with s
//
// Persistent: one block a multiprocessor; a cluster takes tiles in columns GROUP high, so that the rows of x stay in the
// L2 while w streams by. The copying thread runs ahead into the next tile while the sums are written.
//
// The sums leave straight from the registers: the four lanes that hold a row trade words, so that each has 16 bytes in a
// row and the four 64; nobody waits for anybody. By way of shared memory and the copy engine 2% slower (K = 4096).
//
// QUANTIZE: x comes as it is, float16 or bfloat16; its rows become codes ahead of the tiles (int8_rows.cuh).
#include "hopper.cuh"
#include "int8_epilogue.cuh"
#include "wgmma_s8.cuh"
#ifndef QUANTIZE
#define QUANTIZE 0
#endif
#if QUANTIZE
#include "int8_rows.cuh"
#endif

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
#ifndef CLUSTER_M
#define CLUSTER_M 2
#endif
#ifndef CLUSTER_N
#define CLUSTER_N 1
#endif
#ifndef ALIGNED  // 0: rows of y are no multiple of 16 bytes
#define ALIGNED 1
#endif
constexpr int CLUSTER = CLUSTER_M * CLUSTER_N, SHARERS = CLUSTER_M + CLUSTER_N - 1;  // sharers: of a row or a column
constexpr int X_BYTES = TILE_M * STEP, W_BYTES = TILE_N * STEP, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int SUMS = TILE_N / 2;                           // registers a thread
constexpr int SIZE = KIND == 0 || KIND == 3 ? 4 : 2;       // bytes of an output
constexpr int COLUMNS_AT = STAGES * STAGE_BYTES;           // scale, bias and sum of the columns: [2][3][TILE_N]
constexpr int BARRIERS_AT = COLUMNS_AT + 2 * 3 * TILE_N * 4;

struct Tile { int m0, n0; };

// Tile number `index` of a cluster, for its block (down, right): columns of clusters GROUP high, then the next n.
__device__ __forceinline__ Tile place(int index, int high, int wide, int down, int right) {
    int in_group = GROUP * wide, group = index / in_group, height = min(GROUP, high - group * GROUP);
    int row = group * GROUP + index % in_group % height, column = index % in_group / height;
    return {(row * CLUSTER_M + down) * TILE_M, (column * CLUSTER_N + right) * TILE_N};
}

// The block that is number i among those that share rows of x or of w with block (down, right), itself included.
__device__ __forceinline__ int sharer(int i, int down, int right) {
    if (i < CLUSTER_M) return right * CLUSTER_M + i;
    int other = i - CLUSTER_M;
    return (other < right ? other : other + 1) * CLUSTER_M + down;
}

// A part of a tile into this block, or into every block of the cluster that needs it.
__device__ __forceinline__ void fetch(unsigned to, const TensorMap* map, int k, int r, unsigned barrier, int blocks,
                                      unsigned short mask) {
    if (blocks == 1) copy_box(to, map, k, r, barrier);
    else copy_box_to_all(to, map, k, r, barrier, mask);
}

// What a warpgroup needs to write its 64 rows: scales of this lane's two, and the tile's columns in shared memory.
struct Target {
    const float* columns;  // scales, then biases, then sums of the codes
    Row rows[2];
    int m0, n0;
    bool plain;  // neither bias nor zero-point: of the columns, scales alone are there

    __device__ __forceinline__ Column column(int n) const {
        if (plain) return {columns[n], 0.0f, 0};
        return {columns[n], columns[TILE_N + n], ((const int*)columns)[2 * TILE_N + n]};
    }
};

// Two neighbours of a row as they are stored: one word, or `first` and `second`.
struct Pair { unsigned first, second; };
template <bool PLAIN> __device__ __forceinline__ Pair made(int first, int second, Row r, Column left, Column right) {
    if (KIND == 0) return {(unsigned)first, (unsigned)second};
    float a = PLAIN ? (float)first * (r.scale * left.scale) : scaled(first, r, left);
    float b = PLAIN ? (float)second * (r.scale * right.scale) : scaled(second, r, right);
    if (SIZE == 2) return {pair(a, b), 0};
    return {__float_as_uint(a), __float_as_uint(b)};
}

// Lanes that differ in the bit `lanes` trade a word: the lower one keeps mine, the upper one other.
__device__ __forceinline__ void trade(unsigned& mine, unsigned& other, int lanes) {
    bool upper = threadIdx.x & lanes;
    unsigned got = __shfl_xor_sync(0xffffffffu, upper ? mine : other, lanes);
    if (upper) mine = got;
    else other = got;
}

// Write a warpgroup's rows, 16 bytes a lane. Of GROUPS groups of 8 columns a lane of a quad has a pair each; it gets 16
// bytes of one: all of a group, or, of 4-byte outputs, half of one.
template <bool PLAIN>
__device__ __forceinline__ void write_rows(const int (&d)[SUMS], const Target& to, void* out, int M, int N) {
    int thread = threadIdx.x % 128, m = to.m0 + thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
    constexpr int GROUPS = SIZE == 2 ? 4 : 2;
#pragma unroll
    for (int j = 0; j < TILE_N / 8; j += GROUPS) {
        unsigned w[2][4];  // of either row
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
            int n = (j + i) * 8 + t * 2;
            Column left{}, right{};
            if (KIND != 0 && PLAIN) {
                float2 scales = *(const float2*)&to.columns[n];
                left.scale = scales.x, right.scale = scales.y;
            } else if (KIND != 0) left = to.column(n), right = to.column(n + 1);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int at = (j + i) * 4 + half * 2;
                Pair p = made<PLAIN>(d[at], d[at + 1], to.rows[half], left, right);
                w[half][i] = p.first;
                if (SIZE == 4) w[half][i + 2] = p.second;
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            trade(w[half][0], w[half][1], 1);
            trade(w[half][2], w[half][3], 1);
            int n = to.n0 + j * 8, row = m + half * 8;
            if (SIZE == 2) {  // now lane t has word t of every lane, in their order
                trade(w[half][0], w[half][2], 2);
                trade(w[half][1], w[half][3], 2);
                n += t * 8;
            } else {  // even lanes have the first group, its columns 4 (t / 2) and on, odd lanes the second
                unsigned swapped = w[half][1];
                w[half][1] = w[half][2], w[half][2] = swapped;
                n += t % 2 * 8 + t / 2 * 4;
            }
            if (row < M && n < N)
                *(uint4*)((unsigned char*)out + ((size_t)row * N + n) * SIZE) =
                    make_uint4(w[half][0], w[half][1], w[half][2], w[half][3]);
        }
    }
}

// The same one output after the other.
__device__ __forceinline__ void write_single(const int (&d)[SUMS], const Target& to, const Epilogue& e, int M, int N) {
    int thread = threadIdx.x % 128, m = to.m0 + thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
#pragma unroll
    for (int j = 0; j < SUMS / 4; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int n = j * 8 + t * 2 + i % 2, row = m + i / 2 * 8;
            if (row >= M || to.n0 + n >= N) continue;
            size_t at = (size_t)row * N + to.n0 + n;
            store(e, d[j * 4 + i], to.rows[i / 2], to.column(n), at);
        }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(384, 1)
int8_wgmma(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, EPILOGUE_PARAMETERS,
           int M, int N, int K, const unsigned short* x, int x_row, signed char* q, unsigned* counters) {
    DYNAMIC_SHARED(memory, 1024);
    Epilogue e = EPILOGUE;
    unsigned stages = shared_address(memory), full = stages + BARRIERS_AT, empty = full + STAGES * 8;
    int group = threadIdx.x / 128, rank = cluster_rank(), down = rank % CLUSTER_M, right = rank / CLUSTER_M;
    int high = (M + CLUSTER_M * TILE_M - 1) / (CLUSTER_M * TILE_M);
    int wide = (N + CLUSTER_N * TILE_N - 1) / (CLUSTER_N * TILE_N);
    int tiles = high * wide, steps = (K + STEP - 1) / STEP;

    if (threadIdx.x == 0) {
        prefetch_map(&x_map);
        prefetch_map(&w_map);
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + s * 8, 1);
            barrier_init(empty + s * 8, 2 * SHARERS);
        }
        barrier_init_fence();
    }
    cluster_barrier();
    let_next_start();
    unsigned short below = ((1 << CLUSTER_M) - 1) << (right * CLUSTER_M), beside = 0;
    int ahead = min(STAGES, steps);  // stages that have w before the loop comes to them
    if (threadIdx.x == 0) {
        int n = place(blockIdx.x / CLUSTER, high, wide, down, right).n0 + down * (TILE_N / CLUSTER_M);
        for (int s = 0; s < ahead; s++) {
            unsigned to = stages + s * STAGE_BYTES + X_BYTES + down * (W_BYTES / CLUSTER_M);
            barrier_expect(full + s * 8, STAGE_BYTES);
            fetch(to, &w_map, s * STEP, n, full + s * 8, CLUSTER_M, below);
        }
    }
#if QUANTIZE
    wait_for_previous();
    Rows rows{x, x_row, M, K, q, (float*)e.x_scale, counters};
    int first_rows = min(M, GROUP * CLUSTER_M * TILE_M);
    quantize_first_rows(rows, first_rows);
#endif

    if (group == 0) {
        give_registers<QUANTIZE ? 88 : 40>();
        if (threadIdx.x == 0) {
            for (int i = 0; i < CLUSTER_N; i++) beside |= 1 << (i * CLUSTER_M + down);
            int stage = 0, parity = 1;
            wait_for_previous();
            for (int index = blockIdx.x / CLUSTER; index < tiles; index += gridDim.x / CLUSTER) {
                Tile tile = place(index, high, wide, down, right);
                int m = tile.m0 + right * (TILE_M / CLUSTER_N), n = tile.n0 + down * (TILE_N / CLUSTER_M);
#if QUANTIZE
                if (m < M) rows.wait(m);
#endif
                for (int step = 0; step < steps; step++) {
                    unsigned here = stages + stage * STAGE_BYTES, arrived = full + stage * 8;
                    unsigned x_to = here + right * (X_BYTES / CLUSTER_N);
                    unsigned w_to = here + X_BYTES + down * (W_BYTES / CLUSTER_M);
                    if (ahead == 0) {
                        barrier_wait(empty + stage * 8, parity);
                        barrier_expect(arrived, STAGE_BYTES);
                    }
                    fetch(x_to, &x_map, step * STEP, m, arrived, CLUSTER_N, beside);
                    if (ahead > 0) ahead--;
                    else fetch(w_to, &w_map, step * STEP, n, arrived, CLUSTER_M, below);
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
        int thread = threadIdx.x % 128, stage = 0, parity = 0, target = sharer(thread % SHARERS, down, right);
        float* columns = (float*)(memory + COLUMNS_AT) + (group - 1) * 3 * TILE_N;
        Target to;
        to.columns = columns, to.plain = e.bias == nullptr && e.x_zero == nullptr;
        wait_for_previous();
        for (int index = blockIdx.x / CLUSTER; index < tiles; index += gridDim.x / CLUSTER) {
            Tile tile = place(index, high, wide, down, right);
            to.m0 = tile.m0 + (group - 1) * 64, to.n0 = tile.n0;
            Column next[(TILE_N + 127) / 128];  // asked for now, needed once the products are done
            if (KIND != 0) {
#pragma unroll
                for (int i = 0; i < (TILE_N + 127) / 128; i++) {
                    int n = tile.n0 + i * 128 + thread;
                    next[i] = n < N ? read_column(e, n) : Column{0.0f, 0.0f, 0};
                }
#pragma unroll
                for (int half = 0; half < 2 && !QUANTIZE; half++) {
                    int m = to.m0 + thread / 32 * 16 + thread % 32 / 4 + half * 8;
                    to.rows[half] = m < M ? read_row(e, m) : Row{0.0f, 0};
                }
            }
            int d[SUMS];
            int previous = -1;
            for (int step = 0; step < steps; step++) {
                unsigned long long a = descriptor(stages + stage * STAGE_BYTES + (group - 1) * 64 * STEP);
                unsigned long long b = descriptor(stages + stage * STAGE_BYTES + X_BYTES);
                barrier_wait(full + stage * 8, parity);
#if QUANTIZE
                if (step == 0)  // the rows are ready, and so are their scales
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        int m = to.m0 + thread / 32 * 16 + thread % 32 / 4 + half * 8;
                        to.rows[half] = Row{m < M ? load_fresh(e.x_scale + m) : 0.0f, 0};
                    }
#endif
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < STEP / 32; k++) wgmma(d, a + k * 2, b + k * 2, step > 0 || k > 0);
                wgmma_commit();
                wgmma_wait<1>();  // the step before this one is done: its stage may be filled again
                if (previous >= 0 && thread < SHARERS) barrier_arrive_remote(empty + previous * 8, target);
                previous = stage;
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
            wgmma_wait<0>();
            if (thread < SHARERS) barrier_arrive_remote(empty + previous * 8, target);
            if (KIND != 0) {
                named_barrier(group, 128);  // nobody reads the columns of the tile before any more
#pragma unroll
                for (int i = 0; i < (TILE_N + 127) / 128; i++) {
                    int n = i * 128 + thread;
                    if (TILE_N % 128 && n >= TILE_N) break;
                    columns[n] = next[i].scale;
                    if (!to.plain) columns[TILE_N + n] = next[i].bias, ((int*)columns)[2 * TILE_N + n] = next[i].sum;
                }
                named_barrier(group, 128);
            }
            if (!ALIGNED) write_single(d, to, e, M, N);
            else if (to.plain) write_rows<true>(d, to, e.out, M, N);
            else write_rows<false>(d, to, e.out, M, N);
        }
    }
    cluster_meet();  // a block must not leave while the other may still send to it
#if QUANTIZE
    reset_counters(rows);
#endif
}
