"""Fold: divide what a group of matrices reads by s and multiply their columns by s; the block computes the same.

Who writes the input is found by trying. A writer is a norm (its gain and bias are divided; Gemma's gain is 1 + w) or
rows of a linear whose outputs pass channel by channel into the readers (up into down, also where gate and up are one
linear; v into o where every value head has one query head; the rows are divided). A candidate is scaled by test
factors, and is a writer exactly when the block's output stays what it was: an activation between the two rules it out,
and so does a router that reads the same norm, unless it is named among the readers.

Readers are linears, or parameters [N, K] or [E, N, K]: a router's, those of experts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.observe.blocks import Block, hidden_states

FUSED = (1, 2, 3)  # a projection alone; gate and up; queries, keys and values of as many heads
TOLERANCE = 1e-3  # relative, float32: sums in another order; bfloat16 gets 16 times that


@dataclass(frozen=True)
class Writer:
    """A module whose output the readers multiply, and how its parameters take s: "scale", "one plus" or "rows".

    first: the first of these rows.
    """

    name: str
    kind: str
    first: int = 0


def matrix(module: nn.Module, reader: str) -> nn.Parameter:
    """The matrix of a reader, a linear's weight or a parameter by its own name."""
    parent, _, attribute = reader.rpartition(".")
    own = dict(module.get_submodule(parent).named_parameters(recurse=False))
    return own[attribute] if attribute in own else module.get_parameter(f"{reader}.weight")


@torch.no_grad()
def find_writer(block: Block, readers: Sequence[str], linears: Sequence[str]) -> Writer | None:
    """The writer of the input that these readers share, or None. linears: those that may be writers themselves."""
    width = matrix(block.module, readers[0]).shape[-1]
    test = torch.linspace(0.8, 1.25, width, device=block.device)
    with in_float32(block):
        before = output_of(block)
        for writer in _candidates(block.module, readers, linears, width):
            undo = fold(block.module, writer, readers, test)
            same = is_close(output_of(block), before)
            undo()
            if same:
                return writer
    return None


def _candidates(module: nn.Module, readers: Sequence[str], linears: Sequence[str], width: int) -> list[Writer]:
    """Norms and linears of the right width; those registered last come first, as they stand nearer in most blocks."""
    found, fused = [], [width * parts for parts in FUSED]
    for name, part in module.named_modules():
        weight = getattr(part, "weight", None)
        if not isinstance(weight, Tensor) or name in readers:
            continue
        if weight.dim() == 1 and weight.shape[0] == width:
            found += [Writer(name, "scale"), Writer(name, "one plus")]
        elif name in linears and isinstance(part, nn.Linear) and part.out_features in fused:
            starts = dict.fromkeys((part.out_features - width, 0))  # the last rows first: up stands behind gate
            found += [Writer(name, "rows", first) for first in starts]
    return found


@torch.no_grad()
def fold(module: nn.Module, writer: Writer, readers: Sequence[str], scales: Tensor) -> Callable[[], None]:
    """Divide the writer's output by scales [K] and multiply the readers' columns; the returned function undoes it."""
    part = module.get_submodule(writer.name)
    changed = list(part.parameters(recurse=False))
    changed += [matrix(module, name) for name in readers]
    kept = [parameter.detach().clone() for parameter in changed]
    weight = part.get_parameter("weight")
    rows = slice(writer.first, writer.first + len(scales)) if writer.kind == "rows" else slice(None)
    if writer.kind == "rows":
        weight[rows].div_(scales[:, None].to(weight.dtype))
    elif writer.kind == "one plus":
        weight.copy_((1 + weight.float()) / scales - 1)
    else:
        weight.div_(scales.to(weight.dtype))
    if isinstance(getattr(part, "bias", None), Tensor):
        part.get_parameter("bias")[rows].div_(scales)
    for name in readers:
        columns = matrix(module, name)
        columns.mul_(scales.to(columns.dtype))

    def undo() -> None:
        for parameter, value in zip(changed, kept, strict=True):
            parameter.data.copy_(value)

    return undo


def representable(module: nn.Module, writer: Writer, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """scales near the given ones, by which the writer's gain can be divided exactly in the dtype that stores it."""
    if writer.kind == "rows":
        return scales  # its rows will be quantized, not stored
    weight = module.get_submodule(writer.name).get_parameter("weight").detach().float()
    gain = 1 + weight if writer.kind == "one plus" else weight
    stored = gain / scales - (1 if writer.kind == "one plus" else 0)
    rounded = stored.to(dtype).float() + (1 if writer.kind == "one plus" else 0)
    usable = (gain != 0) & (rounded != 0)
    return torch.where(usable, gain / torch.where(usable, rounded, 1), 1.0)


@contextmanager
def in_float32(block: Block) -> Iterator[None]:
    """The block and its arguments in float32 meanwhile: 16 bits can't tell a writer (1e-2) from what is none."""
    parameters = [parameter for parameter in block.module.parameters() if parameter.dtype.itemsize < 4]
    stored = [parameter.dtype for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    outer, block.dtype = block.dtype, torch.float32
    try:
        yield
    finally:
        block.dtype = outer
        for parameter, dtype in zip(parameters, stored, strict=True):
            parameter.data = parameter.data.to(dtype)


Arguments = tuple[tuple, dict[str, Any]]


@torch.no_grad()
def output_of(block: Block, change: Callable[[tuple, dict[str, Any]], Arguments] | None = None) -> Tensor:
    """The block's output for the first batch; `change` is done to its arguments first."""
    args, kwargs = block.arguments(0)
    if change is not None:
        args, kwargs = change(args, kwargs)
    return hidden_states(block.module(*args, **kwargs))


def is_close(a: Tensor, b: Tensor, factor: float = 1.0) -> bool:
    """Whether a and b differ by sums in another order: relative to b by `factor` times what one fold may."""
    bound = TOLERANCE if torch.finfo(a.dtype).eps < 1e-4 else 16 * TOLERANCE
    return bool((a.float() - b.float()).norm() <= factor * bound * b.float().norm())
