"""The W8A8 product in Triton (sm_80 and later): int8 [M, K] x int8 [N, K]^T, scaled on the way out.

    y[m,n] = x_scale[m] w_scale[n] (sum_k qx[m,k] qw[n,k] - x_zero[m] w_sum[n]) + bias[n]

The weight is [N, K] with K contiguous, as int8 tensor cores take it; a [K, N] one Triton would transpose byte by byte.
Tiles are visited in columns of GROUP_M along m, so that the rows of x stay in the L2 while w streams by.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lowbit.kernels.int8 import Scaling


class Tile(NamedTuple):
    """One configuration; used for up to `tokens` tokens."""

    tokens: int
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


TILES = (
    #    tokens   M    N    K  warps stages     measured on H200 (bench/results/int8_linear.json)
    Tile(16, 16, 32, 256, 4, 4),
    Tile(32, 32, 32, 256, 4, 4),
    Tile(64, 64, 64, 128, 4, 5),
    Tile(256, 128, 128, 128, 8, 4),
    Tile(2**31, 128, 256, 128, 8, 3),
)
GROUP_M = tl.constexpr(8)


@triton.jit
def _product(
    x, w, out, x_scale, x_zero, w_scale, w_sum, bias, M, N, x_pitch, w_pitch, K: tl.constexpr,
    X_STRIDE: tl.constexpr, W_STRIDE: tl.constexpr, SCALED: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    across, down = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    group = program // (GROUP_M * across)
    height = min(down - group * GROUP_M, GROUP_M)
    m = (group * GROUP_M + program % (GROUP_M * across) % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = program % (GROUP_M * across) // height * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows beyond M or N read row 0 instead: they are computed, and not written.
    x_row = x + tl.where(m < M, m, 0).to(tl.int64)[:, None] * x_pitch  # [BLOCK_M, 1]
    w_row = w + tl.where(n < N, n, 0).to(tl.int64)[:, None] * w_pitch  # [BLOCK_N, 1]
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k0 in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a = tl.load(x_row + (k0 + k)[None, :])
            b = tl.load(w_row + (k0 + k)[None, :])
        else:
            a = tl.load(x_row + (k0 + k)[None, :], mask=(k0 + k)[None, :] < K, other=0)
            b = tl.load(w_row + (k0 + k)[None, :], mask=(k0 + k)[None, :] < K, other=0)
        sums = tl.dot(a, b.T, sums, out_dtype=tl.int32)
    if HAS_ZERO:
        zero = tl.load(x_zero + m * X_STRIDE, mask=m < M, other=0)
        sums -= zero[:, None] * tl.load(w_sum + n, mask=n < N, other=0)[None, :]
    at = out + m.to(tl.int64)[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if SCALED:
        rows = tl.load(x_scale + m * X_STRIDE, mask=m < M, other=0.0).to(tl.float32)
        columns = tl.load(w_scale + n * W_STRIDE, mask=n < N, other=0.0).to(tl.float32)
        y = sums.to(tl.float32) * (rows[:, None] * columns[None, :])
        if HAS_BIAS:
            y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        tl.store(at, y.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(at, sums, mask=inside)


def product(q: Tensor, codes: Tensor, scaling: Scaling | None = None, tile: Tile | None = None) -> Tensor:
    """q int8 [M, K] times codes int8 [N, K], transposed: int32 [M, N] where scaling is None, else its floats.

    Both with rows padded (kernels/int8.py) and contiguous. tile: None for the row of TILES.
    """
    (rows, columns), (width, _) = q.shape, codes.shape
    chosen = tile or next(tile for tile in TILES if rows <= tile.tokens)
    dtype = torch.int32 if scaling is None else scaling.dtype
    out = torch.empty(rows, width, dtype=dtype, device=q.device)
    early = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] >= 9
    operands = (None,) * 5 if scaling is None else (
        scaling.x_scale, scaling.x_zero, scaling.w_scale, scaling.w_sum, scaling.bias
    )  # fmt: skip
    _product[(triton.cdiv(rows, chosen.block_m) * triton.cdiv(width, chosen.block_n),)](
        q, codes, out, *operands, rows, width, q.stride(0), codes.stride(0), K=columns,
        X_STRIDE=int(scaling is not None and scaling.x_scale.numel() > 1),
        W_STRIDE=int(scaling is not None and scaling.w_scale.numel() > 1),
        SCALED=scaling is not None,
        HAS_ZERO=scaling is not None and scaling.x_zero is not None,
        HAS_BIAS=scaling is not None and scaling.bias is not None,
        EARLY=early,
        BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n, BLOCK_K=chosen.block_k,
        num_warps=chosen.warps, num_stages=chosen.stages, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out
