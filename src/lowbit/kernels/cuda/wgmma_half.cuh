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

// until at most PENDING committed groups are under way
template <int PENDING>
DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

// 128-byte swizzle, K-major: 8 rows of 128 bytes repeat every 1024 bytes. The low half holds the address and may be added
// to: a tile that begins 16 n bytes further is low + n
DEVICE u32 descriptor_low(u32 address) { return (1u << 16) | ((address & 0x3FFFF) >> 4); }
DEVICE u64 descriptor(u32 low) { return (1ull << 62) | (64ull << 32) | low; }

struct alignas(64) TensorMap { unsigned char opaque[128]; };  // CUtensorMap (tensor_map.py)

DEVICE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// the box of a map from a byte of the row and a row, swizzled; counted on the barrier
DEVICE void copy_box(u32 to, const TensorMap* map, int byte, int row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(to), "l"(map), "r"(byte), "r"(row), "r"(barrier) : "memory");
}

// two products, each rounded to nearest even
DEVICE u32 mul2(u32 a, u32 b) {
    u32 d;
#if XTYPE
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#else
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#endif
    return d;
}

// a b + c, rounded once
DEVICE u32 fma2(u32 a, u32 b, u32 c) {
    u32 d;
#if XTYPE
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
    return d;
}

#if XTYPE
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 "
#else
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 "
#endif
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define D32(i) D8(i), D8(i + 8), D8(i + 16), D8(i + 24)
#define A_B "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
#define REGISTERS_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"

// d[64, TOKENS] = a[64, 16] b[16, TOKENS] + (KEEP ? d : 0)
template <bool KEEP>
DEVICE void wgmma(float (&d)[TOKENS / 2], const u32 (&a)[4], u64 b) {
#if TOKENS == 8
    asm volatile(WGMMA(8) "{%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, %9, 1, 1, 0;" : D4(0) : A_B, "n"(KEEP));
#elif TOKENS == 16
    asm volatile(WGMMA(16) "{%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, %13, 1, 1, 0;" : D8(0) : A_B, "n"(KEEP));
#elif TOKENS == 32
    asm volatile(WGMMA(32) "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, %21, 1, 1, 0;"
                 : D8(0), D8(8) : A_B, "n"(KEEP));
#elif TOKENS == 64
    asm volatile(WGMMA(64) "{" REGISTERS_32 "}, {%32,%33,%34,%35}, %36, %37, 1, 1, 0;" : D32(0) : A_B, "n"(KEEP));
#else
    asm volatile(WGMMA(128) "{" REGISTERS_32
                 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,"
                 "%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, %69, 1, 1, 0;"
                 : D32(0), D32(32) : A_B, "n"(KEEP));
#endif
}
#endif  // EMULATED
