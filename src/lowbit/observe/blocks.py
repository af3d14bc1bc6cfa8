"""Stream a causal language model block by block, with the exact arguments that its own forward gives each block.

With blocks f_0 ... f_{L-1}, the hidden states are h_0 = embedding(tokens) and h_{i+1} = f_i(h_i; masks, rotary, ...).
The stream keeps h_i of every batch, lets its caller change f_i, and then replaces h_i by h_{i+1}: block i is calibrated
on what the already quantized blocks before it really give, and one block at a time is on the device.

The arguments of a block come from the model's own forward (capture.py) and are derived again for every batch, so that
only outputs are stored: b * T * K numbers a batch. On SmolLM2-135M, 8 batches of [1, 512], one CPU core, this costs
1.3 ms per block and batch beside 55 ms for the block itself; the whole stream takes 3 to 5 % more than plain forwards.

Whenever a caller's code runs, the model is whole; only the current block may be on another device.
"""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import InputError
from lowbit.observe.capture import StopForward, block_arguments, blocks_answering, find_blocks, mapped, moved

_CPU = torch.device("cpu")
HIDDEN = torch.empty(0)  # stands for the hidden states in arguments that are kept


def hidden_states(output: Any) -> Tensor:
    """The hidden states in what a block returned: the tensor itself, or the first item of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


class Block:
    """One decoder block on the stream's device: index, name ("model.layers.3") and module, which may be changed.

    batch is the number of the batch that is being forwarded; dtype that of its arguments, None: the model's own.
    """

    def __init__(self, stream: "BlockStream", index: int) -> None:
        self._stream = stream
        self.index = index
        self.name = f"{stream.name}.{index}"
        self.module = stream.blocks[index]
        self.batch = 0
        self.dtype: torch.dtype | None = None
        self.advanced = False

    @property
    def device(self) -> torch.device:
        """Where the block and its arguments are."""
        return self._stream.device

    @property
    def hidden_device(self) -> torch.device:
        """Where hidden states are kept."""
        return self._stream.hidden_device

    @property
    def batches(self) -> int:
        """How many batches the stream runs."""
        return len(self._stream.batches)

    @property
    def is_last(self) -> bool:
        return self.index + 1 == len(self._stream)

    def input_bytes(self) -> int:
        """About how many bytes the block's hidden states take, all batches together."""
        args, kwargs = self.arguments(0)
        hidden = args[0] if args else kwargs["hidden_states"]
        tokens = sum(batch.numel() for batch in self._stream.batches)
        return hidden.nbytes * tokens // self._stream.batches[0].numel()

    def _batches(self) -> Iterator[int]:
        for batch in range(len(self._stream.batches)):
            self.batch = batch
            yield batch

    def arguments(self, batch: int) -> tuple[tuple, dict[str, Any]]:
        """The positional and keyword arguments of this block for one batch, on the stream's device."""
        assert not self.advanced, f"{self.name} has advanced: its inputs have been replaced by its outputs"
        arguments, dtype = self._stream.arguments(self.index, batch), self.dtype
        if dtype is None:
            return arguments
        return mapped(arguments, lambda part: part.to(dtype) if part.is_floating_point() else part)

    def run(self, on_batch: Callable[[int], None] | None = None) -> None:
        """Forward every batch for the sake of hooks; the outputs are dropped, and a hook may raise StopForward.

        on_batch, if given, is called with the batch's number after each batch.
        """
        for batch in self._batches():
            args, kwargs = self.arguments(batch)
            try:
                with torch.no_grad():
                    self.module(*args, **kwargs)
            except StopForward:
                pass
            if on_batch is not None:
                on_batch(batch)

    def outputs(self) -> Iterator[Tensor]:
        """The output hidden states [b, T, K] of every batch in turn, on the stream's device."""
        for batch in self._batches():
            args, kwargs = self.arguments(batch)
            with torch.no_grad():
                output = self.module(*args, **kwargs)
            yield hidden_states(output)

    def later_blocks_only(self, batch: int) -> AbstractContextManager[None]:
        """Inside, the model's own forward of this batch begins here: the blocks before answer with what they returned.

        A model whose blocks write into mappings that later ones read runs in full.
        """
        return self._stream.without_previous(self.index, batch)

    def advance(self) -> None:
        """Forward every batch and make the outputs the next block's inputs. No other method works afterwards."""
        for batch in self._batches():
            args, kwargs = self.arguments(batch)
            shared = {name: dict(value) for name, value in kwargs.items() if isinstance(value, MutableMapping)}
            with torch.no_grad():
                output = self.module(*args, **kwargs)
            self._stream.store(batch, output, {name: _written(kwargs[name], shared[name]) for name in shared})
        self.advanced = True


def _into(old: Any, new: Any, device: torch.device) -> Any:
    """`new` on `device`, in the memory of `old` where it fits: fresh memory among short-lived tensors leaves holes."""
    if isinstance(old, Tensor) and isinstance(new, Tensor) and (old.shape, old.dtype) == (new.shape, new.dtype):
        return old.copy_(new)
    if type(old) is type(new) is tuple and len(old) == len(new):
        return tuple(_into(*pair, device) for pair in zip(old, new, strict=True))
    return moved(new, device)


def _is_plain(value: Any) -> bool:
    """Whether value is made of nothing but tensors, numbers, words, None, and tuples, lists and plain dicts of them."""
    if type(value) is dict:
        return all(_is_plain(item) for item in value.values())
    if type(value) in (tuple, list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (Tensor, bool, int, float, str))


