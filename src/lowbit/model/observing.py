"""Forwards that fill statistics: of the inputs of a block's linears, of its experts', or of two models side by side."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import cast

from torch import Tensor, nn

from lowbit.errors import InputError
from lowbit.model.aligned import Seen, Twin
from lowbit.model.log import LayerLog
from lowbit.model.statistics import Statistics
from lowbit.nn.rotated import rotation_of
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.blocks import Block
from lowbit.observe.capture import StopForward
from lowbit.observe.endings import Replays
from lowbit.observe.inputs import ExpertInput, expert_inputs
from lowbit.observe.moments import CrossMoment

WHOLE_METHODS = ("aligned", "rotate", "learned")
HELD_OUT = 6  # one batch in so many judges the candidates of effort 3


def observe_linears(
    block: Block, stage: list[list[str]], schemes: dict[str, QuantScheme], log: LayerLog, replays: Replays
) -> dict[str, Statistics]:
    """Statistics of the stage's inputs, by the first linear of each group, in one pass over the batches."""
    device = next(block.module.parameters()).device
    statistics = {}
    with ExitStack() as hooks:
        for group in stage:
            linear = block.module.get_submodule(group[0])
            width, scheme = cast("nn.Linear", linear).in_features, schemes[group[0]]
            statistics[group[0]] = log.statistics(width, scheme, device, rotation_of(linear))
            kept = group if len(stage) == 1 else []  # in a longer stage later inputs are not final
            hook = _watch(statistics[group[0]], f"{block.name}.{group[0]}", kept, replays, group is stage[-1])
            hooks.callback(linear.register_forward_pre_hook(hook).remove)
        block.run()
    return statistics


def observe_experts(
    block: Block, experts: list[str], schemes: dict[str, QuantScheme], log: LayerLog
) -> dict[str, dict[int, Statistics]]:
    """Statistics of the tokens that reach each expert, in one pass over the batches."""
    device = next(block.module.parameters()).device
    statistics: dict[str, dict[int, Statistics]] = {name: {} for name in experts}
    shapes = {name: block.module.get_parameter(name).shape for name in experts}

    def receive(seen: ExpertInput) -> None:
        if seen.name not in shapes:
            return
        if seen.in_axis != 2:
            raise InputError(
                f"the experts {block.name}.{seen.name} are stored transposed; leave them out with --ignore"
            )
        by_expert = statistics[seen.name]
        if seen.expert not in by_expert:
            by_expert[seen.expert] = log.statistics(shapes[seen.name][2], schemes[seen.name], device)
        by_expert[seen.expert].update(seen.x)

    with expert_inputs(block.module, receive):
        block.run()
    return statistics


def _watch(
    observed: Statistics, name: str, kept: Sequence[str], replays: Replays, ends_forward: bool
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that updates `observed`, keeps the input of the linears `kept`, and may end the forward."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        try:
            observed.update(args[0])
        except InputError as error:
            raise InputError(f"the input of {name}: {error}") from error
        for linear in kept:
            replays.keep(linear, args[0])
        if ends_forward:
            raise StopForward

    return hook


def observe_twin(
    twin: Twin, groups: list[list[str]], idle: list[str], schemes: dict[str, QuantScheme], log: LayerLog
) -> dict[str, Statistics]:
    """Statistics of each group's input in both streams, by its first linear."""
    block = twin.noisy
    held_out = -(-block.batches // HELD_OUT) if log.recipe.method == "chosen" and block.batches > 1 else 0
    leads = [group[0] for group in groups if group[0] not in idle]
    outputs = [group[0] for group in groups if len(group) == 1 and _needs_no_parts(twin, group[0], log)]
    statistics: dict[str, Statistics] = {}
    for name in leads:
        linear = cast("nn.Linear", block.module.get_submodule(name))
        statistics[name] = _twin_statistics(linear, schemes[name], name in twin.sources, name in outputs, log)
        if held_out:
            statistics[name].held_out = _twin_statistics(linear, schemes[name], name in twin.sources, False, log)

    def receive(name: str, batch: int, clean: Seen, noisy: Seen) -> None:
        observed = statistics[name]
        if batch >= block.batches - held_out and observed.held_out is not None:
            observed = observed.held_out
        try:
            read = observed.as_read(noisy.x)
            weighted = partial(_weighted, log, f"{block.name}.{name}", batch)
            x = weighted(read)
            observed.update(noisy.x, x)
            if observed.wanted is not None:
                observed.wanted.update(weighted(_wanted(clean, noisy)), x)
            if observed.shift is not None:
                observed.shift.update(weighted(observed.turned(clean.x) - read), x)
            if observed.residual is not None and clean.residual is not None and noisy.residual is not None:
                observed.residual.update(weighted(clean.residual - noisy.residual), x)
        except InputError as error:
            raise InputError(f"the input of {block.name}.{name}: {error}") from error

    if leads:
        twin.observe(leads, receive, groups[0] if len(groups) == 1 else (), outputs)
    return statistics


def _needs_no_parts(twin: Twin, name: str, log: LayerLog) -> bool:
    """Whether of the linear's wanted output W x + (r - r~) nothing has to be known apart.

    A bias is corrected by what x alone is short of, and candidates differ in how much of r - r~ they want.
    """
    recipe, linear = log.recipe, cast("nn.Linear", twin.noisy.module.get_submodule(name))
    whole = recipe.correction is not None and recipe.correction.residual == 1 and recipe.method in WHOLE_METHODS
    return whole and name in twin.sources and linear.bias is None


def _wanted(clean: Seen, noisy: Seen) -> Tensor:
    """W x + (r - r~) [..., N] of a linear without a bias."""
    assert clean.y is not None
    assert clean.residual is not None
    assert noisy.residual is not None
    return clean.y + (clean.residual - noisy.residual)


def _weighted(log: LayerLog, name: str, batch: int, x: Tensor) -> Tensor:
    """x [..., K] times the square root of each token's weight; x itself where tokens are alike."""
    if name not in log.sensed:
        return x
    return x * log.sensed[name].tokens[batch].sqrt().to(x.device).view(*x.shape[:-1], 1)


def _twin_statistics(
    linear: nn.Linear, scheme: QuantScheme, writes_residual: bool, whole: bool, log: LayerLog
) -> Statistics:
    device = linear.weight.device
    observed = log.statistics(linear.in_features, scheme, device, rotation_of(linear))
    if whole:
        observed.wanted = CrossMoment(linear.out_features, linear.in_features, device)
        return observed
    observed.shift = CrossMoment(linear.in_features, linear.in_features, device)
    if writes_residual:
        observed.residual = CrossMoment(linear.out_features, linear.in_features, device)
    return observed
