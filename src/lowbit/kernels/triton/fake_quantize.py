"""Fake quantization of weights and activations in one pass over memory each way (numerics/fake.py says what they mean).

    fake_quantize            x, scale, zero -> x^                 reads x, writes x^ in the dtype that is multiplied
    fake_quantize_backward   dx^, x, scale, zero -> dx, ds, dz    codes are rounded again instead of kept
    fake_quantize_rows       x -> x^, a row's grid from its own smallest and largest value

A program holds ROWS runs of elements that share a scale, each padded to a power of two. One scale for a whole tensor
(static activations) is that of all runs: each leaves its part of ds and dz, which torch adds. Numbers are those of
numerics/affine.py bit by bit: the quotient is correctly rounded (div_rn), ties go to even, the scale is rounded to the
dtype in which it will be stored. Sums over a run are taken in another order than torch's.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.numerics.fake import lsq_gradient_scale
from lowbit.numerics.scheme import TensorScheme

_ELEMENTS = 4096  # a program's: 32 a thread
_MAGIC = tl.constexpr(12582912.0)  # 1.5 x 2^23: adding and subtracting it rounds |v| < 2^22 to an integer, ties to even
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _stored(scale, STORED: tl.constexpr, EPSILON: tl.constexpr):
    rounded = scale.to(STORED).to(tl.float32)
    return tl.where(rounded == 0.0, EPSILON, rounded)


@triton.jit
def _nearest(v, low: tl.constexpr, high: tl.constexpr):
    clamped = tl.minimum(tl.maximum(v, low), high)
    return (clamped + _MAGIC) - _MAGIC


@triton.jit
def _grid(scale, zero, run, runs, SHARED: tl.constexpr, STORED: tl.constexpr, EPSILON: tl.constexpr,
          HAS_ZERO: tl.constexpr, low: tl.constexpr, high: tl.constexpr):  # fmt: skip
    """(stored scale [ROWS, 1], rounded zero-point [ROWS, 1]) of runs."""
    if SHARED:
        run, runs = run * 0, 1
    step = _stored(tl.load(scale + run, mask=run < runs, other=1.0), STORED, EPSILON)
    shift = tl.zeros_like(step)
    if HAS_ZERO:
        shift = _nearest(tl.load(zero + run, mask=run < runs, other=0.0), low, high)
    return step[:, None], shift[:, None]


@triton.jit
def _forward_kernel(
    x, scale, zero, to, runs, G: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr, SHARED: tl.constexpr,
    STORED: tl.constexpr, EPSILON: tl.constexpr, HAS_ZERO: tl.constexpr, low: tl.constexpr, high: tl.constexpr,
):  # fmt: skip
    run, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, GP)
    step, shift = _grid(scale, zero, run, runs, SHARED, STORED, EPSILON, HAS_ZERO, low, high)
    at = run[:, None].to(tl.int64) * G + column[None]
    inside = (run[:, None] < runs) & (column[None] < G)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    q = _nearest(tl.div_rn(value, step) + shift, low, high)
    tl.store(to + at, ((q - shift) * step).to(to.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dy, x, scale, zero, dx, ds, dz, runs, gain, G: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr,
    SHARED: tl.constexpr, STORED: tl.constexpr, EPSILON: tl.constexpr, HAS_ZERO: tl.constexpr,
    low: tl.constexpr, high: tl.constexpr,
):  # fmt: skip
    run, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, GP)
    step, shift = _grid(scale, zero, run, runs, SHARED, STORED, EPSILON, HAS_ZERO, low, high)
    at = run[:, None].to(tl.int64) * G + column[None]
    there = (run[:, None] < runs) & (column[None] < G)
    gradient = tl.load(dy + at, mask=there, other=0.0).to(tl.float32)
    ratio = tl.div_rn(tl.load(x + at, mask=there, other=0.0).to(tl.float32), step)
    scaled = ratio + shift
    error = _nearest(scaled, low, high) - scaled
    inside = tl.abs(error) <= 0.5
    tl.store(dx + at, tl.where(inside, gradient, 0.0).to(dx.dtype.element_ty), mask=there)
    moved = tl.sum(gradient * (error + tl.where(inside, 0.0, ratio)), 1) * gain
    tl.store(ds + run, moved, mask=run < runs)
    if HAS_ZERO:
        shifted = -tl.sum(tl.where(inside, 0.0, gradient) * step, 1)
        tl.store(dz + run, shifted, mask=run < runs)


@triton.jit
def _rows_kernel(
    x, to, rows, K: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr, EPSILON: tl.constexpr,
    SYMMETRIC: tl.constexpr, low: tl.constexpr, high: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, KP)
    at = row[:, None].to(tl.int64) * K + column[None]
    inside = (row[:, None] < rows) & (column[None] < K)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    smallest, largest = tl.minimum(tl.min(value, 1), 0.0), tl.maximum(tl.max(value, 1), 0.0)
    if SYMMETRIC:
        step = _stored(tl.div_rn(tl.maximum(-smallest, largest), (high - low) / 2), x.dtype.element_ty, EPSILON)
        shift = tl.zeros_like(step)
    else:
        step = _stored(tl.div_rn(largest - smallest, high - low), x.dtype.element_ty, EPSILON)
        shift = _nearest(low - tl.div_rn(smallest, step), low, high)
    q = _nearest(tl.div_rn(value, step[:, None]) + shift[:, None], low, high)
    tl.store(to + at, ((q - shift[:, None]) * step[:, None]).to(to.dtype.element_ty), mask=inside)


def fake_quantize(
    x: Tensor, scale: Tensor, zero: Tensor | None, scheme: TensorScheme, scale_dtype: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """As numerics/fake.py's, rounded to `dtype`: x [..., K] contiguous under groups, channels or one scale."""
    y = torch.empty_like(x, dtype=dtype)
    grid, sizes = _launch(x, scale, zero, scheme)
    _forward_kernel[grid](x, scale, zero if zero is not None else scale, y, *sizes, *_stored_as(scale_dtype),
                          zero is not None, scheme.format.low, scheme.format.high, num_warps=4)  # fmt: skip
    return y


