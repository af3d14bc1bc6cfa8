"""FakeQuantLinear: an nn.Linear that computes with the numbers that its quantized form will hold, and can be trained.

    weights       learn="steps"    weight_scale (and weight_zero) are parameters: LSQ
                  learn="ranges"   weight_low and weight_high are parameters; scale and zero follow from them
                  learn="nothing"  smallest and largest weight, anew in every forward
    activations   dynamic schemes (per token) need no state
                  static schemes watch the input: a moving average of its smallest and largest value over `freeze`
                  training forwards, of which the first `warmup` do not quantize yet; then the range stands still

    parameter      shape                          buffer        shape
    weight         [N, K], as it was              input_low     [1]
    weight_scale   as in affine.py, float32       input_high    [1]
    weight_zero    the same, float32              input_seen    [], training forwards so far

A recomputed forward (gradient checkpointing) is not counted. `quantized()` gives the QuantLinear with the same numbers.
A layer that rotates its input at run time, as QuantLinear can, does so first.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lowbit.kernels.ops import fake_activations, fake_inputs, fake_weight, rotate
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.affine import choose_scale, encode, value_range
from lowbit.numerics.fake import range_grid, stored_grid
from lowbit.numerics.hadamard import Hadamard
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

Learn = Literal["steps", "ranges", "nothing"]


@dataclass(frozen=True)
class FakeOptions:
    """learn: what is learned besides the weights. scale_dtype: in which scales will be stored, None: the weight's.

    masters: keep the weights that are trained in float32, whatever the layer's dtype; the layer still computes in its
    own. warmup, freeze: training forwards, for static activations. momentum: the moving average's newest share.
    """

    learn: Learn = "steps"
    scale_dtype: torch.dtype | None = None
    masters: bool = False
    warmup: int = 10
    freeze: int = 200
    momentum: float = 0.05


class FakeQuantLinear(nn.Linear):
    """y = x^ W^^T + b: x and W rounded to the grids of `scheme`, gradients straight through."""

    weight_scale: nn.Parameter
    weight_zero: nn.Parameter | None
    weight_low: nn.Parameter
    weight_high: nn.Parameter
    input_low: Tensor
    input_high: Tensor
    input_seen: Tensor
    rotation: Hadamard | None = None

    def __init__(self, layer: nn.Linear, scheme: QuantScheme, options: FakeOptions, grid: tuple[Tensor, Tensor | None]):
        """Takes over layer's parameters. grid: scale and zero to begin with, from any solver (affine.py's shapes)."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scheme, self.options = scheme, options
        self.weight, self.bias = layer.weight, layer.bias
        self.scale_dtype = options.scale_dtype or layer.weight.dtype
        if options.masters and layer.weight.dtype != torch.float32:
            self.weight = nn.Parameter(layer.weight.detach().float(), layer.weight.requires_grad)
        if options.learn == "steps":
            self._learn_steps(*grid)
        elif options.learn == "ranges":
            self._learn_ranges(*grid)
        activations = scheme.activations
        self.watches = activations is not None and not activations.dynamic
        if self.watches:
            for name in ("input_low", "input_high"):
                self.register_buffer(name, torch.zeros(1, device=layer.weight.device))
            self.register_buffer("input_seen", torch.zeros((), dtype=torch.int64, device=layer.weight.device))
        self.train(layer.training)

    def _learn_steps(self, scale: Tensor, zero: Tensor | None) -> None:
        # contiguous: a solver's zero-points can be a transposed view, which a kernel would read in the wrong order
        kept = [None if grid is None else grid.detach().float().clone(memory_format=torch.contiguous_format)
                for grid in (scale, zero)]  # fmt: skip
        self.weight_scale = nn.Parameter(cast("Tensor", kept[0]))
        self.register_parameter("weight_zero", None if kept[1] is None else nn.Parameter(kept[1]))

    def _learn_ranges(self, scale: Tensor, zero: Tensor | None) -> None:
        bounds, shift = self.scheme.weights.format, 0.0 if zero is None else zero.float()
        low, high = (bounds.low - shift) * scale.float(), (bounds.high - shift) * scale.float()
        if zero is None:  # the symmetric grid's step is its larger side over (2^B - 1) / 2
            high = scale.float().abs() * (bounds.high - bounds.low) / 2
            low = -high
        self.weight_low, self.weight_high = nn.Parameter(low.detach()), nn.Parameter(high.detach())

    def weight_grid(self) -> tuple[Tensor, Tensor | None]:
        """(scale, zero) of the weight in float32, differentiable where they are learned."""
        if self.options.learn == "steps":
            return self.weight_scale, self.weight_zero
        weights = self.scheme.weights
        if self.options.learn == "ranges":
            return range_grid(self.weight_low, self.weight_high, weights)
        scale, zero = choose_scale(*value_range(self.weight.detach(), weights), weights, self.scale_dtype)
        return scale.float(), None if zero is None else zero.float()

    def fake_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] as its codes will stand for it, in float32 or what is multiplied."""
        return fake_weight(self.weight, *self.weight_grid(), self.scheme, self.scale_dtype, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype, or autocast's."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if self.rotation is not None:
            x = rotate(x, self.rotation)
        return linear(self.fake_input(x), self.fake_weight(dtype), self.bias)

    def fake_input(self, x: Tensor) -> Tensor:
        """x rounded to the grid of the scheme's activations, if it has one."""
        activations = self.scheme.activations
        if activations is None:
            return x
        if not self.watches:
            return fake_activations(x, self.scheme)
        if self.training and not _recomputing():
            self._watch(x.detach())
        scale, zero = self.input_grid(x.dtype)
        shift = None if zero is None else zero.float()
        rounded = fake_inputs(x, scale.float(), shift, self.scheme, x.dtype, x.dtype)
        return torch.where(self.input_seen > self.options.warmup, rounded, x)

    def input_grid(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """(scale [1] in dtype, zero int8 [1]) of static activations."""
        assert self.scheme.activations is not None
        return choose_scale(self.input_low, self.input_high, self.scheme.activations, dtype)

    def _watch(self, x: Tensor) -> None:
        """Move the range towards that of x; without branches, so that it compiles."""
        low, high = torch.aminmax(x.float())
        share = torch.where(self.input_seen == 0, 1.0, self.options.momentum)
        share = torch.where(self.input_seen < self.options.freeze, share, 0.0)
        self.input_low.lerp_(low.reshape(1), share)
        self.input_high.lerp_(high.reshape(1), share)
        self.input_seen.add_(1)

    @torch.no_grad()
    def quantized(self) -> QuantLinear:
        """The layer with the codes that this one computes with."""
        weights = self.scheme.weights
        scale, zero = stored_grid(*self.weight_grid(), weights, self.scale_dtype)
        packed = PackedWeight.from_codes(encode(self.weight, scale, zero, weights), scale, zero, self.scheme)
        input_scale, input_zero = self.input_grid(self.scale_dtype) if self.watches else (None, None)
        layer = QuantLinear.from_packed(packed, self.bias, input_scale, input_zero, self.rotation)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme}"
        return text if self.rotation is None else f"{text}, rotation={self.rotation}"


def _recomputing() -> bool:
    """Whether this forward runs inside a backward, as gradient checkpointing does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
