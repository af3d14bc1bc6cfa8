// Rung 1: four products in one instruction of the ordinary integer units (sm_61 and later; no tensor core).
//
//     dp4a.s32.s32 d, a, b, c        d = c + a.b0*b.b0 + a.b1*b.b1 + a.b2*b.b2 + a.b3*b.b3
//
// a and b hold four consecutive k each. That is why w lies as [N, K]: in a [K, N] matrix the four bytes of a word would
// be four different n, and the instruction would add up products of unrelated elements.
//
//             128 n                  a block of 256 threads makes 128 x 128 outputs, a thread 8 x 8 of them:
//         +-----------+              thread (ty, tx) owns rows ty*4 + {0..3, 64..67}, columns tx*4 + {0..3, 64..67}.
//   128 m |   8x8     |              A step along K brings 32 bytes (8 words) of 128 rows of x and of w into shared
//         +-----------+              memory, transposed to [word][row], so that four rows are one 16-byte read:
//                                    4 reads feed 64 dp4a.
//
// K is a multiple of 16 here (rows are padded when packed), so that global reads are 16 bytes; words at K and beyond, and
// rows at M, N and beyond, are zeros.
constexpr int TILE = 128;
constexpr int WORDS = 8;              // of 4 bytes along K, a step
constexpr int PITCH = TILE + 4;       // words; + 4 spreads the transposing stores over the banks

__device__ __forceinline__ int dp4a(int a, int b, int c) {
    int d;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// 16 bytes of row `row` at byte k of a [rows, K] matrix; zeros outside.
__device__ __forceinline__ int4 fetch(const signed char* matrix, int row, int rows, int k, int K) {
    if (row >= rows || k >= K) return make_int4(0, 0, 0, 0);
    return *(const int4*)(matrix + (size_t)row * K + k);
}

__device__ __forceinline__ void put(int (*tile)[PITCH], int row, int word, int4 four) {
    tile[word + 0][row] = four.x;
    tile[word + 1][row] = four.y;
    tile[word + 2][row] = four.z;
    tile[word + 3][row] = four.w;
}

extern "C" __global__ void __launch_bounds__(256)
int8_dp4a(const signed char* x, const signed char* w, int* out, int M, int N, int K) {
    __shared__ __align__(16) int xs[WORDS][PITCH];
    __shared__ __align__(16) int ws[WORDS][PITCH];
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    int m0 = blockIdx.y * TILE, n0 = blockIdx.x * TILE;
    int row = threadIdx.x / 2, half = threadIdx.x % 2;  // who loads what: two threads a row, 16 bytes each

    int sum[8][8] = {};
    int4 x_next = fetch(x, m0 + row, M, half * 16, K);
    int4 w_next = fetch(w, n0 + row, N, half * 16, K);
    for (int k0 = 0; k0 < K; k0 += WORDS * 4) {
        put(xs, row, half * 4, x_next);
        put(ws, row, half * 4, w_next);
        __syncthreads();
        int k = k0 + WORDS * 4 + half * 16;
        x_next = fetch(x, m0 + row, M, k, K);  // the next step's loads fly while this step is computed
        w_next = fetch(w, n0 + row, N, k, K);
#pragma unroll
        for (int word = 0; word < WORDS; word++) {
            int a[8], b[8];
            *(int4*)&a[0] = *(int4*)&xs[word][ty * 4];
            *(int4*)&a[4] = *(int4*)&xs[word][ty * 4 + 64];
            *(int4*)&b[0] = *(int4*)&ws[word][tx * 4];
            *(int4*)&b[4] = *(int4*)&ws[word][tx * 4 + 64];
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int j = 0; j < 8; j++) sum[i][j] = dp4a(a[i], b[j], sum[i][j]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) {
            int m = m0 + ty * 4 + (i / 4) * 64 + i % 4, n = n0 + tx * 4 + (j / 4) * 64 + j % 4;
            if (m < M && n < N) out[(size_t)m * N + n] = sum[i][j];
        }
}
