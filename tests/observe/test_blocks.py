"""Block streaming and capture. Oracle: hooks in the model's own forward; everything is compared bitwise."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import TINY, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.errors import InputError
from lowbit.observe.blocks import BlockStream, hidden_states, streams_exactly
from lowbit.observe.capture import StopForward, find_blocks

by_architecture = pytest.mark.parametrize("build", TINY.values(), ids=TINY)


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 128, shape, generator=generator) for shape in ((2, 24), (1, 9))]


def _inputs_in_forward(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """The hidden states that each block is given in the model's own forward."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in find_blocks(model)[1]]
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def _hidden(arguments: tuple[tuple, dict[str, Any]]) -> Tensor:
    args, kwargs = arguments
    return args[0] if args else kwargs["hidden_states"]


def test_there_are_at_least_twelve_architectures() -> None:
    assert len(TINY) >= 12


@by_architecture
def test_streamed_blocks_are_bit_exact_with_the_full_forward(build: Callable[[], PreTrainedModel]) -> None:
    model, batches = build(), _batches()
    expected = [_inputs_in_forward(model, tokens) for tokens in batches]
    with BlockStream(model, batches) as stream:
        for block in stream:
            for batch in range(len(batches)):
                assert torch.equal(_hidden(block.arguments(batch)), expected[batch][block.index])
    assert streams_exactly(model, batches[0])


@by_architecture
def test_arguments_that_are_remembered_are_those_that_the_model_gives(build: Callable[[], PreTrainedModel]) -> None:
    model, batches = build(), _batches()
    with BlockStream(model, batches) as asked, BlockStream(model, batches) as remembering:
        remembering.remembers = True
        for plain, block in zip(asked, remembering, strict=True):
            for batch in (0, 1, 0, 1):
                _hidden(block.arguments(batch)).zero_()  # a block may write into what it is given
            for batch in range(len(batches)):
                with torch.no_grad():
                    (args, kwargs), (again, named) = plain.arguments(batch), block.arguments(batch)
                    expected = hidden_states(plain.module(*args, **kwargs))
                    assert torch.equal(hidden_states(block.module(*again, **named)), expected)
                assert kwargs.keys() == named.keys()


def test_a_block_of_a_plain_model_asks_the_model_once_for_each_batch() -> None:
    model, batches = tiny("llama"), _batches()
    stream = BlockStream(model, batches)
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    for block in stream:
        for batch in (0, 1, 0, 1):
            block.arguments(batch)
        if block.index == 1:
            break
        block.advance()
        calls.clear()
    handle.remove()
    assert len(calls) == 2


@by_architecture
def test_changing_a_block_changes_what_later_blocks_are_given(build: Callable[[], PreTrainedModel]) -> None:
    model, batches = build(), _batches()
    before = [_inputs_in_forward(model, tokens) for tokens in batches]
    given: list[list[Tensor]] = []
    with BlockStream(model, batches) as stream:
        for block in stream:
            given.append([_hidden(block.arguments(batch)) for batch in range(len(batches))])
            with torch.no_grad():
                for parameter in block.module.parameters():
                    parameter.mul_(1.25)
    for batch, tokens in enumerate(batches):
        after = _inputs_in_forward(model, tokens)
        assert torch.equal(given[0][batch], before[batch][0])
        assert not torch.equal(after[1], before[batch][1])
        assert all(torch.equal(given[i][batch], after[i]) for i in range(len(stream)))


def test_a_replaced_linear_counts_from_the_next_block_on() -> None:
    model, batches = tiny("llama"), _batches()
    with BlockStream(model, batches) as stream:
        blocks = iter(stream)
        torch.manual_seed(1)
        next(blocks).module.mlp.down_proj = nn.Linear(96, 64)
        given = _hidden(next(blocks).arguments(0))
    assert torch.equal(given, _inputs_in_forward(model, batches[0])[1])


def test_outputs_are_the_next_blocks_inputs() -> None:
    model, batches = tiny("gpt2"), _batches()
    with BlockStream(model, batches) as stream:
        blocks = iter(stream)
        outputs = list(next(blocks).outputs())
        second = next(blocks)
        assert all(torch.equal(outputs[i], _hidden(second.arguments(i))) for i in range(len(batches)))


def test_run_reaches_hooks_and_goes_on_after_stop_forward() -> None:
    model, batches = tiny("llama"), _batches()
    seen: list[torch.Size] = []
    numbers: list[int] = []

    def stop(_: nn.Module, args: tuple) -> None:
        seen.append(args[0].shape)
        raise StopForward

    with BlockStream(model, batches) as stream:
        block = next(iter(stream))
        block.module.mlp.down_proj.register_forward_pre_hook(stop)
        block.run(numbers.append)
    assert seen == [(2, 24, 96), (1, 9, 96)]
    assert numbers == [0, 1]


