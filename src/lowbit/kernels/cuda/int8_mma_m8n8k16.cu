// Rung 3: Turing's own instruction, with the fragments in the open (sm_75 and later).
//
//     mma.sync.m8n8k16.row.col.s32.s8.s8.s32      8 x 8 outputs, 16 bytes along K, one register of x and of w a lane
//
//     lane = 4 g + t, g = 0..7, t = 0..3
//         x: row g, bytes 4t..4t+3        w: column g, bytes 4t..4t+3        sums: row g, columns 2t and 2t+1
//
//     ldmatrix.x4 brings four 8 x 16-byte matrices from shared memory into one register each. Lane l gives the address
//     of row l%8 of matrix l/8; afterwards lane 4g + t holds bytes 4t..4t+3 of row g: exactly the fragment above, for x
//     and for w alike, because both lie along K.
//
//             128 n
//         +---+---+---+---+         8 warps, 2 along m by 4 along n, 64 x 32 outputs each: 8 x 4 mma a slab of 16 bytes,
//   128 m |w0 |w1 |w2 |w3 |         fed by 2 + 1 ldmatrix.x4. A step brings 4 slabs of 128 rows of each matrix, through
//         |w4 |w5 |w6 |w7 |         registers: cp.async is sm_80.
//         +---+---+---+---+
//
// sums[i][j][c] of a lane stands at row 8i + g, column 8j + 2t + c of the warp's 64 x 32.
// Shared memory: [k/16][row][16 bytes]; the 8 rows of one matrix are 128 consecutive bytes: no bank conflict.
// K is a multiple of 16; rows outside the matrices are zeros and are not written.
#include "int8_epilogue.cuh"

constexpr int TILE = 128, SLABS = 4;

__device__ __forceinline__ void ldmatrix(unsigned (&r)[4], const void* row) {
    unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ void mma(int (&sum)[2], unsigned x, unsigned w) {
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+r"(sum[0]), "+r"(sum[1]) : "r"(x), "r"(w));
}

// 16 bytes of row `row` at byte k of a [rows, K] matrix; zeros outside.
__device__ __forceinline__ int4 fetch(const signed char* matrix, int row, int rows, int k, int K) {
    if (row >= rows || k >= K) return make_int4(0, 0, 0, 0);
    return *(const int4*)(matrix + (size_t)row * K + k);
}

extern "C" __global__ void __launch_bounds__(256)
int8_mma_m8n8k16(const signed char* x, const signed char* w, EPILOGUE_PARAMETERS, int M, int N, int K) {
    __shared__ __align__(128) signed char xs[SLABS][TILE][16];
    __shared__ __align__(128) signed char ws[SLABS][TILE][16];
    __shared__ Column columns[TILE];
    Epilogue e = EPILOGUE;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int m0 = blockIdx.y * TILE, n0 = blockIdx.x * TILE;
    int m_warp = warp / 4 * 64, n_warp = warp % 4 * 32;
    int row = threadIdx.x % TILE, slab = threadIdx.x / TILE * 2;  // who loads what: a row, two slabs of each matrix

    int sums[8][4][2] = {};
    int4 x_next[2], w_next[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        x_next[i] = fetch(x, m0 + row, M, (slab + i) * 16, K);
        w_next[i] = fetch(w, n0 + row, N, (slab + i) * 16, K);
    }
    for (int k0 = 0; k0 < K; k0 += SLABS * 16) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            *(int4*)xs[slab + i][row] = x_next[i];
            *(int4*)ws[slab + i][row] = w_next[i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int k = k0 + SLABS * 16 + (slab + i) * 16;
            x_next[i] = fetch(x, m0 + row, M, k, K);
            w_next[i] = fetch(w, n0 + row, N, k, K);
        }
#pragma unroll
        for (int s = 0; s < SLABS; s++) {
            unsigned a[2][4], b[4];
            ldmatrix(a[0], xs[s][m_warp + lane]);
            ldmatrix(a[1], xs[s][m_warp + 32 + lane]);
            ldmatrix(b, ws[s][n_warp + lane]);
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) mma(sums[i][j], a[i / 4][i % 4], b[j]);
        }
        __syncthreads();
    }
    read_columns<TILE, 256>(columns, e, n0, N);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int m = m0 + m_warp + i * 8 + lane / 4;
        if (m >= M) break;
        Row r = read_row(e, m);
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                int n = n_warp + j * 8 + lane % 4 * 2 + c;
                if (n0 + n < N) store(e, sums[i][j][c], r, columns[n], (size_t)m * N + n0 + n);
            }
    }
}
