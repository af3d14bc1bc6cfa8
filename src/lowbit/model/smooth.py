"""Smooth a block's inputs (algorithms/smooth.py): find who reads and who writes each, choose scales, fold, compare.

Linears that read one tensor are a group. What else reads it is found by trying when no writer is found for the group
alone: a mixture's norm is read by its router, its experts and its shared expert, and is scaled for all of them or none.
Phi's fused projections, Gemma's 1 + w and parallel blocks, whose one norm stands before attention and MLP, need no rule
of their own. A fold after which the block computes something else is undone.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.algorithms.smooth import choose_smoothing
from lowbit.model.fold import Writer, find_writer, fold, in_float32, is_close, matrix, output_of, representable
from lowbit.model.smooth_experts import smooth_experts
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.blocks import Block

SAMPLE = 512  # tokens that judge a smoothing
ROWS = 8192  # of the readers' weights, evenly spread, that are judged: experts have many
MOST_COMPANY = 4  # parameters that may read what a group reads; all their subsets are tried


@torch.no_grad()
def smooth_block(
    block: Block, groups: Sequence[Sequence[str]], schemes: dict[str, QuantScheme], dtype: torch.dtype
) -> set[str]:
    """Smooth what every group of linears reads, and every parameter of experts in `schemes`, where it has a writer.

    Returns the names, relative to the block, of float parameters that changed. dtype: that of stored norms and scales.
    """
    linears = [name for group in groups for name in group]
    experts = [[name] for name in schemes if matrix(block.module, name).dim() == 3]
    rewritten: set[str] = set()
    smoothed: set[str] = set()
    with in_float32(block):
        for group in (*groups, *experts):
            if smoothed.isdisjoint(group):
                readers, writer = _pair(block, group, linears)
                if writer is not None and _fold_chosen(block, readers, writer, schemes, dtype):
                    smoothed |= set(readers)
                    rewritten |= {name for name in readers if name not in schemes}
                    rewritten |= _stored(block.module, writer)
        smooth_experts(block, [name for (name,) in experts], schemes, dtype)
    return rewritten


def _fold_chosen(
    block: Block, readers: Sequence[str], writer: Writer, schemes: dict[str, QuantScheme], dtype: torch.dtype
) -> bool:
    """Choose scales and fold them; False where the block then computes something else, and is as it was."""
    weights = [matrix(block.module, name).flatten(0, -2) for name in readers if name in schemes]
    w = torch.cat(weights)  # [..., N, K] -> [sum of N, K]
    lead = next(name for name in readers if name in schemes)
    scales = choose_smoothing(_sample(block, writer, lead), w[:: -(-len(w) // ROWS)], schemes[lead], dtype)
    before = output_of(block)
    undo = fold(block.module, writer, readers, representable(block.module, writer, scales, dtype))
    if is_close(output_of(block), before):
        return True
    undo()
    return False


def _stored(module: nn.Module, writer: Writer) -> set[str]:
    """The float parameters of a writer that stay float; rows of a linear will be quantized."""
    if writer.kind == "rows":
        return set()
    return {f"{writer.name}.{name}" for name, _ in module.get_submodule(writer.name).named_parameters(recurse=False)}


def _pair(block: Block, group: Sequence[str], linears: Sequence[str]) -> tuple[list[str], Writer | None]:
    """(readers, writer) of what a group reads; the group alone where that is all, None where no writer is found."""
    is_linear = group[0] in linears
    if is_linear and (writer := find_writer(block, group, linears)) is not None:
        return list(group), writer
    others = list(_company(block.module, group, linears))
    if len(others) > MOST_COMPANY:
        return list(group), None
    subsets = chain.from_iterable(combinations(others, size) for size in range(len(others), 0 if is_linear else -1, -1))
    for company in subsets:
        if (writer := find_writer(block, [*group, *company], ())) is not None:
            return [*group, *company], writer
    return list(group), None


def _company(module: nn.Module, group: Sequence[str], linears: Sequence[str]) -> Iterator[str]:
    """Parameters that may read what the group reads: matrices with as many columns, none of other groups."""
    width = matrix(module, group[0]).shape[-1]
    for name, parameter in module.named_parameters():
        known = name in group or name.removesuffix(".weight") in linears
        if parameter.dim() > 1 and parameter.shape[-1] == width and not known:
            yield name


def _sample(block: Block, writer: Writer, reader: str) -> Tensor:
    """SAMPLE tokens [M, K], evenly spread over the first batch, of what a norm writes, or a linear reads."""
    seen: list[Tensor] = []

    def keep_input(_: nn.Module, args: tuple) -> None:
        seen.append(args[0].detach())

    def keep_output(_: nn.Module, args: tuple, output: Any) -> None:
        seen.append(output.detach())

    if writer.kind == "rows":
        hook = block.module.get_submodule(reader).register_forward_pre_hook(keep_input)
    else:
        hook = block.module.get_submodule(writer.name).register_forward_hook(keep_output)
    try:
        output_of(block)
    finally:
        hook.remove()
    x = seen[0].reshape(-1, seen[0].shape[-1])  # [..., K] -> [M, K]
    return x[:: max(len(x) // SAMPLE, 1)][:SAMPLE]
