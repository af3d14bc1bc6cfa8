"""x Q at run time: the rotation of a layer's input, by a Triton kernel on CUDA devices, else in plain torch."""

from typing import Any

import torch
from torch import Tensor

from lowbit.numerics.hadamard import Hadamard, factors
from lowbit.optional import installed, late

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_POWER = 8192  # values that one program of the kernel keeps in registers


def refusal(x: Tensor, rotation: Hadamard) -> str | None:
    """Why the Triton kernel can't rotate x, or None."""
    if x.device.type != "cuda":
        return f"x is on {x.device}, this kernel runs on CUDA devices"
    if not installed("triton"):
        return "triton is not installed"
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, this kernel takes float16, bfloat16 and float32"
    found = factors(rotation.block)
    assert found is not None
    return None if found[1] <= LARGEST_POWER else f"a block of {rotation.block} is too long for one program"


def rotated(x: Tensor, rotation: Hadamard, inverse: bool) -> Tensor:
    """x Q (or x Q^T) for x [..., K], in x's dtype; sums in float32."""
    if refusal(x, rotation) is not None:
        return rotation.undo(x) if inverse else rotation.apply(x)
    kernels: Any = late("lowbit.kernels.triton.hadamard")
    with torch.cuda.device(x.device):
        return kernels.rotate(x, rotation, inverse)
