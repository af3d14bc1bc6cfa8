"""What quantizing one group of layers costs: the KL of the whole model with that group alone in few bits.

Each group of linears that read one input (q, k and v; gate and up; all experts of a block) is solved as the recipe's
method solves it, on the moments of its inputs in the float model; everything else stays in float, and the model is run
on a little text that these moments did not see: KL(original || changed), a mean over every second of TOKENS tokens.
GPTQ gains far more in some groups than in others, so costs of rounding rank them wrongly (docs/log-budget.md).

Left out of a probe is what belongs to several layers: corrections of earlier layers' errors, smoothing, rotations,
learning. A sum of costs over groups is scaled by what the real run measured (budget.py).

A level that was not measured is derived from the one below it, by the ratio of the squared weight errors, to which KL
is proportional while it is small.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit import judge
from lowbit.algorithms.rtn import solve_rtn
from lowbit.algorithms.scales import ScaleSearch
from lowbit.model.log import LayerLog
from lowbit.model.observing import observe_experts, observe_linears
from lowbit.model.quantize import Progress, batched
from lowbit.model.recipe import MOMENT_METHODS, Recipe
from lowbit.model.statistics import Statistics
from lowbit.numerics.metrics import kl_divergence
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.blocks import Block, BlockStream
from lowbit.observe.endings import replaying
from lowbit.observe.inputs import input_groups

TOKENS, WINDOW, EVERY = 512, 256, 2  # tokens of text, tokens a window, one token in EVERY is judged
STAGE = "measuring sensitivity"


@dataclass(frozen=True)
class Probe:
    """How costs are measured. ids int64 [windows, T]: the text of the judge; seen: token ids [b, T] for the moments.

    recipe: how layers are solved; scale_dtype: of stored scales; progress: who watches.
    """

    ids: Tensor
    seen: tuple[Tensor, ...]
    recipe: Recipe
    scale_dtype: torch.dtype
    progress: Progress

    @classmethod
    def on(cls, ids: Tensor, recipe: Recipe, scale_dtype: torch.dtype, progress: Progress) -> "Probe":
        """A probe on calibration windows ids [samples, T]: the last ones judge, the others give the moments."""
        length = min(ids.shape[1], WINDOW)
        judging = min(max(TOKENS // length, 1), max(len(ids) // 2, 1))
        seen = ids[:-judging] if len(ids) > 1 else ids
        if recipe.method not in MOMENT_METHODS:
            seen = seen[:1]
        plain = replace(recipe, effort=None, sensitivity=None, joint=None)
        return cls(ids[-judging:, :length], tuple(batched(seen)), plain, scale_dtype, progress)


def fused_groups(model: nn.Module, names: Sequence[str], ids: Tensor) -> list[tuple[str, ...]]:
    """The named weights (linears, or 3-D experts) in groups that share a scheme, in the model's order.

    Linears of a block that read the same tensor in a forward of ids [1, T] are a group, and so are all experts of a
    block, however they are stored. Names outside the blocks are not returned.
    """
    device = next(model.parameters()).device
    groups = []
    with BlockStream(model, [ids], device, device) as stream:
        for block in stream:
            prefix = f"{block.name}."
            inside = [name[len(prefix) :] for name in names if name.startswith(prefix)]
            parameters = dict(block.module.named_parameters())
            linears = [name for name in inside if name not in parameters]
            found = input_groups(block, linears).groups if linears else []
            found += [[name] for name in inside if name in parameters]
            groups += [tuple(prefix + name for name in group) for group in _merged(found)]
    return groups


def _merged(groups: list[list[str]]) -> list[list[str]]:
    """The groups, those that hold experts of one list or of one module joined."""
    places: dict[str, list[str]] = {}
    for group in groups:
        parts = group[0].split(".")
        number = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
        owner = "experts" if "experts" in parts[:-1] else None
        key = ".".join(parts[:number]) if number is not None else owner or group[0]
        places.setdefault(key, []).extend(group)
    return list(places.values())


@torch.no_grad()
def costs(
    model: PreTrainedModel, groups: Sequence[Sequence[str]], schemes: Sequence[QuantScheme], probe: Probe
) -> list[list[float]]:
    """KL [scheme][group], in nats a token, of the model with one group under one scheme; the model is as before.

    groups as `fused_groups` gives them.
    """
    head, device = judge.Head(model), next(model.parameters()).device
    wanted = [head(hidden[::EVERY]) for hidden in judge.hidden_states(model, probe.ids)]
    found = [[0.0] * len(groups) for _ in schemes]
    done = 0
    with BlockStream(model, probe.seen, device) as stream, BlockStream(model, [probe.ids], device) as judging:
        for block, judged in zip(stream, judging, strict=True):
            mine = [number for number, group in enumerate(groups) if group[0].startswith(f"{block.name}.")]
            solver = _Solver(block, [groups[number] for number in mine], schemes[0], probe)
            for number in mine:
                for place, scheme in enumerate(schemes):
                    with _replaced(model, solver.solved(groups[number], scheme)), judged.later_blocks_only(0):
                        hidden = judge.hidden_states(model, probe.ids)
                        klds = [kl_divergence(w, head(h[::EVERY])) for w, h in zip(wanted, hidden, strict=True)]
                    found[place][number] = torch.cat(klds).double().mean().item()
                    done += 1
                    probe.progress(STAGE, done, len(groups) * len(schemes))
    return found


class _Solver:
    """Solves groups of one block, on the moments of its inputs in the float model."""

    def __init__(self, block: Block, groups: Sequence[Sequence[str]], scheme: QuantScheme, probe: Probe) -> None:
        self._block, self._log = block, LayerLog(probe.recipe, probe.scale_dtype)
        self._prefix = f"{block.name}."
        self._parameters = dict(block.module.named_parameters())
        names = [name[len(self._prefix) :] for group in groups for name in group]
        experts = [name for name in names if name in self._parameters]
        linears = [name for name in names if name not in self._parameters]
        schemes = dict.fromkeys(names, scheme)
        self._of_linear: dict[str, Statistics] = {}
        self._of_experts: dict[str, dict[int, Statistics]] = {}
        if probe.recipe.method not in MOMENT_METHODS:
            return
        if linears:
            inputs, idle = input_groups(block, linears)
            stage = [group for group in inputs if group[0] not in idle]
            with replaying(block, ()) as replays:
                seen = observe_linears(block, stage, schemes, self._log, replays)
            self._of_linear = {name: seen[group[0]] for group in stage for name in group}
        if experts:
            self._of_experts = observe_experts(block, experts, schemes, self._log)

    def solved(self, group: Sequence[str], scheme: QuantScheme) -> dict[str, Tensor]:
        """Parameter of the model -> its dequantized weights, for the names of one group."""
        found: dict[str, Tensor] = {}
        by_input: dict[int, list[str]] = {}
        for name in (full[len(self._prefix) :] for full in group):
            if name in self._parameters:
                found[self._prefix + name] = self._experts(name, scheme)
            else:
                by_input.setdefault(id(self._of_linear.get(name)), []).append(name)
        for names in by_input.values():
            weights = [self._parameters[f"{name}.weight"] for name in names]
            moment = _moment(self._of_linear.get(names[0]))
            tokens = _tokens(self._of_linear.get(names[0]))
            solution, _ = self._log.solve(torch.cat(list(weights)).float(), scheme, moment, names[0], tokens)
            rows = solution.dequantized.split([len(w) for w in weights])
            found |= {f"{self._prefix}{name}.weight": part for name, part in zip(names, rows, strict=True)}
        return found

    def _experts(self, name: str, scheme: QuantScheme) -> Tensor:
        """[E, N, K] dequantized, expert by expert."""
        seen = self._of_experts.get(name, {})
        solutions = [
            self._log.solve(w, scheme, _moment(seen.get(expert)), name, _tokens(seen.get(expert)))[0].dequantized
            for expert, w in enumerate(self._parameters[name].float())
        ]
        return torch.stack(solutions)


def _moment(seen: Statistics | None) -> Tensor | None:
    return None if seen is None or seen.moment is None else seen.moment.value


def _tokens(seen: Statistics | None) -> int | None:
    return None if seen is None else seen.tokens


@torch.no_grad()
def weight_errors(
    model: nn.Module, groups: Sequence[Sequence[str]], schemes: Sequence[QuantScheme], scale_dtype: torch.dtype
) -> list[list[float]]:
    """Squared rounding error [scheme][group], summed over a group's weights."""
    return [
        [
            sum((_nearest(w, scheme, scale_dtype) - w).double().square().sum().item() for w in _weights(model, group))
            for group in groups
        ]
        for scheme in schemes
    ]


