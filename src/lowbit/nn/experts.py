"""QuantExperts: the experts of a mixture, a 3-D parameter [E, N, K], kept as E packed weights.

It takes the parameter's place as an attribute of its module, whose plain ("eager") forward multiplies one expert at a
time, `linear(x, self.gate_up_proj[e])`. What it gives for an index is a stand-in for the [N, K] matrix that knows one
operation: to be the weight of `linear` or, where the model keeps its experts as [E, K, N] (gpt-oss), the second factor
of a matrix product. So the experts run through the same op as every other layer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lowbit.nn.linear import QuantLinear

_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class ExpertWeight:
    """The weight [N, K] of one expert, still packed; `torch.nn.functional.linear` takes it in a tensor's place.

    is_transposed: it stands for [K, N], and `x @ weight` is what can be done with it.
    """

    def __init__(self, layer: QuantLinear, is_transposed: bool = False) -> None:
        self.layer, self.is_transposed = layer, is_transposed
        shape = (layer.out_features, layer.in_features)
        self.shape = torch.Size(reversed(shape) if is_transposed else shape)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self)  # type: ignore[arg-type]

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        x, weight, bias = (*args, (kwargs or {}).get("bias"), None)[:3]
        is_known = isinstance(weight, cls) and function in (_PRODUCTS if weight.is_transposed else (linear,))
        if not is_known:
            raise TypeError(
                f"a quantized expert can only be the weight of linear, not an argument of {function.__name__}"
            )
        y = weight.layer(x)
        return y if bias is None else y + bias


def run_experts_plainly(model: nn.Module) -> None:
    """Make transformers multiply one expert at a time; its grouped implementations need one float tensor of all."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"


class QuantExperts(nn.ModuleList):
    """E quantized layers [N, K] that are indexed as the 3-D parameter was: [E, N, K] or, transposed, [E, K, N]."""

    def __init__(self, layers: Sequence[QuantLinear], is_transposed: bool = False) -> None:
        super().__init__(layers)
        self.is_transposed = is_transposed

    def __getitem__(self, index: Any) -> Any:
        return ExpertWeight(super().__getitem__(int(index)), self.is_transposed)  # type: ignore[arg-type]

    @property
    def shape(self) -> torch.Size:
        first = next(self.children())
        assert isinstance(first, QuantLinear)
        shape = (first.out_features, first.in_features)
        return torch.Size((len(self), *(reversed(shape) if self.is_transposed else shape)))
