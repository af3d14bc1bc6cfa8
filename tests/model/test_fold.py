"""Folding and smoothing. Oracles: the writers, written down by hand from the architectures' definitions; the block's
own output; the product with both factors rounded, computed here again."""

import copy
from itertools import product
from pathlib import Path

import pytest
import torch
from architectures import tiny
from checkpoints import TOKENS, quantize_in_memory, selection_of, write_quantized
from torch import nn

import lowbit
from lowbit.algorithms.smooth import choose_smoothing
from lowbit.errors import InputError, SchemeError
from lowbit.model.fold import Writer, find_writer, fold, representable
from lowbit.model.recipe import Recipe
from lowbit.model.smooth import smooth_block
from lowbit.model.smooth_experts import smooth_experts
from lowbit.numerics.affine import quantize_dequantize
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.blocks import Block, BlockStream
from lowbit.observe.inputs import input_groups

QKV, GATE_UP = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]
W8A8 = QuantScheme.parse("w8a8")


def _block(model_type: str) -> Block:
    return next(iter(BlockStream(tiny(model_type), [TOKENS])))


def _linears(block: Block) -> list[str]:
    return [name for name, module in block.module.named_modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize(
    ("model_type", "readers", "writer"),
    [
        ("llama", QKV, Writer("input_layernorm", "scale")),
        ("llama", GATE_UP, Writer("post_attention_layernorm", "scale")),
        ("llama", ["mlp.down_proj"], Writer("mlp.up_proj", "rows")),
        ("gemma2", QKV, Writer("input_layernorm", "one plus")),
        ("gemma2", GATE_UP, Writer("pre_feedforward_layernorm", "one plus")),
        ("olmo2", QKV, None),  # no norm stands before it
        ("llama", QKV[:2], None),  # v reads the norm too
        ("gpt_neox", ["attention.query_key_value"], Writer("input_layernorm", "scale")),
        ("phi3", ["self_attn.qkv_proj"], Writer("input_layernorm", "scale")),
        ("phi3", ["mlp.gate_up_proj"], Writer("post_attention_layernorm", "scale")),
        ("phi3", ["mlp.down_proj"], Writer("mlp.gate_up_proj", "rows", 96)),  # up stands behind gate
        ("cohere2", [*QKV, *GATE_UP], Writer("input_layernorm", "scale")),  # a parallel block has one norm
        ("cohere2", GATE_UP, None),
        ("deepseek_v3", ["self_attn.q_b_proj"], Writer("self_attn.q_a_layernorm", "scale")),
        ("mixtral", ["mlp.experts.gate_up_proj"], None),  # the router reads the norm too
        ("mixtral", ["mlp.experts.gate_up_proj", "mlp.gate.weight"], Writer("post_attention_layernorm", "scale")),
    ],
)
def test_the_writer_of_an_input_is_found(model_type: str, readers: list[str], writer: Writer | None) -> None:
    block = _block(model_type)
    before = {name: tensor.clone() for name, tensor in block.module.state_dict().items()}
    assert find_writer(block, readers, _linears(block)) == writer
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.module.state_dict().items())


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3", "mixtral"])
def test_writers_are_found_in_16_bits_and_no_bit_is_changed_by_looking(model_type: str) -> None:
    """On a GPU models stand in the checkpoint's dtype, where a fold alone moves the output by 6e-3."""
    model = tiny(model_type).bfloat16()
    block = next(iter(BlockStream(model, [TOKENS])))
    readers = ["self_attn.qkv_proj"] if model_type == "phi3" else QKV
    before = {name: tensor.clone() for name, tensor in block.module.state_dict().items()}
    kind = "one plus" if model_type == "gemma2" else "scale"
    assert find_writer(block, readers, _linears(block)) == Writer("input_layernorm", kind)
    assert find_writer(block, readers[:1], _linears(block)) == (Writer("input_layernorm", kind) if len(readers) == 1
                                                                else None)  # fmt: skip
    after = block.module.state_dict()
    assert all(after[name].dtype == torch.bfloat16 and torch.equal(after[name], old) for name, old in before.items())


