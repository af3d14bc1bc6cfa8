"""Observation of the original beside the quantized model. Oracles: the architecture's own order of sums, written down
by hand below; and moments over activations that hooks collect from the two whole models."""

import copy
import dataclasses
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from architectures import tiny
from checkpoints import TOKENS, quantize_in_memory
from torch import Tensor, nn

from lowbit.algorithms.correction import Correction
from lowbit.algorithms.gptaq import solve_gptaq, solve_qronos
from lowbit.algorithms.gptq import solve_gptq
from lowbit.algorithms.solution import Solution
from lowbit.model import quantize
from lowbit.model.aligned import BLOCK_INPUT, residual_sources, twins
from lowbit.model.recipe import Recipe
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.blocks import BlockStream

SOURCES = {
    "llama": {"self_attn.o_proj": BLOCK_INPUT, "mlp.down_proj": "post_attention_layernorm"},
    "qwen3": {"self_attn.o_proj": BLOCK_INPUT, "mlp.down_proj": "post_attention_layernorm"},
    "phi3": {"self_attn.o_proj": BLOCK_INPUT, "mlp.down_proj": "post_attention_layernorm"},
    "opt": {"self_attn.out_proj": BLOCK_INPUT},  # as in OPT-350m, whose norms stand after the sums
    "gemma2": {},  # its outputs are normalized before they are added
    "olmo2": {},
    "gpt_neox": {},  # both of its branches are added at once
}


