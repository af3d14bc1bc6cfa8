"""How far a model is from its original, on text that calibration never saw.

    perplexity   exp(mean -log q(next token))
    kld          mean over tokens of KL(p || q) = sum_v p_v (log p_v - log q_v), p the original, in nats a token
    top-1        share of tokens for which both models' likeliest next token is the same

The original's logits would be large ([tokens, vocabulary]); its last hidden states are kept instead, with its head,
and the logits are made again, a few rows at a time. Standard errors are over windows, which are independent; tokens
of one window are not.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.errors import InputError
from lowbit.numerics.metrics import kl_divergence
from lowbit.observe.head import Head, decoder_name
from lowbit.observe.tokens import Tokens, check_known
from lowbit.optional import require
from lowbit.report import Fidelity

_MOST_NATS = 700.0  # exp of more overflows float64
_ROWS = 256  # tokens whose logits exist at one time
_BATCH_TOKENS = 8192  # large, because a packed weight is decoded once per forward


def hidden_states(model: PreTrainedModel, ids: Tensor) -> Iterator[Tensor]:
    """The last hidden states [T, K] of each window of ids [samples, T]."""
    base = model.get_submodule(decoder_name(model))
    for batch in ids.split(max(_BATCH_TOKENS // ids.shape[1], 1)):
        yield from base(input_ids=batch.to(model.device), use_cache=False).last_hidden_state


@dataclass(frozen=True, eq=False)
class Reference:
    """The original model's answers on a text: hidden states of each window on the CPU, and the head that reads them."""

    tokens: Tokens
    hidden: tuple[Tensor, ...]
    head: Head
    device: torch.device

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, tokens: Tokens) -> "Reference":
        """Run `model` over the text. Raises InputError for a model whose head does more than map hidden states."""
        check_known(tokens.ids, model)
        head = Head(model)
        first = tokens.ids[:1, :_ROWS].to(model.device)
        whole = model(input_ids=first, use_cache=False).logits[0].float()
        again = head(next(hidden_states(model, first)))
        if not torch.allclose(whole, again, rtol=1e-3, atol=1e-3):
            raise InputError(f"{type(model).__name__} makes its logits of more than hidden states: use --no-eval")
        hidden = tuple(window.cpu() for window in hidden_states(model, tokens.ids))
        if model.device.type != "cpu":
            head = copy.deepcopy(head)  # the model may leave the device, and would take its own head along
        return cls(tokens, hidden, head, model.device)


@torch.no_grad()
def window_means(
    model: PreTrainedModel, reference: Reference, on_window: Callable[[int], None] | None = None
) -> Tensor:
    """float64 [windows, 4]: the mean surprise, the original's surprise, KL and agreement of each window's tokens."""
    head, tokens = Head(model), reference.tokens
    windows = []
    for index, (hidden, original, ids) in enumerate(
        zip(hidden_states(model, tokens.ids), reference.hidden, tokens.ids, strict=True)
    ):
        windows.append(_window_sums(head, hidden, reference, original, ids))
        if on_window is not None:
            on_window(index + 1)
    return torch.stack(windows) / (tokens.ids.shape[1] - 1)  # [windows, 4]


@torch.no_grad()
def fidelity(model: PreTrainedModel, reference: Reference, on_window: Callable[[int], None] | None = None) -> Fidelity:
    """The distance of `model` from the reference, on the reference's text."""
    tokens, means = reference.tokens, window_means(model, reference, on_window)
    windows = len(means)
    _check_sane(means, model)
    surprise, surprise_reference, kld, agreement = means.mean(0).tolist()
    stderr = means[:, 2].std().item() / math.sqrt(windows) if windows > 1 else 0.0
    return Fidelity(
        perplexity_reference=math.exp(surprise_reference),
        perplexity=math.exp(surprise),
        kld=kld,
        kld_stderr=stderr,
        top1_agreement=agreement,
        tokens=tokens.ids.shape[0] * (tokens.ids.shape[1] - 1),
        text=tokens.source,
        text_hash=tokens.hash,
    )