@pytest.mark.parametrize("text", ["awq:w4a16-g16", "smooth:w8a8"])
def test_models_in_16_bits_are_smoothed(text: str) -> None:
    original = tiny("llama").bfloat16()
    model = copy.deepcopy(original)
    log = quantize_in_memory(model, Recipe.parse(text), torch.bfloat16)
    with torch.no_grad():
        wanted, logits = (m(input_ids=TOKENS).logits.float() for m in (original, model))
    assert (logits - wanted).norm() < 0.4 * wanted.norm()
    assert sum("norm" in name for name in log.rewritten) == 6


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_neox"])
def test_smoothing_keeps_what_the_block_computes(model_type: str) -> None:
    block = _block(model_type)
    groups = {"gpt_neox": [["attention.query_key_value"], ["mlp.dense_h_to_4h"]]}.get(
        model_type, [QKV, GATE_UP, ["mlp.down_proj"]]
    )
    weights = {name: block.module.get_submodule(name).weight.clone() for group in groups for name in group}
    with torch.no_grad():
        block.module.get_submodule(groups[0][0]).weight[:, 3] *= 30  # something to smooth
        before = next(iter(block.outputs()))
        schemes = {name: W8A8 for group in groups for name in group}
        rewritten = smooth_block(block, groups, schemes, torch.float32)
        after = next(iter(block.outputs()))
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-4)
    assert rewritten
    assert any(not torch.equal(block.module.get_submodule(name).weight, w) for name, w in weights.items())