def _linears(block: nn.Module) -> list[str]:
    return [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("model_type", SOURCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_linears_that_write_to_the_residual_stream_are_found(model_type: str, dtype: torch.dtype) -> None:
    stream = BlockStream(tiny(model_type).to(dtype), [TOKENS])
    block = next(iter(stream))
    assert residual_sources(block, _linears(block.module)) == SOURCES[model_type]


def _inputs(model: nn.Module, name: str) -> Tensor:
    """What the module called name reads in a forward of TOKENS."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    handle.remove()
    return seen[0]


def test_the_twin_sees_both_models_inputs_and_residual_streams() -> None:
    original = tiny("llama")
    model, quantized_first = copy.deepcopy(original), copy.deepcopy(original)
    found: dict[str, tuple] = {}
    with torch.no_grad():
        for linear in (m.model.layers[0].mlp.down_proj for m in (model, quantized_first)):
            linear.weight.mul_(0.9)  # stands for a quantized first block
    noisy, clean = BlockStream(model, [TOKENS[:2], TOKENS[2:]]), BlockStream(original, [TOKENS[:2], TOKENS[2:]])
    for twin in twins(noisy, clean):
        twin.clean.module = original.model.layers[twin.clean.index]
        twin.sources = residual_sources(twin.clean, _linears(twin.clean.module))
        if twin.noisy.index == 1:
            leads = ["self_attn.q_proj", "mlp.down_proj"]
            twin.observe(leads, lambda name, batch, a, b: found.__setitem__(f"{name} {batch}", (a, b)))
            break
    for name, source in (("self_attn.q_proj", None), ("mlp.down_proj", "post_attention_layernorm")):
        for index, whole in enumerate((original, quantized_first)):
            expected = _inputs(whole, f"model.layers.1.{name}").split(2)
            residual = None if source is None else _inputs(whole, f"model.layers.1.{source}").split(2)
            for batch in range(2):
                seen = found[f"{name} {batch}"][index]
                assert torch.equal(seen.x, expected[batch])
                assert (seen.residual is None) == (residual is None)
                if residual is not None:
                    assert torch.equal(seen.residual, residual[batch])


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3", "opt", "mixtral", "gpt_neox"])
@pytest.mark.parametrize("method", ["aligned", "chosen", "gptaq", "qronos"])
def test_every_architecture_is_quantized_by_aligned_methods(model_type: str, method: str) -> None:
    original = tiny(model_type)
    model = copy.deepcopy(original)
    log = quantize_in_memory(model, Recipe.parse(f"{method}:w4a16-g16"), batches=list(TOKENS.split(1)))
    with torch.no_grad():
        wanted, logits = (m(input_ids=TOKENS).logits for m in (original, model))
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    assert {record.method for record in log.records} <= {
        method,
        "aligned",
        "rtn-weighted",
        "rtn",
    }  # experts, few tokens
    assert (logits - wanted).norm() < 0.5 * wanted.norm()


@pytest.mark.parametrize("solve", [solve_gptaq, solve_qronos])
def test_gptaq_and_qronos_are_solved_on_the_moments_of_both_models(solve: Callable[..., Solution]) -> None:
    """The first block reads the same in both models, so the second one's first layer tells them from gptq."""
    original = tiny("llama")
    recipe = Recipe(QuantScheme.parse("w3a16-g16"), solve.__name__.removeprefix("solve_"))
    model, name = copy.deepcopy(original), "model.layers.1.self_attn.v_proj"
    quantize_in_memory(model, recipe, batches=[TOKENS])
    half = copy.deepcopy(original)
    half.model.layers[0] = copy.deepcopy(model.model.layers[0])
    x, noisy = (_inputs(whole, name).flatten(0, 1) for whole in (original, half))
    w = original.get_submodule(name).weight.detach()
    moments = noisy.T @ noisy / len(x), (x - noisy).T @ noisy / len(x)
    expected = solve(w, *moments, recipe.scheme.weights, torch.float32).dequantized
    found = model.get_submodule(name).packed.dequantize()
    assert (found - expected).norm() < 0.1 * (expected - w).norm()
    gptq = solve_gptq(w, moments[0], recipe.scheme.weights, torch.float32).dequantized
    assert (gptq - expected).norm() > 0.2 * (expected - w).norm()


@pytest.mark.parametrize("sequential", [False, True], ids=["once a block", "layer after layer"])
def test_correction_brings_the_calibration_output_closer_to_the_originals(sequential: bool) -> None:
    original, distances = tiny("llama"), []
    tokens = torch.randint(3, 128, (48, 24), generator=torch.Generator().manual_seed(1))
    for strength in (0.0, 1.0):
        model = copy.deepcopy(original)
        correction = Correction(strength=strength, sequential=sequential)
        recipe = Recipe(QuantScheme.parse("w3a16-g16"), "aligned", correction=correction)
        quantize_in_memory(model, recipe, batches=list(tokens.split(16)))
        with torch.no_grad():
            wanted, found = (m.model(input_ids=tokens).last_hidden_state for m in (original, model))
        distances.append((found - wanted).norm().item())
    assert distances[1] < distances[0]


def test_smoothing_and_correction_go_together_where_a_channel_is_massive() -> None:
    original = tiny("llama")
    with torch.no_grad():
        for layer in original.model.layers:
            layer.input_layernorm.weight[3] *= 60  # what q, k and v read there swamps one scale for all
        wanted = original(input_ids=TOKENS).logits
    lost = []
    for method in ("aligned", "smooth"):
        model = copy.deepcopy(original)
        recipe = Recipe(QuantScheme.parse("w8a8-static"), method, correction=Correction())
        quantize_in_memory(model, recipe, torch.bfloat16)
        with torch.no_grad():
            lost.append((model(input_ids=TOKENS).logits - wanted).square().mean().item())
    assert lost[1] < 0.5 * lost[0]


def test_the_same_tokens_give_the_same_bits() -> None:
    models = [copy.deepcopy(tiny("llama")) for _ in range(2)]
    for model in models:
        quantize_in_memory(model, Recipe.parse("aligned:w4a16-g16-asym"))
    states = [model.state_dict() for model in models]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3", "opt", "mixtral", "gpt_neox"])
def test_answering_for_settled_modules_changes_no_bit(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for endings in (True, False):
        model = copy.deepcopy(tiny(model_type))
        if not endings:
            monkeypatch.setattr(quantize, "watching_endings", lambda *_: nullcontext([]))
        quantize_in_memory(model, Recipe.parse("aligned:w4a16-g16-asym"), batches=list(TOKENS.split(1)))
        states.append(model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_aligned_methods_bring_their_own_correction_and_keep_a_given_one() -> None:
    assert Recipe.parse("aligned:w4a16-g64").correction == Correction()
    assert Recipe.parse("gptq:w4a16-g64").correction is None
    given = Correction(strength=0.25)
    recipe = Recipe(QuantScheme.parse("w4a16-g64"), "aligned", correction=given)
    assert dataclasses.replace(recipe, observer="minmax").correction == given


def test_the_moment_of_the_wanted_output_aims_as_those_of_its_parts_do() -> None:
    """A share of 1 of the residual stream's error needs the one, a hair more the others; strength 0 aims elsewhere."""
    tokens = torch.randint(3, 128, (16, 24), generator=torch.Generator().manual_seed(1))
    weights = []
    for correction in (Correction(), Correction(residual=1 + 1e-7), Correction(strength=0.0)):
        model = tiny("llama")
        recipe = Recipe(QuantScheme.parse("w8a16-g16"), "aligned", correction=correction)
        quantize_in_memory(model, recipe, batches=list(tokens.split(4)))
        weights.append(model.model.layers[0].self_attn.o_proj.packed.dequantize())
    whole, parts, none = weights
    assert (whole - parts).norm() < 0.3 * (whole - none).norm()


def test_an_output_that_was_asked_for_is_the_originals() -> None:
    original = tiny("llama")
    streams = (BlockStream(copy.deepcopy(original), [TOKENS]), BlockStream(original, [TOKENS]))
    walk, seen = twins(*streams), []
    twin = next(walk)
    twin.observe(["mlp.down_proj"], lambda _, __, clean, noisy: seen.append((clean, noisy)), outputs=["mlp.down_proj"])
    walk.close()
    clean, noisy = seen[0]
    assert torch.equal(clean.y, original.model.layers[0].mlp.down_proj(clean.x))
    assert noisy.y is None
