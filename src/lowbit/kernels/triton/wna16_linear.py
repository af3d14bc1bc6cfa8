"""The weight-only product in Triton, straight from the canonical tensors: any GPU that Triton compiles for.

    y[m,n] = sum_k x[m,k] w[n,k] + bias[n],   w = (q - zero) scale, or levels[code] absmax, rounded to x's dtype

No fast layout. `_product` reads whole 32-bit words: element i of all words of a tile makes one product with every
32/B-th column of x, so nothing is moved between lanes (a load for each code took 1590 us for one
token and 28672 x 4096 on an H200, this 85). One token is multiplied and summed in float32, more by tl.dot. Codes that
straddle words (3, 5, 6, 7 bits), or groups that cut a word, go to `_product_of_codes`, a load for each code.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.numerics.codebook import NestedAbsmax, levels_of
from lowbit.tensors import PackedWeight


@triton.jit
def _product(
    x, codes, scale, zero, levels, bias, y, M, N, scale_row, scale_group, words: tl.constexpr, K: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    # BITS 0: nibbles over the flattened weight, first code high; else words of q + 2^(BITS-1), first code low
    WIDTH: tl.constexpr = 4 if BITS == 0 else BITS
    PER_WORD: tl.constexpr = 32 // WIDTH
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    of_one = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
    for w0 in range(0, words, BLOCK_W):
        at = w0 + tl.arange(0, BLOCK_W)
        inside = (n < N)[:, None] & (at < words)[None, :]  # [BLOCK_N, BLOCK_W]
        flat = n.to(tl.int64)[:, None] * words + at[None, :]
        word = tl.load(codes + flat, mask=inside, other=0)
        place = (
            flat * PER_WORD // GROUP
            if BITS == 0
            else n[:, None] * scale_row + (at * PER_WORD // GROUP)[None, :] * scale_group
        )
        s = tl.load(scale + place, mask=inside, other=0.0).to(tl.float32)
        middle = 0 if BITS == 0 else 1 << (WIDTH - 1)
        if HAS_ZERO:
            middle += tl.load(zero + place, mask=inside, other=0).to(tl.int32)
        for i in tl.static_range(PER_WORD):
            code = (word >> (8 * (i // 2) + 4 * (1 - i % 2) if BITS == 0 else WIDTH * i)) & ((1 << WIDTH) - 1)
            value = tl.load(levels + code) if BITS == 0 else (code - middle).to(tl.float32)
            w = (value * s).to(x.dtype.element_ty)
            k = at * PER_WORD + i
            a = tl.load(
                x + m.to(tl.int64)[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0
            )
            if BLOCK_M == 1:
                of_one += w.to(tl.float32) * a.to(tl.float32)
            else:
                sums = tl.dot(a, w.T, sums)
    if BLOCK_M == 1:
        sums += tl.sum(of_one, 1)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    out = y + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, sums.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _product_of_codes(
    x, codes, scale, zero, levels, bias, y, M, N, scale_row, scale_group, words: tl.constexpr, K: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
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


# tokens up to: BLOCK_M, BLOCK_N, BLOCK_W (words), warps
TILES = ((1, 1, 32, 64, 4), (16, 16, 32, 32, 4), (64, 64, 64, 16, 4), (1 << 30, 128, 128, 16, 8))


@cache
def _levels(name: str, device: torch.device) -> Tensor:
    """A format's table on a device, copied there once: a copy can't be captured in a graph."""
    return levels_of(name).to(device)


def product(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x [M, K] times the weight [N, K], transposed, + bias [N]: [M, N] in x's dtype; float32 sums, deterministic."""
    (tokens, columns), rows = x.shape, weight.shape[0]
    scheme = weight.scheme.weights
    scale = weight.scale.decode() if isinstance(weight.scale, NestedAbsmax) else weight.scale.contiguous()
    codebook = scheme.format.kind == "codebook"
    zero = weight.zero_points()
    per_row = scale.shape[1] if scale.dim() == 2 else 0
    group, codes = scheme.group_size or columns, weight.codes.contiguous()
    by_words = columns % 8 == 0 and group % 8 == 0 if codebook else 32 % scheme.bits == 0 and (
        per_row <= 1 or group % (32 // scheme.bits) == 0)  # fmt: skip
    if codebook and by_words:
        codes = codes.reshape(-1).view(torch.int32).view(rows, -1)  # [N, K/8]
    y = x.new_empty(tokens, rows)
    _, block_m, block_n, block_w, warps = next(tile for tile in TILES if tokens <= tile[0])
    shape: dict[str, Any] = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_W": block_w, "num_warps": warps}
    if not by_words:
        shape = {"BLOCK_M": max(block_m, 16), "BLOCK_N": 64, "BLOCK_K": 64}
    grid = (triton.cdiv(rows, shape["BLOCK_N"]), triton.cdiv(tokens, shape["BLOCK_M"]))
    (_product if by_words else _product_of_codes)[grid](
        x.contiguous(), codes, scale, None if zero is None else zero.contiguous(),
        _levels(scheme.format.name, x.device) if codebook else None, bias, y,
        tokens, rows, per_row, int(per_row > 1), words=codes.shape[1] if codes.dim() == 2 else 0, K=columns,
        BITS=0 if codebook else scheme.bits, GROUP=group, HAS_ZERO=zero is not None, HAS_BIAS=bias is not None, **shape,
    )  # fmt: skip
    return y
