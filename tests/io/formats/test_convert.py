"""The oracles: decoders.py, which shares nothing with readers and writers; gptqmodel's and autoawq's own checkpoints
(tests/interop/fixtures); stock transformers with compressed-tensors on what we write."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from architectures import tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, CompressedTensorsConfig, FineGrainedFP8Config

import lowbit
from lowbit.errors import CheckpointError, InputError
from lowbit.io import targets
from lowbit.io.conversion import Options
from lowbit.io.convert import FORMATS, convert
from lowbit.io.stored import Stored
from lowbit.io.targets import TARGETS
from lowbit.numerics.pack import pack, unpack
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

FIXTURES = Path(__file__).parents[2] / "interop" / "fixtures"
TOKENS = torch.arange(24).view(2, 12) * 7 % 32


def foreign(name: str, folder: Path) -> Path:
    """A checkpoint that its owner packed, in two shards with an index and a tokenizer's file."""
    with safe_open(FIXTURES / f"{name}.safetensors", framework="pt") as file:
        config = file.metadata()["config"]
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    del tensors["expected.logits"]
    names = sorted(tensors)
    folder.mkdir()
    weight_map = {}
    for index, part in enumerate((names[::2], names[1::2])):  # cuts modules in two
        save_file({key: tensors[key] for key in part}, folder / f"model-{index}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{index}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(config)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "quantize_config.json").write_text("{}")
    return folder


def ours(folder: Path, text: str, model_type: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
    """A compressed-tensors or bitsandbytes checkpoint of a tiny model under scheme `text`."""
    model, scheme = tiny(model_type).to(dtype), QuantScheme.parse(text)
    tensors, schemes = dict(model.state_dict()), {}
    kind = "bitsandbytes" if scheme.weights.format.kind == "codebook" else "compressed-tensors"
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = PackedWeight.from_float(tensors.pop(f"{name}.weight"), scheme, dtype)
            tensors |= TARGETS[kind].tensors(name, Stored(weight), dtype)
            schemes[name] = scheme
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = TARGETS[kind].config(schemes, ["lm_head"], dtype)
    settings = {"quantization_config": quantization, "dtype": str(dtype).removeprefix("torch.")}
    config = model.config.to_dict() | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


@torch.no_grad()
@pytest.mark.parametrize("target", ["compressed-tensors", "gptq", "gptq-v2", "awq"])
@pytest.mark.parametrize("source", ["gptq-llama", "awq-qwen2", "gptq-qwen2", "awq-phi3"])
def test_integers_go_from_format_to_format_and_back_bit_for_bit(source: str, target: str, tmp_path: Path) -> None:
    start = foreign(source, tmp_path / "start")
    expected = lowbit.load(start, torch.float32)(TOKENS).logits
    result = convert(start, tmp_path / "there", target)
    assert result.verified == len(result.schemes) > 0
    assert torch.equal(lowbit.load(tmp_path / "there", torch.float32)(TOKENS).logits, expected)
    home = "awq" if source.startswith("awq") else "gptq-v2" if source == "gptq-qwen2" else "gptq"
    convert(tmp_path / "there", tmp_path / "back", home)
    first, last = all_tensors(start), all_tensors(tmp_path / "back")
    assert first.keys() == last.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, last[name]), name
        assert tensor.dtype == last[name].dtype, name
    names = {path.name for path in (tmp_path / "there").iterdir()}
    assert ("quantize_config.json" in names) == target.startswith("gptq")
    assert "tokenizer.json" in names
    assert json.loads((tmp_path / "there" / "model.safetensors.index.json").read_text())["weight_map"]


@torch.no_grad()
def test_awq_gemv_becomes_gemm_byte_for_byte(tmp_path: Path) -> None:
    """GEMV is compressed-tensors' order with zero-points packed along the groups and filled up to whole words."""
    start = foreign("awq-llama", tmp_path / "start")
    convert(start, tmp_path / "gemv", "compressed-tensors")
    tensors = all_tensors(tmp_path / "gemv")
    for name in [name for name in tensors if name.endswith("weight_packed")]:
        module, rows = name.removesuffix(".weight_packed"), len(tensors[name])
        zero = unpack(tensors.pop(f"{module}.weight_zero_point").T.contiguous(), 4, rows).T
        filling = (0, 16 - zero.shape[1])  # two words a row, as AutoAWQ pads
        tensors[f"{module}.qweight"] = tensors.pop(name)
        tensors[f"{module}.qzeros"] = pack(torch.nn.functional.pad(zero, filling, value=-8).contiguous(), 4)
        tensors[f"{module}.scales"] = torch.nn.functional.pad(tensors.pop(f"{module}.weight_scale"), filling)
        del tensors[f"{module}.weight_shape"]
    for path in (tmp_path / "gemv").glob("model*"):
        path.unlink()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "gemv" / "model.safetensors")
    config = json.loads((start / "config.json").read_text())
    config["quantization_config"]["version"] = "gemv"
    (tmp_path / "gemv" / "config.json").write_text(json.dumps(config))
    result = convert(tmp_path / "gemv", tmp_path / "back", "awq")
    assert result.verified == 7
    first, last = all_tensors(start), all_tensors(tmp_path / "back")
    assert first.keys() == last.keys()
    assert [name for name in first if not torch.equal(first[name], last[name])] == []


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("source", ["gptq-llama", "awq-qwen2", "gptq-qwen2"])
def test_stock_transformers_loads_what_became_compressed_tensors(source: str, tmp_path: Path) -> None:
    start = foreign(source, tmp_path / "start")
    convert(start, tmp_path / "out", "compressed-tensors")
    expected = lowbit.load(start, torch.float32)(TOKENS).logits
    config = CompressedTensorsConfig(dequantize=True)  # 5.23 loads packed zero-points in no other way
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=config)
    error = (theirs(TOKENS).logits - expected).abs().max()
    assert error < 2e-3 * expected.abs().max()  # it dequantizes to the scales' float16


