"""wa8_linear by int8 kernels on CUDA devices: quantize x, multiply, scale; who can do it where.

    hopper_int8   wgmma in CUDA C++               compute capability 9.0
    triton_int8   mma.sync or wgmma by Triton     8.0 and later
    turing_int8   mma.m8n8k16 in CUDA C++         7.5 and later; compiled and emulated here, never run on Turing itself

x is quantized by one Triton kernel, on Turing by torch. Nothing here waits for the device.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbit.kernels import reference
from lowbit.kernels.cuda import int8_hopper, int8_ladder, int8_prefill
from lowbit.kernels.int8 import Quantized, Scaling, activation_refusal, int8_weight, pad_columns, weight_refusal
from lowbit.numerics.affine import encode
from lowbit.numerics.scheme import TensorScheme
from lowbit.optional import installed, late
from lowbit.tensors import PackedWeight

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Product = Callable[[Tensor, Tensor, Scaling], Tensor]


def _refusal(x: Tensor, weight: PackedWeight, least: tuple[int, int], modules: tuple[str, ...]) -> str | None:
    if x.device.type != "cuda":
        return f"x is on {x.device}, this kernel runs on CUDA devices"
    have = torch.cuda.get_device_capability(x.device)
    if have < least:
        return f"compute capability is {have[0]}.{have[1]}, this kernel needs {least[0]}.{least[1]}"
    if missing := [module for module in modules if not installed(module)]:
        return f"{missing[0]} is not installed"
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, this kernel takes float16, bfloat16 and float32"
    return activation_refusal(weight) or weight_refusal(weight)


def hopper_refusal(x: Tensor, weight: PackedWeight) -> str | None:
    """Why hopper_int8 can't run for these arguments, or None."""
    reason = _refusal(x, weight, (9, 0), ("triton", "cuda.bindings"))
    return reason or int8_hopper.refusal(x)


def triton_refusal(x: Tensor, weight: PackedWeight) -> str | None:
    """Why triton_int8 can't run for these arguments, or None."""
    return _refusal(x, weight, (8, 0), ("triton",))


def turing_refusal(x: Tensor, weight: PackedWeight) -> str | None:
    """Why turing_int8 can't run for these arguments, or None."""
    return _refusal(x, weight, (7, 5), ("cuda.bindings",))


def quantize(x: Tensor, scheme: TensorScheme, scale: Tensor | None, zero: Tensor | None) -> Quantized:
    """x [M, K] on the calibrated grid where there is one, else per token; by Triton on a device that has it."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0) and installed("triton"):
        kernels: Any = late("lowbit.kernels.triton.int8_quantize")
        return kernels.quantize_rows(x, scheme.symmetric) if scale is None else kernels.quantize_static(x, scale, zero)
    scale, zero = reference.activation_scale(x, scheme, scale, zero)
    q = pad_columns(encode(x, scale, zero, scheme))
    return Quantized(q, scale.float().flatten(), None if zero is None else zero.to(torch.int32).flatten())


def _linear(
    product: Product, x: Tensor, weight: PackedWeight, bias: Tensor | None, static: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    scheme = weight.scheme.activations
    assert scheme is not None
    assert isinstance(weight.scale, Tensor)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    ready, made = int8_weight(weight), quantize(x, scheme, *static)
    w_sum = None if made.zero is None else ready.sums
    return product(made.q, ready.codes, Scaling(x.dtype, made.scale, weight.scale, made.zero, w_sum, bias))


def hopper_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, scale: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """x [M, K] quantized to int8, times int8 codes [N, K], transposed, scaled: [M, N] in x's dtype."""
    scheme = weight.scheme.activations
    assert scheme is not None
    if scheme.dynamic and scheme.symmetric and int8_hopper.quantizes(x, weight.shape[0]):
        assert isinstance(weight.scale, Tensor)
        return int8_prefill.prefill_quantizing(x, int8_weight(weight).codes, weight.scale, bias)
    return _linear(int8_hopper.product, x, weight, bias, (scale, zero))


def triton_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, scale: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """hopper_linear's function by the Triton kernel."""
    kernels: Any = late("lowbit.kernels.triton.int8_linear")
    return _linear(kernels.product, x, weight, bias, (scale, zero))


def turing_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, scale: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """hopper_linear's function by Turing's instruction."""
    return _linear(turing_product, x, weight, bias, (scale, zero))


def turing_product(q: Tensor, codes: Tensor, scaling: Scaling) -> Tensor:
    """q int8 [M, K] times codes int8 [N, K], transposed, scaled, by mma.m8n8k16."""
    return int8_ladder.product(int8_ladder.BY_NAME["mma_m8n8k16"], q, codes, scaling)
