"""Oracles: the model with its adapters still beside it; PEFT's own LoRA layer."""

from pathlib import Path

import pytest
import torch
from architectures import TINY
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from transformers import PreTrainedModel

from lowbit.errors import CheckpointError, InputError
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight
from lowbit.train.distill import next_token_loss
from lowbit.train.loop import LoopOptions, train
from lowbit.train.lora_layer import LoraQuantLinear
from lowbit.train.optim import AdamW8bit
from lowbit.train.qlora import LoraOptions, add_lora, load_lora, merge_lora

WINDOWS = torch.randint(3, 128, (8, 16), generator=torch.Generator().manual_seed(0))


def quantized(scheme: str = "nf4-b64-dq", name: str = "llama") -> PreTrainedModel:
    model, parsed = TINY[name](), QuantScheme.parse(scheme)
    for path, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and path != "lm_head":
            parent, _, attribute = path.rpartition(".")
            packed = PackedWeight.from_float(module.weight.detach(), parsed, torch.float32)
            setattr(model.get_submodule(parent), attribute, QuantLinear.from_packed(packed, module.bias))
    return model


def adapted(scheme: str = "nf4-b64-dq") -> torch.nn.Module:
    model = add_lora(quantized(scheme), LoraOptions(rank=4))
    optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    run = train(model, WINDOWS, next_token_loss, optimizer, LoopOptions(steps=8, batch=8, warmup=1))
    assert run.losses[-1] < run.losses[0] - 0.1
    return model.eval()


def test_only_adapters_are_trained_and_the_base_keeps_its_bytes() -> None:
    before = {name: buffer.clone() for name, buffer in quantized().named_buffers()}
    model = adapted()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 21
    assert all(".lora_" in name for name in trained)
    for name, buffer in model.get_base_model().named_buffers():
        assert torch.equal(buffer, before[name.replace(".base_layer", "")])


@pytest.mark.parametrize("scheme", ["nf4-b64-dq", "w4a16-g32-asym", "w8a8"])
def test_merging_quantizes_again_and_says_what_it_lost(scheme: str) -> None:
    model = adapted(scheme)
    with torch.no_grad():
        before = model(input_ids=WINDOWS).logits
        merged, report = merge_lora(model, batches=[WINDOWS])
        after = merged(input_ids=WINDOWS).logits
    layers = [module for module in merged.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == len(report.layers) == 21
    assert all(str(layer.scheme) == scheme for layer in layers)
    assert 0 < max(layer.relative_error for layer in report.layers) < 0.2
    assert report.kld is not None
    assert 0 < report.kld < 0.1
    assert not torch.equal(before, after)
    assert "21 layers merged" in str(report)


def test_merging_to_floats_gives_the_same_logits() -> None:
    model = adapted("w4a16-g32")
    with torch.no_grad():
        before = model(input_ids=WINDOWS).logits
        merged, report = merge_lora(model, to_16bit=True, batches=[WINDOWS])
        after = merged(input_ids=WINDOWS).logits
    assert not [module for module in merged.modules() if isinstance(module, QuantLinear)]
    assert torch.allclose(before, after, atol=1e-4)
    assert report.kld < 1e-6


def test_pefts_own_merge_raises_instead_of_changing_nothing() -> None:
    model = adapted()
    with pytest.raises(RuntimeError):
        model.merge_and_unload()


def test_an_adapter_is_saved_loaded_and_refused_by_another_model(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = load_lora(quantized(), tmp_path)
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=WINDOWS).logits, model(input_ids=WINDOWS).logits, atol=1e-6)
    with pytest.raises(CheckpointError, match="is for another model"):
        load_lora(quantized(name="gpt_neox"), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="no whole adapter"):
        load_lora(quantized(), tmp_path)
    with pytest.raises(InputError, match="no quantized linear"):
        add_lora(TINY["llama"]())
    with pytest.raises(InputError, match="ends in w1; there are down_proj"):
        add_lora(quantized(), LoraOptions(targets=("w1",)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_the_fused_lora_layer_is_pefts_own_forward_and_backward(has_bias: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = PackedWeight.from_float(torch.randn(48, 128, generator=generator), QuantScheme.parse("nf4-b64-dq"), dtype)
    base = QuantLinear.from_packed(packed, torch.randn(48, generator=generator).to(dtype) if has_bias else None)
    layer = LoraQuantLinear(base, "default", config=LoraConfig(r=4, lora_alpha=10), r=4, lora_alpha=10)
    torch.nn.init.normal_(layer.lora_B["default"].weight, generator=generator)
    x = torch.randn(2, 5, 128, generator=generator).to(dtype).requires_grad_()
    dy = torch.randn(2, 5, 48, generator=generator).to(dtype)
    leaves = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    found = layer(x)
    gradients = torch.autograd.grad(found, leaves, dy)
    expected = LoraLinear.forward(layer, x)
    wanted = torch.autograd.grad(expected, leaves, dy)
    assert layer._is_plain(base)
    assert found.dtype == expected.dtype == dtype
    limit = 1e-5 if dtype == torch.float32 else 1e-2  # bf16: PEFT adds two rounded products, we round their sum
    for ours, theirs in zip((found, *gradients), (expected, *wanted), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() < limit * theirs.norm()


def test_what_the_fused_lora_layer_does_not_know_goes_pefts_way() -> None:
    model = add_lora(quantized(), LoraOptions(rank=4, dropout=0.5))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features)
    assert not layer._is_plain(layer.get_base_layer())
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        assert not torch.equal(layer.train()(x), layer(x))
        with model.disable_adapter():
            assert torch.equal(layer(x), layer.get_base_layer()(x))
