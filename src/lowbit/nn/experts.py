"""QuantExperts: the experts of a mixture, a 3-D parameter [E, N, K], kept as E packed weights.

It takes the parameter's place as an attribute of its module, whose plain ("eager") forward multiplies one expert at a
time, `linear(x, self.gate_up_proj[e])`. What it gives for an index is a stand-in for the [N, K] matrix that knows one
operation: to be the weight of `linear`. So the experts run through the same op as every other layer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lowbit.nn.linear import QuantLinear


class ExpertWeight:
    """The weight [N, K] of one expert, still packed; `torch.nn.functional.linear` takes it in a tensor's place."""

    def __init__(self, layer: QuantLinear) -> None:
        self.layer = layer
        self.shape = torch.Size((layer.out_features, layer.in_features))

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        x, weight, bias = (*args, (kwargs or {}).get("bias"), None)[:3]
        if function is not linear or not isinstance(weight, cls):
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
    """E quantized layers [N, K] that are indexed as the 3-D parameter was."""

    def __getitem__(self, index: Any) -> Any:
        return ExpertWeight(super().__getitem__(int(index)))  # type: ignore[arg-type]

    @property
    def shape(self) -> torch.Size:
        first = next(self.children())
        assert isinstance(first, QuantLinear)
        return torch.Size((len(self), first.out_features, first.in_features))
