// Rung 0: one thread, one output, one byte at a time.
//
//     out[m,n] = sum_k x[m,k] w[n,k]        x int8 [M, K], w int8 [N, K], out int32 [M, N]
//
//                 n = blockIdx.x * 16 + threadIdx.x
//                 v
//         +---+---+---+---+          every thread walks row m of x and row n of w from k = 0 to K - 1.
//     m > |   | * |   |   |          Both rows are contiguous along K: the weight is [N, K], never [K, N].
//         +---+---+---+---+
//
// The instruction is an integer multiply-add (IMAD) on bytes widened to 32 bits. Nothing is shared: each byte is read
// from the caches M or N times. It is the version to compare the others with, and it takes any K.
extern "C" __global__ void int8_naive(const signed char* x, const signed char* w, int* out, int M, int N, int K) {
    int n = blockIdx.x * 16 + threadIdx.x;
    int m = blockIdx.y * 16 + threadIdx.y;
    if (m >= M || n >= N) return;
    const signed char* row = x + (size_t)m * K;
    const signed char* column = w + (size_t)n * K;
    int sum = 0;
    for (int k = 0; k < K; k++) sum += (int)row[k] * (int)column[k];
    out[(size_t)m * N + n] = sum;
}
