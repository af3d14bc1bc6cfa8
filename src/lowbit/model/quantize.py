"""The pipeline: walk a model's decoder blocks, observe their inputs, solve each weight, put quantized layers in place.

Block i is observed with what the already quantized blocks before it give (observe/blocks.py), and within a block each
linear with what the quantized ones before it give: a forward per stage, which ends at the stage's input and skips what
is settled (observe/endings.py). Linears that read one input share its statistics and are solved as one matrix. A recipe
that needs no statistics runs no forward at all.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.errors import InputError, MethodError
from lowbit.kernels.reference import keeping_decoded
from lowbit.memory import give_back
from lowbit.model.aligned import Twin, twins, watching_sources
from lowbit.model.layers import solve_experts, solve_linears
from lowbit.model.log import LayerLog
from lowbit.model.observing import observe_experts, observe_linears, observe_twin
from lowbit.model.recipe import HESSIAN_METHODS, MOMENT_METHODS, SMOOTHING_METHODS, Recipe
from lowbit.model.rotate import rotate_model
from lowbit.model.rotation import Rotation
from lowbit.model.select import Selection
from lowbit.model.sensitivity import sense
from lowbit.model.smooth import smooth_block
from lowbit.model.statistics import Statistics
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.blocks import Block, BlockStream
from lowbit.observe.capture import find_blocks
from lowbit.observe.endings import replaying, watching_endings
from lowbit.observe.inputs import input_groups
from lowbit.observe.parking import parked

MAX_STAGES = 8  # a block whose experts are linears of their own would else run one forward for each of them

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many steps are done, and of how many."""


@dataclass(frozen=True)
class Job:
    """What `quantize_blocks` needs beside the model. scale_dtype is the checkpoint's; batches are token ids [b, T]."""

    recipe: Recipe
    selection: Selection
    batches: Sequence[Tensor]
    scale_dtype: torch.dtype
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress = lambda stage, done, total: None
    hidden_device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def needs_data(recipe: Recipe, selection: Selection) -> bool:
    """Whether the recipe looks at activations."""
    static = (scheme.activations and not scheme.activations.dynamic for scheme in selection.schemes.values())
    return recipe.method in MOMENT_METHODS or any(static)


def check_tokens(model: nn.Module, recipe: Recipe, selection: Selection, tokens: int) -> None:
    """Raise InputError where so many calibration tokens leave the second moment of some layer's input singular.

    With fewer tokens than channels GPTQ fits what it saw and loses to rounding (docs/log-budget.md). Experts are not
    asked here: which tokens reach them is not known yet (model/layers.py).
    """
    if recipe.method not in HESSIAN_METHODS:
        return
    parameters = dict(model.named_parameters())
    widths = {name: model.get_parameter(f"{name}.weight").shape[1]
              for name in selection.schemes if name not in parameters}  # fmt: skip
    widest = max(widths, key=lambda name: widths[name], default="")
    if widest and tokens < widths[widest]:
        other = "--effort 1" if recipe.effort is not None else "--method rtn-weighted"
        raise InputError(
            f"{tokens} calibration tokens are too few for {recipe.method}: {widest} reads {widths[widest]} channels, "
            "whose second moment is singular with fewer tokens; give a longer text or more and longer samples, or use "
            f"{other}"
        )


@torch.no_grad()
def quantize_blocks(model: nn.Module, job: Job) -> LayerLog:
    """Replace the selected weights of `model` by quantized ones, in place; what each of them lost.

    Raises InputError where a weight or an activation is not finite.
    """
    log = LayerLog(job.recipe, job.scale_dtype)
    if job.recipe.rotation is not None:
        _rotate(model, job, job.recipe.rotation, log)
    if job.recipe.sensitivity is not None:
        log.sensed = sense(model, list(job.selection.schemes), job.batches, job.recipe.sensitivity)
    blocks_name, blocks = find_blocks(model)
    depth = 1 + max(index for index in range(len(blocks)) if index == 0 or _inside(job, f"{blocks_name}.{index}"))
    outside = [name for name in job.selection.schemes if not name.startswith(f"{blocks_name}.")]
    if job.recipe.correction is not None:
        with (
            parked(blocks, job.scale_dtype) as take_out,
            _stream(model, job) as noisy,
            _stream(model, job) as clean,
        ):
            give_back(job.device)

            def prepare(block: Block) -> None:
                take_out(block.module)
                schemes = _inside(job, block.name)
                if job.recipe.method in SMOOTHING_METHODS and schemes:
                    groups, idle = input_groups(block, _split(block.module, schemes)[0])
                    _smooth(block, groups, idle, schemes, log)
                    _check_smoothed(model, job.recipe.method, log)

            for twin in islice(twins(noisy, clean, prepare), depth):
                _quantize_twin(twin, _inside(job, twin.noisy.name), log)
                give_back(job.device)
                job.progress("quantizing", twin.noisy.index + 1, depth)
    elif needs_data(job.recipe, job.selection):
        with parked(blocks, job.scale_dtype) as take_out, _stream(model, job) as stream:
            give_back(job.device)
            for block in islice(stream, depth):
                take_out(block.module)
                schemes = _inside(job, block.name)
                _quantize_observed(block, schemes, log)
                if job.recipe.method in SMOOTHING_METHODS and schemes:
                    _check_smoothed(model, job.recipe.method, log)
                give_back(job.device)
                job.progress("quantizing", block.index + 1, depth)
    else:
        for index, module in enumerate(blocks):
            _quantize_blind(module, f"{blocks_name}.{index}", _inside(job, f"{blocks_name}.{index}"), log)
            job.progress("quantizing", index + 1, len(blocks))
    log.rewritten |= log.corrected
    for name in outside:
        solve_linears(model, "", [name], job.selection.schemes[name], None, log)
    return log


