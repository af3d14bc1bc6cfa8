"""The exact arguments that a model's own forward gives one of its decoder blocks.

The model's forward runs with stand-ins for its blocks. Those before block i answer with a given output of block i-1,
whatever they are asked; the one in block i's place raises what it was called with. So masks, rotary embeddings and
everything else that the parent computes are right by construction, for any architecture and without tracing, and
neither later blocks nor the head run. Stand-ins are in place only inside that one call.
"""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import InputError


class StopForward(Exception):  # noqa: N818  (a signal like StopIteration, not an error)
    """Raised in a hook to end the forward of one batch early: Block.run goes on with the next batch."""


class _Captured(StopForward):
    """Carries the arguments with which the parent called a block."""

    def __init__(self, args: tuple, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_of_block, self.kwargs_of_block = args, kwargs


class StandIn(nn.Module):
    """Takes a module's place: answers calls by itself, and has every attribute that the parent may read of it."""

    def __init__(self, original: nn.Module, answer: Callable[..., Any]) -> None:
        super().__init__()
        self._original = (original,)  # in a tuple, so that it isn't registered as a child
        self._answer = answer
        self.training = original.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"][0], name)


def _capture(*args: Any, **kwargs: Any) -> None:
    raise _Captured(args, kwargs)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of the model's decoder blocks with its dotted name, such as "model.layers".

    Of the outermost non-empty ModuleLists, those as long as the config's number of layers go first; among them the one
    with the most parameters wins (a vision tower's or a projection's list is smaller). Raises InputError without any.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) > 0 and not nested:
            lists[name] = module
    if not lists:
        raise InputError(
            f"{type(model).__name__} has no nn.ModuleList of decoder blocks to stream; "
            "give a causal language model of transformers"
        )
    depth = _configured_depth(model)
    parameters = {name: sum(p.numel() for p in found.parameters()) for name, found in lists.items()}
    name = max(lists, key=lambda name: (len(lists[name]) == depth, parameters[name]))
    return name, lists[name]


def _configured_depth(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    return next((getattr(config, name) for name in names if hasattr(config, name)), None)


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """value with function applied to its tensors. Mappings keep their identity: blocks that share one write to it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, MutableMapping):
        for key in list(value):
            value[key] = mapped(value[key], function)
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, function) for item in value))
    if type(value) in (tuple, list):
        return type(value)(mapped(item, function) for item in value)
    return value


def moved(value: Any, device: torch.device) -> Any:
    return mapped(value, lambda tensor: tensor.to(device))


@torch.no_grad()
def block_arguments(model: nn.Module, name: str, index: int, tokens: Tensor, previous: Any) -> tuple[tuple, dict]:
    """Positional and keyword arguments of block `index` of the list called name, for tokens [b, T].

    previous is what block index-1 returned for these tokens; block 0 needs none. Raises InputError where the model's
    forward does not run the block.
    """
    blocks = model.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)
    stand_ins = [StandIn(block, lambda *_, **__: previous) for block in blocks[:index]]
    stand_ins.append(StandIn(blocks[index], _capture))
    with _replaced(model, name, nn.ModuleList([*stand_ins, *blocks[index + 1 :]])):
        try:
            model(input_ids=tokens, use_cache=False)
        except _Captured as captured:
            return captured.args_of_block, captured.kwargs_of_block
    raise InputError(f"{type(model).__name__} does not run {name}.{index} in its forward, so it cannot be calibrated")


def blocks_answering(
    model: nn.Module, name: str, index: int, answer: Callable[..., Any]
) -> AbstractContextManager[None]:
    """The model whose blocks before `index`, of the list called name, answer so, for the time of the context."""
    blocks = model.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)
    stand_ins = [StandIn(block, answer) for block in blocks[:index]]
    return _replaced(model, name, nn.ModuleList([*stand_ins, *blocks[index:]]))


@contextmanager
def _replaced(model: nn.Module, name: str, blocks: nn.ModuleList) -> Iterator[None]:
    """The model with another list of blocks, for the time of the context."""
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    original = getattr(parent, attribute)
    setattr(parent, attribute, blocks)
    try:
        yield
    finally:
        setattr(parent, attribute, original)
