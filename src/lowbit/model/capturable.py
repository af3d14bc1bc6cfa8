"""A model of transformers, or its decoder, as a CUDA graph can hold it."""

from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel


class _NoCache(DynamicCache):
    """A cache that keeps nothing: compiled blocks would be compiled anew for every layer that a real one has."""

    def update(self, key_states: Tensor, value_states: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


class Capturable(nn.Module):
    """`model` called so that a capture runs what an eager call runs.

    transformers looks at the position ids for packed sequences unless there is a cache: eagerly that waits for the
    device, within a capture it builds a mask, and attention takes a slower kernel. A cache that stays empty stops that.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, **arguments: Any) -> Any:
        """The model's own output."""
        return self.model(past_key_values=_NoCache(config=self.model.config), **arguments)
