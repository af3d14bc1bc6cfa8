"""What is taken of a model before its weights are replaced: tokens, its own answers, the layers that will change."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from lowbit import judge, memory
from lowbit.budget import Ground
from lowbit.errors import InputError
from lowbit.io.names import disk_layout
from lowbit.io.source import Source, load_float, load_tokenizer, model_config
from lowbit.model.quantize import check_tokens, needs_data
from lowbit.model.recipe import Recipe
from lowbit.model.select import Selection, select
from lowbit.observe.capture import find_blocks
from lowbit.observe.tokens import Tokens, check_known, load_tokens, overlap, packaged_text, text_windows
from lowbit.options import Calibration, Conditions, Evaluation
from lowbit.tensors import check_finite

MOST_SHARED = 0.01  # of the held-out text may occur in the calibration text: a licence, a table's head
PROMPT = "The most important thing to know about the human heart is that"


@dataclass(frozen=True)
class Original:
    """The model as it was: its files, its tokenizer and tokens, and, where results are judged, its own answers."""

    source: Source
    tokenizer: Any
    tokens: Tokens | None
    reference: judge.Reference | None
    text: str
    device: torch.device


def device_of(name: str) -> torch.device:
    """cpu, cuda or cuda:1; auto is cuda where there is one. Raises InputError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"there is no device {name!r} here ({str(error).splitlines()[0]}); use cpu, cuda or auto"
        ) from None
    return torch.device(name)


def working_dtype(source: Source, device: torch.device) -> torch.dtype:
    """float32 on a CPU, whose 16-bit products are slow and coarse; the checkpoint's dtype elsewhere."""
    return torch.float32 if device.type == "cpu" else stored_dtype(source)


def stored_dtype(source: Source) -> torch.dtype:
    return model_config(source).dtype or torch.float32


def moved(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    return model.to(device)  # type: ignore[arg-type]


def load_finite(source: Source, conditions: Conditions) -> PreTrainedModel:
    """The float model on the CPU, every weight finite; peak memory is counted from here on."""
    device = device_of(conditions.device)
    memory.reset_peak(device)
    model = load_float(source, working_dtype(source, device))
    for name, parameter in model.named_parameters():
        check_finite(parameter, name)
    return model


def evaluation_tokens(evaluation: Evaluation, tokenizer: Any) -> Tokens:
    if evaluation.text is not None:
        return load_tokens(evaluation.text, tokenizer, evaluation.windows, evaluation.seq_len, seed=0)
    text, source = packaged_text("evaluation"), "lowbit's packaged evaluation text"
    return text_windows(text, tokenizer, evaluation.windows, evaluation.seq_len, 0, source)


def measured(
    source: Source,
    model: PreTrainedModel,
    recipes: Sequence[Recipe],
    conditions: Conditions,
    needs_tokens: bool = False,
) -> Original:
    """Everything that is needed of the original, taken before its weights are replaced."""
    calibration, evaluation = conditions.calibration, conditions.evaluation
    conditions.gates.check_possible(evaluation)
    device, tokenizer, tokens = device_of(conditions.device), load_tokenizer(source), None
    selections = [selection_of(model, recipe) for recipe in recipes]
    if needs_tokens or any(needs_data(*pair) for pair in zip(recipes, selections, strict=True)):
        tokens = _calibration_tokens(calibration, tokenizer)
        check_known(tokens.ids, model)
        for recipe, selection in zip(recipes, selections, strict=True):
            check_tokens(model, recipe, selection, tokens.ids.numel())
    if evaluation is None:
        return Original(source, tokenizer, tokens, None, "", device)
    held_out = evaluation_tokens(evaluation, tokenizer)
    _check_apart(tokens, held_out)
    conditions.progress("measuring the original", 0, 1)
    moved(model, device)
    reference = judge.Reference.of(model, held_out)
    text = judge.continuation(model, tokenizer, PROMPT, evaluation.sample_tokens) if evaluation.sample_tokens else ""
    conditions.progress("measuring the original", 1, 1)
    moved(model, torch.device("cpu"))
    return Original(source, tokenizer, tokens, reference, text, device)


def _calibration_tokens(calibration: Calibration, tokenizer: Any) -> Tokens:
    return load_tokens(calibration.source, tokenizer, calibration.samples, calibration.seq_len, calibration.seed)


def _check_apart(tokens: Tokens | None, held_out: Tokens) -> None:
    """Raise InputError where one text is to serve for calibration and for judging."""
    if tokens is not None and (tokens.source == held_out.source or overlap(tokens, held_out) > MOST_SHARED):
        raise InputError(
            f"{held_out.source} can't be both calibration and evaluation text: the result would flatter itself; "
            "give another text for one of them"
        )


def ground(model: PreTrainedModel, recipe: Recipe, original: Original, conditions: Conditions) -> Ground:
    """What sensitivities are measured on; the model is on its device from here on."""
    tokens = original.tokens
    if tokens is None:
        tokens = _calibration_tokens(conditions.calibration, original.tokenizer)
        if original.reference is not None:
            _check_apart(tokens, original.reference.tokens)
    selection, dtype = selection_of(model, recipe), stored_dtype(original.source)
    return Ground(moved(model, original.device), selection, tokens.ids, dtype, conditions.progress)


def selection_of(model: PreTrainedModel, recipe: Recipe) -> Selection:
    splittable = {piece.parameter for piece in disk_layout(model).values() if piece.expert is not None}
    return select(model, find_blocks(model)[0], recipe.scheme, recipe.rules, splittable)
