"""Self-distillation: the loss of a quantized model is its distance from the model it was, token by token.

    loss = mean over tokens of KL(p || q) = sum_v p_v (log p_v - log q_v),   p the teacher's, in nats

It asks for no labels and pulls towards the whole distribution, not only towards the next word of the text (LLM-QAT,
arXiv:2305.17888). The teacher is either a float model that runs along (`Teacher`), or its k likeliest tokens written
down beforehand (`CachedTeacher`): k log-probabilities in 16 bits and k ids, and the mass of all others in one bucket,
6 k bytes a token instead of 2 V. The cached loss is a lower bound of the KL, tight where the tail has the right shape.

Gradients are computed beside the loss, a slice of tokens at a time: dKL/dlogits = (q - p) / tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lowbit.errors import CheckpointError, InputError
from lowbit.observe.tokens import Tokens
from lowbit.optional import installed, late

_ROWS = 1024  # tokens whose float32 log-probabilities exist at one time


class Objective(Protocol):
    """A loss of a model on a batch: ids int64 [b, T]; which windows of the data they are, int64 [b]."""

    def __call__(self, model: nn.Module, ids: Tensor, windows: Tensor) -> Tensor: ...


class _Kl(torch.autograd.Function):
    """Mean KL over rows of logits [M, V], its gradient made on the way: in one kernel on a GPU."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor) -> Tensor:
        if logits.is_cuda and installed("triton"):
            with torch.cuda.device(logits.device):
                kernels: Any = late("lowbit.kernels.triton.kl_rows")
                kl, gradient = kernels.kl_rows(logits.contiguous(), wanted.contiguous())
            ctx.save_for_backward(gradient)
            return cast("Tensor", kl.mean())
        gradient, total = torch.empty_like(logits), torch.zeros((), device=logits.device)
        for rows in _row_slices(logits.shape[0]):
            log_q = torch.log_softmax(logits[rows].float(), -1)
            log_p = torch.log_softmax(wanted[rows].float(), -1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            gradient[rows] = (log_q.exp() - p) / logits.shape[0]
        ctx.save_for_backward(gradient)
        return total / logits.shape[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * gradients[0], None


class _TopKl(torch.autograd.Function):
    """Mean KL over k named tokens and one bucket for the rest: logits [M, V], log_p [M, k], ids [M, k]."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_p: Tensor, ids: Tensor) -> Tensor:
        gradient, total = torch.empty_like(logits), torch.zeros((), device=logits.device)
        for rows in _row_slices(logits.shape[0]):
            log_q = torch.log_softmax(logits[rows].float(), -1)
            q, top, named = log_q.exp(), log_p[rows].float(), ids[rows].long()
            p, log_q_named = top.exp(), log_q.gather(-1, named)
            rest_p = (1 - p.sum(-1, keepdim=True)).clamp(min=1e-6)
            rest_q = (1 - log_q_named.exp().sum(-1, keepdim=True)).clamp(min=1e-6)
            total += (p * (top - log_q_named)).sum() + (rest_p * (rest_p.log() - rest_q.log())).sum()
            # d/dlogit: q - p for a named token; the bucket's mass is shared as q shares it
            change = q * (1 - rest_p / rest_q)
            change.scatter_(-1, named, q.gather(-1, named) * (p.sum(-1, keepdim=True) + rest_p) - p)
            gradient[rows] = change / logits.shape[0]
        ctx.save_for_backward(gradient)
        return total / logits.shape[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * gradients[0], None, None


def _row_slices(rows: int) -> Iterator[slice]:
    for start in range(0, rows, _ROWS):
        yield slice(start, min(start + _ROWS, rows))


def kl_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean KL of the student's logits [..., V] from the teacher's, differentiable in the former; a scalar float32."""
    return cast("Tensor", _Kl.apply(logits.flatten(0, -2), wanted.flatten(0, -2)))


def top_kl_loss(logits: Tensor, log_p: Tensor, ids: Tensor) -> Tensor:
    """The same from the teacher's k likeliest tokens: log_p, ids [..., k]."""
    return cast("Tensor", _TopKl.apply(logits.flatten(0, -2), log_p.flatten(0, -2), ids.flatten(0, -2)))


def next_token_loss(model: nn.Module, ids: Tensor, windows: Tensor) -> Tensor:
    """The ordinary objective: cross-entropy of each next token."""
    return cast("Tensor", model(input_ids=ids, labels=ids, use_cache=False).loss)


@dataclass(frozen=True, eq=False)
class Teacher:
    """An objective: the distance from `model`, which runs along without gradients."""

    model: nn.Module

    def __call__(self, model: nn.Module, ids: Tensor, windows: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.model(input_ids=ids, use_cache=False).logits
        return kl_loss(model(input_ids=ids, use_cache=False).logits, wanted)


@dataclass(frozen=True, eq=False)
class CachedTeacher:
    """An objective: the distance from the k likeliest tokens of a teacher that is no longer there.

    log_p float16 [windows, T, k], ids int32 [windows, T, k], and the hash of the tokens they belong to.
    """

    log_p: Tensor
    ids: Tensor
    tokens_hash: str

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, tokens: Tokens, k: int = 64, batch: int = 8) -> "CachedTeacher":
        """Run `model` over all windows and keep its k likeliest tokens."""
        device = next(model.parameters()).device
        log_p, ids = [], []
        for part in tokens.ids.split(batch):
            for logits in model(input_ids=part.to(device), use_cache=False).logits:
                top = torch.log_softmax(logits.float(), -1).topk(k, dim=-1)
                log_p.append(top.values.half().cpu())
                ids.append(top.indices.int().cpu())
        return cls(torch.stack(log_p), torch.stack(ids), tokens.hash)

    def __call__(self, model: nn.Module, ids: Tensor, windows: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        rows = windows.cpu()
        return top_kl_loss(logits, self.log_p[rows].to(logits.device), self.ids[rows].to(logits.device))

    def save(self, path: Path) -> None:
        save_file({"log_p": self.log_p, "ids": self.ids}, path, metadata={"tokens": self.tokens_hash})

    @classmethod
    def load(cls, path: Path, tokens: Tokens) -> "CachedTeacher":
        """Read what `save` wrote. Raises CheckpointError for another file, InputError for other tokens."""
        try:
            with safe_open(path, framework="pt") as file:
                found = (file.metadata() or {}).get("tokens")
                cached = cls(file.get_tensor("log_p"), file.get_tensor("ids"), str(found))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is no teacher's cache that lowbit wrote: {error}") from error
        if found != tokens.hash:
            raise InputError(f"{path} was written for other tokens than these; make the cache again, on the same text")
        return cached


def frozen(models: Sequence[nn.Module]) -> None:
    """Turn gradients off and evaluation mode on, as a teacher needs."""
    for model in models:
        model.eval().requires_grad_(False)
