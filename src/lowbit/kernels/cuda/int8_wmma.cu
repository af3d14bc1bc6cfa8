// Rung 2: the tensor cores through WMMA, the instruction whose fragments are a secret (sm_72 and later).
//
//     wmma.load.a.row.m16n16k16.s8    16 x 16 bytes of x   -> 2 registers a lane
//     wmma.load.b.col.m16n16k16.s8    16 x 16 bytes of w   -> 2 registers a lane     ("col": B[k][n] lies as w[n][k])
//     wmma.mma.row.col.m16n16k16      8 int32 a lane +=
//     wmma.store.d.row                16 x 16 int32
//
// Which lane holds which element is unspecified, so the product can only be loaded, multiplied and stored. It is written
// in PTX because <mma.h> is not among the headers that NVRTC carries.
//
//             128 n
//         +---+---+---+---+         256 threads are 8 warps, 2 along m by 4 along n; a warp makes 64 x 32 outputs,
//   128 m |w0 |w1 |w2 |w3 |         4 x 2 tiles of 16 x 16. A step brings 64 bytes along K of 128 rows of each matrix.
//         |w4 |w5 |w6 |w7 |
//         +---+---+---+---+
//
// Shared memory: [k/16][row][16 bytes]. A 16 x 16 tile is 256 consecutive bytes (leading dimension 16), and the 8 rows
// that a warp touches at a time are 128 consecutive bytes: no bank conflict. K is a multiple of 16.
constexpr int TILE = 128, SLABS = 4;  // a slab is 16 bytes along K

struct Fragment { unsigned r[2]; };
struct Sums { int r[8]; };

__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

__device__ __forceinline__ Fragment load_x(const signed char* tile) {
    Fragment f;
    asm volatile("wmma.load.a.sync.aligned.row.m16n16k16.shared.s8 {%0, %1}, [%2], 16;"
                 : "=r"(f.r[0]), "=r"(f.r[1]) : "r"(shared_address(tile)) : "memory");
    return f;
}

__device__ __forceinline__ Fragment load_w(const signed char* tile) {
    Fragment f;
    asm volatile("wmma.load.b.sync.aligned.col.m16n16k16.shared.s8 {%0, %1}, [%2], 16;"
                 : "=r"(f.r[0]), "=r"(f.r[1]) : "r"(shared_address(tile)) : "memory");
    return f;
}

__device__ __forceinline__ void multiply(Sums& s, Fragment a, Fragment b) {
    asm volatile(
        "wmma.mma.sync.aligned.row.col.m16n16k16.s32.s8.s8.s32 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9}, {%10,%11}, "
        "{%0,%1,%2,%3,%4,%5,%6,%7};"
        : "+r"(s.r[0]), "+r"(s.r[1]), "+r"(s.r[2]), "+r"(s.r[3]), "+r"(s.r[4]), "+r"(s.r[5]), "+r"(s.r[6]), "+r"(s.r[7])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(b.r[0]), "r"(b.r[1]));
}

__device__ __forceinline__ void store_tile(int* tile, const Sums& s) {
    asm volatile("wmma.store.d.sync.aligned.row.m16n16k16.shared.s32 [%0], {%1,%2,%3,%4,%5,%6,%7,%8}, 16;"
                 :: "r"(shared_address(tile)), "r"(s.r[0]), "r"(s.r[1]), "r"(s.r[2]), "r"(s.r[3]), "r"(s.r[4]),
                    "r"(s.r[5]), "r"(s.r[6]), "r"(s.r[7]) : "memory");
}

// 16 bytes of row `row` at byte k of a [rows, K] matrix; zeros outside.
__device__ __forceinline__ int4 fetch(const signed char* matrix, int row, int rows, int k, int K) {
    if (row >= rows || k >= K) return make_int4(0, 0, 0, 0);
    return *(const int4*)(matrix + (size_t)row * K + k);
}

extern "C" __global__ void __launch_bounds__(256)
int8_wmma(const signed char* x, const signed char* w, int* out, int M, int N, int K) {
    __shared__ __align__(128) signed char xs[SLABS][TILE][16];
    __shared__ __align__(128) signed char ws[SLABS][TILE][16];
    __shared__ __align__(128) int staging[8][16 * 16];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int m0 = blockIdx.y * TILE, n0 = blockIdx.x * TILE;
    int m_warp = warp / 4 * 64, n_warp = warp % 4 * 32;
    int row = threadIdx.x % TILE, slab = threadIdx.x / TILE * 2;  // who loads what: a row, two slabs of each matrix

    Sums sums[4][2] = {};
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
            Fragment b[2] = {load_w(ws[s][n_warp]), load_w(ws[s][n_warp + 16])};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                Fragment a = load_x(xs[s][m_warp + i * 16]);
                multiply(sums[i][0], a, b[0]);
                multiply(sums[i][1], a, b[1]);
            }
        }
        __syncthreads();
    }
    // Through shared memory to the masked output: the layout of sums is known to wmma.store alone.
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            store_tile(staging[warp], sums[i][j]);
            __syncwarp();
#pragma unroll
            for (int at = lane; at < 256; at += 32) {
                int m = m0 + m_warp + i * 16 + at / 16, n = n0 + n_warp + j * 16 + at % 16;
                if (m < M && n < N) out[(size_t)m * N + n] = staging[warp][at];
            }
            __syncwarp();
        }
}
