"""Run a recipe, and hold it to its rung: never worse than any rung below.

A recipe that came from `--effort` keeps some calibration windows apart. The rungs below are run too, on copies of the
model; all are judged by KL on the windows kept apart, and the lowest stays. The report says which, and the numbers.
A rung that learns begins from the closest of the rungs below it.
"""

import copy
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowbit import judge
from lowbit.errors import MethodError
from lowbit.model.efforts import name_of, rungs_below
from lowbit.model.learn import Learning, learn
from lowbit.model.log import LayerLog
from lowbit.model.quantize import Job, batched, quantize_blocks
from lowbit.model.recipe import Recipe
from lowbit.model.rungs import with_lower_run
from lowbit.observe.tokens import Tokens
from lowbit.products import quick_products
from lowbit.report import LayerRecord

SHARE, MOST = 8, 8  # one calibration window in 8 is kept apart, at most 8
MEANS = 16  # windows that tell a rung below the mean squares of inputs: they cost it forwards, and little else
CPU_TOKENS, GPU_TOKENS = 2048, 16384  # a batch's: with fewer a GPU waits for the launches of small kernels
GPU_BATCHES = 4  # at least; twice as many where one in six judges what was made of the others
HIDDEN_COPIES = 8  # two streams of hidden states, each with what its replays keep (observe/endings.py)


@dataclass(frozen=True)
class Outcome:
    """The recipe whose result the model now holds, and what happened on the way."""

    recipe: Recipe
    log: LayerLog


