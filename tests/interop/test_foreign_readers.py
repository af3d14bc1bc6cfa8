"""The oracles are transformers 5.23, compressed-tensors 0.20 and bitsandbytes 0.50, on whole tiny models and on layers:
what they write or decode is read by us, to the last bit or, where a sum has another order, to float32's rounding.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import tiny
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import lowbit
from lowbit.errors import CheckpointError
from lowbit.io.compressed_tensors_reader import CompressedTensorsReader
from lowbit.io.fp8 import Fp8Reader
from lowbit.io.llm_int8 import LlmInt8Reader
from lowbit.io.mxfp4 import Mxfp4Reader
from lowbit.nn.linear import QuantLinear
from lowbit.numerics import affine
from lowbit.numerics.pack import pack
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

TOKENS = torch.arange(24).view(2, 12) * 7 % 100 + 1
N, K = 48, 96


def make_weight(rows: int = N, columns: int = K) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def ct_reader(tensors: dict[str, Tensor], group: dict, **config: object) -> CompressedTensorsReader:
    settings = {"config_groups": {"group_0": {"targets": ["Linear"], **group}}} | config
    return CompressedTensorsReader(settings, shapes_of(tensors), tensors.__getitem__)


PRESETS = {
    **{"W4A16": "w4a16-g32", "W4A16_ASYM": "w4a16-g32-asym", "W8A16": "w8a16-g32", "W8A8": "w8a8", "INT8": "w8a8"},
    **{"FP8": "fp8-tensor-static", "FP8_DYNAMIC": "fp8", "FP8_BLOCK": "fp8-tile128"},
    **{"NVFP4": "nvfp4", "NVFP4A16": "nvfp4a16", "MXFP4": "mxfp4", "MXFP4A16": "mxfp4a16"},
}
FORMATS = {
    **{"W4A16": "pack-quantized", "W4A16_ASYM": "pack-quantized", "W8A16": "pack-quantized"},
    **{"W8A8": "int-quantized", "INT8": "int-quantized"},
    **{"FP8": "float-quantized", "FP8_DYNAMIC": "float-quantized", "FP8_BLOCK": "float-quantized"},
    **{"NVFP4": "nvfp4-pack-quantized", "NVFP4A16": "nvfp4-pack-quantized"},
    **{"MXFP4": "mxfp4-pack-quantized", "MXFP4A16": "mxfp4-pack-quantized"},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_compressed_by_them_read_by_us_decompressed_by_them(preset: str) -> None:
    """Their compressor packs our scales; their decompressor and our reader agree to the last bit."""
    w, scheme = make_weight(), QuantScheme.parse(PRESETS[preset])
    theirs = preset_name_to_scheme(preset, ["Linear"])
    if theirs.weights.group_size == 128:
        theirs.weights.group_size = 32
    packed = PackedWeight.from_float(w, scheme, torch.float32)
    state = {"weight": packed.dequantize(), "weight_scale": packed.scale}
    if packed.scale.dtype == torch.uint8:
        state["weight_scale"] = torch.exp2(packed.scale.float() - 127)
    if packed.scale.dtype == torch.float8_e4m3fn:
        state["weight_scale"] = packed.scale.float()
    if packed.global_scale is not None:
        state["weight_global_scale"] = packed.global_scale
    if packed.zero is not None:
        state["weight_zero_point"] = packed.zero_points()
    compressor = BaseCompressor.get_value_from_registry(FORMATS[preset])
    compressed = {f"m.{key}": value.data for key, value in compressor.compress(state, theirs).items()}
    if not theirs.input_activations or theirs.input_activations.dynamic is True:
        inputs = {}
    elif preset == "NVFP4":
        inputs = {"m.input_global_scale": torch.tensor([3.0])}
    else:
        inputs = {"m.input_scale": torch.tensor([0.5])}
    group = json.loads(theirs.model_dump_json(exclude_none=True))
    reader = ct_reader(compressed | inputs, group)
    stored = reader.read("m")
    assert str(stored.weight.scheme) == PRESETS[preset]
    assert {f"m.{key}": value.item() for key, value in stored.inputs.items()} == {
        key: value.item() for key, value in inputs.items()
    }
    local = {key.removeprefix("m."): value for key, value in compressed.items()}
    their_weight = compressor.decompress(local, theirs)["weight"]
    assert torch.equal(stored.weight.dequantize(their_weight.dtype), their_weight.data)
    assert torch.equal(stored.weight.dequantize(), packed.dequantize())


def whole_codes(q: Tensor, bits: int) -> Tensor:
    """Codes [N, K] packed as compressed-tensors before 0.17 did: 32 // B of them in a word, the last one filled."""
    per_word = 32 // bits
    words = torch.zeros(q.shape[0], -(-q.shape[1] // per_word), dtype=torch.int64)
    for k in range(q.shape[1]):
        words[:, k // per_word] |= (q[:, k].long() + 2 ** (bits - 1)) << bits * (k % per_word)
    return words.to(torch.uint32).view(torch.int32)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_the_layout_before_0_17_is_told_by_its_width(bits: int, symmetric: bool) -> None:
    text = f"w{bits}a16-g32" + "-asym" * (not symmetric)
    packed = PackedWeight.from_float(make_weight(), QuantScheme.parse(text), torch.float32)
    zero = packed.zero_points()
    arguments = {"num_bits": bits, "type": "int", "group_size": 32, "strategy": "group", "symmetric": symmetric}
    for old in (False, True):
        tensors = {f"m.{key}": value for key, value in packed.tensors().items()}
        if old:
            tensors["m.weight_packed"] = whole_codes(packed.q(), bits)
            if zero is not None:
                tensors["m.weight_zero_point"] = whole_codes(zero.T, bits).T.contiguous()
        reader = ct_reader(tensors, {"weights": arguments})
        assert torch.equal(reader.read("m").weight.dequantize(), packed.dequantize())
        assert ["before compressed-tensors 0.17" in words for words in reader.warnings] == [True] * old


def test_groups_that_follow_g_idx_are_read_though_0_20_refuses_them() -> None:
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(K, generator=generator)
    packed = PackedWeight.from_float(make_weight()[:, order], QuantScheme.parse("w4a16-g32"), torch.float32)
    back = torch.argsort(order)
    g_idx = (torch.arange(K) // 32)[back].to(torch.int32)
    tensors = {f"m.{key}": value for key, value in packed.tensors().items()}
    tensors |= {"m.weight_packed": pack(packed.q()[:, back], 4), "m.weight_g_idx": g_idx}
    group = {"weights": {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group", "actorder": "group"}}
    weight = ct_reader(tensors, group).read("m").weight
    assert str(weight.scheme) == "w4a16-g32-order"
    assert torch.equal(weight.dequantize(), packed.dequantize()[:, back])
    with pytest.raises(ValueError, match="actorder"):
        QuantizationArgs(**group["weights"])


def test_integers_stored_one_a_byte_and_four_bits_beside_int8_inputs_are_read() -> None:
    packed = PackedWeight.from_float(make_weight(), QuantScheme.parse("w8a16-asym"), torch.float32)
    tensors = {"m.weight": packed.q(), "m.weight_scale": packed.scale, "m.weight_zero_point": packed.zero_points()}
    group: dict = {"weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}}
    assert torch.equal(ct_reader(tensors, group).read("m").weight.dequantize(), packed.dequantize())
    packed = PackedWeight.from_float(make_weight(), QuantScheme.parse("w4a16-g32"), torch.float32)
    group = {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}
    group["input_activations"] = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    stored = ct_reader({f"m.{key}": value for key, value in packed.tensors().items()}, group).read("m")
    assert str(stored.weight.scheme) == "w4a8-g32"
    assert torch.equal(stored.weight.dequantize(), packed.dequantize())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse format 'sparse-24-bitmask'"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "rotations at run time"),
        ({"config_groups": {"g": {"targets": ["re:("], "weights": {"num_bits": 4, "group_size": 32}}}}, "the target"),
        ({"config_groups": []}, "no config_groups"),
    ],
)
def test_what_we_can_t_run_is_refused_not_misread(config: dict, message: str) -> None:
    tensors = {"m.weight_packed": torch.zeros(8, 4, dtype=torch.int32), "m.weight_scale": torch.ones(8, 1)}
    with pytest.raises(CheckpointError, match=message):
        ct_reader(tensors, {"weights": {"num_bits": 4, "group_size": 32}}, **config)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "phi3"])
@torch.no_grad()
def test_llm_int8_models_that_bitsandbytes_wrote_give_its_logits(model_type: str, tmp_path: Path) -> None:
    """Layer by layer on its own inputs: its 1/127^2 is written 6.200124e-05, which is off by 1.8e-5, and that is all.

    Over layers a value that is nearly a tie may take another code, so logits are held to what int8 costs.
    """
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=2.0)
    source = saved(tiny(model_type), tmp_path / "float")
    theirs = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, args, y: seen.update({name: (args[0].clone(), y.clone())})

    for name, module in theirs.named_modules():
        if isinstance(module, Linear8bitLt):
            module.register_forward_hook(keep(name))
    expected = theirs(TOKENS).logits
    ours = lowbit.load(saved(theirs, tmp_path / "int8"), torch.float32)
    assert len(seen) == sum(isinstance(module, QuantLinear) for module in ours.modules()) > 0
    for name, (x, y) in seen.items():
        layer = ours.get_submodule(name)
        assert str(layer.scheme) == "int8-t2"
        assert (layer(x) - y).abs().max() < 2.5e-5 * y.abs().max(), name
    cost = (expected - tiny(model_type)(TOKENS).logits).norm()
    assert (ours(TOKENS).logits - expected).norm() < 0.5 * cost


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("kind", "nested"), [("nf4", True), ("fp4", False)])
@torch.no_grad()
def test_4_bit_models_that_bitsandbytes_wrote_give_its_logits(
    kind: str, nested: bool, storage: str, tmp_path: Path
) -> None:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=storage,
    )
    model = tiny("granite")
    model.config.intermediate_size = 128
    source = saved(type(model)(model.config), tmp_path / "float")  # rows that hold whole blocks of 64
    theirs = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    for layer in theirs.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # its product in bfloat16
    expected = theirs(TOKENS).logits
    ours = lowbit.load(saved(theirs, tmp_path / "4bit"), torch.float32)
    torch.testing.assert_close(ours(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float8_e8m0fnu], ids=str)