def test_a_block_that_has_advanced_gives_no_more_arguments() -> None:
    with BlockStream(tiny("llama"), _batches()) as stream:
        block = next(iter(stream))
        block.advance()
        with pytest.raises(AssertionError, match=r"model.layers.0 has advanced"):
            block.arguments(0)


def test_a_stream_starts_over_when_it_is_iterated_again() -> None:
    model, batches = tiny("qwen3"), _batches()
    stream = BlockStream(model, batches)
    first = [_hidden(block.arguments(0)) for block in stream]
    second = [_hidden(block.arguments(0)) for block in stream]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class _InterruptedError(RuntimeError):
    pass


def test_the_model_is_whole_after_an_exception_in_its_forward() -> None:
    model, batches = tiny("llama"), _batches()
    blocks, expected = list(model.model.layers), _inputs_in_forward(model, batches[0])

    def fail(*_: Any) -> None:
        raise _InterruptedError

    handle = model.model.embed_tokens.register_forward_hook(fail)
    with BlockStream(model, batches) as stream:
        block = next(iter(stream))
        with pytest.raises(_InterruptedError):
            block.arguments(0)
    handle.remove()
    assert list(model.model.layers) == blocks
    again = _inputs_in_forward(model, batches[0])
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_an_exception_in_a_block_leaves_its_inputs_as_they_were() -> None:
    model, batches = tiny("llama"), _batches()
    expected = _inputs_in_forward(model, batches[1])[1]

    def fail(*_: Any) -> None:
        raise _InterruptedError

    with BlockStream(model, batches) as stream:
        blocks = iter(stream)
        next(blocks)
        block = next(blocks)
        handle = block.module.mlp.register_forward_hook(fail)
        with pytest.raises(_InterruptedError):
            block.run()
        handle.remove()
        assert torch.equal(_hidden(block.arguments(1)), expected)


def test_a_block_that_writes_into_its_input_does_not_harm_the_next_look() -> None:
    model, batches = tiny("llama"), _batches()
    with BlockStream(model, batches) as stream:
        blocks = iter(stream)
        next(blocks)
        block = next(blocks)
        before = _hidden(block.arguments(0)).clone()
        _hidden(block.arguments(0)).zero_()
        assert torch.equal(_hidden(block.arguments(0)), before)


def test_the_current_block_goes_home_when_the_loop_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    moves: list[Any] = []
    monkeypatch.setattr(type(model.model.layers[0]), "to", lambda self, device: moves.append((id(self), device)))
    there = torch.device("cpu", 0)

    def leave() -> None:
        with BlockStream(model, _batches(), device=there) as stream:
            for _ in stream:
                raise _InterruptedError

    with pytest.raises(_InterruptedError):
        leave()
    first = id(model.model.layers[0])
    assert moves == [(first, there), (first, torch.device("cpu"))]


def test_state_that_the_stream_does_not_carry_is_noticed() -> None:
    model = tiny("llama")

    def spoil(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        kwargs["position_embeddings"][0].mul_(0.5)

    model.model.layers[0].register_forward_pre_hook(spoil, with_kwargs=True)
    assert not streams_exactly(model, _batches()[0])


@pytest.mark.parametrize(
    "batches",
    [[], [torch.zeros(4, dtype=torch.int64)], [torch.zeros(1, 4, dtype=torch.int32)], [torch.zeros(1, 4)]],
    ids=["none", "1-d", "int32", "float"],
)
def test_batches_that_are_no_token_ids_are_refused(batches: list[Tensor]) -> None:
    with pytest.raises(InputError, match=r"int64 token ids of shape \[b, T\]"):
        BlockStream(tiny("llama"), batches)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(InputError, match=r"call model.eval\(\)"):
        BlockStream(tiny("llama").train(), _batches())


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(InputError, match=r"Linear has no nn\.ModuleList"):
        find_blocks(nn.Linear(2, 2))


def test_the_decoders_list_is_found_among_others() -> None:
    model = tiny("llama")
    model.model.towers = nn.ModuleList(nn.Linear(300, 300) for _ in range(5))  # larger, but not as deep as the config
    assert find_blocks(model)[0] == "model.layers"


def test_hidden_states_come_from_tensors_and_tuples() -> None:
    x = torch.zeros(2)
    assert hidden_states(x) is x
    assert hidden_states((x, None)) is x
