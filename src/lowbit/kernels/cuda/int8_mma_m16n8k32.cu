// Rung 4: Ampere's instruction, four times the work of Turing's, and copies that run by themselves (sm_80 and later).
//
//     mma.sync.m16n8k32.row.col.s32.s8.s8.s32     16 x 8 outputs, 32 bytes along K
//
//     lane = 4 g + t, g = 0..7, t = 0..3
//         x:  a0 row g,   bytes 4t..4t+3       a1 row g+8, same bytes
//             a2 row g,   bytes 16+4t..        a3 row g+8, same bytes
//         w:  b0 column g, bytes 4t..4t+3      b1 column g, bytes 16+4t..
//         sums: c0 c1 row g, columns 2t, 2t+1; c2 c3 row g+8
//
//     x, one ldmatrix.x4:  rows 0-7 | 8-15 of bytes 0-15, then rows 0-7 | 8-15 of bytes 16-31   = a0 a1 a2 a3
//     w, one ldmatrix.x4:  columns 0-7: bytes 0-15 | 16-31, columns 8-15: bytes 0-15 | 16-31     = b0 b1 of two mma
//
//     cp.async.cg 16 bytes: global -> shared memory without a register; a group is committed per stage, and the loop
//     waits for the oldest of STAGES - 1 groups in flight. Its src-size operand 0 writes zeros: that is the mask.
//
//                 256 n
//         +----+----+----+----+      8 warps, 2 along m by 4 along n, 64 x 64 outputs each (128 registers of sums):
//   128 m | w0 | w1 | w2 | w3 |      32 mma for 8 ldmatrix.x4 per 32 bytes along K. A stage is 64 bytes along K of
//         | w4 | w5 | w6 | w7 |      128 + 256 rows = 24 KB; four stages, 96 KB, fit sm_86 and sm_89 too.
//         +----+----+----+----+
//
// Shared memory: rows of 64 bytes = 4 chunks of 16; chunk c of row r stands at c ^ (r/2 % 4), so that the 8 rows that
// ldmatrix reads at one c fall into 8 different groups of banks.
#include "int8_epilogue.cuh"

constexpr int TILE_M = 128, TILE_N = 256, STEP = 64, STAGES = 4;
constexpr int STAGE_BYTES = (TILE_M + TILE_N) * STEP;
constexpr int GROUP = 8;  // tiles along m that are visited before the next n: their rows of x stay in the L2

__device__ __forceinline__ int offset(int row, int chunk) { return row * STEP + ((chunk ^ (row / 2 % 4)) * 16); }

__device__ __forceinline__ void ldmatrix(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ void mma(int (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void copy16(unsigned to, const signed char* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

// Start the copies of `rows` rows from first_row on, bytes k0..k0+63, by all 256 threads: 4 neighbours share a row.
template <int ROWS>
__device__ __forceinline__ void load(unsigned to, const signed char* matrix, int first_row, int limit, int k0, int K) {
    int chunk = threadIdx.x % 4;
#pragma unroll
    for (int r = threadIdx.x / 4; r < ROWS; r += 64) {
        bool inside = first_row + r < limit && k0 + chunk * 16 < K;
        const signed char* from = inside ? matrix + (size_t)(first_row + r) * K + k0 + chunk * 16 : matrix;
        copy16(to + offset(r, chunk), from, inside);
    }
}

extern "C" __global__ void __launch_bounds__(256)
int8_mma_m16n8k32(const signed char* x, const signed char* w, EPILOGUE_PARAMETERS, int M, int N, int K) {
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ Column columns[TILE_N];
    Epilogue e = EPILOGUE;
    unsigned base = (unsigned)__cvta_generic_to_shared(memory);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int tiles_m = (M + TILE_M - 1) / TILE_M, tiles_n = (N + TILE_N - 1) / TILE_N;
    int in_group = GROUP * tiles_n, group = blockIdx.x / in_group;
    int height = min(GROUP, tiles_m - group * GROUP);
    int m0 = (group * GROUP + blockIdx.x % in_group % height) * TILE_M;
    int n0 = blockIdx.x % in_group / height * TILE_N;
    int m_warp = warp / 4 * 64, n_warp = warp % 4 * 64;
    int steps = (K + STEP - 1) / STEP;

    int sums[4][8][4] = {};
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) {
            load<TILE_M>(base + s * STAGE_BYTES, x, m0, M, s * STEP, K);
            load<TILE_N>(base + s * STAGE_BYTES + TILE_M * STEP, w, n0, N, s * STEP, K);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    for (int step = 0; step < steps; step++) {
        asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory");
        __syncthreads();  // this stage has arrived for all, and the stage that is filled next has been read by all
        int ahead = step + STAGES - 1;
        if (ahead < steps) {
            unsigned to = base + ahead % STAGES * STAGE_BYTES;
            load<TILE_M>(to, x, m0, M, ahead * STEP, K);
            load<TILE_N>(to + TILE_M * STEP, w, n0, N, ahead * STEP, K);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        unsigned xs = base + step % STAGES * STAGE_BYTES, ws = xs + TILE_M * STEP;
#pragma unroll
        for (int k = 0; k < STEP / 32; k++) {
            unsigned a[4][4], b[4][4];
#pragma unroll
            for (int i = 0; i < 4; i++) ldmatrix(a[i], xs + offset(m_warp + i * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
            for (int j = 0; j < 4; j++)
                ldmatrix(b[j], ws + offset(n_warp + j * 16 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 8; j++) mma(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    }
    read_columns<TILE_N, 256>(columns, e, n0, N);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int m = m0 + m_warp + i * 8 + lane / 4;
        if (m >= M) break;
        Row r = read_row(e, m);
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                int n = n_warp + j * 8 + lane % 4 * 2 + c;
                if (n0 + n < N) store(e, sums[i / 2][j][i % 2 * 2 + c], r, columns[n], (size_t)m * N + n0 + n);
            }
    }
}