def _copied(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of what is plain, function applied to its tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _copied(item, function) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_copied(item, function) for item in value)
    return value


def _written(mapping: MutableMapping, before: dict) -> dict:
    """The entries of mapping that a block has put there."""
    return {key: value for key, value in mapping.items() if key not in before or before[key] is not value}


class BlockStream:
    """Iterates over a model's blocks in order; see the module's docstring.

    model is in eval mode; batches are int64 token ids [b, T] on the CPU and may differ in shape. Each block is moved to
    device while it is its turn and back afterwards; hidden states are stored on hidden_device. A block whose advance()
    was not called is advanced when the next one is asked for. Used as a context manager, the stream takes the current
    block home also when an exception ends the loop.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        device: torch.device = _CPU,
        hidden_device: torch.device = _CPU,
    ) -> None:
        if not batches or any(batch.dim() != 2 or batch.dtype != torch.int64 for batch in batches):
            raise InputError("calibration batches must be int64 token ids of shape [b, T], at least one")
        if model.training:
            raise InputError("the model is in training mode, where dropout changes every forward; call model.eval()")
        self.name, self.blocks = find_blocks(model)
        self.batches = batches
        self.device, self.hidden_device = device, hidden_device
        self._model = model
        self._home = next(model.parameters()).device
        self._stored: list[Any] = [None] * len(batches)  # the latest block's output, as it returned it
        self._shared: list[dict[str, dict]] = [{} for _ in batches]  # what blocks wrote into mappings they share
        self._known: dict[tuple[int, int], tuple[tuple, dict[str, Any]]] = {}  # arguments, by block and batch
        self._current: Iterator[Block] | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Block]:
        self._stored = [None] * len(self.batches)
        self._shared = [{} for _ in self.batches]
        self._known = {}
        self._current = self._iterate()
        return self._current

    def __enter__(self) -> "BlockStream":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._current is not None:
            self._current.close()  # type: ignore[attr-defined]

    def _iterate(self) -> Iterator[Block]:
        for index, module in enumerate(self.blocks):
            home = next((p.device for p in module.parameters()), self._home)
            try:
                block = Block(self, index)
                module.to(self.device)
                yield block
                if not block.advanced and index + 1 < len(self):
                    block.advance()
            finally:
                self.blocks[index].to(home)

    def store(self, batch: int, output: Any, written: dict[str, dict]) -> None:
        """Keep a block's output as the next one's input, and what it wrote for later blocks."""
        self._stored[batch] = _into(self._stored[batch], output, self.hidden_device)
        for name, entries in written.items():
            self._shared[batch].setdefault(name, {}).update(moved(entries, self.hidden_device))

    def without_previous(self, index: int, batch: int) -> AbstractContextManager[None]:
        """The model with stand-ins for the blocks before `index`, for the time of the context."""
        if self._shared[batch]:
            return nullcontext()
        previous = moved(self._stored[batch], self.device)
        return blocks_answering(self._model, self.name, index, lambda *_, **__: mapped(previous, Tensor.clone))

    def arguments(self, index: int, batch: int) -> tuple[tuple, dict[str, Any]]:
        """What the model's forward gives block `index` for one batch, on the stream's device."""
        previous = mapped(self._stored[batch], Tensor.clone)  # a copy: a block may change its input in place
        if (known := self._known.get((index, batch))) is not None and isinstance(previous, Tensor):
            return _copied(known, lambda tensor: previous if tensor is HIDDEN else tensor.clone())
        tokens = self.batches[batch].to(self._home)
        args, kwargs = block_arguments(self._model, self.name, index, tokens, previous)
        for name, entries in self._shared[batch].items():
            kwargs[name].update(entries)
        found = moved(args, self.device), moved(kwargs, self.device)
        if isinstance(previous, Tensor):
            self._remember(index, batch, found, previous)
        return found

    def _remember(self, index: int, batch: int, found: tuple[tuple, dict[str, Any]], previous: Tensor) -> None:
        """Keep what block `index` gets beside its hidden states, if it is plain and small: each stage asks for it."""
        if self._known and next(iter(self._known))[0] != index:
            self._known = {}
        sizes: list[int] = []

        def kept(tensor: Tensor) -> Tensor:
            if tensor is previous:
                return HIDDEN
            sizes.append(tensor.nbytes)
            return tensor.clone()

        if _is_plain(found):
            plain = _copied(found, kept)
            if sum(sizes) <= previous.nbytes:
                self._known[index, batch] = plain


def streams_exactly(model: nn.Module, tokens: Tensor) -> bool:
    """Whether the streamed last block's output is bitwise equal to that in the model's own forward. tokens [b, T].

    False for a model whose blocks share state that the stream does not carry. Costs two forwards of tokens.
    """
    stream = BlockStream(model, [tokens], device=next(model.parameters()).device)
    whole: list[Tensor] = []
    handle = stream.blocks[-1].register_forward_hook(lambda _, __, output: whole.append(hidden_states(output)))
    try:
        with torch.no_grad():
            model(input_ids=tokens.to(stream.device), use_cache=False)
    finally:
        handle.remove()
    streamed = next(output for block in stream if block.index + 1 == len(stream) for output in block.outputs())
    return torch.equal(whole[0], streamed)
