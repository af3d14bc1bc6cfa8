"""The oracle is the float model in transformers and rounding layer by layer; PEFT where it is installed."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import lowbit
from lowbit import LowbitConfig
from lowbit.errors import InputError
from lowbit.io import hf
from lowbit.io.convert import convert
from lowbit.io.stored import Stored
from lowbit.io.targets import TARGETS
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

TOKENS = torch.arange(24).view(2, 12) * 7 % 100 + 1
SCHEMES = [
    "nf4-b64",
    "nf4-b64-dq",
    "w4a16-g32",
    "w3a16-g32-asym",
    "w8a8",
    "fp8",
    "int8-t6",
    "nvfp4",
    "mxfp4a16",
    "fp8-tile128",
]
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")


def float_folder(folder: Path, model_type: str = "llama") -> Path:
    tiny(model_type).save_pretrained(folder)
    return folder


def layers_of(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def same_state(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        x.dtype == y.dtype and torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
        for x, y in ((first[name], second[name]) for name in first)
    )


@torch.no_grad()
@pytest.mark.parametrize("text", SCHEMES)
def test_loading_quantizes_and_saving_keeps_every_bit(text: str, tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=LowbitConfig(text), dtype=torch.float32)
    plain = tiny("llama")
    layers = layers_of(model)
    assert len(layers) == 21  # all but the head
    for name, layer in layers.items():
        expected = PackedWeight.from_float(plain.get_submodule(name).weight, QuantScheme.parse(text), torch.float32)
        assert torch.equal(layer.packed.dequantize(), expected.dequantize()), name
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert same_state(model, again)
    assert torch.equal(model(TOKENS).logits, again(TOKENS).logits)
    assert {str(layer.scheme) for layer in layers_of(again).values()} == {text}


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["qwen2", "gpt_neox", "phi3", "gemma2", "mixtral", "starcoder2"])
def test_other_architectures_with_biases_and_experts(
    model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = float_folder(tmp_path / "float", model_type)
    config = LowbitConfig("w8a16", ignore=["*layers.0.*"])
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    layers = layers_of(model)
    assert layers
    assert not [name for name in layers if ".layers.0." in name]
    assert ("6 parameters with the experts of a mixture stay" in caplog.text) == (model_type == "mixtral")
    expected = tiny(model_type)(TOKENS).logits
    assert (model(TOKENS).logits - expected).norm() < 0.05 * expected.norm()
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert same_state(model, again)


@torch.no_grad()
def test_scales_keep_their_dtype_whatever_the_model_s_is(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")
    config = LowbitConfig("w4a16-g32")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    before, after = (next(iter(layers_of(m).values())) for m in (model, again))
    assert before.weight_scale.dtype == after.weight_scale.dtype == torch.bfloat16
    assert torch.equal(before.weight_scale, after.weight_scale)


def packed_folder(folder: Path, text: str, target: str) -> Path:
    """A tiny llama under `text` as target's checkpoint."""
    model, scheme = tiny("llama").half(), QuantScheme.parse(text)
    model.config.dtype = torch.float16
    model.save_pretrained(folder)
    tensors = dict(model.state_dict())
    schemes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = PackedWeight.from_float(tensors.pop(f"{name}.weight"), scheme, torch.float16)
            tensors |= TARGETS[target].tensors(name, Stored(weight), torch.float16)
            schemes[name] = scheme
    from_safetensors = importlib.import_module("safetensors.torch")
    from_safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = TARGETS[target].config(schemes, ["lm_head"], torch.float16)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


READABLE = [
    *(("w4a16-g32", "gptq"), ("w4a16-g32-asym", "awq"), ("nf4-b64-dq", "bitsandbytes")),
    *(("w8a8", "compressed-tensors"), ("fp8", "compressed-tensors")),
]


