"""Input groups and expert inputs. Oracles: the architectures' known wiring; the router's own choice of experts, whose
tokens are picked from the block's hidden states by index."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from architectures import TINY, tiny
from torch import Tensor, nn

from lowbit.observe.blocks import Block, BlockStream
from lowbit.observe.inputs import ExpertInput, expert_inputs, input_groups

TOKENS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
LLAMA = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
LLAMA += [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
PARALLEL = [[*LLAMA[0], *LLAMA[2]], LLAMA[1], LLAMA[3]]
OPT = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.out_proj"], ["fc1"], ["fc2"]]
GROUPS = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "smollm3"], LLAMA),
    **dict.fromkeys(["cohere2", "stablelm"], PARALLEL),
    "opt": OPT,
    "phi3": [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
}
EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3"]


@contextmanager
def _last_block(model: nn.Module) -> Iterator[Block]:
    with BlockStream(model, [TOKENS]) as stream:
        for block in stream:
            if block.index + 1 == len(stream):
                yield block


def _linears(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]


@pytest.mark.parametrize("model_type", GROUPS)
def test_linears_that_read_the_same_tensor_form_a_group(model_type: str) -> None:
    with _last_block(tiny(model_type)) as block:
        found = input_groups(block, _linears(block.module))
    assert found.groups == GROUPS[model_type]
    assert found.idle == []


@pytest.mark.parametrize("model_type", TINY)
def test_members_of_a_group_are_given_equal_inputs(model_type: str) -> None:
    seen: dict[str, Tensor] = {}
    with _last_block(tiny(model_type)) as block:
        names = _linears(block.module)
        found = input_groups(block, names)
        for name in names:
            module = block.module.get_submodule(name)
            module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].clone()))
        block.run()
    assert sorted(name for group in found.groups for name in group) == sorted(names)
    for group in found.groups:
        first = seen[group[0]].flatten(0, -2)
        assert all(torch.equal(seen[name].flatten(0, -2), first) for name in group)


class _Wired(nn.Module):
    """A block in which `first` and `second` read what wire returns; `unused` is never run."""

    def __init__(self, wire: Any) -> None:
        super().__init__()
        self.first, self.second, self.unused = (nn.Linear(8, 8) for _ in range(3))
        self.wire = wire

    def forward(self, hidden: Tensor) -> Tensor:
        return self.wire(self, hidden)


class _FakeBlock:
    """What input_groups uses of a Block."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def arguments(self, batch: int) -> tuple[tuple, dict]:
        return (torch.ones(2, 3, 8),), {}


def _groups_of(wire: Any) -> tuple[list[list[str]], list[str]]:
    block = _FakeBlock(_Wired(wire))
    return input_groups(block, ["first", "second", "unused"])  # type: ignore[arg-type]


def test_views_of_the_same_rows_are_the_same_input() -> None:
    groups, idle = _groups_of(lambda m, x: m.first(x) + m.second(x.view(-1, 8)).view(2, 3, 8))
    assert groups == [["first", "second"], ["unused"]]
    assert idle == ["unused"]


def test_a_tensor_that_was_written_in_between_is_another_input() -> None:
    groups, _ = _groups_of(lambda m, x: m.first(x) + m.second(x.mul_(2)))
    assert groups == [["first"], ["second"], ["unused"]]


def test_equal_values_at_other_addresses_are_another_input() -> None:
    groups, _ = _groups_of(lambda m, x: m.first(x) + m.second(x.clone()))
    assert groups == [["first"], ["second"], ["unused"]]


def test_a_freed_and_reused_address_is_not_mistaken_for_the_same_input() -> None:
    groups, _ = _groups_of(lambda m, x: m.first(x * 2) + m.second(x * 3))
    assert groups == [["first"], ["second"], ["unused"]]


def test_other_rows_of_the_same_memory_are_another_input() -> None:
    groups, _ = _groups_of(lambda m, x: m.first(x[:1]).sum() + m.second(x).sum())
    assert groups == [["first"], ["second"], ["unused"]]


def test_inputs_given_by_keyword_are_seen() -> None:
    groups, _ = _groups_of(lambda m, x: m.first(input=x) + m.second(x))
    assert groups == [["first", "second"], ["unused"]]


def test_a_linear_that_gets_no_rows_is_idle() -> None:
    _, idle = _groups_of(lambda m, x: m.first(x).sum() + m.second(x[:0]).sum())
    assert idle == ["second", "unused"]


def test_hooks_are_gone_also_after_an_exception() -> None:
    def fail(m: nn.Module, x: Tensor) -> Tensor:
        raise ZeroDivisionError

    block = _FakeBlock(_Wired(fail))
    with pytest.raises(ZeroDivisionError):
        input_groups(block, ["first", "second"])  # type: ignore[arg-type]
    assert not any(module._forward_pre_hooks for module in block.module.modules())


