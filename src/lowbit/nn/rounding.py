"""RoundingLinear: a quantized linear whose rounding and scales can be learned.

    w^ = (round(clamp(u + v)) - zero) scale gain        v [N, K] and gain (in scale's shape) are parameters

u is w / scale + zero, moved into the cell of the code that a solver chose: with v = 0 and gain = 1 this is the solved
layer, and |v| < 1/2 reaches the neighbouring codes (SignRound, arXiv:2309.05516, there around plain rounding). `spread`
draws u to the middle of its cell, at 0 all the way: then a code moves only when v has gone half a step one way, that is
when gradients agreed for long, instead of at the first step wherever u lies beside an edge. The gradient passes
straight through the rounding, and is zero where u + v leaves the grid.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lowbit.nn.linear import QuantLinear
from lowbit.numerics.affine import choose_scale, decode, encode, per_element, round_to, value_range
from lowbit.optional import installed, late
from lowbit.tensors import PackedWeight

EDGE = 0.495  # how near to the edge of its code's cell u may lie


class _Fused(torch.autograd.Function):
    """weight_now by kernels/triton/rounding.py; scale is the stored one, and takes the gradient of the learned one."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, scale: Tensor, u: Tensor, zero: Tensor | None, limits: Any, dtype: Any) -> Tensor:
        kernels = late("lowbit.kernels.triton.rounding")
        ctx.save_for_backward(v, scale, u, zero)
        ctx.limits = limits
        return kernels.rounded_weight(u, v, scale, zero, limits, dtype)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        kernels = late("lowbit.kernels.triton.rounding")
        v, scale, u, zero = ctx.saved_tensors
        dv, ds = kernels.rounded_gradients(u, v, scale, zero, slopes[0], ctx.limits)
        return dv, ds, None, None, None, None


class RoundingLinear(nn.Module):
    """Stands in for `layer` while it is learned. w [N, K]: the weights that its codes should stand for."""

    scale: Tensor
    zero: Tensor | None
    u: Tensor

    def __init__(self, layer: QuantLinear, w: Tensor, spread: float = 1.0) -> None:
        super().__init__()
        packed = layer.packed
        assert isinstance(packed.scale, Tensor)
        self.scheme, self.scale_dtype, self.bias = packed.scheme, packed.scale.dtype, layer.bias
        zero = packed.zero_points()
        # packed zero-points come as a view of their transpose, whose strides a copy to another dtype keeps
        self.register_buffer("scale", packed.scale.float().contiguous())
        self.register_buffer("zero", None if zero is None else zero.float().contiguous())
        self.input_grid = (layer._buffers.get("input_scale"), layer._buffers.get("input_zero_point"))
        q = packed.q().float()
        u = w.detach().float() / self._wide(self.scale) + (0 if self.zero is None else self._wide(self.zero))
        self.register_buffer("u", (q + spread * (torch.clamp(u, q - EDGE, q + EDGE) - q)).contiguous())
        by_rows = self.scheme.weights.granularity in ("group", "channel")
        self.fuses = by_rows and u.is_cuda and installed("triton")
        self.v = nn.Parameter(torch.zeros_like(self.u))
        self.gain = nn.Parameter(torch.ones_like(self.scale))

    def _wide(self, parameter: Tensor) -> Tensor:
        return per_element(parameter, self.scheme.weights)

    def _codes(self) -> Tensor:
        limits = self.scheme.weights.format
        return (self.u + self.v).clamp(limits.low, limits.high)

    def _scale(self) -> Tensor:
        """The learned scale, as the dtype in which it will be stored rounds it."""
        scale = self.scale * self.gain
        return scale + (scale.to(self.scale_dtype).float() - scale).detach()

    def weight_now(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """w^ [N, K] in dtype."""
        if self.fuses:
            weight = _Fused.apply(self.v, self._scale(), self.u, self.zero, self.scheme.weights.format, dtype)
            return cast("Tensor", weight)
        soft = self._codes()
        code = soft + (round_to(soft.detach(), self.scheme.weights.format).float() - soft).detach()
        shifted = code if self.zero is None else code - self._wide(self.zero)
        return (shifted * self._wide(self._scale())).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]; x is rounded on the way where the scheme says so."""
        activations = self.scheme.activations
        if activations is not None:
            fixed, seen = x.detach(), value_range(x.detach(), activations)
            static, zero = self.input_grid
            scale, zero = (static, zero) if static is not None else choose_scale(*seen, activations, x.dtype)
            rounded = decode(encode(fixed, scale, zero, activations), scale, zero, activations)
            x = x + (rounded.to(x.dtype) - x).detach()
        autocast = x.is_cuda and torch.is_autocast_enabled("cuda")
        return linear(x, self.weight_now(torch.get_autocast_dtype("cuda") if autocast else x.dtype), self.bias)

    @torch.no_grad()
    def solved(self) -> QuantLinear:
        """The layer with what was learned."""
        q = round_to(self._codes(), self.scheme.weights.format)
        zero = None if self.zero is None else self.zero.to(torch.int8)
        packed = PackedWeight.from_codes(q, self._scale().to(self.scale_dtype), zero, self.scheme)
        return QuantLinear.from_packed(packed, self.bias, *self.input_grid)
