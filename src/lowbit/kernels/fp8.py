"""fp8 e4m3 W8A8 through torch's own product: x quantized by one kernel, then `torch._scaled_mm`.

    fp8, fp8-tensor       x_scale[m] w_scale[n] sum_k qx qw + b       rows times columns; one weight scale is repeated
    fp8-static            x_scale w_scale[n] sum_k qx qw + b          the same, with the calibrated scale repeated
    fp8-tensor-static     x_scale w_scale sum_k qx qw + b             tensor times tensor
    fp8-tile128           sum over g of x_scale[m,g] w_scale[n/128,g] sum over k in g of qx qw + b        9.0 alone

Rows and tensors: compute capability 8.9 and later. y is bfloat16.
"""

from typing import Any

import torch
from torch import Tensor

from lowbit.numerics.storage import storage_of
from lowbit.optional import installed, late
from lowbit.tensors import PackedWeight

TILE = 128  # the only tiles that cuBLAS multiplies
_ROWS = 4  # a multiple of x's rows that it needs then (vllm-project/vllm pull request 49932)


def refusal(x: Tensor, weight: PackedWeight) -> str | None:
    """Why fp8_scaled_mm can't run for these arguments, or None."""
    if weight.scheme.activations is None or not weight.scheme.activations.dynamic:
        return f"{weight.scheme} does not quantize activations per token"
    return _rows_refusal(x, weight)


def static_refusal(x: Tensor, weight: PackedWeight) -> str | None:
    """Why fp8_scaled_mm_static can't run for these arguments, or None."""
    if weight.scheme.activations is None or weight.scheme.activations.dynamic:
        return f"{weight.scheme} has no calibrated scale for activations"
    return _rows_refusal(x, weight)


def _rows_refusal(x: Tensor, weight: PackedWeight) -> str | None:
    if weight.scheme.weights.granularity not in ("channel", "tensor"):
        return f"weights under {weight.scheme} are not fp8 with a scale per channel or tensor"
    return _refusal(x, weight, (8, 9))


def tiles_refusal(x: Tensor, weight: PackedWeight) -> str | None:
    """Why fp8_scaled_mm_tiles can't run for these arguments, or None."""
    if weight.scheme.weights.granularity != "tile" or weight.scheme.weights.group_size != TILE:
        return f"weights under {weight.scheme} are not fp8 with a scale per tile of {TILE} x {TILE}"
    if weight.shape[1] % (4 * TILE):  # torch 2.9 and 2.10 differ in how rows of other lengths' scales must lie
        return f"in_features {weight.shape[1]} is no multiple of {4 * TILE}"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) != (9, 0):
        return "torch._scaled_mm multiplies tiles on compute capability 9.0 alone"
    return _refusal(x, weight, (9, 0))


def _refusal(x: Tensor, weight: PackedWeight, least: tuple[int, int]) -> str | None:
    if x.device.type != "cuda":
        return f"x is on {x.device}, this kernel runs on CUDA devices"
    have = torch.cuda.get_device_capability(x.device)
    if have < least:
        return f"compute capability is {have[0]}.{have[1]}, these fp8 products need {least[0]}.{least[1]}"
    if storage_of(weight.scheme) != "fp8":
        return f"weights under {weight.scheme} are not fp8"
    if weight.scheme.activations is None:
        return f"{weight.scheme} leaves activations in 16 bits"
    if x.dtype != torch.bfloat16:
        return f"x is {x.dtype}, and torch._scaled_mm with row or tile scales writes bfloat16"
    if weight.shape[0] % 16 or weight.shape[1] % 16:
        return f"the weight is {list(weight.shape)}, and torch._scaled_mm needs multiples of 16"
    return None if installed("triton") else "triton is not installed"


def scaled_mm_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, scale: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """x bfloat16 [M, K] quantized to e4m3 per token, times e4m3 codes [N, K], transposed, scaled: bfloat16 [M, N]."""
    assert isinstance(weight.scale, Tensor)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    kernels: Any = late("lowbit.kernels.triton.fp8_quantize")
    q, x_scale = kernels.quantize_rows(x if x.stride(-1) == 1 else x.contiguous())
    return _product(q, weight.codes, (x_scale, _per_column(weight)), bias, fast=True)


def scaled_mm_static(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, scale: Tensor, zero: Tensor | None = None
) -> Tensor:
    """x bfloat16 [M, K] quantized to e4m3 by `scale` [1], times e4m3 codes [N, K], transposed: bfloat16 [M, N]."""
    assert isinstance(weight.scale, Tensor)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    kernels: Any = late("lowbit.kernels.triton.fp8_quantize")
    q, x_scale = kernels.quantize_static(x if x.stride(-1) == 1 else x.contiguous(), scale), scale.float().reshape(1)
    if weight.scale.numel() == 1:
        return _product(q, weight.codes, (x_scale, weight.scale.float().reshape(1)), bias, fast=True)
    x_scale = x_scale.expand(x.shape[0]).reshape(-1, 1).contiguous()
    return _product(q, weight.codes, (x_scale, _per_column(weight)), bias, fast=True)


def _per_column(weight: PackedWeight) -> Tensor:
    """The weight's scales as float32 [1, N]."""
    assert isinstance(weight.scale, Tensor)
    return weight.scale.float().reshape(-1).expand(weight.shape[0]).reshape(1, -1).contiguous()


def scaled_mm_tiles(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, scale: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """x bfloat16 [M, K] quantized to e4m3 per token and 128 columns, times e4m3 codes [N, K], transposed: [M, N]."""
    assert isinstance(weight.scale, Tensor)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    kernels: Any = late("lowbit.kernels.triton.fp8_quantize")
    q, x_scale = kernels.quantize_groups(x if x.stride(-1) == 1 else x.contiguous(), TILE, _ROWS)
    w_scale = weight.scale.float().contiguous().T  # [N/128, K/128] -> [K/128, N/128]
    return _product(q, weight.codes, (x_scale, w_scale), bias, fast=False)[: x.shape[0]]


def _product(q: Tensor, codes: Tensor, scales: tuple[Tensor, Tensor], bias: Tensor | None, fast: bool) -> Tensor:
    x_scale, w_scale = scales
    y = torch._scaled_mm(
        q, codes.T, scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16, use_fast_accum=fast
    )  # fmt: skip
    return y if bias is None else y + bias.to(y.dtype)