@torch.no_grad()
@pytest.mark.parametrize(("text", "target"), READABLE)
def test_a_foreign_checkpoint_that_we_loaded_saves_and_reloads_in_transformers(
    text: str, target: str, tmp_path: Path
) -> None:
    model = lowbit.load(packed_folder(tmp_path / "foreign", text, target), torch.float32)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert same_state(model, again)
    assert torch.equal(model(TOKENS).logits, again(TOKENS).logits)


def lora(model: PreTrainedModel) -> Any:
    peft = importlib.import_module("peft")
    targets = ["q_proj", "down_proj"]
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", lora_alpha=64)
    )


@needs_peft
@pytest.mark.parametrize(("text", "target"), READABLE)
def test_lora_trains_saves_and_reloads_and_a_plain_merge_raises(text: str, target: str, tmp_path: Path) -> None:
    peft = importlib.import_module("peft")
    folder = packed_folder(tmp_path / "foreign", text, target)
    model = lora(lowbit.load(folder, torch.float32))
    frozen = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(buffer, frozen[name]) for name, buffer in model.named_buffers())
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(lowbit.load(folder, torch.float32), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, again(TOKENS).logits)
    for safe in (False, True):
        with pytest.raises((RuntimeError, ValueError)):
            again.merge_and_unload(safe_merge=safe)


NAMES: list[tuple[dict[str, Any], str]] = [
    ({"load_in_8bit": True}, "int8-t6"),
    ({"load_in_8bit": True, "llm_int8_threshold": 0.0}, "int8-t0"),
    ({"load_in_4bit": True}, "fp4-b64"),
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "nf4-b64-dq"),
    ({"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}, "fp4-b64"),
]


@pytest.mark.parametrize(("names", "scheme"), NAMES)
def test_bitsandbytes_names_are_understood(names: dict[str, Any], scheme: str) -> None:
    assert LowbitConfig.from_bitsandbytes(**names).scheme == scheme


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LowbitConfig.from_bitsandbytes(), "one of load_in_8bit"),
        (lambda: LowbitConfig.from_bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="int4"), "choose nf4 or fp4"),
        (lambda: LowbitConfig("w9a16"), "out of range"),
        (lambda: LowbitConfig("nf4", bits=4), "not \\['bits'\\]"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


def test_static_activations_can_t_be_quantized_on_load(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")
    with pytest.raises(InputError, match=r"w8a8-static needs activations that were observed"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=LowbitConfig("w8a8-static"))


@torch.no_grad()
def test_skipped_modules_are_those_of_bitsandbytes(tmp_path: Path) -> None:
    config = LowbitConfig.from_bitsandbytes(load_in_4bit=True, llm_int8_skip_modules=["down_proj"])
    source = float_folder(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    assert not [name for name in layers_of(model) if name.endswith("down_proj")]
    assert len(layers_of(model)) == 18


def test_convert_reads_what_transformers_wrote(tmp_path: Path) -> None:
    """Our own method id is a format like any other."""
    source = float_folder(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=LowbitConfig("w4a16-g32"))
    model.save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "gptq", "gptq")
    with torch.no_grad():
        expected = model(TOKENS).logits
        loaded: Tensor = lowbit.load(tmp_path / "gptq", torch.float32)(TOKENS).logits
        own: Tensor = lowbit.load(tmp_path / "saved", torch.float32)(TOKENS).logits
    assert torch.equal(loaded, expected.float())
    assert torch.equal(own, expected.float())


@torch.no_grad()
def test_the_float_model_is_never_there_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time a weight arrives, none of the others that will be quantized is there in float."""
    source, arrived = float_folder(tmp_path / "float"), []
    convert_one = hf._QuantizeOnLoad.convert

    def watched(self: Any, *args: Any, **arguments: Any) -> dict[str, Any]:
        modules = dict(arguments["model"].named_modules())
        floats = [name for name in self.quantizer.chosen if type(modules[name]) is nn.Linear]
        arrived.append([name for name in floats if modules[name].weight.device.type != "meta"])
        return convert_one(self, *args, **arguments)

    monkeypatch.setattr(hf._QuantizeOnLoad, "convert", watched)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=LowbitConfig("nf4"))
    assert arrived == [[]] * 21
