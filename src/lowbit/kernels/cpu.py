"""int8 products on the CPU through torch's own kernel, oneDNN's s8 x s8 -> s32 (`torch._int_mm`).

    y_mn = sx_m sw_n (sum_k qx_mk qw_nk - zx_m sum_k qw_nk) + b_n

Scales multiply after the exact integer sum. On a processor with VNNI this is three to four times as fast as the
float32 product (bench/results/cpu_int8.json); without, it may be slower, and the measured table decides.
"""

import torch
from torch import Tensor

from lowbit.kernels.reference import activation_scale
from lowbit.numerics.affine import encode
from lowbit.tensors import PackedWeight, storage_of


def int8_refusal(x: Tensor, weight: PackedWeight) -> str | None:
    """Why the int8 product can't run for these arguments, or None."""
    if x.device.type != "cpu":
        return f"x is on {x.device}, this kernel runs on the CPU"
    if storage_of(weight.scheme) != "int8" or weight.zero is not None:
        return f"weights under {weight.scheme} are not symmetric int8 codes"
    if weight.scheme.weights.granularity == "group":
        return f"{weight.scheme} has a scale per group, inside the integer sum"
    if (activations := weight.scheme.activations) is not None and activations.bits != 8:
        return f"{weight.scheme} does not round activations to int8"
    if weight.shape[1] == 1:
        return "torch._int_mm reads beyond a matrix of one column (torch 2.13)"
    return None


def int8_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    static_scale: Tensor | None = None,
    static_zero: Tensor | None = None,
) -> Tensor:
    """x [M, K] quantized to int8, times int8 codes [N, K], transposed, scaled: [M, N] in x's dtype."""
    scheme = weight.scheme.activations
    assert scheme is not None
    assert isinstance(weight.scale, Tensor)
    scale, zero = activation_scale(x, scheme, static_scale, static_zero)
    q = encode(x, scale, zero, scheme)
    product = torch._int_mm(q, weight.codes.T)  # [M, K] x [K, N] -> int32 [M, N]
    if zero is not None:
        product = product - zero.to(torch.int32) * weight.codes.sum(-1, dtype=torch.int32)
    scaled = product.float() * scale.float() * weight.scale.float().reshape(1, -1)  # weight scale [N, 1] or [1]
    return (scaled if bias is None else scaled + bias.float()).to(x.dtype)
