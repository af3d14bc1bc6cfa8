"""Activations quantized once, together with what makes them, and multiplied by as many weights as read them.

    norm -> int8 -> q_proj, k_proj, v_proj         rms_norm_quantize, then `multiply` three times
    silu(gate) * up -> int8 -> down_proj           silu_product_quantize, then `multiply`

On a CUDA device with Triton each is one kernel that passes over memory once (triton/int8_quantize.py); elsewhere the
plain torch below, which is what they mean.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from lowbit.kernels import int8_linear
from lowbit.kernels.cpu_product import product
from lowbit.kernels.cuda import int8_hopper
from lowbit.kernels.int8 import Quantized, Scaling, int8_weight
from lowbit.numerics.formats import int_format
from lowbit.numerics.scheme import TensorScheme
from lowbit.optional import installed, late
from lowbit.tensors import PackedWeight

_SYMMETRIC = TensorScheme(int_format(8), "token", dynamic=True)
_ASYMMETRIC = TensorScheme(int_format(8), "token", symmetric=False, dynamic=True)


def _by_triton(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0) and installed("triton")


def quantize_tokens(x: Tensor, symmetric: bool = True) -> Quantized:
    """x [M, K] in float16, bfloat16 or float32, quantized per token."""
    return int8_linear.quantize(x, _SYMMETRIC if symmetric else _ASYMMETRIC, None, None)


def rms_norm_quantize(
    x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None, smooth: Tensor | None = None,
    symmetric: bool = True,
) -> tuple[Quantized, Tensor]:  # fmt: skip
    """(codes of rms_norm(x + residual) * weight * smooth, x + residual), both [M, K]; weight and smooth [K].

    smooth is 1 / s of SmoothQuant where s is not folded into weight. Rounded to x's dtype where separate modules would.
    """
    if _by_triton(x):
        kernels = late("lowbit.kernels.triton.int8_quantize")
        return kernels.rms_norm_quantize(x, weight, epsilon, residual, smooth, symmetric)
    h = x if residual is None else x + residual
    y = (h.float() * torch.rsqrt(h.float().square().mean(-1, keepdim=True) + epsilon)).to(x.dtype) * weight
    return quantize_tokens(y if smooth is None else y * smooth, symmetric), h


def silu_product_quantize(gate: Tensor, up: Tensor, smooth: Tensor | None = None, symmetric: bool = True) -> Quantized:
    """The codes of silu(gate) * up * smooth, [M, K]; smooth [K] as above."""
    if _by_triton(gate):
        return late("lowbit.kernels.triton.int8_quantize").silu_product_quantize(gate, up, smooth, symmetric)
    y = silu(gate) * up
    return quantize_tokens(y if smooth is None else y * smooth, symmetric)


def product_refusal(x: Tensor) -> str | None:
    """Why `multiply` can't run on x's device, or None."""
    if not x.is_cuda or _by_triton(x) or installed("cuda.bindings"):
        return None
    return "neither triton nor cuda.bindings is installed"


def multiply(made: Quantized, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Quantized activations [M, K] times int8 codes [N, K], transposed, scaled, plus bias [N]: [M, N] in `dtype`.

    The weight is one that `int8.weight_refusal` does not refuse.
    """
    assert isinstance(weight.scale, Tensor)
    ready = int8_weight(weight)
    w_sum = None if made.zero is None else ready.sums
    scaling = Scaling(dtype, made.scale, weight.scale, made.zero, w_sum, bias)
    if not made.q.is_cuda:
        return scaling.apply(product(made.q, ready.codes) if w_sum is None else torch._int_mm(made.q, ready.codes.T))
    if int8_hopper.refusal(made.q) is None and installed("cuda.bindings"):
        return int8_hopper.product(made.q, ready.codes, scaling)
    if _by_triton(made.q):
        return late("lowbit.kernels.triton.int8_linear").product(made.q, ready.codes, scaling)
    return int8_linear.turing_product(made.q, ready.codes, scaling)