@torch.no_grad()
def test_act_order_goes_to_gptq_v2_and_is_refused_elsewhere_by_name(tmp_path: Path) -> None:
    start = foreign("gptq-mistral", tmp_path / "start")
    convert(start, tmp_path / "v2", "gptq-v2")
    expected = lowbit.load(start, torch.float32)(TOKENS).logits
    assert torch.equal(lowbit.load(tmp_path / "v2", torch.float32)(TOKENS).logits, expected)
    for target, word in (
        ("awq", "AWQ has no act-order"),
        ("compressed-tensors", "refuses groups that follow an order"),
    ):
        with pytest.raises(InputError, match=word) as caught:
            convert(start, tmp_path / "no", target)
        assert "--lossy requantize" in str(caught.value)
        assert not (tmp_path / "no").exists()
    options = Options("requantize", QuantScheme.parse("w4a16-g32-asym"))
    result = convert(start, tmp_path / "awq", "awq", options)
    assert result.requantized == ["model.layers.0.mlp.down_proj"]  # the others have one group, so no order
    assert result.verified == 6
    near = lowbit.load(tmp_path / "awq", torch.float32)(TOKENS).logits
    assert 0 < (near - expected).norm() < 0.5 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("text", ["w3a16-g32", "w8a16", "w8a16-g32-asym", "w4a16-g32", "w2a16-g32-asym"])
def test_our_integers_go_to_gptq_v2_and_come_back(text: str, tmp_path: Path) -> None:
    start = ours(tmp_path / "start", text)
    convert(start, tmp_path / "gptq", "gptq-v2")
    convert(tmp_path / "gptq", tmp_path / "back", "compressed-tensors")
    first, last = all_tensors(start), all_tensors(tmp_path / "back")
    assert first.keys() == last.keys()
    assert [name for name in first if not torch.equal(first[name], last[name])] == []


@torch.no_grad()
@pytest.mark.parametrize(
    "text", ["w4a16-g32", "w5a16-asym", "w8a8", "fp8", "fp8-tile128", "nvfp4a16", "mxfp4a16", "nf4-b64-dq", "fp4-b64"]
)
def test_float_is_the_dequantized_weight_in_a_plain_checkpoint(text: str, tmp_path: Path) -> None:
    start = ours(tmp_path / "start", text)
    result = convert(start, tmp_path / "out", "float")
    assert result.verified == len(result.schemes) == 21
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    packed = lowbit.load(start, torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == torch.bfloat16
    for name in result.schemes:
        layer = packed.get_submodule(name)
        assert torch.equal(layer.packed.dequantize(torch.bfloat16), plain.get_submodule(name).weight), name


def test_llm_int8_becomes_float_and_nothing_else(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "float")
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config, dtype=torch.float16)
    model.save_pretrained(tmp_path / "int8")
    assert convert(tmp_path / "int8", tmp_path / "out", "float").verified == 21
    with pytest.raises(InputError, match=r"outlier columns.*--lossy requantize"):
        convert(tmp_path / "int8", tmp_path / "no", "compressed-tensors")


