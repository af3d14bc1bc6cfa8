"""Rotating models. Oracles: the original's logits; the architecture's own definition of who reads and who writes; a
checkpoint that is written and loaded again."""

import copy
from pathlib import Path

import pytest
import torch
from architectures import tiny
from checkpoints import TOKENS, quantize_in_memory, source_folder
from torch import nn
from transformers import PreTrainedModel

import lowbit
from lowbit.errors import InputError, SchemeError
from lowbit.io.checkpoint import write_checkpoint
from lowbit.io.convert import convert
from lowbit.io.names import disk_layout
from lowbit.io.source import load_float, open_source
from lowbit.model.recipe import Recipe
from lowbit.model.rotate import rotate_model
from lowbit.model.rotation import Rotation
from lowbit.nn.linear import QuantLinear
from lowbit.nn.rotated import RotatedLinear
from lowbit.numerics.hadamard import Hadamard
from lowbit.numerics.scheme import QuantScheme

ALL = Rotation(residual=False, heads=False, online="all")


def _linears(model: nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and "head" not in name]


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def _tied_llama() -> PreTrainedModel:
    model = tiny("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize(
    "options", [Rotation(online="writers"), Rotation(block=32, seed=3, smoothing=0.5)], ids=["whole", "blocks"]
)
def test_a_rotated_model_computes_the_same(model_type: str, options: Rotation) -> None:
    model = tiny(model_type)
    before, weights = _logits(model), {name: p.clone() for name, p in model.named_parameters()}
    done = rotate_model(model, options, _linears(model))
    torch.testing.assert_close(_logits(model), before, rtol=1e-3, atol=1e-3)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, weights[n])}
    assert changed - {f"{name}.weight" for name in done.online} <= done.rewritten
    assert {name.rpartition(".")[2] for name in done.online} >= {"down_proj"}
    assert done.heads == 3


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3"])
def test_models_in_16_bits_turn_as_well(model_type: str) -> None:
    """As they stand on a GPU. Their weights are rounded once more, so their logits are not quite the same."""
    model = tiny(model_type).bfloat16()
    before = _logits(model).float()
    done = rotate_model(model, Rotation(online="writers"), _linears(model))
    assert done.heads == 3
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert (_logits(model).float() - before).norm() < 0.05 * before.norm()


def test_what_can_not_turn_is_refused_in_16_bits_too() -> None:
    model = tiny("gemma2").bfloat16()
    with pytest.raises(InputError, match=r"the residual stream of model.layers.0 can't be rotated"):
        rotate_model(model, Rotation(), _linears(model))


def test_rows_and_columns_of_a_llama_turn_as_its_definition_says() -> None:
    original = tiny("llama")
    model = copy.deepcopy(original)
    done = rotate_model(model, Rotation(online="none"), _linears(model))
    turn = Hadamard.of(64)
    before, after = original.model.layers[1], model.model.layers[1]
    gained = before.mlp.gate_proj.weight * before.post_attention_layernorm.weight
    torch.testing.assert_close(after.mlp.gate_proj.weight, turn.apply(gained))
    torch.testing.assert_close(after.mlp.down_proj.weight, turn.apply(before.mlp.down_proj.weight.T).T)
    assert torch.equal(after.input_layernorm.weight, torch.ones(64))
    assert done.heads == 3
    assert not done.online


def test_a_head_that_shares_the_embedding_gets_its_own_weight() -> None:
    model = _tied_llama()
    before = _logits(model)
    done = rotate_model(model, Rotation(), _linears(model))
    assert done.untied
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    torch.testing.assert_close(_logits(model), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_neox", "mixtral", "olmo2"])
def test_inputs_turn_where_the_residual_stream_can_not(model_type: str) -> None:
    model = tiny(model_type)
    before = _logits(model)
    with pytest.raises(InputError, match='online="all"'):
        rotate_model(copy.deepcopy(model), Rotation(), _linears(model))
    done = rotate_model(model, ALL, _linears(model))
    torch.testing.assert_close(_logits(model), before, rtol=1e-3, atol=1e-3)
    assert all(isinstance(model.get_submodule(name), RotatedLinear) for name in done.online)


def test_what_subtracts_the_mean_is_named() -> None:
    with pytest.raises(InputError, match="input_layernorm subtracts the mean of the residual stream"):
        rotate_model(tiny("gpt_neox"), Rotation(), [])


def test_rotation_spreads_what_four_bits_can_not_hold() -> None:
    """Channels of the stream and of the intermediate that are 20 times the others, as large models have them."""
    original = tiny("llama")
    with torch.no_grad():
        original.model.embed_tokens.weight[:, :2] *= 20
        for layer in original.model.layers:
            layer.mlp.up_proj.weight[:2] *= 20
    errors = {}
    for recipe in (Recipe.parse("aligned:w4a4-g16"), Recipe.parse("rotate:w4a4-g16")):
        model = copy.deepcopy(original)
        quantize_in_memory(model, recipe)
        errors[recipe.method] = float((_logits(model) - _logits(original)).norm() / _logits(original).norm())
    assert errors["rotate"] < 0.8 * errors["aligned"]


@pytest.mark.parametrize("text", ["rotate:w4a4-g16", "rotate:w8a8-static"])
def test_rotated_inputs_survive_writing_and_loading(text: str, tmp_path: Path) -> None:
    source_folder(tmp_path / "source", "llama")
    with open_source(tmp_path / "source") as source:
        model = load_float(source, torch.float32)
        layout = disk_layout(model)
        log = quantize_in_memory(model, Recipe.parse(text), torch.bfloat16)
        (tmp_path / "out").mkdir()
        write_checkpoint(source, tmp_path / "out", model, layout, torch.bfloat16, log.rewritten)
    loaded = lowbit.load(tmp_path / "out", torch.float32)
    layer = loaded.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(layer, QuantLinear)
    assert str(layer.rotation) == "hadamard-96-s0"
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()  # as the files keep them
    torch.testing.assert_close(_logits(loaded), _logits(model))
    loaded.save_pretrained(tmp_path / "again")
    again = type(loaded).from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(_logits(again), _logits(loaded))
    with pytest.raises(InputError, match="turns its input at run time, for which compressed-tensors has no form"):
        convert(tmp_path / "out", tmp_path / "other", "compressed-tensors")


def test_rotations_that_a_format_or_the_options_do_not_know_are_refused() -> None:
    with pytest.raises(SchemeError, match=r'use Rotation\(online="none"\)'):
        Recipe(QuantScheme.parse("nf4-b64"), "rtn", rotation=Rotation())
    with pytest.raises(InputError, match="choose one of none, down, writers, all"):
        Rotation(online="up")
