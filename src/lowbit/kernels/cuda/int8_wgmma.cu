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
// The sums leave 128 bytes of columns at a time: scaled, put down in shared memory in the copy engine's swizzle, and
// written by it while the next 128 bytes are scaled and the next tile is multiplied. Four lanes that write their own 64
// bytes of each row instead, with scales read at the end: 5.4 us a tile where the products take 16.7 (K = 4096).
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
#ifndef CLUSTER_M
#define CLUSTER_M 2
#endif
#ifndef CLUSTER_N
#define CLUSTER_N 1
#endif
#ifndef STAGED  // 0: rows of y are no multiple of 16 bytes, and the copy engine can't write them
#define STAGED 1
#endif
constexpr int CLUSTER = CLUSTER_M * CLUSTER_N, SHARERS = CLUSTER_M + CLUSTER_N - 1;  // sharers: of a row or a column
constexpr int X_BYTES = TILE_M * STEP, W_BYTES = TILE_N * STEP, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int SUMS = TILE_N / 2;                           // registers a thread
constexpr int SIZE = KIND == 0 || KIND == 3 ? 4 : 2;       // bytes of an output
constexpr int COLUMNS = 128 / SIZE, CHUNK_BYTES = 64 * 128;  // of the part of a tile that is written at once
constexpr int OUT_AT = STAGES * STAGE_BYTES;               // two chunks a warpgroup
constexpr int SCALES_AT = OUT_AT + 4 * CHUNK_BYTES;        // float [2][TILE_N]
constexpr int BARRIERS_AT = SCALES_AT + 2 * TILE_N * 4;

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

// What a warpgroup needs to write its 64 rows: those of this lane, and the tile's columns in shared memory.
// Where there is a bias or a zero-point (not `plain`), the second chunk's place holds bias and sums of the columns.
struct Target {
    unsigned char* chunks;
    const float* scales;
    Row rows[2];
    int m0, n0, id;  // id: the warpgroup, 1 or 2
    bool plain;

    __device__ __forceinline__ float* bias() const { return (float*)(chunks + CHUNK_BYTES); }
    __device__ __forceinline__ int* sums() const { return (int*)(chunks + CHUNK_BYTES) + TILE_N; }
    __device__ __forceinline__ Column column(int n) const {
        if (plain) return {scales[n], 0.0f, 0};
        return {scales[n], bias()[n], sums()[n]};
    }
};

// Scale two neighbours of a row and put them down: r the row in the chunk, j the group of 8 columns in it.
template <bool PLAIN>
__device__ __forceinline__ void put(const Target& to, unsigned char* chunk, int2 sum, int half, int r, int j, int column) {
    int t = threadIdx.x % 4;
    unsigned char* row = chunk + r * 128;
    if (KIND == 0) {
        *(int2*)(row + ((j * 2 + t / 2) ^ (r % 8)) * 16 + t % 2 * 8) = sum;
        return;
    }
    float2 scale = *(const float2*)&to.scales[column];
    Column left{scale.x, 0.0f, 0}, right{scale.y, 0.0f, 0};
    if (!PLAIN) left = to.column(column), right = to.column(column + 1);
    float first = scaled(sum.x, to.rows[half], left), second = scaled(sum.y, to.rows[half], right);
    if (SIZE == 2) *(unsigned*)(row + (j ^ (r % 8)) * 16 + t * 4) = pair(first, second);
    else *(float2*)(row + ((j * 2 + t / 2) ^ (r % 8)) * 16 + t % 2 * 8) = make_float2(first, second);
}

// Write a warpgroup's rows through shared memory, a chunk of 128 bytes of columns after the other.
template <bool PLAIN>
__device__ __forceinline__ void write_staged(const int (&d)[SUMS], const Target& to, const TensorMap* y_map) {
    int thread = threadIdx.x % 128, r = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
#pragma unroll
    for (int c = 0; c < TILE_N / COLUMNS; c++) {
        unsigned char* chunk = to.chunks + (PLAIN ? c % 2 * CHUNK_BYTES : 0);
        if (thread == 0) stores_read<PLAIN ? 1 : 0>();  // the copy engine has read what stood there
        named_barrier(to.id, 128);
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int at = (c * COLUMNS / 8 + j) * 4 + half * 2;
                put<PLAIN>(to, chunk, make_int2(d[at], d[at + 1]), half, r + half * 8, j, c * COLUMNS + j * 8 + t * 2);
            }
        shared_to_copy_engine();
        named_barrier(to.id, 128);
        if (thread == 0) store_box(y_map, to.n0 + c * COLUMNS, to.m0, shared_address(chunk));
    }
}