def fake_quantize_backward(
    dy: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, scheme: TensorScheme, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx in x's dtype, ds, dz float32, the latter empty without zero-points) of dy [..., K]."""
    grid, (runs, *sizes) = _launch(x, scale, zero, scheme)
    shared = sizes[-1]
    dx, ds = torch.empty_like(x), scale.new_empty(runs) if shared else torch.empty_like(scale)
    dz = torch.empty_like(ds) if zero is not None else scale.new_empty(0)
    gain = lsq_gradient_scale(x.numel() // scale.numel(), scheme)
    _backward_kernel[grid](dy, x, scale, zero if zero is not None else scale, dx, ds, dz, runs, gain, *sizes,
                           *_stored_as(scale_dtype), zero is not None, scheme.format.low, scheme.format.high,
                           num_warps=4)  # fmt: skip
    if shared:
        ds, dz = ds.sum().view(scale.shape), dz if zero is None else dz.sum().view(scale.shape)
    return dx, ds, dz


def fake_quantize_rows(x: Tensor, scheme: TensorScheme) -> Tensor:
    """x [..., K] contiguous with a grid per row from its own range, the scale rounded to x's dtype: x's dtype."""
    y, columns = torch.empty_like(x), x.shape[-1]
    padded = triton.next_power_of_2(columns)
    rows, block = x.numel() // columns, max(1, _ELEMENTS // padded)
    _rows_kernel[(triton.cdiv(rows, block),)](x, y, rows, columns, padded, block, torch.finfo(x.dtype).eps,
                                              scheme.symmetric, scheme.format.low, scheme.format.high,
                                              num_warps=4 if padded <= _ELEMENTS else 8)  # fmt: skip
    return y


def _stored_as(dtype: torch.dtype) -> tuple[tl.dtype, float]:
    return _TYPES[dtype], torch.finfo(dtype).eps


def _launch(x: Tensor, scale: Tensor, zero: Tensor | None, scheme: TensorScheme) -> tuple[tuple[int], list[int]]:
    """(grid, [runs, G, G padded, ROWS, whether all runs share one scale])."""
    assert all(tensor is None or tensor.is_contiguous() for tensor in (x, scale, zero))
    shared = scheme.granularity == "tensor"
    size = math.gcd(x.numel(), _ELEMENTS) if shared else x.numel() // scale.numel()
    assert scale.numel() == (1 if shared else x.numel() // size)
    padded = triton.next_power_of_2(size)
    runs, rows = x.numel() // size, max(1, _ELEMENTS // padded)
    return (triton.cdiv(runs, rows),), [runs, size, padded, rows, shared]
