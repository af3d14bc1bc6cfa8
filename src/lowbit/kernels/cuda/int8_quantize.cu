// A few long rows of activations to int8, each by a cluster of blocks (sm_90a; rows of 16-byte chunks).
//
//     x [M, K] float16 or bfloat16 -> q int8 [M, pitch], scale float32 [M]           int8_codes.cuh
//
//         row m:  | block 0 of its cluster | block 1 | ... | SPLIT - 1 |      a thread holds up to 4 chunks of 8 values
//                       max                    max            max             each sends its own to all (st.async)
//
// One block of 1024 threads a row, as Triton makes it, needs a whole multiprocessor: it waits until the product before it
// and the one after it, which has started early and holds its weights, have left one. 256 threads fit beside them.
#include "hopper.cuh"
#include "int8_codes.cuh"

#ifndef SPLIT
#define SPLIT 1
#endif
constexpr int THREADS = 256, HELD = 4;

extern "C" __global__ void __cluster_dims__(SPLIT, 1, 1) __launch_bounds__(THREADS)
int8_quantize(const unsigned short* x, signed char* q, float* scale, int x_row, int K, int pitch) {
    struct Board { unsigned long long barrier; unsigned tops[SPLIT], mine; };
    SHARED(Board, board);
    int rank = blockIdx.x % SPLIT, m = blockIdx.x / SPLIT, chunks = K / CHUNK;
    int first = chunks * rank / SPLIT, last = chunks * (rank + 1) / SPLIT;
    unsigned arrived = shared_address(&board.barrier);
    if (threadIdx.x == 0) {
        board.mine = 0;
        barrier_init(arrived, 1);
        barrier_expect(arrived, SPLIT * 4);
        barrier_init_fence();
    }
    __syncthreads();
    if (SPLIT > 1) cluster_arrive();
    let_next_start();
    wait_for_previous();

    uint4 held[HELD];
    unsigned top = 0;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int c = first + i * THREADS + threadIdx.x;
        held[i] = c < last ? *(const uint4*)(x + (size_t)m * x_row + c * CHUNK) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) top = max(top, largest(held[i]));
    top = __reduce_max_sync(0xffffffffu, top);
    if (threadIdx.x % 32 == 0) atomicMax(&board.mine, top);
    __syncthreads();
    top = board.mine;
    if (SPLIT > 1) {
        cluster_wait();  // all blocks have their barriers ready
        if (threadIdx.x < SPLIT)
            send(remote_address(shared_address(&board.tops[rank]), threadIdx.x), top, remote_address(arrived, threadIdx.x));
        barrier_wait(arrived, 0);
#pragma unroll
        for (int i = 0; i < SPLIT; i++) top = max(top, board.tops[i]);
    }
    Grid grid = grid_of(top);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int c = first + i * THREADS + threadIdx.x;
        if (c < last) *(uint2*)(q + (size_t)m * pitch + c * CHUNK) = codes_of(held[i], grid);
    }
    if (rank == 0 && threadIdx.x == 0) scale[m] = grid.scale;
    // columns K to pitch: the weight holds zeros there, so what q holds does not matter
}
