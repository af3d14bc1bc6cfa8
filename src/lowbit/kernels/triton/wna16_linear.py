"""The weight-only product in Triton, straight from the canonical tensors: any GPU that Triton compiles for.

    y[m,n] = sum_k x[m,k] w[n,k] + bias[n],   w = (q - zero) scale, or levels[code] absmax, rounded to x's dtype

No fast layout and no tuning: every code is fetched by its own load from the word (or two, for 3, 5, 6 and 7 bits) that
holds it. kernels/cuda has the fast kernels; this one asks for nothing but Triton, and runs in its interpreter.
"""

import triton
import triton.language as tl
from torch import Tensor

from lowbit.numerics.codebook import NestedAbsmax, levels_of
from lowbit.tensors import PackedWeight

BLOCK_N, BLOCK_K = 64, 64


@triton.jit
def _product(
    x, codes, scale, zero, levels, bias, y, M, N, words, scale_row, scale_group, K: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # BITS 0: nibbles over the flattened weight, first code high; else dense words of q + 2^(BITS-1), first code low
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        inside = (n < N)[:, None] & (k < K)[None, :]  # [BLOCK_N, BLOCK_K]
        if BITS == 0:
            at = n.to(tl.int64)[:, None] * K + k[None, :]
            byte = tl.load(codes + at // 2, mask=inside, other=0).to(tl.int32)
            code = tl.where(at % 2 == 0, byte >> 4, byte & 15)
            absmax = tl.load(scale + at // GROUP, mask=inside, other=0.0)
            w = tl.load(levels + code) * absmax
        else:
            bit = k * BITS
            row = codes + n.to(tl.int64)[:, None] * words
            low = tl.load(row + (bit // 32)[None, :], mask=inside, other=0).to(tl.uint32, bitcast=True)
            value = low >> (bit % 32).to(tl.uint32)[None, :]
            if 32 % BITS != 0:
                straddles = (bit % 32 + BITS > 32)[None, :] & inside
                high = tl.load(row + (bit // 32 + 1)[None, :], mask=straddles, other=0).to(tl.uint32, bitcast=True)
                shift = tl.where(bit % 32 + BITS > 32, 32 - bit % 32, 0).to(tl.uint32)
                value = value | tl.where(straddles, high << shift[None, :], 0)
            q = (value & ((1 << BITS) - 1)).to(tl.int32) - (1 << (BITS - 1))
            place = n[:, None] * scale_row + (k // GROUP)[None, :] * scale_group
            if HAS_ZERO:
                q -= tl.load(zero + place, mask=inside, other=0).to(tl.int32)
            w = q.to(tl.float32) * tl.load(scale + place, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(x + m.to(tl.int64)[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        sums += tl.dot(a, w.to(a.dtype).T)
    if HAS_BIAS:
        sums += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    out = y + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, sums.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def product(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x [M, K] times the weight [N, K], transposed, + bias [N]: [M, N] in x's dtype; float32 sums, deterministic."""
    (tokens, columns), rows = x.shape, weight.shape[0]
    scheme = weight.scheme.weights
    scale = weight.scale.decode() if isinstance(weight.scale, NestedAbsmax) else weight.scale.contiguous()
    codebook = scheme.format.kind == "codebook"
    zero = weight.zero_points()
    per_row = scale.shape[1] if scale.dim() == 2 else 0
    y = x.new_empty(tokens, rows)
    block_m = 16 if tokens <= 16 else 64
    _product[(triton.cdiv(rows, BLOCK_N), triton.cdiv(tokens, block_m))](
        x.contiguous(), weight.codes, scale, None if zero is None else zero.contiguous(),
        levels_of(scheme.format.name).to(x.device) if codebook else None, bias, y,
        tokens, rows, 0 if codebook else weight.codes.shape[1], per_row, int(per_row > 1), K=columns,
        BITS=0 if codebook else scheme.bits, GROUP=scheme.group_size or columns,
        HAS_ZERO=zero is not None, HAS_BIAS=bias is not None,
        BLOCK_M=block_m, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
    )  # fmt: skip
    return y
