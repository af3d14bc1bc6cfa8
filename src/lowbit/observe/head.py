"""A causal language model in two parts: the decoder that gives the last hidden states, and the head that reads them.

The head is the model's own forward with a stand-in for its decoder, so that whatever stands behind the decoder (a
projection, soft caps, scales) is right for any architecture.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.observe.capture import find_blocks


class _Answer(nn.Module):
    """Stands in for the base model: answers with given hidden states, whatever it is asked."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> "_Output":
        return _Output(self.hidden)


class _Output:
    """What a base model returns, reduced to its hidden states; everything else is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return self.last_hidden_state if index == 0 else ()


class Head:
    """A causal language model without its blocks: hidden states to logits, by the model's own forward."""

    def __init__(self, model: nn.Module) -> None:
        self._model = _shallow(model)
        *path, self._name = decoder_name(model).split(".")
        self._parent: nn.Module = self._model
        for name in path:  # copies along the path, so that the model itself stays as it is
            child = _shallow(self._parent._modules[name])
            self._parent._modules[name] = child
            self._parent = child
        self._parent._modules[self._name] = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [T, K] -> logits [T, V] float32."""
        self._parent._modules[self._name] = _Answer(hidden[None])
        tokens = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)
        return self._model(input_ids=tokens, use_cache=False).logits[0].float()


def decoder_name(model: nn.Module) -> str:
    """The dotted name of the module that runs the decoder blocks and returns the last hidden states."""
    return find_blocks(model)[0].rpartition(".")[0]


def _shallow(module: Any) -> Any:
    """The same module with a list of children of its own."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
