"""RoundingLinear: a quantized linear whose rounding and scales can be learned.

    w^ = (round(clamp(u + v)) - zero) scale gain        v [N, K] and gain (in scale's shape) are parameters

u is the code that a solver chose: with v = 0 and gain = 1 this is the solved layer, and a code moves to its neighbour
when v has gone half a step one way, that is when gradients agreed for long. (SignRound, arXiv:2309.05516, begins where
the float weight lies between codes, and so beside an edge with many.) The gradient passes straight through the
rounding, and is zero where u + v leaves the grid. The scale of static activations is learned too, by LSQ's gradient.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lowbit.kernels.ops import fake_activations, fake_inputs, rotate
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.affine import group_view, nearest, round_to
from lowbit.numerics.scheme import TensorScheme
from lowbit.optional import installed, late
from lowbit.tensors import PackedWeight


class _Rounded(torch.autograd.Function):
    """w^ [N, K]; scale is the stored one, and takes the gradient of the learned one. Saves no intermediate."""

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, scale: Tensor, u: Tensor, zero: Tensor | None, scheme: TensorScheme, dtype: Any
    ) -> Tensor:
        ctx.save_for_backward(v, scale, u, zero)
        ctx.scheme = scheme
        if _fuses(scheme, u):
            return late("lowbit.kernels.triton.rounding").rounded_weight(u, v, scale, zero, scheme.format, dtype)
        code = nearest(u + v, scheme.format)
        if zero is not None:
            group_view(code, scheme).sub_(zero.unsqueeze(-1))
        group_view(code, scheme).mul_(scale.unsqueeze(-1))
        return code.to(dtype)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        v, scale, u, zero = ctx.saved_tensors
        scheme = ctx.scheme
        if _fuses(scheme, u):
            kernels = late("lowbit.kernels.triton.rounding")
            dv, ds = kernels.rounded_gradients(u, v, scale, zero, slopes[0], scheme.format)
            return dv, ds, None, None, None, None
        soft = u + v
        inside = (soft >= scheme.format.low) & (soft <= scheme.format.high)
        code = nearest(soft, scheme.format)
        if zero is not None:
            group_view(code, scheme).sub_(zero.unsqueeze(-1))
        slope = slopes[0].float()
        ds = group_view(code.mul_(slope), scheme).sum(-1)
        dv = (group_view(slope, scheme) * scale.unsqueeze(-1)).view_as(v).mul_(inside)
        return dv, ds, None, None, None, None


def _fuses(scheme: TensorScheme, u: Tensor) -> bool:
    return scheme.granularity in ("group", "channel") and u.is_cuda and installed("triton")


class RoundingLinear(nn.Module):
    """Stands in for `layer`, whose weights and static activations are integers, while it is learned."""

    scale: Tensor
    zero: Tensor | None
    u: Tensor

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        packed = layer.packed
        assert isinstance(packed.scale, Tensor)
        self.scheme, self.scale_dtype, self.bias = packed.scheme, packed.scale.dtype, layer.bias
        zero = packed.zero_points()
        # packed zero-points come as a view of their transpose, whose strides a copy to another dtype keeps
        self.register_buffer("scale", packed.scale.float().contiguous())
        self.register_buffer("zero", None if zero is None else zero.float().contiguous())
        self.register_buffer("u", packed.q().float().contiguous())
        self.rotation = layer.rotation
        self.input_scale, self.input_zero = layer._buffers.get("input_scale"), layer._buffers.get("input_zero_point")
        static = self.input_scale is not None
        self.input_gain = nn.Parameter(torch.ones(1, device=self.u.device)) if static else None
        self.v = nn.Parameter(torch.zeros_like(self.u))
        self.gain = nn.Parameter(torch.ones_like(self.scale))

    def _codes(self) -> Tensor:
        limits = self.scheme.weights.format
        return (self.u + self.v).clamp(limits.low, limits.high)

    def _scale(self) -> Tensor:
        """The learned scale, as the dtype in which it will be stored rounds it."""
        scale = self.scale * self.gain
        return scale + (scale.to(self.scale_dtype).float() - scale).detach()

    def weight_now(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """w^ [N, K] in dtype."""
        weight = _Rounded.apply(self.v, self._scale(), self.u, self.zero, self.scheme.weights, dtype)
        return cast("Tensor", weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]; x is rounded on the way where the scheme says so."""
        if self.rotation is not None:
            x = rotate(x, self.rotation)
        autocast = x.is_cuda and torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if autocast else x.dtype
        if self.input_gain is not None:
            x = self._static(x, dtype)
        elif self.scheme.activations is not None:
            x = fake_activations(x, self.scheme)
        return linear(x, self.weight_now(dtype), self.bias)

    def _input_scale(self) -> Tensor:
        assert self.input_scale is not None
        assert self.input_gain is not None
        return self.input_scale.float() * self.input_gain

    def _static(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x under the learned grid of static activations, in dtype."""
        assert self.input_scale is not None
        shift = None if self.input_zero is None else self.input_zero.float()
        return fake_inputs(x, self._input_scale(), shift, self.scheme, self.input_scale.dtype, dtype)

    @torch.no_grad()
    def solved(self) -> QuantLinear:
        """The layer with what was learned."""
        q = round_to(self._codes(), self.scheme.weights.format)
        zero = None if self.zero is None else self.zero.to(torch.int8)
        packed = PackedWeight.from_codes(q, self._scale().to(self.scale_dtype), zero, self.scheme)
        static = self._input_scale().to(self.input_scale.dtype) if self.input_scale is not None else None
        return QuantLinear.from_packed(packed, self.bias, static, self.input_zero, self.rotation)