def test_deepseek_blocks_are_the_product_with_their_scales(scale_dtype: torch.dtype) -> None:
    """The oracle is compressed-tensors' decoder of the same blocks."""
    w = make_weight(200, 330)
    scale = affine.tiles(w, 128).abs().amax(-1) / 448
    if scale_dtype == torch.float8_e8m0fnu:
        scale = torch.exp2(scale.log2().ceil())
    args = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[128, 128])
    packed = PackedWeight.from_float(w, QuantScheme.parse("fp8-tile128"), torch.float32)
    codes = affine.encode(w, scale, None, packed.scheme.weights)
    tensors = {"m.weight": codes, "m.weight_scale_inv": scale.to(scale_dtype)}
    config = {"weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    stored = Fp8Reader(config, shapes_of(tensors), tensors.__getitem__).read("m")
    assert str(stored.weight.scheme) == "fp8-tile128"
    assert torch.equal(stored.weight.dequantize(), dequantize(codes, scale, None, args))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"weight_block_size": [128, 64]}, "square blocks"),
        ({"weight_block_size": [128, 128], "activation_scheme": "odd"}, "not 'odd'"),
        ({"weight_block_size": [64, 64]}, "weight_scale is torch.float32"),
        ({}, "is no lone number"),
        ({"weight_block_size": [128, 128], "activation_scheme": "static"}, "it has no activation_scale"),
    ],
)
def test_an_fp8_config_that_does_not_fit_is_refused(config: dict, message: str) -> None:
    tensors = {"m.weight": torch.zeros(200, 330).to(torch.float8_e4m3fn), "m.weight_scale_inv": torch.ones(2, 3)}
    with pytest.raises(CheckpointError, match=message):
        Fp8Reader(config, shapes_of(tensors), tensors.__getitem__).read("m")


