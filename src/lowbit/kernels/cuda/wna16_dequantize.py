"""Launches of wna16_dequantize.cu, and the product by way of it: many tokens, where the tensor cores are the limit."""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear as float_linear

from lowbit.kernels.cuda.compiler import Kernel, current_stream, load_kernel
from lowbit.kernels.cuda.device import gpu_of, gpu_refusal, on_device_of
from lowbit.kernels.cuda.wna16_layout import Defines, fast, form_defines
from lowbit.kernels.layout import FastForm, FastWeight, form_refusal
from lowbit.tensors import PackedWeight

_WARPS = 8


def refusal(x: Tensor, weight: PackedWeight) -> str | None:
    """Why this kernel can't run for these arguments, or None."""
    return gpu_refusal(x, weight.codes) or form_refusal(weight)


def dequantize(x: Tensor, weight: PackedWeight) -> Tensor:
    """The weight [N, K] in x's dtype, on x's device; an absmax has 11 bits, all else is exact before rounding."""
    return on_device_of(x, lambda: _dequantize(fast(weight), weight.shape, x.dtype))


def _dequantize(weight: FastWeight, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    device = weight.records.device
    w = torch.empty(shape, dtype=dtype, device=device)
    levels = weight.levels[torch.float32].data_ptr() if weight.levels is not None else 0
    records = -(-shape[0] // 16) * -(-shape[1] // 128)
    grid = (min(-(-records // _WARPS), 8 * gpu_of(device).processors), 1, 1)
    arguments = (weight.records.data_ptr(), levels, weight.factor.data_ptr(), w.data_ptr(), *shape)
    kernel(weight.form, dtype, device).launch(grid, (32 * _WARPS, 1, 1), arguments, 0, current_stream(device))
    return w


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x [M, K] times the dequantized weight by torch's product: [M, N] in x's dtype."""
    return float_linear(x, dequantize(x, weight), bias)


@cache
def kernel(form: FastForm, dtype: torch.dtype, device: torch.device) -> Kernel:
    """wna16_dequantize for a form and a result's type."""
    defines = dequantize_defines(form, dtype)
    return load_kernel("wna16_dequantize.cu", "wna16_dequantize", "PPPPii", device, defines)


def dequantize_defines(form: FastForm, dtype: torch.dtype) -> Defines:
    """The defines that compile wna16_dequantize.cu."""
    return (*form_defines(form), ("XTYPE", int(dtype == torch.bfloat16)))
