"""The Triton candidate of the weight-only product: kernels/triton/wna16_linear.py, where CUDA C++ can't be compiled."""

from typing import Any

import torch
from torch import Tensor

from lowbit.numerics.storage import storage_of
from lowbit.optional import installed, late
from lowbit.tensors import PackedWeight


def refusal(x: Tensor, weight: PackedWeight) -> str | None:
    """Why triton_wna16 can't run for these arguments, or None."""
    if x.device.type != "cuda":
        return f"x is on {x.device}, this kernel runs on CUDA devices"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "compute capability is below 8.0, the least that Triton's products are made for"
    if not installed("triton"):
        return "triton is not installed"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"x is {x.dtype}, this kernel multiplies float16 and bfloat16"
    if weight.order is not None:
        return "its columns are stored in another order than x's; the op sorts x first"
    if storage_of(weight.scheme) not in ("packed", "nibbles"):
        return f"{weight.scheme} is not a scheme for 16-bit activations"
    return None


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x [M, K] times the weight [N, K], transposed, + bias [N]: [M, N] in x's dtype."""
    kernels: Any = late("lowbit.kernels.triton.wna16_linear")
    with torch.cuda.device(x.device):
        return kernels.product(x, weight, bias)