def _rotate(model: nn.Module, job: Job, options: Rotation, log: LayerLog) -> None:
    ids = job.batches[0] if job.batches else None
    rotated = rotate_model(cast("PreTrainedModel", model), options, list(job.selection.schemes), ids)
    log.rewritten |= rotated.rewritten
    log.untied = rotated.untied
    words = (
        f"rotated {'the residual stream, ' * options.residual}the values of {rotated.heads} blocks and the inputs of "
    )
    log.notes.append(f"{words}{len(rotated.online)} layers at run time")


def _check_smoothed(model: nn.Module, method: str, log: LayerLog) -> None:
    """Raise MethodError after a block in which no norm could take scales: in an hour it would be no better."""
    if not log.rewritten:
        other = "aligned" if method == "awq" else "gptq"
        raise MethodError(
            f"{method} found no norm in {type(model).__name__} whose only readers are matrices that can be scaled "
            f"with it; use --method {other}"
        )


def _stream(model: nn.Module, job: Job) -> BlockStream:
    return BlockStream(model, job.batches, job.device, job.hidden_device)


def _inside(job: Job, block: str) -> dict[str, QuantScheme]:
    """The selected names within a block, relative to it."""
    prefix = f"{block}."
    return {name[len(prefix) :]: s for name, s in job.selection.schemes.items() if name.startswith(prefix)}


def _split(module: nn.Module, schemes: dict[str, QuantScheme]) -> tuple[list[str], list[str]]:
    """(linears, expert parameters) among the names."""
    parameters = dict(module.named_parameters())
    experts = [name for name in schemes if name in parameters]
    return [name for name in schemes if name not in parameters], experts


def _quantize_blind(module: nn.Module, prefix: str, schemes: dict[str, QuantScheme], log: LayerLog) -> None:
    linears, experts = _split(module, schemes)
    for name in linears:
        solve_linears(module, prefix, [name], schemes[name], None, log)
    for name in experts:
        solve_experts(module, prefix, name, schemes[name], {}, log)


def _quantize_observed(block: Block, schemes: dict[str, QuantScheme], log: LayerLog) -> None:
    """Solve the block's linears stage by stage, each on what the quantized ones before it give, then its experts."""
    linears, experts = _split(block.module, schemes)
    with watching_endings(block, linears) as endings:
        groups, idle = input_groups(block, linears)
    if log.recipe.method in SMOOTHING_METHODS:
        _smooth(block, groups, idle, schemes, log)
    with keeping_decoded(), replaying(block, endings) as replays:
        for stage in _stages([group for group in groups if group[0] not in idle]):
            statistics = observe_linears(block, stage, schemes, log, replays)
            give_back(block.device)  # the forward's short-lived tensors, before the solver's
            for group in stage:
                _solve_group(block, group, schemes, statistics[group[0]], log)
            for name in stage[0] if len(stage) == 1 else ():
                replays.settle(name)
        for name in idle:
            _solve_group(block, [name], schemes, None, log)
        expert_statistics = observe_experts(block, experts, schemes, log) if experts else {}
        for name in experts:
            solve_experts(block.module, block.name, name, schemes[name], expert_statistics[name], log)
        if not block.is_last:
            block.advance()


def _smooth(
    block: Block, groups: list[list[str]], idle: list[str], schemes: dict[str, QuantScheme], log: LayerLog
) -> None:
    busy = [group for group in groups if group[0] not in idle]
    rewritten = smooth_block(block, busy, schemes, log.scale_dtype)
    log.rewritten |= {f"{block.name}.{name}" for name in rewritten}


def _quantize_twin(twin: Twin, schemes: dict[str, QuantScheme], log: LayerLog) -> None:
    """Quantize a block whose inputs are seen beside the original's; experts without that comparison."""
    block = twin.noisy
    linears, experts = _split(block.module, schemes)
    with watching_endings(block, linears) as endings, watching_sources(block, linears) as sources:
        groups, idle = input_groups(block, linears)
    correction = log.recipe.correction
    assert correction is not None
    if correction.residual:
        twin.sources = sources
    steps = [[group] for group in groups] if correction.sequential else [groups]
    if log.sensed:  # each linear has its own tokens' weights
        steps = [[[name] for group in step for name in group] for step in steps]
    with keeping_decoded(), twin.replaying(endings):
        for step in steps:
            statistics = observe_twin(twin, step, idle, schemes, log)
            give_back(block.device)  # the forwards' short-lived tensors, before the solver's
            for group in step:
                _solve_group(block, group, schemes, statistics.get(group[0]), log)
            for name in step[0] if len(step) == 1 else ():
                twin.settle(name)
        expert_statistics = observe_experts(block, experts, schemes, log) if experts else {}
        for name in experts:
            solve_experts(block.module, block.name, name, schemes[name], expert_statistics[name], log)
        if not block.is_last:
            block.advance()
            twin.clean.advance()


def _stages(groups: list[list[str]]) -> list[list[list[str]]]:
    """The groups in order of execution, cut into at most MAX_STAGES runs that are observed together."""
    size = -(-len(groups) // MAX_STAGES)
    return [groups[start : start + size] for start in range(0, len(groups), size or 1)]


def _solve_group(
    block: Block, group: list[str], schemes: dict[str, QuantScheme], observed: Statistics | None, log: LayerLog
) -> None:
    for scheme in dict.fromkeys(schemes[name] for name in group):
        names = [name for name in group if schemes[name] == scheme]
        solve_linears(block.module, block.name, names, scheme, observed, log)


def batched(ids: Tensor, tokens: int = 2048) -> Iterator[Tensor]:
    """ids [samples, T] in batches of about `tokens` tokens."""
    yield from ids.split(max(tokens // ids.shape[1], 1))