def _routed(block: Block, experts: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """(tokens [M, K] that experts are called with, the token numbers routed to each expert) from a plain forward."""
    seen: list[tuple[Tensor, ...]] = []
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    block.run()
    handle.remove()
    hidden, chosen = seen[0][0], seen[0][1]
    hidden = hidden.reshape(-1, hidden.shape[-1])
    count = next(p for p in experts.parameters() if p.dim() == 3).shape[0]
    return hidden, [(chosen == e).any(-1).nonzero().flatten() for e in range(count)]


@pytest.mark.parametrize("model_type", EXPERTS)
def test_each_expert_is_seen_with_exactly_the_tokens_routed_to_it(model_type: str) -> None:
    received: list[ExpertInput] = []
    with _last_block(tiny(model_type)) as block:
        hidden, routed = _routed(block, block.module.mlp.experts)
        with expert_inputs(block.module, received.append):
            block.run()
        parameter = block.module.mlp.experts.gate_up_proj
        first = [seen for seen in received if seen.name == "mlp.experts.gate_up_proj"]
        assert [seen.expert for seen in first] == [e for e, tokens in enumerate(routed) if len(tokens)]
        for seen in first:
            assert seen.x.shape[-1] == parameter.shape[seen.in_axis]
            got = seen.x[seen.x[:, 0].argsort()]
            expected = hidden[routed[seen.expert]]
            assert torch.equal(got, expected[expected[:, 0].argsort()])
        second = [seen for seen in received if seen.name == "mlp.experts.down_proj"]
        assert [(seen.expert, len(seen.x)) for seen in second] == [(seen.expert, len(seen.x)) for seen in first]


@pytest.mark.parametrize("model_type", [*EXPERTS, "granitemoe", "llama4_text"])
def test_in_axis_tells_the_layout_of_the_experts(model_type: str) -> None:
    received: list[ExpertInput] = []
    with _last_block(tiny(model_type)) as block:
        parameters = dict(block.module.named_parameters())
        with expert_inputs(block.module, received.append):
            block.run()
    assert {seen.name.rpartition(".")[2] for seen in received} == {"gate_up_proj", "down_proj"}
    expected_axis = 1 if model_type in ("gpt_oss", "llama4_text") else 2
    for seen in received:
        w = parameters[seen.name]
        assert seen.in_axis == expected_axis
        assert seen.x.shape[1] == w.shape[seen.in_axis]
        assert 0 <= seen.expert < w.shape[0]


def test_the_second_products_inputs_follow_from_the_firsts() -> None:
    received: list[ExpertInput] = []
    with _last_block(tiny("mixtral")) as block:
        w = block.module.mlp.experts.gate_up_proj
        with expert_inputs(block.module, received.append):
            block.run()
    inputs = {(seen.name.rpartition(".")[2], seen.expert): seen.x for seen in received}
    for expert in range(4):
        gate, up = (inputs["gate_up_proj", expert] @ w[expert].T).chunk(2, dim=-1)
        torch.testing.assert_close(inputs["down_proj", expert], nn.functional.silu(gate) * up)


def test_llama4s_experts_see_their_own_tokens_and_zeros() -> None:
    """llama4 gives every expert all rows, those of other experts scaled to zero: their second moment is unharmed."""
    received: list[ExpertInput] = []
    with _last_block(tiny("llama4_text")) as block, expert_inputs(block.module, received.append):
        block.run()
    first = {seen.expert: seen.x for seen in received if seen.name.endswith("gate_up_proj")}
    used = torch.stack([first[e].abs().amax(-1) > 0 for e in sorted(first)])  # [E, M]
    assert used.shape == (4, TOKENS.numel())
    assert (used.sum(0) == 1).all()


@pytest.mark.parametrize("bias", [False, True], ids=["mm", "addmm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_and_product_is_seen(bias: bool, dtype: torch.dtype) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, 5, 4, dtype=dtype))

        def forward(self, x: Tensor) -> Tensor:
            b = torch.ones(5, dtype=dtype) if bias else None
            return nn.functional.linear(x[1:], self.w[2], b).sum() + nn.functional.linear(x[:1], self.w[0], b).sum()

    x, received = torch.arange(12, dtype=dtype).view(3, 4), []
    with torch.no_grad(), expert_inputs(module := Experts(), received.append):
        module(x)
    assert [(seen.name, seen.expert, seen.in_axis) for seen in received] == [("w", 2, 2), ("w", 0, 2)]
    assert torch.equal(received[0].x, x[1:])
    assert torch.equal(received[1].x, x[:1])


def test_what_the_receiver_computes_is_not_observed() -> None:
    module = nn.Module()
    module.w = nn.Parameter(torch.ones(2, 4, 4))
    received: list[ExpertInput] = []

    def receive(seen: ExpertInput) -> None:
        received.append(seen)
        _ = seen.x @ module.w[1]

    with torch.no_grad(), expert_inputs(module, receive):
        _ = torch.ones(3, 4) @ module.w[0]
    assert [seen.expert for seen in received] == [0]


def test_transformers_experts_get_their_implementation_back() -> None:
    model = tiny("mixtral")
    model.config._experts_implementation = before = "grouped_mm"
    block = model.model.layers[0]

    def fail() -> None:
        with expert_inputs(block, lambda seen: None):
            assert model.config._experts_implementation == "eager"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model.config._experts_implementation == before


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_the_experts_outputs_do_not_change_while_they_are_observed(implementation: str) -> None:
    model = tiny("qwen3_moe")
    model.config._experts_implementation = implementation
    with _last_block(model) as block:
        plain = next(block.outputs())
        received: list[ExpertInput] = []
        with expert_inputs(block.module, received.append):
            observed = next(block.outputs())
    assert received
    torch.testing.assert_close(observed, plain, rtol=1e-5, atol=1e-5)  # other orders of the same float32 sums
