"""QuantLinear: an nn.Linear whose weight stays packed.

Its buffers have the names, shapes and bytes of the checkpoint (tensors.py), so `state_dict` is the file. It is an
`nn.Linear`, so code that looks for linear layers (PEFT, for one) finds it; `weight`, whatever the codes are called, is
a read-only view full of NaN with the right shape: merging into it can't silently do nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowbit.kernels.ops import quantized_linear, rotate
from lowbit.numerics.hadamard import Hadamard
from lowbit.numerics.scheme import QuantScheme
from lowbit.numerics.storage import tensor_shapes
from lowbit.tensors import PackedWeight


class QuantLinear(nn.Linear):
    """y = x W^T + b with W [N, K] quantized under `scheme`; x [..., K] of any float dtype.

    rotation: x is multiplied by this matrix before anything else; the codes stand for W times the same.
    """

    rotation: Hadamard | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: QuantScheme,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Empty buffers for a weight [out_features, in_features]; scales and bias in `dtype`."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.shape_names = tensor_shapes(scheme, (out_features, in_features), dtype)
        for name, (shape, tensor_dtype) in self.shape_names.items():
            self.register_buffer(name, torch.empty(shape, dtype=tensor_dtype, device=device))
        activations = scheme.activations
        if activations is not None and not activations.dynamic:
            self.register_buffer("input_scale", torch.ones(1, dtype=dtype, device=device))
            if not activations.symmetric:
                self.register_buffer("input_zero_point", torch.zeros(1, dtype=torch.int8, device=device))
        empty = torch.empty(out_features, dtype=dtype, device=device)
        self.register_parameter("bias", nn.Parameter(empty, requires_grad=False) if bias else None)

    @classmethod
    def from_packed(
        cls,
        packed: PackedWeight,
        bias: Tensor | None = None,
        input_scale: Tensor | None = None,
        input_zero: Tensor | None = None,
        rotation: Hadamard | None = None,
    ) -> "QuantLinear":
        """The layer that holds `packed` (not copied), with a static activation grid where the scheme has one.

        For nvfp4 input_scale is the calibrated divisor of all activations, kept as `input_global_scale`.
        """
        rows, columns = packed.shape
        layer = cls(columns, rows, packed.scheme, bias is not None, device="meta")
        for name, tensor in packed.tensors().items():
            layer.register_buffer(name, tensor)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        if input_scale is not None:
            is_nvfp4 = packed.scheme.weights.format.name == "nvfp4"
            layer.register_buffer("input_global_scale" if is_nvfp4 else "input_scale", input_scale)
        if input_zero is not None:
            layer.register_buffer("input_zero_point", input_zero)
        layer.rotation = rotation
        return layer

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        codes = next(iter(self.__dict__.get("_buffers", {}).values()), None) if name == "weight" else None
        if codes is not None:
            device = codes.device
            return torch.full((1, 1), torch.nan, device=device).expand(self.out_features, self.in_features)
        return super().__getattr__(name)

    @property
    def packed(self) -> PackedWeight:
        """The weight as it lies in the buffers."""
        named = {name: self._buffers[name] for name in self.shape_names}
        return PackedWeight.from_tensors(named, self.scheme, (self.out_features, self.in_features))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        scale, zero = self._buffers.get("input_scale"), self._buffers.get("input_zero_point")
        scale = self._buffers.get("input_global_scale") if scale is None else scale
        if self.rotation is not None:
            x = rotate(x, self.rotation)
        return quantized_linear(x, self.packed, self.bias, scale, zero)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        """Moves codes and scales to another device, but never to another dtype: their bits are the weight."""

        def moved(tensor: Tensor) -> Tensor:
            result = function(tensor)
            keeps = result.dtype == tensor.dtype or tensor is self.bias
            return result if keeps else tensor.to(result.device)

        super()._apply(moved, recurse)
        return self

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme}"
        return text if self.rotation is None else f"{text}, rotation={self.rotation}"
