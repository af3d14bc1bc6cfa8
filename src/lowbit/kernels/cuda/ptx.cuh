// The instructions that the kernels of this folder share, in PTX, so that no CUDA header is needed.
//
// XTYPE chooses the 16-bit type of activations: 0 fp16, 1 bf16. `half2x` below is two of them in 32 bits.
// tests/kernels/cuda/emulated.hpp defines the same functions in C++, so that the kernels also run where no GPU is.
#pragma once
#ifndef EMULATED

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef XTYPE
#define XTYPE 1
#endif

#define DEVICE __device__ __forceinline__

#define SHARED_MEMORY(alignment) extern __shared__ __align__(alignment) u8 shared[]

DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// ---- 16-bit floats ----
// float -> fp16 or bf16 bits, to nearest even
DEVICE u16 to_x(float value) {
    u16 bits;
#if XTYPE
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    u32 word = __float_as_uint(value);
    bits = (value != value) ? 0x7FC0 : static_cast<u16>((word + 0x7FFF + ((word >> 16) & 1)) >> 16);
#endif
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
    return bits;
}

DEVICE float from_f16(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

DEVICE float from_x(u16 bits) {
#if XTYPE
    return __uint_as_float(static_cast<u32>(bits) << 16);
#else
    return from_f16(bits);
#endif
}

// a - b on two halves, exact for the small integers that we feed it
DEVICE u32 sub2(u32 a, u32 b) {
    u32 d;
#if XTYPE
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3F803F80u), "r"(b ^ 0x80008000u));
#else
    asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#endif
    return d;
}

// ---- bits ----
// a & mask | b in one instruction; b must come from a register, for only one operand may be a constant
template <u32 MASK>
DEVICE u32 masked(u32 a, u32 b) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "n"(MASK), "r"(b));
    return d;
}

// ~a & mask | b
template <u32 MASK>
DEVICE u32 masked_not(u32 a, u32 b) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xAE;" : "=r"(d) : "r"(a), "n"(MASK), "r"(b));
    return d;
}

// a constant that the compiler keeps in a register
DEVICE u32 opaque(u32 constant) {
    u32 d;
    asm volatile("mov.u32 %0, %1;" : "=r"(d) : "r"(constant));
    return d;
}

// what all lanes of a warp have equal; said so, the compiler keeps it once a warp
DEVICE u32 uniform(u32 value) { return __shfl_sync(~0u, value, 0); }

DEVICE u32 load_shared(u32 address) {
    u32 word;
    asm("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(address));
    return word;
}

// ---- tensor cores: d[16,8] += a[16,16] b[16,8], fp32 sums ----
// lane l = 4 g + c holds  a0 (g, 2c..2c+1)  a1 (g+8, same)  a2 (g, 2c+8..)  a3 (g+8, 2c+8..)
//                         b0 (2c..2c+1, g)  b1 (2c+8.., g)  d0,d1 (g, 2c..2c+1)  d2,d3 (g+8, same)
DEVICE void mma_16816(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
#if XTYPE
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else  // Turing: fp16 alone, eight columns of a at a time
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// four 8x8 matrices of halves; lanes 8i to 8i+7 give the row addresses of matrix i
DEVICE void ldmatrix_x4(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

// an 8 x 8 matrix of halves, a row a quad of lanes, two columns a lane, turned over
DEVICE u32 transpose_8x8(u32 pair) {
    u32 turned;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(pair));
    return turned;
}

// ---- from block to block through memory ----
// A flag is raised when it holds this number, which no memory holds by chance: so nobody needs to clear it beforehand.
constexpr u64 RAISED = 0x9E6C63D0676A9A99ull;

// what the warp wrote before the __syncwarp before this is there for whoever awaits the flag
DEVICE void raise_flag(u64* flag) {
    asm volatile("fence.acq_rel.gpu;\nst.relaxed.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(RAISED) : "memory");
}

DEVICE void await_flag(const u64* flag) {
    u64 found;
    do asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(flag) : "memory");
    while (found != RAISED);
}

// past the first-level cache
DEVICE float4 load_fresh(const float4* from) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from) : "memory");
    return v;
}

// ---- programmatic dependent launch ----
DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

DEVICE void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- blocks of a cluster ----
#if __CUDA_ARCH__ >= 900
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// the float at a shared address of the block with this rank
DEVICE float load_from_rank(u32 address, u32 rank) {
    float value;
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.f32 %0, [there];\n}"
                 : "=f"(value) : "r"(address), "r"(rank) : "memory");
    return value;
}
#endif

// ---- asynchronous copies to shared memory ----
#if __CUDA_ARCH__ >= 900
DEVICE void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}"
        ::"r"(barrier), "r"(parity) : "memory");
}

DEVICE u64 evict_first_policy() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

DEVICE u64 evict_last_policy() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// bytes (a multiple of 16) from global to shared by the copy engine; counted on the barrier
DEVICE void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
        ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}
#endif

#if __CUDA_ARCH__ >= 800
DEVICE void copy_16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

DEVICE void copy_16_or_zeros(u32 to, const void* from, bool valid) {
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
#endif
#endif  // EMULATED
