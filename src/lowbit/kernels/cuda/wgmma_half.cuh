// wgmma m64nNk16 on fp16 or bf16 (sm_90a), operand A in registers, B in shared memory, fp32 sums; N = TOKENS.
//
// A: warp i of the four holds rows 16 i to 16 i + 15, each as mma.m16n8k16 wants its operand A (ptx.cuh).
// D: registers 4 j to 4 j + 3 of lane 4 g + c: row 16 i + g, columns 8 j + 2 c, + 1; row 16 i + g + 8, the same columns.
// B: rows of 128 bytes along K in the 128-byte swizzle (16-byte piece c of row r at c ^ (r % 8)), tiles at multiples of
// 1024 bytes. The 16 columns of step j start 32 j bytes further: + 2 j in the descriptor.
#pragma once
#include "ptx.cuh"
#ifndef EMULATED

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
DEVICE void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// 128-byte swizzle, K-major: 8 rows of 128 bytes repeat every 1024 bytes
DEVICE u64 descriptor_of(u32 address) {
    return (1ull << 62) | (64ull << 32) | (1ull << 16) | ((address & 0x3FFFF) >> 4);
}

#if XTYPE
#define TYPES "f32.bf16.bf16"
#else
#define TYPES "f32.f16.f16"
#endif
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define A_B "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add)

// d[64, TOKENS] = (add ? d : 0) + a[64, 16] b[16, TOKENS]
DEVICE void wgmma(float (&d)[TOKENS / 2], const u32 (&a)[4], u64 b, int add) {
#if TOKENS == 16
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %13, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n16k16." TYPES " {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, p, 1, 1, 0;\n}"
                 : D8(0) : A_B);
#elif TOKENS == 32
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16." TYPES
                 " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, p, 1, 1, 0;\n}"
                 : D8(0), D8(8) : A_B);
#else
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16." TYPES
                 " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,"
                 "%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, p, 1, 1, 0;\n}"
                 : D8(0), D8(8), D8(16), D8(24) : A_B);
#endif
}
#endif  // EMULATED