@pytest.mark.parametrize("text", ["w8a8", "w4a8-g16", "w4a16-g16-asym"])
def test_the_chosen_scales_lose_less_than_none(text: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scheme = QuantScheme.parse(text)
    x = torch.randn(200, 64, generator=generator)
    x[:, 5] *= 60
    w = torch.randn(32, 64, generator=generator)
    scales = choose_smoothing(x, w, scheme, torch.float32)

    def loss(s: torch.Tensor) -> float:
        left = x / s if scheme.activations is None else quantize_dequantize(x / s, scheme.activations)
        return (left @ quantize_dequantize(w * s, scheme.weights).T - x @ w.T).square().mean().item()

    assert scales[5] == scales.max() > 1
    assert loss(scales) < 0.8 * loss(torch.ones(64))


@pytest.mark.parametrize("kind", ["scale", "one plus"])
def test_representable_scales_leave_nothing_to_round_in_the_stored_norm(kind: str) -> None:
    block = _block("llama")
    writer, wanted = Writer("input_layernorm", kind), torch.linspace(0.5, 2, 64)
    norm = block.module.get_submodule("input_layernorm").weight
    with torch.no_grad():
        norm.copy_(torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16())
        norm[7] = 0 if kind == "scale" else -1
    scales = representable(block.module, writer, wanted, torch.bfloat16)
    assert scales[7] == 1  # no gain, nothing to divide
    usual = (norm.abs() > 0.1) & (torch.arange(64) != 7)
    assert torch.allclose(scales[usual], wanted[usual], rtol=0.1)
    fold(block.module, writer, QKV, scales)
    assert torch.allclose(norm, norm.bfloat16().float(), atol=1e-6)


SMOOTHED = [
    *product(["llama", "gemma2"], ["smooth:w8a8", "smooth:w8a8-static", "smooth:w4a8-g16", "awq:w4a16-g16-asym"]),
    *product(["mixtral"], ["smooth:w8a8", "smooth:w4a8-g16", "awq:w4a16-g16"]),  # experts: dynamic and symmetric
]


@pytest.mark.parametrize(("model_type", "text"), SMOOTHED)
def test_smoothed_models_stay_near_their_originals(model_type: str, text: str) -> None:
    original = tiny(model_type)
    model = copy.deepcopy(original)
    log = quantize_in_memory(model, Recipe.parse(text))
    with torch.no_grad():
        wanted, logits = (m(input_ids=TOKENS).logits for m in (original, model))
    assert (logits - wanted).norm() < 0.4 * wanted.norm()
    assert log.rewritten
    assert all("norm" in name or name.endswith(".mlp.gate.weight") for name in log.rewritten)


MOE = {  # what is rewritten beside the norms of attention, in block 2
    "mixtral": {"mlp.gate.weight", "post_attention_layernorm.weight"},
    "qwen2_moe": {"mlp.gate.weight", "mlp.shared_expert_gate.weight", "post_attention_layernorm.weight"},
    "qwen3_moe": {"mlp.gate.weight", "post_attention_layernorm.weight"},
    "deepseek_v3": {"mlp.gate.weight", "post_attention_layernorm.weight"},
}


@pytest.mark.parametrize("model_type", MOE)
def test_a_mixtures_norm_is_folded_into_its_router_and_all_of_its_experts(model_type: str) -> None:
    model = tiny(model_type)
    block = next(block for block in BlockStream(model, [TOKENS]) if block.index == 2)
    recipe = Recipe.parse("awq:w3a16-g16")
    chosen = selection_of(model, recipe).schemes
    schemes = {n.removeprefix(f"{block.name}."): s for n, s in chosen.items() if n.startswith(f"{block.name}.")}
    linears = [name for name in schemes if name not in dict(block.module.named_parameters())]
    norm = block.module.get_submodule("post_attention_layernorm").weight
    with torch.no_grad():
        norm[3] *= 20  # something to smooth
        before = next(iter(block.outputs()))
        rewritten = smooth_block(block, input_groups(block, linears).groups, schemes, torch.float32)
        assert (next(iter(block.outputs())) - before).norm() < 1e-3 * before.norm()
    assert {name for name in rewritten if "self_attn" not in name and "input_layernorm" not in name} == MOE[model_type]


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_each_expert_smooths_what_its_second_matrix_reads(model_type: str) -> None:
    block = next(block for block in BlockStream(tiny(model_type), [TOKENS]) if block.index == 2)
    first, second = (block.module.get_parameter(f"mlp.experts.{name}") for name in ("gate_up_proj", "down_proj"))
    width = second.shape[2]
    scheme = QuantScheme.parse("w3a16-g16")
    with torch.no_grad():
        first[1, width + 5] *= 40  # a large channel of expert 1's up
        before, old = next(iter(block.outputs())), (first.clone(), second.clone())
        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        smooth_experts(block, names, dict.fromkeys(names, scheme), torch.float32)
        assert (next(iter(block.outputs())) - before).norm() < 1e-4 * before.norm()
    scales = second[:, 0] / old[1][:, 0]  # [E, K]
    assert scales[1, 5] == scales[1].max() > 1.5
    assert torch.allclose(second, old[1] * scales[:, None, :], rtol=1e-4)
    assert torch.allclose(first[:, width:], old[0][:, width:] / scales[:, :, None], rtol=1e-4)
    assert torch.equal(first[:, :width], old[0][:, :width])  # gate
    assert not torch.allclose(scales[0], scales[1])


def test_a_smoothed_mixture_is_written_with_its_router(tmp_path: Path) -> None:
    written = write_quantized(tmp_path, "mixtral", "awq:w4a16-g16")
    loaded = lowbit.load(written.out, torch.float32)
    with torch.no_grad():
        wanted, found = (m(input_ids=TOKENS).logits.float() for m in (written.model, loaded))
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_methods_that_do_not_apply_are_refused() -> None:
    with pytest.raises(SchemeError, match="use --method awq"):
        Recipe.parse("smooth:w4a16-g64")
    with pytest.raises(SchemeError, match="use --method smooth"):
        Recipe.parse("awq:w8a8")
    with pytest.raises(InputError, match=r"found no norm in Olmo2ForCausalLM .* use --method aligned"):
        quantize_in_memory(tiny("olmo2"), Recipe.parse("awq:w4a16-g16"))
