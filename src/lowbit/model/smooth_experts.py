"""Smooth what the second matrix of each expert reads: s_e [K] divides the rows of the first that write it.

    down_e (act(gate_e x) * up_e x) = (down_e s_e) (act(gate_e x) * (up_e / s_e) x)

Experts are parameters [E, N, K]. Which rows of which other parameter write a channel is found by trying, as in fold.py.
Each expert has scales of its own, chosen on the tokens that were routed to it; none where no token was.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lowbit.algorithms.smooth import choose_smoothing
from lowbit.model.fold import is_close, output_of
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.blocks import Block
from lowbit.observe.inputs import ExpertInput, expert_inputs

SAMPLE = 512  # tokens of an expert that judge its smoothing


@torch.no_grad()
def smooth_experts(block: Block, names: Sequence[str], schemes: dict[str, QuantScheme], dtype: torch.dtype) -> None:
    """Smooth the inputs of those of the named parameters [E, N, K] that others of them write, in place."""
    for name in names:
        reader = block.module.get_parameter(name)
        test = torch.linspace(0.8, 1.25, reader.shape[2], device=block.device).expand(len(reader), -1)
        before = output_of(block)
        for rows in _candidates(block.module, name, names):
            undo = _fold(reader, rows, test)
            same = is_close(output_of(block), before)
            undo()
            if same:
                undo = _fold(reader, rows, _chosen(block, name, schemes[name], dtype))
                if not is_close(output_of(block), before):
                    undo()
                break


def _candidates(module: nn.Module, name: str, names: Sequence[str]) -> list[Tensor]:
    """Views [E, K, ...] of rows that may write what `name` reads: all of a parameter, or a half: up beside gate."""
    experts, _, width = module.get_parameter(name).shape
    found = []
    for other in names:
        w = module.get_parameter(other)
        if other != name and len(w) == experts and w.shape[1] in (width, 2 * width):
            found += [w[:, start : start + width] for start in dict.fromkeys((w.shape[1] - width, 0))]
    return found


def _fold(reader: Tensor, rows: Tensor, scales: Tensor) -> Callable[[], None]:
    """Divide rows [E, K, ...] by scales [E, K] and multiply the reader's columns; the returned function undoes it."""
    kept = reader.clone(), rows.clone()
    rows.div_(scales[:, :, None])
    reader.mul_(scales[:, None, :])

    def undo() -> None:
        reader.copy_(kept[0])
        rows.copy_(kept[1])

    return undo


def _chosen(block: Block, name: str, scheme: QuantScheme, dtype: torch.dtype) -> Tensor:
    """Scales float32 [E, K] of each expert's input."""
    reader, seen = block.module.get_parameter(name), dict[int, Tensor]()

    def receive(found: ExpertInput) -> None:
        if found.name == name and found.in_axis == 2:
            seen[found.expert] = found.x[:SAMPLE].detach().clone()

    with expert_inputs(block.module, receive):
        output_of(block)
    scales = torch.ones(len(reader), reader.shape[2], device=reader.device)
    for expert, x in seen.items():
        scales[expert] = choose_smoothing(x, reader[expert], scheme, dtype)
    return scales
