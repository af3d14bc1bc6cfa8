"""Fold: divide what a group of linears reads by s and multiply their weights by s; the block computes the same.

Who writes the input is found by trying. A writer is a norm (its gain and bias are divided; Gemma's gain is 1 + w) or
a linear whose outputs pass channel by channel into the readers (up into down; v into o where every value head has one
query head; its rows are divided). A candidate is scaled by test factors, and is a writer exactly when the block's
output stays what it was: so a router that reads the same norm, or an activation between the two, rules it out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.algorithms.smooth import choose_smoothing
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.blocks import Block, hidden_states

SAMPLE = 512  # tokens that judge a smoothing
TOLERANCE = 1e-3  # relative, float32: sums in another order; bfloat16 gets 16 times that


@dataclass(frozen=True)
class Writer:
    """A module whose output the readers multiply, and how its parameters take s: "scale", "one plus" or "rows"."""

    name: str
    kind: str


@torch.no_grad()
def find_writer(block: Block, readers: Sequence[str], linears: Sequence[str]) -> Writer | None:
    """The writer of the input that these linears share, or None. linears: those that may be writers themselves."""
    width = block.module.get_submodule(readers[0]).get_parameter("weight").shape[1]
    test = torch.linspace(0.8, 1.25, width, device=block.device)
    before = _output(block)
    for writer in _candidates(block.module, readers, linears, width):
        undo = fold(block.module, writer, readers, test)
        same = _close(_output(block), before)
        undo()
        if same:
            return writer
    return None


def _candidates(module: nn.Module, readers: Sequence[str], linears: Sequence[str], width: int) -> list[Writer]:
    """Norms and linears of the right width; those registered last come first, as they stand nearer in most blocks."""
    found = []
    for name, part in module.named_modules():
        weight = getattr(part, "weight", None)
        if not isinstance(weight, Tensor) or name in readers:
            continue
        if weight.dim() == 1 and weight.shape[0] == width:
            found += [Writer(name, "scale"), Writer(name, "one plus")]
        elif name in linears and isinstance(part, nn.Linear) and part.out_features == width:
            found.append(Writer(name, "rows"))
    return found


@torch.no_grad()
def smooth_block(
    block: Block, groups: Sequence[Sequence[str]], schemes: dict[str, QuantScheme], dtype: torch.dtype
) -> set[str]:
    """Smooth the input of every group of linears (algorithms/smooth.py) that has a writer, in place.

    Returns the names, relative to the block, of float parameters that changed; a fold after which the block computes
    something else is undone. dtype: that of stored norms and scales.
    """
    linears = [name for group in groups for name in group]
    rewritten: set[str] = set()
    for group in groups:
        writer = find_writer(block, group, linears)
        if writer is None:
            continue
        w = torch.cat([block.module.get_submodule(name).get_parameter("weight") for name in group])
        scales = choose_smoothing(_sample(block, group[0]), w, schemes[group[0]], dtype)
        scales = representable(block.module, writer, scales, dtype)
        before = _output(block)
        undo = fold(block.module, writer, group, scales)
        if not _close(_output(block), before):
            undo()
        elif writer.kind != "rows":
            part = block.module.get_submodule(writer.name)
            rewritten |= {f"{writer.name}.{name}" for name, _ in part.named_parameters(recurse=False)}
    return rewritten


def _sample(block: Block, name: str) -> Tensor:
    """SAMPLE tokens [M, K], evenly spread over the first batch, of what a linear reads."""
    seen: list[Tensor] = []
    hook = block.module.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    try:
        _output(block)
    finally:
        hook.remove()
    x = seen[0].reshape(-1, seen[0].shape[-1])  # [..., K] -> [M, K]
    return x[:: max(len(x) // SAMPLE, 1)][:SAMPLE]


@torch.no_grad()
def fold(module: nn.Module, writer: Writer, readers: Sequence[str], scales: Tensor) -> Callable[[], None]:
    """Divide the writer's output by scales [K] and multiply the readers' columns; the returned function undoes it."""
    part = module.get_submodule(writer.name)
    changed = list(part.parameters(recurse=False))
    changed += [module.get_submodule(name).get_parameter("weight") for name in readers]
    kept = [parameter.detach().clone() for parameter in changed]
    weight = part.get_parameter("weight")
    if writer.kind == "rows":
        weight.div_(scales[:, None].to(weight.dtype))
    elif writer.kind == "one plus":
        weight.copy_((1 + weight.float()) / scales - 1)
    else:
        weight.div_(scales.to(weight.dtype))
    if isinstance(getattr(part, "bias", None), Tensor):
        part.get_parameter("bias").div_(scales)
    for name in readers:
        columns = module.get_submodule(name).get_parameter("weight")
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


@torch.no_grad()
def _output(block: Block) -> Tensor:
    args, kwargs = block.arguments(0)
    return hidden_states(block.module(*args, **kwargs)).float()


def _close(a: Tensor, b: Tensor) -> bool:
    bound = TOLERANCE if torch.finfo(a.dtype).eps < 1e-4 else 16 * TOLERANCE
    return bool((a - b).norm() <= bound * b.norm())
