"""Endings: what a stand-in answers is bitwise what the module would have computed. Oracle: the module itself."""

import pytest
import torch
from architectures import TINY
from torch import nn

from lowbit.observe import endings
from lowbit.observe.blocks import Block, BlockStream
from lowbit.observe.endings import Ending, Replays, replaying, watching_endings

TOKENS = [torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(i)) for i in range(3)]
EXPECTED = {
    "llama": [Ending("self_attn", "self_attn.o_proj", 1), Ending("mlp", "mlp.down_proj", None)],
    "mixtral": [Ending("self_attn", "self_attn.o_proj", 1)],
    "gpt_neox": [Ending("attention", "attention.dense", 1), Ending("mlp", "mlp.dense_4h_to_h", None)],
}


def _linears(block: Block) -> list[str]:
    return [name for name, module in block.module.named_modules() if isinstance(module, nn.Linear)]


@torch.no_grad()
def find_endings(block: Block, names: list[str]) -> list[Ending]:
    with watching_endings(block, names) as found:
        args, kwargs = block.arguments(0)
        block.module(*args, **kwargs)
    return found


def _keep_inputs(block: Block, replays: Replays, name: str) -> None:
    linear = block.module.get_submodule(name)
    handle = linear.register_forward_pre_hook(lambda _, args: replays.keep(name, args[0]))
    block.run()
    handle.remove()


@pytest.mark.parametrize("model_type", EXPECTED)
def test_attention_and_mlp_end_in_their_projections(model_type: str) -> None:
    block = next(iter(BlockStream(TINY[model_type](), TOKENS)))
    assert find_endings(block, _linears(block)) == EXPECTED[model_type]


@pytest.mark.parametrize("model_type", TINY)
def test_outputs_with_settled_modules_are_bitwise_the_same(model_type: str) -> None:
    """Every block of every architecture, everything settled that can be; the block is whole again afterwards."""
    for block in BlockStream(TINY[model_type](), TOKENS):
        linears, modules = _linears(block), dict(block.module.named_children())
        wanted = [output.clone() for output in block.outputs()]
        endings = find_endings(block, linears)
        with replaying(block, endings) as replays:
            for ending in endings:
                _keep_inputs(block, replays, ending.linear)
                replays.settle(ending.linear)
            assert all(torch.equal(x, y) for x, y in zip(block.outputs(), wanted, strict=True))
        assert dict(block.module.named_children()) == modules


def test_nothing_of_a_settled_module_runs_any_more() -> None:
    block = next(iter(BlockStream(TINY["llama"](), TOKENS)))
    with replaying(block, find_endings(block, ["self_attn.o_proj"])) as replays:
        attention = block.module.self_attn
        _keep_inputs(block, replays, "self_attn.o_proj")
        replays.settle("self_attn.o_proj")
        ran: list[str] = []
        attention.q_proj.register_forward_hook(lambda *_: ran.append("q_proj"))
        attention.o_proj.register_forward_hook(lambda *_: ran.append("o_proj"))
        list(block.outputs())
        assert ran == []
    list(block.outputs())
    assert ran == ["q_proj", "o_proj"] * len(TOKENS)


def test_memory_for_what_is_kept_is_limited_and_the_rest_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three inputs of 64 channels make room for two of the MLP's inner 96."""
    monkeypatch.setattr(endings, "_SHARE", 1)
    block = next(iter(BlockStream(TINY["llama"](), TOKENS)))
    wanted = [output.clone() for output in block.outputs()]
    with replaying(block, find_endings(block, _linears(block))) as replays:
        ran: list[int] = []
        block.module.mlp.gate_proj.register_forward_hook(lambda *_: ran.append(block.batch))
        _keep_inputs(block, replays, "mlp.down_proj")
        replays.settle("mlp.down_proj")
        ran.clear()
        assert all(torch.equal(x, y) for x, y in zip(block.outputs(), wanted, strict=True))
    assert ran == [2]


def test_a_changed_last_linear_changes_the_answer() -> None:
    block = next(iter(BlockStream(TINY["llama"](), TOKENS)))
    with replaying(block, find_endings(block, ["self_attn.o_proj"])) as replays:
        _keep_inputs(block, replays, "self_attn.o_proj")
        replacement = nn.Linear(64, 64, bias=False)
        block.module.self_attn.o_proj = replacement
        wanted = [output.clone() for output in block.outputs()]
        replays.settle("self_attn.o_proj")
        assert all(torch.equal(x, y) for x, y in zip(block.outputs(), wanted, strict=True))
