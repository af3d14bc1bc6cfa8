"""The Triton candidate that dequantizes nf4 and fp4 without a fast layout: kernels/triton/nibbles_dequantize.py."""

from typing import Any, cast

import torch
from torch import Tensor

from lowbit.numerics.storage import storage_of
from lowbit.optional import installed, late
from lowbit.tensors import PackedWeight


def refusal(x: Tensor, weight: PackedWeight) -> str | None:
    """Why it can't run for these arguments, or None."""
    if x.device.type != "cuda":
        return f"x is on {x.device}, this kernel runs on CUDA devices"
    if not installed("triton"):
        return "triton is not installed"
    if storage_of(weight.scheme) != "nibbles":
        return f"{weight.scheme} is not stored as nibbles"
    if weight.shape[0] * weight.shape[1] % (weight.scheme.weights.group_size or 1):
        return "its last block is not whole"
    return None


def dequantize(x: Tensor, weight: PackedWeight) -> Tensor:
    """The weight [N, K] in x's dtype, computed in float32 and rounded once."""
    with torch.cuda.device(x.device):
        kernels: Any = late("lowbit.kernels.triton.nibbles_dequantize")
        return cast("Tensor", kernels.dequantize(x, weight))