@quick_products()
def run(model: PreTrainedModel, job: Job, ids: Tensor | None) -> Outcome:
    """Quantize `model` in place by job.recipe; ids int64 [samples, T]: the calibration tokens, None without any.

    job.batches are made here. With fewer than 8 windows nothing is kept apart and no rungs are compared. Learning
    judges itself on the windows kept apart.
    """
    apart = 0 if ids is None else min(len(ids) // SHARE, MOST)
    if not job.recipe.effort or not apart or ids is None:
        return Outcome(job.recipe, _run_one(model, job, ids))
    held_out = Tokens(ids[-apart:], "calibration windows kept apart")
    model.to(job.device)  # type: ignore[arg-type]
    reference = judge.Reference.of(model, held_out)
    model.to("cpu")  # type: ignore[arg-type]
    best: _Reached | None = None
    words: list[str] = []
    below: list[list[LayerRecord]] = []
    for recipe in (*rungs_below(job.recipe), job.recipe):
        other = copy.deepcopy(model) if recipe is not job.recipe else model
        outcome, name = Outcome(recipe, LayerLog(recipe, job.scale_dtype)), name_of(recipe)
        try:
            if recipe.learning is not None and best is not None:
                name = f"effort {recipe.effort} (learning, from effort {best.outcome.recipe.effort})"
                outcome = _learn_on(other, best, replace(job, recipe=recipe), ids, apart)
            else:
                few = recipe.method == "rtn-weighted" and recipe is not job.recipe
                seen = (ids[: min(MEANS, len(ids) - apart)], 0) if few else (ids, apart)
                outcome = Outcome(recipe, _run_one(other, replace(job, recipe=recipe), *seen))
        except MethodError as error:
            words.insert(0, f"{name} does not apply ({error})")
        else:
            below.append(outcome.log.records)
            kld = _distance(other, reference)
            words.insert(0, f"{name} reached KL {kld:.4f}")
            if best is None or kld <= best.kld:
                best = _Reached(kld, other, outcome)
        finally:
            del other  # one copy less while the next rung makes its own
    assert best is not None  # rounding applies to every model
    outcome, said = best.outcome, f"on {apart} windows kept apart: {', '.join(words)}"
    if best.model is not model:
        _become(model, best.model)
        outcome.log.warnings.append(f"{said}; effort {outcome.recipe.effort} was kept")
        return outcome
    outcome.log.notes.append(said)
    for records in below[:-1]:
        outcome.log.records = with_lower_run(outcome.log.records, records)
    return outcome


class _Reached(NamedTuple):
    """A rung's model, and its KL on the windows kept apart."""

    kld: float
    model: PreTrainedModel
    outcome: Outcome


def _learn_on(model: PreTrainedModel, start: _Reached, job: Job, ids: Tensor, apart: int) -> Outcome:
    """Make `model`, the original, what learning makes of `start`, judged on the last `apart` windows of ids."""
    assert job.recipe.learning is not None
    learning = replace(job.recipe.learning, held_out=apart)
    original = copy.deepcopy(model)
    _become(model, copy.deepcopy(start.model))
    log = copy.deepcopy(start.outcome.log)
    _learn(model, original, job, ids, learning, log)
    return Outcome(replace(start.outcome.recipe, learning=learning, effort=job.recipe.effort), log)


def _distance(model: PreTrainedModel, reference: judge.Reference) -> float:
    """KL to the reference; the model is on its device meanwhile, and on the CPU afterwards."""
    model.to(reference.device)  # type: ignore[arg-type]
    kld = judge.fidelity(model, reference).kld
    model.to("cpu")  # type: ignore[arg-type]
    return kld


def _run_one(model: PreTrainedModel, job: Job, ids: Tensor | None, apart: int = 0) -> LayerLog:
    """Solve on all but the last `apart` windows of ids, on which learning is judged, if there is any."""
    learning = job.recipe.learning
    if learning is not None and ids is not None:
        apart = apart or learning.apart(len(ids))
        learning = replace(learning, held_out=apart)
    original = copy.deepcopy(model) if learning is not None else None
    log = quantize_blocks(model, _placed(model, job, None if ids is None else ids[: len(ids) - apart]))
    model.to("cpu")  # type: ignore[arg-type]
    if learning is not None and original is not None and ids is not None:
        _learn(model, original, job, ids, learning, log)
    return log


def _placed(model: PreTrainedModel, job: Job, ids: Tensor | None) -> Job:
    """The job with its batches. Where a GPU has the room, the model and all hidden states go there for the whole run.

    Room: both take at most half of the memory that is free. Else a block at a time is there, and the rest on the CPU.
    """
    if ids is None:
        return replace(job, batches=[])
    if job.device.type != "cuda":
        return replace(job, batches=list(batched(ids, CPU_TOKENS)))
    width, itemsize = model.config.get_text_config().hidden_size, model.dtype.itemsize
    weights = sum(parameter.nbytes for parameter in model.parameters())
    needed = weights + HIDDEN_COPIES * ids.numel() * width * itemsize
    home = job.hidden_device
    if needed <= torch.cuda.mem_get_info(job.device)[0] // 2:
        home = job.device
        model.to(home)  # type: ignore[arg-type]
    fewest = GPU_BATCHES * (2 if job.recipe.method == "chosen" else 1)
    tokens = min(max(ids.numel() // fewest, CPU_TOKENS), GPU_TOKENS)
    return replace(job, batches=list(batched(ids, tokens)), hidden_device=home)


def _learn(
    model: PreTrainedModel, original: PreTrainedModel, job: Job, ids: Tensor, learning: Learning, log: LayerLog
) -> None:
    dtype = next(iter(original.parameters())).dtype
    for part in (model, original):
        part.to(job.device)  # type: ignore[arg-type]
    model.float()  # steps of a norm's gain would vanish in 16 bits; codes and scales keep their dtypes
    with torch.enable_grad():
        learned = learn(model, original, ids, learning, job.progress)
    model.to("cpu", dtype)  # type: ignore[arg-type]
    log.rewritten |= learned.rewritten
    if learned.step:
        words = f"lowered KL on windows kept apart from {learned.before:.4f} to {learned.after:.4f}"
        log.notes.append(f"learning {words} (step {learned.step} of {learning.steps})")
    else:
        log.warnings.append(f"learning found nothing better than KL {learned.before:.4f} on windows kept apart")


def _become(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Make `model` hold the modules and parameters of `other`."""
    model._modules, model._parameters, model._buffers = other._modules, other._parameters, other._buffers
