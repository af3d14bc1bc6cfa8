"""Observe a block twice in lockstep: on what the original model gives it, and on what the quantized model gives it.

Two streams walk the same model. The clean one keeps the original hidden states and runs a copy of each block, taken
before it is quantized; the noisy one runs the block itself. For each input of a linear the moments of the noisy x~ and
of the difference x - x~ are collected. Of linears that write to the residual stream those of the difference there are
collected as well or, where that says enough, those of the wanted output alone (algorithms/correction.py).

Which linears do is found numerically, in one forward of the block: with h the block's input and y a linear's output,
h + y is the input of another module or the block's output; or the block's output less y is another module's input.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowbit.observe.blocks import Block, BlockStream, hidden_states
from lowbit.observe.capture import StopForward
from lowbit.observe.endings import Ending, Replays, replaying

BLOCK_INPUT = ""  # the name that stands for the block's own input in `residual_sources`
ROWS = 256  # tokens that tell which linears write to the residual stream


class Seen(NamedTuple):
    """x [..., K], the input of a linear; r [..., N], the residual stream that its output is added to, if any; and its
    output y [..., N], where it was asked for."""

    x: Tensor
    residual: Tensor | None
    y: Tensor | None = None


Receive = Callable[[str, int, Seen, Seen], None]
"""Called with a linear's name, the batch, what it sees in the original, and what it sees in the quantized model."""


class Twin:
    """One block in both streams. `noisy.module` may be changed; the clean block runs a copy of it."""

    def __init__(self, noisy: Block, clean: Block) -> None:
        self.noisy, self.clean = noisy, clean
        clean.module = copy.deepcopy(noisy.module)
        self.sources: dict[str, str] = {}  # what residual_sources found, where the recipe asks for it
        self._replays: tuple[tuple[Block, Replays], ...] = ()

    @contextmanager
    def replaying(self, endings: Sequence[Ending]) -> Iterator[None]:
        """Inside, `settle` may shorten both streams' forwards by these endings of the block (observe/endings.py)."""
        # a module that holds the input of a sum has to run in full
        kept = [e for e in endings if not any(source.startswith(f"{e.module}.") for source in self.sources.values())]
        with replaying(self.noisy, kept) as noisy, replaying(self.clean, kept) as clean:
            self._replays = (self.noisy, noisy), (self.clean, clean)
            yield
        self._replays = ()

    def settle(self, name: str) -> None:
        """The linear `name` has its final weight in both blocks."""
        for _, replays in self._replays:
            replays.settle(name)

    def observe(
        self, leads: Sequence[str], receive: Receive, final: Sequence[str] = (), outputs: Sequence[str] = ()
    ) -> None:
        """Call receive(name, batch, clean, noisy) for each of these linears, in order of execution, and each batch.

        final: linears that read what the last of the leads reads, which won't change any more. outputs: leads whose
        outputs are wanted too, in the original.
        """
        for batch in range(self.noisy.batches):
            self.noisy.batch = self.clean.batch = batch
            clean = _captured(self.clean, batch, leads, self.sources, outputs)
            noisy = _captured(self.noisy, batch, leads, self.sources)
            for block, replays in self._replays if leads[-1] in clean and leads[-1] in noisy else ():
                seen = (noisy if block is self.noisy else clean)[leads[-1]]
                for name in final:
                    replays.keep(name, seen.x, seen.y if name == leads[-1] else None)
            for name in leads:
                if name in clean and name in noisy:
                    receive(name, batch, clean[name], noisy[name])


def _captured(
    block: Block, batch: int, leads: Sequence[str], sources: dict[str, str], outputs: Sequence[str] = ()
) -> dict[str, Seen]:
    """What each of the leads sees, and those in `outputs` answer, from one forward that ends at the last of them."""
    args, kwargs = block.arguments(batch)
    inputs: dict[str, Tensor] = {BLOCK_INPUT: hidden_input(args, kwargs)}
    written: dict[str, Tensor] = {}
    wanted = dict.fromkeys([*leads, *(sources[name] for name in leads if sources.get(name))])
    with ExitStack() as hooks:
        for name in wanted:
            hook = _keep(inputs, name, ends=name == leads[-1] and name not in outputs)
            module = block.module.get_submodule(name)
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for name in outputs:
            answer = _keep_output(written, name, ends=name == leads[-1])
            hooks.callback(block.module.get_submodule(name).register_forward_hook(answer).remove)
        try:
            with torch.no_grad():
                block.module(*args, **kwargs)
        except StopForward:
            pass
    residual = {name: inputs.get(sources[name]) if name in sources else None for name in leads}
    return {name: Seen(inputs[name], residual[name], written.get(name)) for name in leads if name in inputs}


