"""Launches of wna16_dequantize.cu, and the product by way of it: many tokens, where the tensor cores are the limit."""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear as float_linear

from lowbit.kernels.cuda.compiler import Kernel, current_stream, load_kernel
from lowbit.kernels.cuda.device import gpu_of, gpu_refusal, on_device_of
from lowbit.kernels.cuda.wna16_layout import Defines, fast, form_defines
from lowbit.kernels.layout import RECORD, STRIP, UNIT, FastForm, FastWeight, form_refusal
from lowbit.tensors import PackedWeight

_WARPS = 8
# Of a dequantized part of the weight, at most; a power of two of rows, for others leave multiprocessors idle in torch's
# product. gate_up at 4096 tokens on an H200: 1329 us in parts of 64 MB, 1402 whole, 1390 in parts of 16 MB, 1412 in
# four of 7168 rows; a second stream that dequantizes beside the product made it 1477
_PART_BYTES = 1 << 26


def refusal(x: Tensor, weight: PackedWeight) -> str | None:
    """Why this kernel can't run for these arguments, or None."""
    return gpu_refusal(x, weight.codes) or form_refusal(weight)


def dequantize(x: Tensor, weight: PackedWeight) -> Tensor:
    """The weight [N, K] in x's dtype, on x's device; an absmax has 11 bits, all else is exact before rounding."""
    return on_device_of(x, lambda: _dequantize(fast(weight), weight.shape, x.dtype))


def _dequantize(weight: FastWeight, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    w = torch.empty(shape, dtype=dtype, device=weight.records.device)
    _dequantize_rows(weight, 0, w)
    return w


def _dequantize_rows(weight: FastWeight, first: int, w: Tensor) -> None:
    """w [n, K] = the weight's rows from `first`, a multiple of UNIT, on."""
    device = w.device
    levels = weight.levels[torch.float32].data_ptr() if weight.levels is not None else 0
    count = -(-w.shape[0] // STRIP) * -(-w.shape[1] // RECORD)
    grid = (min(-(-count // _WARPS), 8 * gpu_of(device).processors), 1, 1)
    arguments = (weight.records[first // UNIT].data_ptr(), levels, weight.factor.data_ptr(), w.data_ptr(), *w.shape)
    kernel(weight.form, w.dtype, device).launch(grid, (32 * _WARPS, 1, 1), arguments, 0, current_stream(device))


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x [M, K] times the dequantized weight [N, K], transposed, by torch's product, + bias: [M, N] in x's dtype."""
    return on_device_of(x, lambda: _linear(x, fast(weight), weight.shape, bias))


def _linear(x: Tensor, weight: FastWeight, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
    rows, columns = shape
    height = max(UNIT, 1 << (_PART_BYTES // (2 * columns)).bit_length() - 1)
    if rows <= height:
        return float_linear(x, _dequantize(weight, shape, x.dtype), bias)
    y, w = x.new_empty(x.shape[0], rows), x.new_empty(height, columns)
    for first in range(0, rows, height):
        part, of_y = w[: rows - first], y[:, first : first + height]
        _dequantize_rows(weight, first, part)
        if bias is None:
            torch.mm(x, part.T, out=of_y)
        else:
            torch.addmm(bias[first : first + height].to(x.dtype), x, part.T, out=of_y)
    return y


@cache
def kernel(form: FastForm, dtype: torch.dtype, device: torch.device) -> Kernel:
    """wna16_dequantize for a form and a result's type."""
    defines = dequantize_defines(form, dtype)
    return load_kernel("wna16_dequantize.cu", "wna16_dequantize", "PPPPii", device, defines)


def dequantize_defines(form: FastForm, dtype: torch.dtype) -> Defines:
    """The defines that compile wna16_dequantize.cu."""
    return (*form_defines(form), ("XTYPE", int(dtype == torch.bfloat16)))
