"""How much the model's answer depends on each layer's output, token by token: one backward pass of the original.

For each token t a label is drawn from the original's own distribution, so that with g the gradient of its
log-likelihood (the sum over all tokens' labels) with respect to a linear's output y_t

    E[(g . dy)^2]  is twice the KL that a small change dy of the outputs causes (the Fisher information)

Kept are, for each linear, |g_t|^2 of every token, by which its inputs are weighed (GuidedQuant, arXiv:2505.07004), and
where asked for G = E[g g^T] (algorithms/joint.py).
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sensitivity:
    """power: of |g|^2 (0: all tokens alike, 1: as the second-order theory says); most: a token's weight, in means."""

    power: float = 1.0
    most: float = 20.0
    outputs: bool = False
    seed: int = 0


@dataclass
class Sensed:
    """tokens: per batch [b T] float32 weights, their mean 1; outputs: G [N, N] float32 or None."""

    tokens: list[Tensor]
    outputs: Tensor | None = None


def sense(model: nn.Module, names: Sequence[str], batches: Sequence[Tensor], options: Sensitivity) -> dict[str, Sensed]:
    """What the linears `names` of a float model are to its answer; batches of ids [b, T]; the model's own device."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(options.seed)
    found = {name: Sensed([]) for name in names}
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with ExitStack() as hooks, torch.enable_grad():
            embedding = cast("nn.Module", cast("PreTrainedModel", model).get_input_embeddings())
            hooks.callback(embedding.register_forward_hook(lambda _, __, out: out.requires_grad_()).remove)
            for name in names:
                hook = _receive(found[name], options)
                hooks.callback(model.get_submodule(name).register_full_backward_hook(hook).remove)
            for batch in batches:
                for window in batch:
                    _backward(model, window[None].to(device), generator)
                for sensed in found.values():
                    rows = len(batch)
                    sensed.tokens[-rows:] = [torch.cat(sensed.tokens[-rows:])]
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
    for sensed in found.values():
        _level(sensed, options)
    return found


def _backward(model: nn.Module, ids: Tensor, generator: torch.Generator) -> None:
    logits = model(input_ids=ids, use_cache=False).logits[0].float()  # [T, V]
    with torch.no_grad():
        labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    nn.functional.cross_entropy(logits, labels, reduction="sum").backward()


def _receive(sensed: Sensed, options: Sensitivity) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_: nn.Module, __: Any, gradients: Any) -> None:
        g = gradients[0].detach().flatten(0, -2).float()  # [T, N]
        sensed.tokens.append(g.square().sum(-1))
        if options.outputs:
            product = g.T @ g
            sensed.outputs = product if sensed.outputs is None else sensed.outputs.add_(product)

    return hook


def _level(sensed: Sensed, options: Sensitivity) -> None:
    """Raise to the power, divide by the mean, cut, divide again."""
    for batch, weights in enumerate(sensed.tokens):
        sensed.tokens[batch] = weights.pow(options.power)
    for _ in range(2):
        mean = torch.cat(sensed.tokens).mean().clamp(min=torch.finfo(torch.float32).tiny)
        sensed.tokens = [(weights / mean).clamp(max=options.most) for weights in sensed.tokens]
