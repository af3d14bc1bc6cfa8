"""Optimizers whose states take 8 (or 4) bits instead of 32: AdamW8bit, Adam8bit, Lion8bit, SGD8bit, AdamW4bit.

    optimizer = lowbit.optim.AdamW8bit(lowbit.optim.parameter_groups(model, weight_decay=0.1), lr=2e-5)

`StateOptions(paged=True)` keeps states in pinned host memory, which the CUDA kernel reads and writes in place over the
bus. The state dict is torch's: plain tensors that torch.save writes and `load_state_dict` checks. Under FSDP2 every
rank holds, saves and loads the states of its own shards.
"""

from typing import Any

from torch import nn

from lowbit.train.blockwise import BlockwiseOptimizer, Params, StateOptions
from lowbit.train.rules import ADAM, LION, MOMENTUM

__all__ = ["Adam8bit", "AdamW4bit", "AdamW8bit", "Lion8bit", "SGD8bit", "StateOptions", "parameter_groups"]
_EIGHT_BITS, _FOUR_BITS = StateOptions(), StateOptions(bits=4)


class AdamW8bit(BlockwiseOptimizer):
    """AdamW (decoupled decay) with 8-bit states."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        options: StateOptions = _EIGHT_BITS,
    ) -> None:
        super().__init__(params, ADAM, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, options)


class AdamW4bit(BlockwiseOptimizer):
    """AdamW (decoupled decay) with 4-bit states."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        options: StateOptions = _FOUR_BITS,
    ) -> None:
        super().__init__(params, ADAM, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, options)


class Adam8bit(BlockwiseOptimizer):
    """Adam (weight decay is added to the gradient) with 8-bit states."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        options: StateOptions = _EIGHT_BITS,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, ADAM, defaults, options, decoupled=False)


class Lion8bit(BlockwiseOptimizer):
    """Lion (decoupled decay) with an 8-bit momentum."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        options: StateOptions = _EIGHT_BITS,
    ) -> None:
        super().__init__(params, LION, {"lr": lr, "betas": betas, "eps": 0.0, "weight_decay": weight_decay}, options)


class SGD8bit(BlockwiseOptimizer):
    """SGD with an 8-bit momentum; weight decay is added to the gradient."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        options: StateOptions = _EIGHT_BITS,
    ) -> None:
        defaults = {"lr": lr, "betas": (momentum, 0.0), "eps": 0.0, "weight_decay": weight_decay}
        super().__init__(params, MOMENTUM, defaults, options, decoupled=False)


def parameter_groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """The trainable parameters in three groups: matrices that decay, embeddings in 32 bits, and vectors without decay.

    Embeddings see a gradient in few rows at a time, so their block maxima jump: bitsandbytes and the paper
    (arXiv:2110.02861, section 2.3) keep them in 32 bits. A head that shares the embedding's weight goes with it.
    """
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in embeddings and p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in embeddings], "weight_decay": weight_decay, "bits": 32},
        {"params": [p for p in trained if id(p) not in embeddings and p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
