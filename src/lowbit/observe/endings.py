"""Modules that end in one linear layer: their output can be made again from what that layer reads, and nothing else.

An attention module returns what its output projection returned. Once the projection is the last weight in it that will
still change, its queries, keys and values need not be computed again: `Replays` keeps what the projection read, and
once its weight is final lets a stand-in answer with projection(kept).

Endings are found by identity in one forward: the module's output is the very memory that the layer wrote. A module that
returns more than that (keys and values, router scores) has none, nor has a block that writes into a mapping which later
blocks read; these run in full.
"""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.observe.blocks import Block
from lowbit.observe.capture import StandIn

_SHARE = 2.75  # kept inputs take at most this many times the bytes of the block's own inputs


@dataclass(frozen=True)
class Ending:
    """Child `module` of a block returns what `linear` in it returned, followed by `nones` times None, as a tuple.

    nones is None where it returns the bare tensor.
    """

    module: str
    linear: str
    nones: int | None


@contextmanager
def watching_endings(block: Block, names: Sequence[str]) -> Iterator[list[Ending]]:
    """Fills the list, at the end, with the children of the block that end in one of the named linears.

    Inside, the block's forward runs once, for whatever reason. names are dotted names inside the block.
    """
    outputs: dict[str, list[Any]] = {name: [] for name, _ in block.module.named_children()}
    inner = [name for name in names if "." in name]
    outputs |= {name: [] for name in inner}
    writes: list[bool] = []

    def watch(name: str) -> Callable[[nn.Module, tuple, Any], None]:
        return lambda _, __, output: outputs[name].append(output)

    def before(_: nn.Module, __: tuple, kwargs: dict[str, Any]) -> None:
        keys.extend((value, set(value)) for value in kwargs.values() if isinstance(value, MutableMapping))

    def after(*_: object) -> None:
        writes.append(any(old != value.keys() for value, old in keys))

    keys: list[tuple[MutableMapping, set]] = []
    found: list[Ending] = []
    with ExitStack() as hooks:
        for name in outputs:
            hooks.callback(block.module.get_submodule(name).register_forward_hook(watch(name)).remove)
        hooks.callback(block.module.register_forward_pre_hook(before, with_kwargs=True).remove)
        hooks.callback(block.module.register_forward_hook(after).remove)
        yield found
    if writes != [False]:
        return
    for name in inner:
        module = name.partition(".")[0]
        if len(outputs[module]) == len(outputs[name]) == 1 and _is_all_of(outputs[module][0], outputs[name][0]):
            nones = len(outputs[module][0]) - 1 if isinstance(outputs[module][0], tuple) else None
            found.append(Ending(module, name, nones))


def _is_all_of(output: Any, tensor: Tensor) -> bool:
    """Whether a module returned `tensor` and, beside it, nothing but None."""
    first, *rest = output if isinstance(output, tuple) else (output,)
    if not isinstance(first, Tensor) or any(item is not None for item in rest):
        return False
    return first.data_ptr() == tensor.data_ptr() and first.shape == tensor.shape


class Replays:
    """Keeps the inputs of ending linears, for as many batches as memory allows, and answers from them."""

    def __init__(self, block: Block, endings: Sequence[Ending]) -> None:
        self._block = block
        self._endings = {ending.linear: ending for ending in endings}
        # one piece of memory for all: kept tensors between short-lived ones left holes that cost 300 MB on SmolLM2
        room = int(_SHARE * block.input_bytes()) if endings else 0
        self._arena = torch.empty(room, dtype=torch.uint8, device=block.hidden_device)
        self._used = 0
        self._kept: dict[str, dict[int, Tensor]] = {ending.linear: {} for ending in endings}
        self._answered: set[tuple[str, int]] = set()  # of what was kept, the outputs
        self._originals: dict[str, nn.Module] = {}

    def keep(self, linear: str, x: Tensor, y: Tensor | None = None) -> None:
        """Keep x [..., K], the input of an ending linear in the current batch, while there is room for it.

        y [..., N]: what the linear made of it, where its weight is final already: kept in place of x.
        """
        part = x if y is None else y
        end = self._used + part.nbytes
        if linear in self._kept and end <= self._arena.numel():
            place = self._arena[self._used : end].view(part.dtype).view(part.shape)
            self._kept[linear][self._block.batch] = place.copy_(part.detach())
            self._used = -(-end // 16) * 16  # every dtype stays aligned
            if y is not None:
                self._answered.add((linear, self._block.batch))

    def settle(self, linear: str) -> None:
        """`linear` has its final weight: from now on the module that ends in it answers from what was kept."""
        if not self._kept.get(linear):
            return
        ending, kept, block = self._endings[linear], self._kept[linear], self._block
        original, layer = block.module.get_submodule(ending.module), block.module.get_submodule(linear)
        for batch, x in kept.items():
            if (linear, batch) not in self._answered:
                kept[batch] = self._product(layer, x)

        def answer(*args: Any, **kwargs: Any) -> Any:
            if block.batch not in kept:
                return original(*args, **kwargs)
            y = kept[block.batch].to(block.device, copy=True)  # a copy: the block may change it in place
            return y if ending.nones is None else (y, *[None] * ending.nones)

        self._originals[ending.module] = original
        setattr(block.module, ending.module, StandIn(original, answer))

    @torch.no_grad()
    def _product(self, layer: nn.Module, x: Tensor) -> Tensor:
        """layer(x), in the memory of x where it fits there."""
        y = layer(x.to(self._block.device)).to(x.device)
        return x.view(-1)[: y.numel()].view(y.shape).copy_(y) if y.dtype == x.dtype and y.numel() <= x.numel() else y

    def restore(self) -> None:
        """Put the modules back and let go of what was kept."""
        for name, original in self._originals.items():
            setattr(self._block.module, name, original)
        self._originals.clear()
        self._kept.clear()
        self._arena = self._arena[:0].clone()


@contextmanager
def replaying(block: Block, endings: Sequence[Ending]) -> Iterator[Replays]:
    """Replays of the endings, whose modules are back in their places afterwards."""
    replays = Replays(block, endings)
    try:
        yield replays
    finally:
        replays.restore()