// Write a warpgroup's rows one output after the other.
__device__ __forceinline__ void write_single(const int (&d)[SUMS], const Target& to, const Epilogue& e, int M, int N) {
    int thread = threadIdx.x % 128, m = to.m0 + thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
    named_barrier(to.id, 128);
#pragma unroll
    for (int j = 0; j < SUMS / 4; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int n = j * 8 + t * 2 + i % 2, row = m + i / 2 * 8;
            if (row < M && to.n0 + n < N)
                store(e, d[j * 4 + i], to.rows[i / 2], to.column(n), (size_t)row * N + to.n0 + n);
        }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(384, 1)
int8_wgmma(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
           const __grid_constant__ TensorMap y_map, EPILOGUE_PARAMETERS, int M, int N, int K) {
    extern __shared__ __align__(1024) unsigned char memory[];
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

    if (group == 0) {
        give_registers<40>();
        if (threadIdx.x == 0) {
            wait_for_previous();
            int stage = 0, parity = 1;
            unsigned short beside = 0, below = ((1 << CLUSTER_M) - 1) << (right * CLUSTER_M);
            for (int i = 0; i < CLUSTER_N; i++) beside |= 1 << (i * CLUSTER_M + down);
            for (int index = blockIdx.x / CLUSTER; index < tiles; index += gridDim.x / CLUSTER) {
                Tile tile = place(index, high, wide, down, right);
                int m = tile.m0 + right * (TILE_M / CLUSTER_N), n = tile.n0 + down * (TILE_N / CLUSTER_M);
                for (int step = 0; step < steps; step++) {
                    unsigned here = stages + stage * STAGE_BYTES, arrived = full + stage * 8;
                    unsigned x_to = here + right * (X_BYTES / CLUSTER_N);
                    unsigned w_to = here + X_BYTES + down * (W_BYTES / CLUSTER_M);
                    barrier_wait(empty + stage * 8, parity);
                    barrier_expect(arrived, STAGE_BYTES);
                    fetch(x_to, &x_map, step * STEP, m, arrived, CLUSTER_N, beside);
                    fetch(w_to, &w_map, step * STEP, n, arrived, CLUSTER_M, below);
                    if (++stage == STAGES) stage = 0, parity ^= 1;
                }
            }
        }
        __syncwarp();
    } else {
        take_registers<232>();
        int thread = threadIdx.x % 128, stage = 0, parity = 0, target = sharer(thread % SHARERS, down, right);
        float* scales = (float*)(memory + SCALES_AT) + (group - 1) * TILE_N;
        Target to;
        to.chunks = memory + OUT_AT + (group - 1) * 2 * CHUNK_BYTES, to.scales = scales, to.id = group;
        to.plain = e.bias == nullptr && e.x_zero == nullptr;
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
                for (int half = 0; half < 2; half++) {
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
            if (KIND != 0)  // what the last tile read here is behind a barrier, and so is what this one reads
#pragma unroll
                for (int i = 0; i < (TILE_N + 127) / 128; i++) {
                    int n = i * 128 + thread;
                    if (TILE_N % 128 && n >= TILE_N) break;
                    scales[n] = next[i].scale;
                    if (!to.plain) to.bias()[n] = next[i].bias, to.sums()[n] = next[i].sum;
                }
            if (!STAGED) {
                write_single(d, to, e, M, N);
                named_barrier(to.id, 128);
            } else if (to.plain) write_staged<true>(d, to, &y_map);
            else write_staged<false>(d, to, &y_map);
        }
        if (STAGED && thread == 0) stores_read<0>();
    }
    cluster_meet();  // a block must not leave while the other may still send to it
}
