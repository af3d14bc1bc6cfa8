"""The solvers' loops over columns (algorithms/columns.py), fused: a program walks a panel for a few rows of the weight.

A panel is [B, N], B columns of the weight by N rows of it; rows are independent. A program keeps its [B, 16] part of
the panel in registers through all B steps. Step i selects its row i by a masked sum, rounds it, and adds the outer
product of the answer with row i of the corner (read from cache) to the part. One launch a panel takes the place of some
ten launches a column (docs/log-accuracy.md).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.numerics.formats import NumberFormat

ROWS = 16  # rows of the weight per program; N is 576 and more, so that there are programs for every multiprocessor
HALF_EVEN = tl.constexpr(
    12582912.0
)  # 1.5 * 2^23: adding and subtracting it rounds |x| < 2^22 to an integer, ties to even


@triton.jit
def _nearest(x, low: tl.constexpr, high: tl.constexpr, e2m1: tl.constexpr):  # type: ignore[no-untyped-def]
    clamped = tl.minimum(tl.maximum(x, low), high)
    if e2m1:  # levels are half-integers up to 2, integers up to 4, even up to 6 (numerics/microscale.py)
        size = tl.abs(clamped)
        step = tl.where(size < 2.0, 0.5, tl.where(size < 4.0, 1.0, 2.0))
        rounded = ((clamped / step + HALF_EVEN) - HALF_EVEN) * step
    else:
        rounded = (clamped + HALF_EVEN) - HALF_EVEN
    return rounded


@triton.jit
def _round_kernel(  # type: ignore[no-untyped-def]
    panel, corner, steps, shifts, codes, errors, rows, count: tl.constexpr,
    low: tl.constexpr, high: tl.constexpr, e2m1: tl.constexpr, padded: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * width + tl.arange(0, width)
    j = tl.arange(0, padded)
    inside = n < rows
    part = tl.load(panel + j[:, None] * rows + n[None], mask=(j[:, None] < count) & inside[None], other=0.0)
    for i in range(count):
        w = tl.sum(tl.where(j[:, None] == i, part, 0.0), axis=0)
        step = tl.load(steps + i * rows + n, mask=inside, other=1.0)
        shift = tl.load(shifts + i * rows + n, mask=inside, other=0.0)
        pivot = tl.load(corner + i * count + i)
        code = _nearest(w / step + shift, low, high, e2m1)
        error = (w - (code - shift) * step) / pivot
        tl.store(codes + i * rows + n, code, mask=inside)
        tl.store(errors + i * rows + n, error, mask=inside)
        answer = tl.load(corner + i * count + j, mask=(j > i) & (j < count), other=0.0)
        part -= answer[:, None] * error[None]


@triton.jit
def _descend_kernel(  # type: ignore[no-untyped-def]
    gradient, corner, codes, steps, found, moved, rows, count: tl.constexpr,
    low: tl.constexpr, high: tl.constexpr, e2m1: tl.constexpr, padded: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * width + tl.arange(0, width)
    j = tl.arange(0, padded)
    inside = n < rows
    part = tl.load(gradient + j[:, None] * rows + n[None], mask=(j[:, None] < count) & inside[None], other=0.0)
    for i in range(count):
        slope = tl.sum(tl.where(j[:, None] == i, part, 0.0), axis=0)
        step = tl.load(steps + i * rows + n, mask=inside, other=1.0)
        before = tl.load(codes + i * rows + n, mask=inside, other=0.0)
        pivot = tl.load(corner + i * count + i)
        code = _nearest(before - slope / (pivot * step), low, high, e2m1)
        change = (code - before) * step
        tl.store(found + i * rows + n, code, mask=inside)
        tl.store(moved + i * rows + n, change, mask=inside)
        answer = tl.load(corner + i * count + j, mask=j < count, other=0.0)
        part += answer[:, None] * change[None]


def round_panel(
    panel: Tensor, corner: Tensor, steps: Tensor, shifts: Tensor, limits: NumberFormat
) -> tuple[Tensor, Tensor]:
    """As in algorithms/columns.py, equal to it but for the order of float32 sums."""
    codes, errors = torch.empty_like(panel), torch.empty_like(panel)
    arguments = (panel.contiguous(), corner.contiguous(), steps.contiguous(), shifts.contiguous(), codes, errors)
    _launch(_round_kernel, arguments, limits)
    return codes, errors


def descend_panel(
    gradient: Tensor, corner: Tensor, codes: Tensor, steps: Tensor, limits: NumberFormat
) -> tuple[Tensor, Tensor]:
    """As in algorithms/columns.py, equal to it but for the order of float32 sums."""
    found, moved = torch.empty_like(codes), torch.empty_like(codes)
    arguments = (gradient.contiguous(), corner.contiguous(), codes.contiguous(), steps.contiguous(), found, moved)
    _launch(_descend_kernel, arguments, limits)
    return found, moved


def _launch(kernel, arguments: tuple[Tensor, ...], limits: NumberFormat) -> None:  # type: ignore[no-untyped-def]
    count, rows = arguments[0].shape
    grid = (triton.cdiv(rows, ROWS),)
    padded = triton.next_power_of_2(count)
    is_e2m1 = limits.kind == "float"
    kernel[grid](*arguments, rows, count, limits.low, limits.high, is_e2m1, max(padded, 16), ROWS, num_warps=4)
