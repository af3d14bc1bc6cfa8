"""What the parts of a model's rotation share: what is asked for, what was done, how a block is run and compared."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from lowbit.errors import InputError
from lowbit.model import fold
from lowbit.model.fold import is_close
from lowbit.numerics.hadamard import Hadamard
from lowbit.observe.blocks import Block

ONLINE = ("none", "down", "writers", "all")


@dataclass(frozen=True)
class Rotation:
    """residual: R1. heads: R2. online: which layers turn their input at run time (R4), of those that are quantized:
    "none"; "down", writers to the residual stream that R2 does not serve; "writers", all of these; or "all".

    block: the largest Hadamard block at run time, None for the whole input. seed: of the signs. smoothing: the exponent
    with which channels that are written by a linear are smoothed before they turn (algorithms/smooth.py), None: not.
    """

    residual: bool = True
    heads: bool = True
    online: str = "down"
    block: int | None = None
    seed: int = 0
    smoothing: float | None = None

    def __post_init__(self) -> None:
        if self.online not in ONLINE:
            raise InputError(f"unknown choice of layers {self.online!r}; choose one of {', '.join(ONLINE)}")


@dataclass
class Rotated:
    """What was done: parameters that changed beside the quantized ones, new ones, layers that turn their input."""

    rewritten: set[str] = field(default_factory=set)
    untied: bool = False
    online: dict[str, Hadamard] = field(default_factory=dict)
    heads: int = 0


def close(a: Tensor, b: Tensor) -> bool:
    return is_close(a, b, factor=4)


def output_of(block: Block, rotation: Hadamard | None = None) -> Tensor:
    """The block's output on the tokens; its input is turned back by `rotation` first."""
    return fold.output_of(block, None if rotation is None else partial(_turned_back, rotation))


def _turned_back(rotation: Hadamard, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments with the hidden states, the first tensor among them, turned back."""
    for place, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:place], rotation.undo(value), *args[place + 1 :]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: rotation.undo(kwargs[name])}


def weight_of(block: Block, name: str) -> nn.Parameter:
    return cast("nn.Parameter", block.module.get_submodule(name).weight)


def parameters_of(block: Block, name: str) -> list[tuple[str, nn.Parameter]]:
    """The weight of a linear and, if it has one, its bias."""
    return list(block.module.get_submodule(name).named_parameters(recurse=False))
