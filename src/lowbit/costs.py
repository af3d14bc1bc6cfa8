"""What rounding one group of layers costs: the KL of the whole model with that group alone in few bits.

Each group of linears that read one input (q, k and v; gate and up; all experts of a block) is rounded to nearest under
clip-searched scales, everything else stays in float, and the model is run on a little text: KL(original || changed), a
mean over every second of TOKENS tokens. The solver of the real run loses less, but ranks the groups alike: a sum of
these costs over groups is scaled by what the real run measured (budget.py).

A level that was not measured is derived from the one below it, by the ratio of the squared weight errors, to which KL
is proportional while it is small.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit import judge
from lowbit.algorithms.rtn import solve_rtn
from lowbit.algorithms.scales import ScaleSearch
from lowbit.model.quantize import Progress
from lowbit.numerics.metrics import kl_divergence
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.blocks import BlockStream
from lowbit.observe.inputs import input_groups

TOKENS, WINDOW, EVERY = 512, 256, 2  # tokens of text, tokens a window, one token in EVERY is judged
STAGE = "measuring sensitivity"


@dataclass(frozen=True)
class Probe:
    """How one run is measured: ids int64 [windows, T], the dtype of scales, and who watches."""

    ids: Tensor
    scale_dtype: torch.dtype
    progress: Progress

    @classmethod
    def on(cls, ids: Tensor, scale_dtype: torch.dtype, progress: Progress) -> "Probe":
        """A probe on the first tokens of the first calibration windows ids [samples, T]."""
        length = min(ids.shape[1], WINDOW)
        return cls(ids[: max(TOKENS // length, 1), :length], scale_dtype, progress)


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
    """KL [scheme][group], in nats a token, of the model with one group under one scheme; the model is as before."""
    head = judge.Head(model)
    wanted = [head(hidden[::EVERY]) for hidden in judge.hidden_states(model, probe.ids)]
    found: list[list[float]] = []
    for scheme in schemes:
        found.append([])
        for group in groups:
            with _rounded(model, group, scheme, probe.scale_dtype):
                hidden = judge.hidden_states(model, probe.ids)
                klds = [kl_divergence(w, head(h[::EVERY])) for w, h in zip(wanted, hidden, strict=True)]
            found[-1].append(torch.cat(klds).double().mean().item())
            probe.progress(STAGE, len(groups) * (len(found) - 1) + len(found[-1]), len(groups) * len(schemes))
    return found


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
def _rounded(model: nn.Module, names: Sequence[str], scheme: QuantScheme, scale_dtype: torch.dtype) -> Iterator[None]:
    """The model with the named weights rounded, for the time of the context."""
    parameters = list(_weights(model, names))
    before = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = _nearest(parameter.data, scheme, scale_dtype).to(parameter.dtype)
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
