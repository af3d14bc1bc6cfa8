"""fp8 e4m3 W8A8 through torch's own product: x quantized per token, `torch._scaled_mm` with row and column scales.

y[m,n] = x_scale[m] w_scale[n] sum_k qx[m,k] qw[n,k] + bias[n]        compute capability 8.9 and later, y in bfloat16
"""

from typing import Any

import torch
from torch import Tensor

from lowbit.optional import installed, late
from lowbit.tensors import PackedWeight, storage_of


def refusal(x: Tensor, weight: PackedWeight) -> str | None:
    """Why fp8_scaled_mm can't run for these arguments, or None."""
    if x.device.type != "cuda":
        return f"x is on {x.device}, this kernel runs on CUDA devices"
    have = torch.cuda.get_device_capability(x.device)
    if have < (8, 9):
        return f"compute capability is {have[0]}.{have[1]}, fp8 products need 8.9"
    if storage_of(weight.scheme) != "fp8" or weight.scheme.weights.granularity != "channel":
        return f"weights under {weight.scheme} are not fp8 with a scale per channel"
    if weight.scheme.activations is None or not weight.scheme.activations.dynamic:
        return f"{weight.scheme} does not quantize activations per token"
    if x.dtype != torch.bfloat16:
        return f"x is {x.dtype}, and torch._scaled_mm with row scales writes bfloat16"
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
    w_scale = weight.scale.float().reshape(1, -1)
    y = torch._scaled_mm(
        q, weight.codes.T, scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return y if bias is None else y + bias.to(y.dtype)
