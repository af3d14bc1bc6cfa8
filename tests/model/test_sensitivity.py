"""Sensitivity of outputs. Oracle: KL itself, of a model one of whose outputs was changed a little."""

import pytest
import torch
from architectures import tiny
from checkpoints import quantize_in_memory

from lowbit.model.recipe import Recipe
from lowbit.model.sensitivity import Sensitivity, sense
from lowbit.numerics.metrics import kl_divergence
from lowbit.numerics.scheme import QuantScheme

IDS = torch.randint(3, 128, (64, 24), generator=torch.Generator().manual_seed(3))
NAME = "model.layers.1.mlp.down_proj"


def test_the_moment_of_gradients_predicts_the_kl_of_a_small_change() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    outputs = sense(model, [NAME], list(IDS.split(8)), Sensitivity(outputs=True))[NAME].outputs
    assert outputs is not None
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(outputs.shape[0], generator=generator) * 1e-3
    signs = torch.randn(*IDS.shape, 1, generator=generator).sign()  # tokens that change apart from each other
    handle = model.get_submodule(NAME).register_forward_hook(lambda _, __, out: out + signs * change)
    with torch.no_grad():
        changed = model(input_ids=IDS).logits
        handle.remove()
        kld = kl_divergence(model(input_ids=IDS).logits, changed).double().sum()
    assert kld.item() == pytest.approx(0.5 * (change @ outputs @ change).item(), rel=0.35)


def test_weights_of_tokens_have_a_mean_of_one_and_the_model_is_left_as_it_was() -> None:
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = sense(model, [NAME], list(IDS[:6].split(4)), Sensitivity())[NAME]
    assert [len(weights) for weights in found.tokens] == [4 * 24, 2 * 24]
    assert torch.cat(found.tokens).mean().item() == pytest.approx(1, rel=0.05)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_recipe_with_sensitivity_quantizes_and_repeats_bit_by_bit() -> None:
    states = []
    for _ in range(2):
        model = tiny("llama")
        recipe = Recipe(QuantScheme.parse("w3a16-g16-asym"), "aligned", sensitivity=Sensitivity(outputs=True))
        quantize_in_memory(model, recipe, torch.bfloat16, batches=list(IDS[:8].split(4)))
        states.append(model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