@torch.no_grad()
def test_a_deepseek_model_in_blocks_gives_the_logits_of_its_dequantized_twin(tmp_path: Path) -> None:
    """Activations are rounded too, per token and 128 columns, so the twin's linears get rounded inputs."""
    model = tiny("llama")
    tensors, scheme = dict(model.state_dict()), QuantScheme.parse("fp8-tile128")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            packed = PackedWeight.from_float(module.weight, scheme, torch.float32)
            tensors |= {f"{name}.weight": packed.codes, f"{name}.weight_scale_inv": packed.scale}
            module.weight.copy_(packed.dequantize())
            module.register_forward_pre_hook(round_fp8)
    save_file(tensors, tmp_path / "model.safetensors")
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    config = model.config.to_dict() | {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = lowbit.load(tmp_path, torch.float32)
    torch.testing.assert_close(ours(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)


def round_fp8(_: nn.Module, args: tuple[Tensor]) -> Tensor:
    (x,) = args
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def mxfp4_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [E, N, K] as gpt-oss stores it: blocks [E, N, K/32, 16] and scales [E, N, K/32]."""
    packed = [PackedWeight.from_float(part, QuantScheme.parse("mxfp4a16"), torch.float32) for part in w]
    blocks = torch.stack([part.codes for part in packed]).unflatten(2, (-1, 16))
    return blocks, torch.stack([part.scale for part in packed])


def test_mxfp4_experts_decode_as_transformers_decodes_them() -> None:
    blocks, scales = mxfp4_blocks(torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(0)))
    tensors = {"p_blocks": blocks, "p_scales": scales}
    experts = Mxfp4Reader({}, shapes_of(tensors), tensors.__getitem__).read_experts("p")
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # [E, K, N]
    assert torch.equal(torch.stack([part.weight.dequantize() for part in experts]), theirs.transpose(1, 2))


@torch.no_grad()
def test_a_gpt_oss_model_gives_the_logits_of_its_dequantized_twin(tmp_path: Path) -> None:
    model = tiny("gpt_oss")
    tensors = dict(model.state_dict())
    for name, parameter in list(model.named_parameters()):
        if name.endswith(("gate_up_proj", "down_proj")) and parameter.dim() == 3:
            blocks, scales = mxfp4_blocks(parameter.transpose(1, 2))
            del tensors[name]
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            parameter.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "model.safetensors")
    config = model.config.to_dict() | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = lowbit.load(tmp_path, torch.float32)
    model.set_experts_implementation("eager")
    torch.testing.assert_close(ours(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert sum(isinstance(module, QuantLinear) for module in ours.modules()) == 4 * 4 * 2


def test_an_int8_layer_in_a_gpu_s_layout_is_refused() -> None:
    tensors = {"m.weight": torch.zeros(4, 8, dtype=torch.int8), "m.SCB": torch.ones(4)}
    tensors["m.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="a GPU's own layout"):
        LlmInt8Reader({}, shapes_of(tensors), tensors.__getitem__).read("m")


@pytest.mark.parametrize(
    "change",
    [
        lambda named: named.pop("m.SCB"),
        lambda named: named.update({"m.weight": named["m.weight"].float()}),
        lambda named: named.update({"m.SCB": torch.ones(3)}),
    ],
)
def test_a_damaged_int8_layer_is_refused(change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {"m.weight": torch.zeros(4, 8, dtype=torch.int8), "m.SCB": torch.ones(4)}
    change(tensors)
    reader = LlmInt8Reader({}, shapes_of(tensors), tensors.__getitem__)
    if "m" in reader.modules:
        with pytest.raises(CheckpointError, match="m"):
            reader.read("m")
