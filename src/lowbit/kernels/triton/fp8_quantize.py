"""Activations to fp8 e4m3, one pass over memory: scale = max|x| / 448 per token or per group of a token, or calibrated.

Scales and codes are those of numerics/affine.py bit by bit; the rounding is the format's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.triton.int8_quantize import LAUNCHES, _quotient


@triton.jit
def _grid_of(largest, DTYPE: tl.constexpr, EPSILON: tl.constexpr):
    scale = tl.div_rn(largest, 448.0).to(DTYPE).to(tl.float32)
    return tl.where(scale == 0, EPSILON, scale)


@triton.jit
def _codes(y, scale, SHORT: tl.constexpr):
    scaled = _quotient(y, scale, SHORT)
    return tl.minimum(tl.maximum(scaled, -448.0), 448.0).to(tl.float8e4nv)


@triton.jit
def _rows(
    x, stride, q, scale_to, K, DTYPE: tl.constexpr, EPSILON: tl.constexpr, SHORT: tl.constexpr, BLOCK: tl.constexpr
):
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    live = columns < K
    y = tl.load(x + row.to(tl.int64) * stride + columns, mask=live, other=0.0).to(tl.float32)
    scale = _grid_of(tl.max(tl.abs(y), 0), DTYPE, EPSILON)
    tl.store(q + row.to(tl.int64) * K + columns, _codes(y, scale, SHORT), mask=live)
    tl.store(scale_to + row, scale)


@triton.jit
def _static(x, stride, q, scale, K, SHORT: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    live = columns < K
    y = tl.load(x + row.to(tl.int64) * stride + columns, mask=live, other=0.0).to(tl.float32)
    codes = _codes(y, tl.load(scale).to(tl.float32), SHORT)
    tl.store(q + row.to(tl.int64) * K + columns, codes, mask=live)


@triton.jit
def _groups(
    x, stride, q, scale_to, scale_stride, K,
    DTYPE: tl.constexpr, EPSILON: tl.constexpr, SHORT: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row, group = tl.program_id(0), tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]  # [GROUPS, SIZE]
    live = columns < K
    y = tl.load(x + row.to(tl.int64) * stride + columns, mask=live, other=0.0).to(tl.float32)
    scale = _grid_of(tl.max(tl.abs(y), 1), DTYPE, EPSILON)
    tl.store(q + row.to(tl.int64) * K + columns, _codes(y, scale[:, None], SHORT), mask=live)
    tl.store(scale_to + group * scale_stride + row, scale, mask=group * SIZE < K)


_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def _warps(block: int) -> int:
    return next(launch.warps for launch in LAUNCHES if block <= launch.columns)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn [M, K], scale float32 [M, 1]) of x [M, K], K contiguous, any float dtype."""
    rows, columns = x.shape
    q = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    _rows[(rows,)](
        x, x.stride(0), q, scale, columns, DTYPE=_DTYPES[x.dtype], EPSILON=torch.finfo(x.dtype).eps,
        SHORT=x.is_cuda and x.dtype != torch.float32, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return q, scale


def quantize_static(x: Tensor, scale: Tensor) -> Tensor:
    """float8_e4m3fn [M, K] of x [M, K], K contiguous, under a calibrated scale [1] of any float dtype."""
    rows, columns = x.shape
    q = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    block = triton.next_power_of_2(columns)
    short = x.is_cuda and torch.float32 not in (x.dtype, scale.dtype)
    _static[(rows,)](x, x.stride(0), q, scale, columns, SHORT=short, BLOCK=block, num_warps=_warps(block))
    return q


def quantize_groups(x: Tensor, size: int, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn [M', K], scale float32 [M', K/size], M' contiguous) of x [M, K], K contiguous, size dividing K.

    M' is M up to a multiple of `multiple`; what the rows beyond M hold is not determined.
    """
    rows, columns = x.shape
    padded, groups = -(-rows // multiple) * multiple, columns // size
    q = torch.empty(padded, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(groups, padded, dtype=torch.float32, device=x.device)
    at_once = min(16, triton.next_power_of_2(groups))
    _groups[(rows, triton.cdiv(groups, at_once))](
        x, x.stride(0), q, scale, padded, columns, DTYPE=_DTYPES[x.dtype], EPSILON=torch.finfo(x.dtype).eps,
        SHORT=x.is_cuda and x.dtype != torch.float32, GROUPS=at_once, SIZE=size, num_warps=4,
    )  # fmt: skip
    return q, scale.T
