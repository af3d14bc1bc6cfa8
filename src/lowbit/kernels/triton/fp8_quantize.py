"""Activations to fp8 e4m3 per token, one pass over memory: scale = max|x| / 448, the rounding is the format's.

Scales and codes are those of numerics/affine.py bit by bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.triton.int8_quantize import LAUNCHES, _quotient


@triton.jit
def _rows(
    x, stride, q, scale_to, K, DTYPE: tl.constexpr, EPSILON: tl.constexpr, SHORT: tl.constexpr, BLOCK: tl.constexpr
):
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    live = columns < K
    y = tl.load(x + row.to(tl.int64) * stride + columns, mask=live, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(y), 0), 448.0).to(DTYPE).to(tl.float32)
    scale = tl.where(scale == 0, EPSILON, scale)
    scaled = _quotient(y, scale, SHORT)
    codes = tl.minimum(tl.maximum(scaled, -448.0), 448.0).to(tl.float8e4nv)
    tl.store(q + row.to(tl.int64) * K + columns, codes, mask=live)
    tl.store(scale_to + row, scale)


_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn [M, K], scale float32 [M, 1]) of x [M, K], K contiguous, any float dtype."""
    rows, columns = x.shape
    q = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    _rows[(rows,)](
        x, x.stride(0), q, scale, columns, DTYPE=_DTYPES[x.dtype], EPSILON=torch.finfo(x.dtype).eps,
        SHORT=x.is_cuda and x.dtype != torch.float32, BLOCK=block,
        num_warps=next(launch.warps for launch in LAUNCHES if block <= launch.columns),
    )  # fmt: skip
    return q, scale