def _weights(model: nn.Module, names: Sequence[str]) -> Iterator[nn.Parameter]:
    parameters = dict(model.named_parameters())
    yield from (parameters[name if name in parameters else f"{name}.weight"] for name in names)


def _nearest(w: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype) -> Tensor:
    """w [N, K] or [E, N, K] rounded to nearest under `scheme`, float32."""
    matrices = w.float().reshape(-1, *w.shape[-2:])
    rounded = [solve_rtn(one, scheme.weights, scale_dtype, ScaleSearch()).dequantized for one in matrices]
    return torch.stack(rounded).reshape(w.shape)


@contextmanager
def _replaced(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with these parameters' values, for the time of the context."""
    parameters = [model.get_parameter(name) for name in weights]
    before = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, weights.values(), strict=True):
            parameter.data = value.to(parameter.dtype)
        yield
    finally:
        for parameter, data in zip(parameters, before, strict=True):
            parameter.data = data


def group_name(names: Sequence[str]) -> str:
    """What a group is called: "model.layers.3.self_attn: q_proj, k_proj, v_proj", or its first and how many more."""
    owner = names[0].rpartition(".")[0]
    if len(names) == 1:
        return names[0]
    if all(name.rpartition(".")[0] == owner for name in names):
        return f"{owner}: {', '.join(name.rpartition('.')[2] for name in names)}"
    return f"{names[0]} and {len(names) - 1} more"