def _keep(inputs: dict[str, Tensor], name: str, ends: bool) -> Callable[[nn.Module, tuple, dict[str, Any]], None]:
    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs[name] = hidden_input(args, kwargs).clone()
        if ends:
            raise StopForward

    return hook


def hidden_input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The first tensor among a module's arguments."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


@contextmanager
def watching_sources(block: Block, linears: Sequence[str]) -> Iterator[dict[str, str]]:
    """Fills the mapping, at the end: linear -> module whose input is the residual stream that the linear's output is
    added to (BLOCK_INPUT: h).

    Inside, the block's forward runs once, for whatever reason. Linears that do not write to the residual stream are
    left out; see the module's docstring.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, module in block.module.named_modules():
            if not name or not any(module.children()):
                hook = _keep_rows(inputs, name)
                hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for name in ("", *linears):
            hook_output = _keep_output_rows(outputs, name)
            hooks.callback(block.module.get_submodule(name).register_forward_hook(hook_output).remove)
        found: dict[str, str] = {}
        yield found
    h, result = inputs.pop(BLOCK_INPUT), outputs.pop(BLOCK_INPUT)
    tried = [
        (name, source, pair, y)
        for name, y in outputs.items()
        if y.shape == h.shape
        for source, pair in _sums(h, y, result, inputs)
        if pair[0].shape == pair[1].shape
    ]
    if tried:
        same = torch.stack([_same(*pair, y) for _, _, pair, y in tried]).tolist()  # one wait for all
        for (name, source, _, _), fits in zip(tried, same, strict=True):
            if fits:
                found.setdefault(name, source)


@torch.no_grad()
def residual_sources(block: Block, linears: Sequence[str]) -> dict[str, str]:
    """What `watching_sources` finds in one forward of the first batch."""
    args, kwargs = block.arguments(0)
    with watching_sources(block, linears) as found:
        block.module(*args, **kwargs)
    return found


def _keep_rows(inputs: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple, dict[str, Any]], None]:
    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs[name] = _rows(hidden_input(args, kwargs)).clone()  # a copy: what is read may change in place

    return hook


def _keep_output_rows(outputs: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple, Any], None]:
    def hook(_: nn.Module, __: tuple, output: Any) -> None:
        outputs[name] = _rows(hidden_states(output)).clone()

    return hook


def _keep_output(outputs: dict[str, Tensor], name: str, ends: bool) -> Callable[[nn.Module, tuple, Tensor], None]:
    def hook(_: nn.Module, args: tuple, output: Tensor) -> None:
        outputs[name] = output if ends else output.clone()
        if ends:
            raise StopForward

    return hook


def _sums(
    h: Tensor, y: Tensor, result: Tensor, inputs: dict[str, Tensor]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Each module whose input may be the stream that y is added to, with two tensors that are equal where it is."""
    for candidate in (*inputs.values(), result):
        if candidate.shape == h.shape:
            yield BLOCK_INPUT, (h + y, candidate)
    yield from ((name, (x, result - y)) for name, x in inputs.items())


def _rows(x: Tensor) -> Tensor:
    """The first tokens of x: [b, T, K] -> [ROWS, K]; some blocks (OPT) join batch and tokens halfway."""
    return x.reshape(-1, x.shape[-1])[:ROWS]


def _same(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Whether a and b differ by less than a twentieth of y on average, by the rounding of a sum with y that is; 0-d."""
    return (a - b).float().abs().mean() <= 0.05 * y.float().abs().mean()


def twins(
    noisy: BlockStream, clean: BlockStream, prepare: Callable[[Block], None] = lambda block: None
) -> Iterator[Twin]:
    """The blocks of two streams over one model, side by side, each after `prepare` was called with the noisy one."""
    for left, right in zip(noisy, clean, strict=True):
        prepare(left)
        yield Twin(left, right)
        if right.index + 1 < len(clean) and not right.advanced:
            right.advance()
