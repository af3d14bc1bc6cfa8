"""The pipeline: walk a model's decoder blocks, observe their inputs, solve each weight, put quantized layers in place.

Block i is observed with what the already quantized blocks before it give (observe/blocks.py); within a block all inputs
are taken in one forward, which ends as soon as the last of them is known. Linears that read one input share its
statistics and are solved as one matrix. A recipe that needs no statistics runs no forward at all.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowbit.errors import InputError
from lowbit.model.layers import LayerLog, Statistics, solve_experts, solve_linears
from lowbit.model.recipe import Recipe
from lowbit.model.select import Selection
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.blocks import Block, BlockStream
from lowbit.observe.capture import StopForward, find_blocks
from lowbit.observe.inputs import ExpertInput, expert_inputs, input_groups

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


def needs_data(recipe: Recipe, selection: Selection) -> bool:
    """Whether the recipe looks at activations."""
    static = (scheme.activations and not scheme.activations.dynamic for scheme in selection.schemes.values())
    return recipe.method == "gptq" or any(static)


@torch.no_grad()
def quantize_blocks(model: nn.Module, job: Job) -> LayerLog:
    """Replace the selected weights of `model` by quantized ones, in place; what each of them lost.

    Raises InputError where a weight or an activation is not finite.
    """
    log = LayerLog(job.recipe, job.scale_dtype)
    blocks_name, blocks = find_blocks(model)
    outside = [name for name in job.selection.schemes if not name.startswith(f"{blocks_name}.")]
    if needs_data(job.recipe, job.selection):
        with BlockStream(model, job.batches, job.device) as stream:
            for block in stream:
                _quantize_observed(block, _inside(job, block.name), log)
                job.progress("quantizing", block.index + 1, len(blocks))
    else:
        for index, module in enumerate(blocks):
            _quantize_blind(module, f"{blocks_name}.{index}", _inside(job, f"{blocks_name}.{index}"), log)
            job.progress("quantizing", index + 1, len(blocks))
    for name in outside:
        solve_linears(model, "", [name], job.selection.schemes[name], None, log)
    return log


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
    linears, experts = _split(block.module, schemes)
    groups, idle = input_groups(block, linears)
    statistics, expert_statistics = _observe(block, groups, experts, schemes, log)
    for group in groups:
        for scheme in dict.fromkeys(schemes[name] for name in group):
            names = [name for name in group if schemes[name] == scheme]
            observed = None if names[0] in idle else statistics[group[0]]
            solve_linears(block.module, block.name, names, scheme, observed, log)
    for name in experts:
        solve_experts(block.module, block.name, name, schemes[name], expert_statistics[name], log)


def _observe(
    block: Block, groups: list[list[str]], experts: list[str], schemes: dict[str, QuantScheme], log: LayerLog
) -> tuple[dict[str, Statistics], dict[str, dict[int, Statistics]]]:
    """Statistics of every group's input (by its first linear) and of every expert's, in one pass over the batches."""
    device = next(block.module.parameters()).device
    statistics = {
        group[0]: log.statistics(block.module.get_submodule(group[0]).in_features, schemes[group[0]], device)  # type: ignore[arg-type]
        for group in groups
    }
    expert_statistics: dict[str, dict[int, Statistics]] = {name: {} for name in experts}
    shapes = {name: block.module.get_parameter(name).shape for name in experts}

    def receive(seen: ExpertInput) -> None:
        if seen.name not in shapes:
            return
        if seen.in_axis != 2:
            raise InputError(
                f"the experts {block.name}.{seen.name} are stored transposed; leave them out with --ignore"
            )
        by_expert = expert_statistics[seen.name]
        if seen.expert not in by_expert:
            by_expert[seen.expert] = log.statistics(shapes[seen.name][2], schemes[seen.name], device)
        by_expert[seen.expert].update(seen.x)

    last = None if experts or not groups else groups[-1][0]
    with ExitStack() as hooks:
        for name, observed in statistics.items():
            hook = _watch(observed, f"{block.name}.{name}", name == last)
            hooks.callback(block.module.get_submodule(name).register_forward_pre_hook(hook).remove)
        if experts:
            hooks.enter_context(expert_inputs(block.module, receive))
        block.run()
    return statistics, expert_statistics


def _watch(observed: Statistics, name: str, ends_forward: bool) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        try:
            observed.update(args[0])
        except InputError as error:
            raise InputError(f"the input of {name}: {error}") from error
        if ends_forward:
            raise StopForward

    return hook


def batched(ids: Tensor, tokens: int = 4096) -> Iterator[Tensor]:
    """ids [samples, T] in batches of about `tokens` tokens."""
    yield from ids.split(max(tokens // ids.shape[1], 1))
