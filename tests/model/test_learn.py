"""Learned rounding. Oracles: the layer before it was softened, bit for bit; finite differences of the loss; and the
loss itself, on windows that learning did not see."""

import copy

import pytest
import torch
from architectures import tiny
from checkpoints import quantize_in_memory
from torch import nn

from lowbit.errors import InputError
from lowbit.model.learn import Learning, learn
from lowbit.model.recipe import Recipe
from lowbit.nn.linear import QuantLinear
from lowbit.nn.rounding import RoundingLinear
from lowbit.numerics.metrics import kl_divergence

IDS = torch.randint(3, 128, (16, 24), generator=torch.Generator().manual_seed(3))


def _quantized(text: str) -> tuple[nn.Module, nn.Module]:
    """(original, quantized), with a head sharp enough for rounding to matter."""
    original = tiny("llama")
    with torch.no_grad():
        original.lm_head.weight.mul_(20)
    model = copy.deepcopy(original)
    quantize_in_memory(model, Recipe.parse(text), torch.bfloat16, batches=[IDS])
    return original, model


@pytest.mark.parametrize(
    "text",
    ["gptq:w3a16-g16-asym", "gptq:w4a16-g16", "rtn:w8a8", "rtn:w8a8-static-asym", "rtn:int8-t1", "rotate:w4a4-g16"],
)
def test_a_softened_layer_computes_what_the_layer_did_and_becomes_it_again(text: str) -> None:
    _, model = _quantized(text)
    name = "model.layers.0.mlp.down_proj"
    layer = model.get_submodule(name)
    assert isinstance(layer, QuantLinear)
    soft = RoundingLinear(layer)
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(soft(x), layer(x), atol=1e-5)
    assert torch.equal(soft.weight_now(), layer.packed.dequantize())
    again, before = soft.solved().state_dict(), layer.state_dict()
    assert again.keys() == before.keys()
    assert all(torch.equal(again[key], before[key]) for key in before)


def test_half_a_step_moves_a_code_to_its_neighbour() -> None:
    _, model = _quantized("gptq:w4a16-g16")
    name = "model.layers.0.mlp.down_proj"
    layer = model.get_submodule(name)
    soft = RoundingLinear(layer)
    with torch.no_grad():
        soft.v.fill_(1.0)
    q, moved = layer.packed.q(), soft.solved().packed.q()
    assert torch.equal(moved, (q + 1).clamp(max=7))


def test_the_gradient_of_a_scale_is_that_of_finite_differences() -> None:
    _, model = _quantized("gptq:w4a16-g16-asym")
    name = "model.layers.0.mlp.down_proj"
    soft = RoundingLinear(model.get_submodule(name))
    soft.scale_dtype = torch.float32
    x = torch.randn(5, soft.u.shape[1], generator=torch.Generator().manual_seed(0))
    soft(x).square().sum().backward()
    with torch.no_grad():
        values = []
        for step in (-1e-2, 1e-2):
            soft.gain[0, 0] = 1 + step
            values.append(soft(x).square().sum())
    assert soft.gain.grad is not None
    assert soft.gain.grad[0, 0].item() == pytest.approx(((values[1] - values[0]) / 2e-2).item(), rel=1e-2)


def test_the_scale_of_static_activations_is_learned_towards_what_clips_less() -> None:
    original, model = _quantized("rtn:w8a8-static")
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    layer._buffers["input_scale"] = layer.input_scale / 8
    found = learn(model, original, IDS, Learning(steps=60, windows=4, held_out=4, rate=0.0, input_rate=0.02))
    learned = model.get_submodule("model.layers.0.mlp.down_proj").input_scale
    assert found.after < found.before
    assert learned.dtype == layer.input_scale.dtype
    assert learned > layer.input_scale


def test_learning_lowers_kl_on_windows_it_did_not_see_and_leaves_quantized_layers() -> None:
    original, model = _quantized("rtn:w2a16-g16-asym")
    found = learn(model, original, IDS, Learning(steps=40, windows=4, held_out=4, rate=0.02, gain_rate=0.01))
    assert found.after < found.before
    with torch.no_grad():
        logits, wanted = (m(input_ids=IDS[-4:]).logits for m in (model, original))
    assert kl_divergence(wanted, logits).mean().item() == pytest.approx(found.after, rel=0.05)
    assert all(not isinstance(module, RoundingLinear) for module in model.modules())
    assert isinstance(model.get_submodule("model.layers.0.mlp.down_proj"), QuantLinear)
    assert found.rewritten == {name for name, p in model.named_parameters() if "norm" in name}
    assert all(torch.equal(p, p.bfloat16().float()) for name, p in model.named_parameters() if "norm" in name)


def test_learning_begins_with_the_kl_of_the_model_it_was_given() -> None:
    original, model = _quantized("aligned:w3a16-g16-asym")
    with torch.no_grad():
        logits, wanted = (m(input_ids=IDS[-4:]).logits for m in (model, original))
    found = learn(model, original, IDS, Learning(steps=1, held_out=4))
    assert found.before == pytest.approx(kl_divergence(wanted, logits).mean().item(), rel=1e-4)


def test_learning_that_only_harms_gives_back_the_model_it_was_given() -> None:
    original, model = _quantized("gptq:w4a16-g16")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = learn(model, original, IDS, Learning(steps=4, held_out=4, checks=2, rate=50.0, gain_rate=50.0))
    assert (found.step, found.after, found.rewritten) == (0, found.before, frozenset())
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_same_seed_learns_the_same_bits() -> None:
    states = []
    for _ in range(2):
        original, model = _quantized("rtn:w3a16-g16")
        learn(model, original, IDS, Learning(steps=6, held_out=4, checks=3, rate=0.02, seed=5))
        states.append(model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_too_few_windows_to_judge_on_are_refused() -> None:
    original, model = _quantized("rtn:w4a16-g16")
    with pytest.raises(InputError, match="needs 4 or more calibration windows"):
        learn(model, original, IDS[:3], Learning())