def _window_sums(head: Head, hidden: Tensor, reference: Reference, original: Tensor, ids: Tensor) -> Tensor:
    """Sums over one window's tokens: surprise, the original's surprise, KL, agreement; float64 [4] on the CPU."""
    total = torch.zeros(4, dtype=torch.float64)
    for start in range(0, ids.shape[0] - 1, _ROWS):
        stop = min(start + _ROWS, ids.shape[0] - 1)
        targets = ids[start + 1 : stop + 1].to(hidden.device)
        logits = head(hidden[start:stop])
        wanted = reference.head(original[start:stop].to(reference.device)).to(logits.device)
        parts = (
            _surprise(logits, targets),
            _surprise(wanted, targets),
            kl_divergence(wanted, logits),
            (logits.argmax(-1) == wanted.argmax(-1)).float(),
        )
        total += torch.stack([part.double().sum() for part in parts]).cpu()
    return total


def _check_sane(means: Tensor, model: PreTrainedModel) -> None:
    """Raise InputError unless all means, in nats, are numbers of which exp can be taken."""
    if not (means < _MOST_NATS).all():
        raise InputError(
            f"the logits of {type(model).__name__} are NaN, infinite or much too large on the held-out text; choose "
            "another model or scheme, or --no-eval to write the checkpoint all the same"
        )


def _surprise(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, targets, reduction="none")


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: Tokens, on_window: Callable[[int], None] | None = None) -> float:
    """exp of the mean surprise of the text's tokens, windows of ids [samples, T]."""
    check_known(tokens.ids, model)
    head, total = Head(model), 0.0
    for index, (hidden, ids) in enumerate(zip(hidden_states(model, tokens.ids), tokens.ids, strict=True)):
        if on_window is not None:
            on_window(index + 1)
        for start in range(0, ids.shape[0] - 1, _ROWS):
            stop = min(start + _ROWS, ids.shape[0] - 1)
            targets = ids[start + 1 : stop + 1].to(hidden.device)
            total += _surprise(head(hidden[start:stop]), targets).double().sum().item()
    mean = total / (tokens.ids.shape[0] * (tokens.ids.shape[1] - 1))
    _check_sane(torch.tensor(mean), model)
    return math.exp(mean)


@torch.no_grad()
def continuation(model: PreTrainedModel, tokenizer: Any, prompt: str, tokens: int) -> str:
    """The model's greedy continuation of prompt, without the prompt."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    generate: Any = model.generate
    output = generate(
        **inputs, max_new_tokens=tokens, do_sample=False, num_beams=1, pad_token_id=tokenizer.eos_token_id
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@dataclass(frozen=True)
class Tasks:
    """lm-eval tasks by name; limit: examples per task, None for all; path: a folder with more task files (YAML)."""

    names: tuple[str, ...]
    limit: int | None = None
    path: Path | None = None


def task_scores(model: PreTrainedModel, tokenizer: Any, tasks: Tasks) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, from lm-eval (an extra). Raises InputError for a task that it does not know."""
    lm_eval = require("lm_eval", "tasks")
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    manager = require("lm_eval.tasks", "tasks").TaskManager(include_path=str(tasks.path) if tasks.path else None)
    if unknown := [task for task in tasks.names if not manager.match_tasks([task])]:
        raise InputError(
            f"lm-eval knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists them, --task-path adds some"
        )
    wrapped = require("lm_eval.models.huggingface", "tasks").HFLM(pretrained=model, tokenizer=tokenizer)
    results = lm_eval.simple_evaluate(
        wrapped, tasks=list(tasks.names), limit=tasks.limit, task_manager=manager, bootstrap_iters=0
    )
    return {
        task: {name.removesuffix(",none"): value for name, value in scores.items() if isinstance(value, float)}
        for task, scores in results["results"].items()
    }
