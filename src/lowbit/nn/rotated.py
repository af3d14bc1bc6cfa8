"""RotatedLinear: a float linear layer that rotates its input, and whose weight is rotated to match.

    y = (x Q) (W Q)^T + b = x W^T + b

It stands in the place of a linear layer between the rotation of a model (model/rotate.py) and its quantization, after
which QuantLinear rotates its own input.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lowbit.kernels.ops import rotate
from lowbit.numerics.hadamard import Hadamard


class RotatedLinear(nn.Linear):
    """`layer` with its weight replaced by W Q; x is multiplied by Q on its way in."""

    rotation: Hadamard

    @classmethod
    @torch.no_grad()
    def from_linear(cls, layer: nn.Linear, rotation: Hadamard) -> "RotatedLinear":
        """The same function of x; layer's parameters are not copied but changed."""
        nn.Module.__init__(rotated := cls.__new__(cls))
        rotated.in_features, rotated.out_features, rotated.rotation = layer.in_features, layer.out_features, rotation
        layer.weight.copy_(rotation.apply(layer.weight.double()))
        rotated.weight, rotated.bias = layer.weight, layer.bias
        return rotated

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return linear(rotate(x, self.rotation), self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rotation={self.rotation}"


def rotation_of(layer: nn.Module) -> Hadamard | None:
    """The rotation of the input that this layer does at run time, or None."""
    return getattr(layer, "rotation", None)
