"""Activations to int8 in one pass over memory, together with what stands before: nothing, RMSNorm, or SiLU x up.

    rows          x                                                    -> q, scale, zero
    rms_norm      h = x + residual;  y = h / rms(h) * weight * smooth  -> q, scale, zero, h
    silu_product  y = silu(gate) * up * smooth                         -> q, scale, zero

smooth [K] is 1 / s of SmoothQuant (arXiv:2211.10438, eq. 3) where s could not be folded into a weight. A program holds
one row in registers from the load to the codes, so each input is read once and nothing is written but the result. Of
many long rows a program takes several, and copies the next ones into shared memory meanwhile (cp.async).

Scales and codes are those of numerics/affine.py bit by bit: scale = 2 max|x| / 255 in float32, rounded to x's dtype;
the quotient is correctly rounded, and ties go to even. Intermediate results are rounded to x's dtype where the unfused
modules round them. Division by div_rn takes 30 instructions a value, as many as a chip has time for at 3 TB/s; hence
`_quotient`.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lowbit.kernels.cuda.device import gpu_of
from lowbit.kernels.int8 import Quantized, padded_columns

LARGEST_ROW = 65536  # 64 values a thread in the largest block


class Launch(NamedTuple):
    """How rows of up to `columns` values are launched: warps of a program, which takes one row.

    many_warps: those of a program of plain quantization where there are more rows than `programs` a multiprocessor.
    stages above 1: then only so many programs run, which take one row after the other, stages - 1 rows ahead.
    """

    columns: int
    warps: int
    many_warps: int = 0
    stages: int = 1
    programs: int = 0


LAUNCHES = (  # measured on H200 (bench/results/int8_quantize.json)
    Launch(1024, 2),
    Launch(2048, 4),
    Launch(4096, 8, many_warps=4, programs=2),  # 4 warps: 3.24 TB/s for 3.02, but 1% slower for few rows
    Launch(8192, 8),
    Launch(16384, 32, many_warps=8, stages=3, programs=2),  # 3.41 TB/s for 2.16; silu is slower so, 2.25 for 2.73
    Launch(32768, 32, many_warps=16, stages=3, programs=1),  # 3.36 TB/s for 2.53
    Launch(LARGEST_ROW, 32),
)
_MAGIC = tl.constexpr(12582912.0)  # 1.5 x 2^23: adding and subtracting it rounds |v| < 2^22 to an integer, ties to even


@triton.jit
def _nearest(v):
    return (v + _MAGIC) - _MAGIC


@triton.jit
def _quotient(y, scale, SHORT: tl.constexpr):
    """y / scale, correctly rounded; SHORT: both hold a float16 or bfloat16 number.

    Then a Newton step from y rn(1 / scale) is exact: a quotient of 11-bit numbers stays away from the midpoints of
    float32 numbers (Markstein, IBM J. R&D 34, 1990; all pairs tried). A tiny scale is lifted first, so that its
    reciprocal is finite.
    """
    if SHORT:
        lift = tl.where(scale < 5.421010862427522e-20, 18446744073709551616.0, 1.0)  # 2^-64, 2^64
        y, scale = y * lift, scale * lift
        inverse = tl.div_rn(1.0, scale)
        first = y * inverse
        return tl.fma(tl.fma(-first, tl.zeros_like(y) + scale, y), tl.zeros_like(y) + inverse, first)
    return tl.div_rn(y, tl.zeros_like(y) + scale)


@triton.jit
def _codes(scaled):
    """The nearest int8 of float32 numbers: adding _MAGIC leaves it in the low byte."""
    clamped = tl.minimum(tl.maximum(scaled, -128.0), 127.0)
    return (clamped + _MAGIC).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _write_codes(
    y, columns, row, to, K, pitch, DTYPE: tl.constexpr, EPSILON: tl.constexpr, SYMMETRIC: tl.constexpr,
    SHORT: tl.constexpr,
):  # fmt: skip
    """Choose the grid of one row y [BLOCK] (float32 values of DTYPE), write its codes to `to`: (q, scale, zero)."""
    q, scale_to, zero_to = to
    y = tl.where(columns < K, y, 0.0)
    if SYMMETRIC:
        scale = tl.div_rn(tl.max(tl.abs(y), 0), 127.5)
    else:
        low, high = tl.min(y, 0), tl.max(y, 0)
        scale = tl.div_rn(high - low, 255.0)
    scale = scale.to(DTYPE).to(tl.float32)
    scale = tl.where(scale == 0, EPSILON, scale)
    scaled = _quotient(y, scale, SHORT)
    if not SYMMETRIC:
        zero = _nearest(tl.minimum(tl.maximum(-128.0 - tl.div_rn(low, scale), -128.0), 127.0))
        scaled += zero
        tl.store(zero_to + row, zero.to(tl.int32))
    tl.store(q + row.to(tl.int64) * pitch + columns, _codes(scaled), mask=columns < pitch)
    tl.store(scale_to + row, scale)


@triton.jit
def _row(
    row,
    x,
    stride,
    to,
    columns,
    K,
    pitch,
    DTYPE: tl.constexpr,
    EPSILON: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SHORT: tl.constexpr,
):
    y = tl.load(x + row.to(tl.int64) * stride + columns, mask=columns < K, other=0.0).to(tl.float32)
    _write_codes(y, columns, row, to, K, pitch, DTYPE, EPSILON, SYMMETRIC, SHORT)


@triton.jit
def _rows(
    x, stride, q, scale, zero, M, K, pitch,
    DTYPE: tl.constexpr, EPSILON: tl.constexpr, SYMMETRIC: tl.constexpr, SHORT: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    if STAGES > 1:
        for row in tl.range(tl.program_id(0), M, tl.num_programs(0), num_stages=STAGES):
            _row(row, x, stride, (q, scale, zero), columns, K, pitch, DTYPE, EPSILON, SYMMETRIC, SHORT)
    else:
        _row(tl.program_id(0), x, stride, (q, scale, zero), columns, K, pitch, DTYPE, EPSILON, SYMMETRIC, SHORT)


@triton.jit
def _static(
    x, stride, q, scale, zero, K, pitch,
    SYMMETRIC: tl.constexpr, SHORT: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    y = tl.load(x + row.to(tl.int64) * stride + columns, mask=columns < K, other=0.0).to(tl.float32)
    scaled = _quotient(y, tl.load(scale).to(tl.float32), SHORT)
    if not SYMMETRIC:
        scaled += tl.load(zero).to(tl.float32)
    tl.store(q + row.to(tl.int64) * pitch + columns, _codes(scaled), mask=columns < pitch)


@triton.jit
def _rms_norm(
    x, stride, residual, residual_stride, h_to, weight, smooth, q, scale, zero, K, pitch, epsilon, offset,
    DTYPE: tl.constexpr, EPSILON: tl.constexpr, SYMMETRIC: tl.constexpr, SHORT: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_SMOOTH: tl.constexpr,
):  # fmt: skip
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    live = columns < K
    gain = tl.load(weight + columns, mask=live, other=0.0).to(tl.float32) + offset  # not the previous kernel's work
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    h = tl.load(x + row.to(tl.int64) * stride + columns, mask=live, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(residual + row.to(tl.int64) * residual_stride + columns, mask=live, other=0.0).to(tl.float32)
        h = h.to(DTYPE).to(tl.float32)
        tl.store(h_to + row.to(tl.int64) * K + columns, h.to(DTYPE), mask=live)
    inverse = tl.rsqrt(tl.sum(h * h, 0) / K + epsilon)
    y = ((h * inverse).to(DTYPE).to(tl.float32) * gain).to(DTYPE).to(tl.float32)
    if HAS_SMOOTH:
        y = (y * tl.load(smooth + columns, mask=live, other=0.0).to(tl.float32)).to(DTYPE).to(tl.float32)
    _write_codes(y, columns, row, (q, scale, zero), K, pitch, DTYPE, EPSILON, SYMMETRIC, SHORT)


@triton.jit
def _silu_product(
    gate, gate_stride, up, up_stride, smooth, q, scale, zero, K, pitch,
    DTYPE: tl.constexpr, EPSILON: tl.constexpr, SYMMETRIC: tl.constexpr, SHORT: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr, HAS_SMOOTH: tl.constexpr,
):  # fmt: skip
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    live = columns < K
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    g = tl.load(gate + row.to(tl.int64) * gate_stride + columns, mask=live, other=0.0).to(tl.float32)
    u = tl.load(up + row.to(tl.int64) * up_stride + columns, mask=live, other=0.0).to(tl.float32)
    silu = (g / (1.0 + tl.exp(-g))).to(DTYPE).to(tl.float32)
    y = (silu * u).to(DTYPE).to(tl.float32)
    if HAS_SMOOTH:
        y = (y * tl.load(smooth + columns, mask=live, other=0.0).to(tl.float32)).to(DTYPE).to(tl.float32)
    _write_codes(y, columns, row, (q, scale, zero), K, pitch, DTYPE, EPSILON, SYMMETRIC, SHORT)


_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def _options(x: Tensor, pitch: int, symmetric: bool) -> dict[str, Any]:
    """The constexpr arguments that all kernels of rows share, and how they are launched, a program a row."""
    block = triton.next_power_of_2(pitch)
    early = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9
    options = {
        "DTYPE": _DTYPES[x.dtype], "EPSILON": torch.finfo(x.dtype).eps, "SYMMETRIC": symmetric, "EARLY": early,
        "SHORT": x.is_cuda and x.dtype != torch.float32, "BLOCK": block, "num_warps": _launch(block).warps,
    }  # fmt: skip  # the interpreter's fma rounds twice
    return options | ({"launch_pdl": True} if early else {})


def _launch(block: int) -> Launch:
    return next(launch for launch in LAUNCHES if block <= launch.columns)


def _rows_grid(x: Tensor, options: dict[str, Any]) -> tuple[int]:
    """The grid of `_rows`; completes its options."""
    launch, rows = _launch(options["BLOCK"]), x.shape[0]
    programs = launch.programs * gpu_of(x.device).processors if x.is_cuda else 0
    are_many = 0 < programs < rows
    options |= {"STAGES": launch.stages if are_many else 1}
    if are_many:
        options |= {"num_warps": launch.many_warps}
    return (programs if are_many and launch.stages > 1 else rows,)


def _empty(x: Tensor, symmetric: bool) -> Quantized:
    """Uninitialized codes, scales and zero-points for x [M, K]."""
    rows, columns = x.shape
    q = torch.empty(rows, padded_columns(columns), dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    return Quantized(q, scale, None if symmetric else torch.empty(rows, dtype=torch.int32, device=x.device))


def quantize_rows(x: Tensor, symmetric: bool = True) -> Quantized:
    """x [M, K], K contiguous, in float16, bfloat16 or float32, quantized per token."""
    made = _empty(x, symmetric)
    pitch = made.q.shape[1]
    options = _options(x, pitch, symmetric)
    grid = _rows_grid(x, options)
    _rows[grid](x, x.stride(0), made.q, made.scale, made.zero, *x.shape, pitch, **options)
    return made


def quantize_static(x: Tensor, scale: Tensor, zero: Tensor | None) -> Quantized:
    """x [M, K], K contiguous, on a calibrated grid: scale [1] of any float dtype, zero [1] of any integer one."""
    q = _empty(x, True).q
    options = _options(x, q.shape[1], zero is None)
    options["SHORT"] &= scale.dtype != torch.float32
    for name in ("DTYPE", "EPSILON"):
        del options[name]
    _static[(x.shape[0],)](x, x.stride(0), q, scale, zero, x.shape[1], q.shape[1], **options)
    return Quantized(q, scale.float(), None if zero is None else zero.to(torch.int32))


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    residual: Tensor | None = None,
    smooth: Tensor | None = None,
    symmetric: bool = True,
    weight_offset: float = 0.0,
) -> tuple[Quantized, Tensor]:
    """(codes of rms_norm(x + residual) * (weight + weight_offset) * smooth, x + residual), both [M, K].

    x and residual: one dtype, K contiguous; weight and smooth [K]. weight_offset is 1 in Gemma. Without a residual the
    second result is x itself.
    """
    made = _empty(x, symmetric)
    pitch = made.q.shape[1]
    h = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rms_norm[(x.shape[0],)](
        x, x.stride(0), residual, 0 if residual is None else residual.stride(0), h, weight, smooth, made.q, made.scale,
        made.zero, x.shape[1], pitch, epsilon, weight_offset, HAS_RESIDUAL=residual is not None,
        HAS_SMOOTH=smooth is not None, **_options(x, pitch, symmetric),
    )  # fmt: skip
    return made, h


def silu_product_quantize(gate: Tensor, up: Tensor, smooth: Tensor | None = None, symmetric: bool = True) -> Quantized:
    """The codes of silu(gate) * up * smooth, [M, K]; gate and up: one dtype, K contiguous; smooth [K]."""
    made = _empty(gate, symmetric)
    pitch = made.q.shape[1]
    _silu_product[(gate.shape[0],)](
        gate, gate.stride(0), up, up.stride(0), smooth, made.q, made.scale, made.zero, gate.shape[1], pitch,
        HAS_SMOOTH=smooth is not None, **_options(gate, pitch, symmetric),
    )  # fmt: skip
    return made