def test_deepseek_blocks_become_compressed_tensors(tmp_path: Path) -> None:
    start = ours(tmp_path / "ct", "fp8-tile128")
    tensors = {name.replace("weight_scale", "weight_scale_inv"): value for name, value in all_tensors(start).items()}
    fp8 = tmp_path / "fp8"
    shutil.copytree(start, fp8)
    save_file(tensors, fp8 / "model.safetensors")
    config = json.loads((fp8 / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (fp8 / "config.json").write_text(json.dumps(config))
    convert(fp8, tmp_path / "back", "compressed-tensors")
    first, last = all_tensors(start), all_tensors(tmp_path / "back")
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name].float(), last[name].float()) for name in first)
    convert(start, tmp_path / "again", "fp8")
    third = all_tensors(tmp_path / "again")
    assert third.keys() == tensors.keys()
    assert all(torch.equal(third[name].float(), tensors[name].float()) for name in third)
    written = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert written.items() >= config["quantization_config"].items()


@torch.no_grad()
@pytest.mark.parametrize("text", ["fp8-tensor", "fp8-tensor-static"])
def test_fp8_per_tensor_goes_there_and_back(text: str, tmp_path: Path) -> None:
    start = ours(tmp_path / "start", text)
    if text.endswith("static"):
        tensors = all_tensors(start)
        names = [name.replace("weight_scale", "input_scale") for name in tensors if name.endswith("weight_scale")]
        tensors |= {name: torch.tensor([0.02]).bfloat16() for name in names}
        save_file(tensors, start / "model.safetensors", metadata={"format": "pt"})
    result = convert(start, tmp_path / "fp8", "fp8")
    assert result.verified == 21
    first, last = (lowbit.load(folder, torch.float32)(TOKENS).logits for folder in (start, tmp_path / "fp8"))
    assert torch.equal(first, last)
    with pytest.raises(InputError, match=r"square blocks or whole tensors.*--lossy requantize"):
        convert(ours(tmp_path / "channel", "fp8"), tmp_path / "no", "fp8")


@torch.no_grad()
def test_transformers_dequantizes_the_fp8_that_we_wrote(tmp_path: Path) -> None:
    start = ours(tmp_path / "start", "fp8-tile128")
    convert(start, tmp_path / "fp8", "fp8")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    packed = lowbit.load(tmp_path / "fp8", torch.float32)
    for name, module in packed.named_modules():
        if isinstance(module, lowbit.QuantLinear):
            assert torch.equal(module.packed.dequantize(torch.bfloat16), theirs.get_submodule(name).weight), name


@pytest.mark.parametrize("key", ["weight_packed", "weight_scale"])
def test_a_writer_that_errs_is_caught_by_the_second_decoder(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = foreign("gptq-llama", tmp_path / "start")

    def wrong(name: str, stored: Stored, dtype: torch.dtype) -> dict[str, Tensor]:
        named = targets._compressed_tensors(name, stored, dtype)
        if name.endswith("layers.0.mlp.up_proj"):
            named[f"{name}.{key}"].view(-1)[3] += 1
        return named

    broken = TARGETS["compressed-tensors"]
    monkeypatch.setitem(TARGETS, "compressed-tensors", type(broken)(broken.refusal, wrong, broken.config, "w4a16"))
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj does not decode to the same numbers"):
        convert(start, tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()


def test_what_can_t_be_asked_for_is_said(tmp_path: Path) -> None:
    start = foreign("gptq-llama", tmp_path / "start")
    with pytest.raises(InputError, match=f"choose one of {', '.join(FORMATS[:2])}"):
        convert(start, tmp_path / "out", "exl2")
    with pytest.raises(InputError, match="no lossy way 'squeeze'"):
        convert(start, tmp_path / "out", "awq", Options("squeeze"))
    tiny("llama").save_pretrained(tmp_path / "float")
    with pytest.raises(InputError, match="is not quantized"):
        convert(tmp_path / "float", tmp_path / "out", "awq")
    with pytest.raises(InputError, match="the model itself"):
        convert(start, start, "awq", Options(overwrite=True))
