"""RoundingLinear: a quantized linear whose rounding and scales can be learned.

    w^ = (round(clamp(u + v)) - zero) scale gain        v [N, K] and gain (in scale's shape) are parameters

u is w / scale + zero, moved into the cell of the code that a solver chose: with v = 0 and gain = 1 this is the solved
layer, and |v| < 1/2 reaches the neighbouring codes (SignRound, arXiv:2309.05516, there around plain rounding). The
gradient passes straight through the rounding, and is zero where u + v leaves the grid.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lowbit.nn.linear import QuantLinear
from lowbit.numerics.affine import choose_scale, decode, encode, per_element, round_to, value_range
from lowbit.tensors import PackedWeight

EDGE = 0.495  # how near to the edge of its code's cell u may lie


class RoundingLinear(nn.Module):
    """Stands in for `layer` while it is learned. w [N, K]: the weights that its codes should stand for."""

    scale: Tensor
    zero: Tensor | None
    u: Tensor

    def __init__(self, layer: QuantLinear, w: Tensor) -> None:
        super().__init__()
        packed = layer.packed
        assert isinstance(packed.scale, Tensor)
        self.scheme, self.scale_dtype, self.bias = packed.scheme, packed.scale.dtype, layer.bias
        zero = packed.zero_points()
        self.register_buffer("scale", packed.scale.float())
        self.register_buffer("zero", None if zero is None else zero.float())
        self.input_grid = (layer._buffers.get("input_scale"), layer._buffers.get("input_zero_point"))
        q = packed.q().float()
        u = w.detach().float() / self._wide(self.scale) + (0 if self.zero is None else self._wide(self.zero))
        self.register_buffer("u", torch.clamp(u, q - EDGE, q + EDGE))
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

    def weight_now(self) -> Tensor:
        """w^ [N, K] float32."""
        soft = self._codes()
        code = soft + (round_to(soft.detach(), self.scheme.weights.format).float() - soft).detach()
        shifted = code if self.zero is None else code - self._wide(self.zero)
        return shifted * self._wide(self._scale())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]; x is rounded on the way where the scheme says so."""
        activations = self.scheme.activations
        if activations is not None:
            fixed, seen = x.detach(), value_range(x.detach(), activations)
            static, zero = self.input_grid
            scale, zero = (static, zero) if static is not None else choose_scale(*seen, activations, x.dtype)
            rounded = decode(encode(fixed, scale, zero, activations), scale, zero, activations)
            x = x + (rounded.to(x.dtype) - x).detach()
        return linear(x, self.weight_now(), self.bias)

    @torch.no_grad()
    def solved(self) -> QuantLinear:
        """The layer with what was learned."""
        q = round_to(self._codes(), self.scheme.weights.format)
        zero = None if self.zero is None else self.zero.to(torch.int8)
        packed = PackedWeight.from_codes(q, self._scale().to(self.scale_dtype), zero, self.scheme)
        return QuantLinear.from_packed(packed, self.bias, *self.input_grid)
