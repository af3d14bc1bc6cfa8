"""PEFT's LoRA layer on a QuantLinear, its step with fewer passes over memory.

    y  = x W^T + s (x A^T) B^T          x [M, K], W [N, K] dequantized for the product and dropped
    dx = dy W + (s dy B) A              A [r, K], B [N, r] in x's dtype; their gradients in their own
    dA = (s dy B)^T x,   dB = s dy^T (x A^T)

PEFT's own forward casts x to the adapters' float32, multiplies, scales and adds, each over all of x or y, and autograd
keeps what it needs of each. Here the adapter's product is added within the second product (addmm), forward and
backward, and only x and x A^T [M, r] are kept. Names, files and everything else are PEFT's; dropout, several adapters,
DoRA and the like take its own forward.
"""

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear

from lowbit.kernels.ops import dequantize
from lowbit.nn.linear import QuantLinear
from lowbit.tensors import PackedWeight


class _LoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, weight: PackedWeight, scaling: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # [..., K] -> [M, K]
        y = linear(flat, dequantize(weight, flat), bias)
        inner = flat @ a.to(x.dtype).T  # [M, r]
        y.addmm_(inner, b.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(flat, a, b, inner)
        ctx.weight, ctx.scaling = weight, scaling
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, a, b, inner = ctx.saved_tensors
        dy = gradients[0].reshape(-1, gradients[0].shape[-1])  # [..., N] -> [M, N]
        through = (dy @ b.to(dy.dtype)).mul_(ctx.scaling)  # [M, r]
        da = (through.T @ flat).to(a.dtype) if ctx.needs_input_grad[1] else None
        db = (dy.T @ inner).mul_(ctx.scaling).to(b.dtype) if ctx.needs_input_grad[2] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ dequantize(ctx.weight, dy)).addmm_(through, a.to(dy.dtype))
            dx = dx.view(*gradients[0].shape[:-1], -1)
        dbias = dy.sum(0) if ctx.needs_input_grad[3] else None
        return dx, da, db, dbias, None, None


class LoraQuantLinear(LoraLinear):  # type: ignore[misc]
    """PEFT's LoRA layer whose base is a QuantLinear."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        base = self.get_base_layer()
        if not self._is_plain(base) or args or kwargs:
            return cast("Tensor", super().forward(x, *args, **kwargs))
        (name,) = self.active_adapters
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return cast("Tensor", _LoraProduct.apply(x, a, b, base.bias, base.packed, float(self.scaling[name])))

    def _is_plain(self, base: nn.Module) -> bool:
        """Whether one adapter without dropout is added to a product with a weight that is quantized alone."""
        if not isinstance(base, QuantLinear) or base.scheme.activations is not None:
            return False
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        (name,) = self.active_adapters
        there = name in self.lora_A and name not in self.lora_variant and not self.lora_bias.get(name, False)
        return there and isinstance(self.lora_dropout[name], nn.Identity)
