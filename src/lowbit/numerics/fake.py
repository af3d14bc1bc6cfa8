"""Fake quantization: what a quantized number will be, in floats, with gradients that training can use.

    forward    x^ = decode(encode(x, s, z)), bit for bit what the converted layer decodes (numerics/affine.py)
    dx^/dx     1 where the code is inside [low, high], 0 where it saturates: the straight-through estimator
               (arXiv:1308.3432; torch.fake_quantize draws the line at the same place)
    dx^/ds     q - z - x/s inside, q - z where it saturates: learned step size (LSQ, arXiv:1902.08153, eq. 3),
               times g = 1 / sqrt(elements under one scale * high) (section 2.2)
    dx^/dz     0 inside, -s where it saturates (LSQ+, arXiv:2004.09576, eq. 6)
    ranges     s = (high - low) / (2^B - 1), z = round(q_low - low / s): gradients go on to low and high

Scale and zero are parameters in float32; the forward uses what will be stored: the scale rounded to `scale_dtype`, the
zero-point rounded to an integer. Both roundings are passed straight through.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor

from lowbit.numerics.affine import choose_scale, decode, encode, group_view, round_to, stored_scale
from lowbit.numerics.dynamic import round_activations
from lowbit.numerics.scheme import TensorScheme


def lsq_gradient_scale(elements: int, scheme: TensorScheme) -> float:
    """LSQ's g for a scale that `elements` elements share."""
    return 1 / math.sqrt(elements * scheme.format.high)


def stored_grid(
    scale: Tensor, zero: Tensor | None, scheme: TensorScheme, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """(scale in scale_dtype, zero int8) as the converted layer keeps them, of parameters in float32."""
    return stored_scale(scale, scale_dtype), None if zero is None else round_to(zero, scheme.format)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        scheme: TensorScheme,
        scale_dtype: torch.dtype,
    ) -> Tensor:
        stored, rounded = stored_grid(scale, zero, scheme, scale_dtype)
        q = encode(x, stored, rounded, scheme)
        ctx.save_for_backward(x, q, stored, rounded)
        ctx.scheme, ctx.dtype = scheme, scale.dtype
        return decode(q, stored, rounded, scheme)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """With e = q - (x/s + z), a code is inside where |e| <= 1/2; then d/ds is e, elsewhere e + x/s = q - z."""
        x, q, stored, rounded = ctx.saved_tensors
        scheme: TensorScheme = ctx.scheme
        step, dy = stored.float().unsqueeze(-1), group_view(gradients[0].float(), scheme)
        ratio = group_view(x.float(), scheme) / step
        scaled = ratio if rounded is None else ratio + rounded.unsqueeze(-1)
        error = group_view(q, scheme).float() - scaled
        inside = error.abs() <= 0.5
        dx = (dy * inside).reshape(x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None
        ds = dz = None
        if ctx.needs_input_grad[1]:
            ds = (dy * (error + torch.where(inside, 0.0, ratio))).sum(-1)
            ds = (ds * lsq_gradient_scale(ratio.shape[-1], scheme)).to(ctx.dtype).view(stored.shape)
        if rounded is not None and ctx.needs_input_grad[2]:
            dz = -(dy * step * ~inside).sum(-1).to(ctx.dtype).view(stored.shape)
        return dx, ds, dz, None, None


def fake_quantize(
    x: Tensor, scale: Tensor, zero: Tensor | None, scheme: TensorScheme, scale_dtype: torch.dtype = torch.float32
) -> Tensor:
    """x [..., K] under a grid of parameters (shapes as in affine.py, float32): float32 [..., K], differentiable."""
    return cast("Tensor", _FakeQuantize.apply(x, scale, zero, scheme, scale_dtype))


class _DynamicFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scheme: TensorScheme) -> Tensor:
        return round_activations(x, scheme).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def fake_quantize_dynamic(x: Tensor, scheme: TensorScheme) -> Tensor:
    """x [..., K] with a grid from its own smallest and largest value (per token, per group): x's dtype.

    Nothing saturates, so the gradient passes unchanged.
    """
    return cast("Tensor", _DynamicFakeQuantize.apply(x, scheme))


class _RangeGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, low: Tensor, high: Tensor, scheme: TensorScheme) -> tuple[Tensor, Tensor]:
        scale, zero = choose_scale(low, high, scheme, torch.float32)
        ctx.save_for_backward(low, high, scale)
        ctx.scheme = scheme
        return scale, torch.zeros_like(scale) if zero is None else zero.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        low, high, scale = ctx.saved_tensors
        ds, dz = gradients
        steps = ctx.scheme.format.high - ctx.scheme.format.low
        if ctx.scheme.symmetric:
            ds = ds * 2 / steps
            from_low = -low > high
            return -ds * from_low, ds * ~from_low, None
        below = low.clamp(max=0)
        dlow = -ds / steps - dz / scale * (1 + below / (scale * steps))
        dhigh = ds / steps + dz * below / (scale.square() * steps)
        return dlow, dhigh, None


def range_grid(low: Tensor, high: Tensor, scheme: TensorScheme) -> tuple[Tensor, Tensor | None]:
    """(scale, zero) float32 of learned ranges, differentiable; zero is None where the scheme is symmetric."""
    scale, zero = cast("tuple[Tensor, Tensor]", _RangeGrid.apply(low, high, scheme))
    return scale, None if scheme.symmetric else zero
