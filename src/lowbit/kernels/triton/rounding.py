"""nn/rounding.py's weight and its gradients, fused: one kernel forward, one backward, in place of some forty.

    w^ = (round(clamp(u + v)) - zero) s         s = the learned scale, as it will be stored
    dv = dw^ s  where u + v is on the grid      ds = sum over a group of dw^ (round(clamp(u + v)) - zero)

A program takes WIDTH groups of G elements; a channel is a group of K.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.numerics.formats import NumberFormat

ELEMENTS = 2048  # of a program, at most
HALF_EVEN = tl.constexpr(12582912.0)  # as in columns.py: rounds to the nearest integer, ties to even


@triton.jit
def _weight_kernel(  # type: ignore[no-untyped-def]
    u, v, scale, zero, out, groups, size: tl.constexpr, padded: tl.constexpr, width: tl.constexpr,
    low: tl.constexpr, high: tl.constexpr, has_zero: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * width + tl.arange(0, width)
    j = tl.arange(0, padded)
    at = row[:, None] * size + j[None]
    inside = (row[:, None] < groups) & (j[None] < size)
    soft = tl.load(u + at, mask=inside, other=0.0) + tl.load(v + at, mask=inside, other=0.0)
    code = (tl.minimum(tl.maximum(soft, low), high) + HALF_EVEN) - HALF_EVEN
    step = tl.load(scale + row, mask=row < groups, other=1.0)
    if has_zero:
        code -= tl.load(zero + row, mask=row < groups, other=0.0)[:, None]
    tl.store(out + at, code * step[:, None], mask=inside)


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    u, v, scale, zero, slope, dv, ds, groups, size: tl.constexpr, padded: tl.constexpr, width: tl.constexpr,
    low: tl.constexpr, high: tl.constexpr, has_zero: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * width + tl.arange(0, width)
    j = tl.arange(0, padded)
    at = row[:, None] * size + j[None]
    inside = (row[:, None] < groups) & (j[None] < size)
    soft = tl.load(u + at, mask=inside, other=0.0) + tl.load(v + at, mask=inside, other=0.0)
    code = (tl.minimum(tl.maximum(soft, low), high) + HALF_EVEN) - HALF_EVEN
    step = tl.load(scale + row, mask=row < groups, other=1.0)
    if has_zero:
        code -= tl.load(zero + row, mask=row < groups, other=0.0)[:, None]
    g = tl.load(slope + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dv + at, tl.where((soft >= low) & (soft <= high), g * step[:, None], 0.0), mask=inside)
    tl.store(ds + row, tl.sum(tl.where(inside, g * code, 0.0), axis=1), mask=row < groups)


def rounded_weight(
    u: Tensor, v: Tensor, scale: Tensor, zero: Tensor | None, limits: NumberFormat, dtype: torch.dtype
) -> Tensor:
    """w^ [N, K] in dtype. u, v float32 [N, K] contiguous; scale, zero float32 [N, K/G] contiguous."""
    out = torch.empty(u.shape, dtype=dtype, device=u.device)
    _launch(_weight_kernel, (u, v, scale, scale if zero is None else zero, out), zero is not None, limits)
    return out


def rounded_gradients(
    u: Tensor, v: Tensor, scale: Tensor, zero: Tensor | None, slope: Tensor, limits: NumberFormat
) -> tuple[Tensor, Tensor]:
    """(dv float32 [N, K], ds float32 [N, K/G]) for slope = dw^ [N, K]."""
    dv, ds = torch.empty_like(v), torch.empty_like(scale)
    arguments = (u, v, scale, scale if zero is None else zero, slope.contiguous(), dv, ds)
    _launch(_gradient_kernel, arguments, zero is not None, limits)
    return dv, ds


def _launch(kernel, arguments: tuple[Tensor, ...], has_zero: bool, limits: NumberFormat) -> None:  # type: ignore[no-untyped-def]
    assert all(argument.is_contiguous() for argument in arguments), "the kernels step through memory, not by strides"
    groups = arguments[2].numel()
    size = arguments[0].numel() // groups
    padded = triton.next_power_of_2(size)
    width = max(ELEMENTS // padded, 1)
    grid = (triton.cdiv(groups, width),)
    kernel[grid](*arguments, groups, size, padded, width, float(limits.low), float(limits.high), has_zero, num_warps=4)
