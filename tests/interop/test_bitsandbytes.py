"""The oracle is bitsandbytes on the CPU: its codes, maxima, entries and weights, and transformers' reader of them.

Where a row does not hold whole blocks, weights are compared with bitsandbytes' generic code: its AVX-512 code (0.50)
takes the wrong absmax there.
"""

import json
from inspect import unwrap
from itertools import product
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.nn import Linear4bit
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lowbit.errors import CheckpointError, InputError
from lowbit.io.bitsandbytes import config_4bit, parse_4bit, tensors_4bit
from lowbit.numerics import codebook
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

SCHEMES = ["nf4-b64", "nf4-b64-dq", "fp4-b64", "fp4-b64-dq"]
each_scheme = pytest.mark.parametrize("text", SCHEMES)


def make_weight(shape: tuple[int, ...], dtype: torch.dtype, zeros: int = 0) -> Tensor:
    """Heavy-tailed weights; the first `zeros` and the last 5 elements are zero where zeros is not 0."""
    generator = torch.Generator().manual_seed(sum(shape))
    w = (torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator) ** 3).to(dtype)
    if zeros:
        w.view(-1)[:zeros] = 0
        w.view(-1)[-5:] = 0
    return w


def same_bits(a: Tensor, b: Tensor) -> bool:
    a_bytes, b_bytes = (tensor.reshape(-1).view(torch.uint8) for tensor in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a_bytes, b_bytes)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_levels_are_theirs(name: str) -> None:
    assert same_bits(codebook.levels_of(name), bnb.get_4bit_type(name, device="cpu"))


def test_the_dynamic_map_is_theirs() -> None:
    assert same_bits(codebook.dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (33, 70), (7, 9), (1, 1), (129, 64)], ids=str)
@pytest.mark.parametrize(("name", "block"), list(product(("nf4", "fp4"), (32, 64, 128, 1024, 4096))))
def test_codes_and_maxima_are_theirs(name: str, block: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    levels = codebook.levels_of(name)
    for zeros in (0, 2 * block):
        w = make_weight(shape, dtype, zeros)
        packed, state = bnb.quantize_4bit(w, blocksize=block, quant_type=name)
        codes, absmax = codebook.encode_blocks(w, levels, block)
        assert same_bits(codebook.pack_nibbles(codes, codebook.zero_code(levels)), packed.view(-1))
        assert same_bits(absmax, state.absmax)
        generic = unwrap(_dequantize_4bit_compute)  # the function under torch.compile
        theirs = generic(packed.view(-1), state.absmax, state.code, block, shape, dtype)
        assert torch.equal(codebook.decode_blocks(codes, absmax, levels, block, shape, dtype), theirs)


@pytest.mark.parametrize("length", [63, 64], ids=["last block, not full", "full block"])
def test_a_tie_between_levels_falls_as_theirs_in_full_and_short_blocks(length: int) -> None:
    """bfloat16 weights often lie halfway between fp4 levels, where a quotient and a product with 1 / absmax part."""
    generator = torch.Generator().manual_seed(0)
    levels, ways = codebook.levels_of("fp4"), []
    for _ in range(200):
        w = torch.randn(1, length, generator=generator).bfloat16()
        packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="fp4")
        codes, absmax = codebook.encode_blocks(w, levels, 64)
        assert same_bits(codebook.pack_nibbles(codes), packed.view(-1))
        assert same_bits(absmax, state.absmax)
        ways.append(not torch.equal(w.float() / absmax, w.float() * (1 / absmax)))
    assert any(ways)


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 5000])
def test_nested_codes_maxima_and_offset_are_theirs(count: int) -> None:
    absmax = make_weight((count,), torch.float32).abs()
    offset = absmax.mean()
    codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    nested = codebook.double_quantize(absmax)
    assert same_bits(nested.codes, codes)
    assert same_bits(nested.absmax, state.absmax)
    assert same_bits(nested.offset, offset)
    assert same_bits(nested.decode(), bnb.dequantize_blockwise(codes, state) + offset)


def test_nested_codes_are_theirs_at_every_edge_of_the_grid() -> None:
    """All midpoints of the 2^16 grid and their neighbours, both signs of zero, subnormal maxima, blocks of zeros."""
    edges = ((torch.arange(65535).double() + 0.5) / 65535 * 2 - 1).float()
    values = torch.cat(
        [edges, edges.nextafter(torch.tensor(2.0)), edges.nextafter(torch.tensor(-2.0)), -torch.zeros(1)]
    )
    values = torch.nn.functional.pad(values, (0, -values.numel() % 255)).view(-1, 255)
    ended = torch.cat([torch.ones(len(values), 1), values], dim=1).view(-1)
    subnormal = torch.tensor([1e-39, -1e-39, 3e-40, 1e-45]).repeat(64)
    for x in (ended, subnormal, torch.zeros(300)):
        codes, absmax = codebook.encode_dynamic(x)
        their_codes, state = bnb.quantize_blockwise(x, blocksize=256)
        assert same_bits(codes, their_codes)
        assert same_bits(absmax, state.absmax)


@each_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_entries_are_those_of_their_quant_state(text: str, dtype: torch.dtype) -> None:
    scheme = QuantScheme.parse(text)
    w = make_weight((48, 128), dtype)
    data, state = bnb.quantize_4bit(
        w, blocksize=64, quant_type=scheme.weights.format.name, compress_statistics=scheme.weights.nested
    )
    theirs = {"layer.weight": data} | {f"layer.weight.{key}": t for key, t in state.as_dict(packed=True).items()}
    ours = tensors_4bit("layer", PackedWeight.from_float(w, scheme, dtype), dtype)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not same_bits(ours[key], theirs[key])] == []


@each_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_their_reader_gives_our_weights(text: str, dtype: torch.dtype) -> None:
    packed = PackedWeight.from_float(make_weight((48, 128), dtype), QuantScheme.parse(text), dtype)
    entries = tensors_4bit("layer", packed, dtype)
    data = entries.pop("layer.weight")
    state = bnb.QuantState.from_dict(entries, device=torch.device("cpu"))
    assert torch.equal(bnb.dequantize_4bit(data, state), packed.dequantize(dtype))


@each_scheme
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_their_weights_are_read_bit_for_bit(text: str, storage: torch.dtype) -> None:
    scheme = QuantScheme.parse(text)
    data, state = bnb.quantize_4bit(
        make_weight((48, 128), torch.bfloat16),
        quant_type=scheme.weights.format.name,
        compress_statistics=scheme.weights.nested,
        quant_storage=storage,
    )
    entries = {"a.b.weight": data} | {f"a.b.weight.{key}": t for key, t in state.as_dict(packed=True).items()}
    packed = parse_4bit("a.b", entries)
    assert packed.scheme == scheme
    assert packed.shape == (48, 128)
    assert torch.equal(packed.dequantize(torch.bfloat16), bnb.dequantize_4bit(data, state))


@pytest.mark.parametrize("text", ["nf4-b32", "fp4-b4096-dq"])
@pytest.mark.parametrize("shape", [(7, 9), (64, 128)], ids=str)
def test_parse_inverts_tensors(text: str, shape: tuple[int, int]) -> None:
    packed = PackedWeight.from_float(make_weight(shape, torch.float32), QuantScheme.parse(text), torch.float32)
    again = parse_4bit("layer", tensors_4bit("layer", packed, torch.float32))
    assert again.scheme == packed.scheme
    assert again.shape == packed.shape
    ours, theirs = packed.tensors(), again.tensors()
    assert ours.keys() == theirs.keys()
    assert all(same_bits(ours[key], theirs[key]) for key in ours)


def broken(key: str, value: Tensor | None) -> dict[str, Tensor]:
    """The entries of a good nested layer with one of them replaced or, for None, left out."""
    packed = PackedWeight.from_float(
        make_weight((48, 128), torch.float32), QuantScheme.parse("nf4-b64-dq"), torch.float32
    )
    entries = tensors_4bit("layer", packed, torch.float32)
    del entries[f"layer.{key}"]
    return entries if value is None else entries | {f"layer.{key}": value}


def text_tensor(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weight.absmax", None, "no layer.weight.absmax"),
        (STATE, None, "has 0"),
        (STATE, text_tensor("{"), "not a JSON text"),
        (STATE, text_tensor("[]"), "none that lowbit reads"),
        (STATE, text_tensor('{"quant_type": "af4", "blocksize": 64, "shape": [48, 128]}'), "af4-b64"),
        ("weight", torch.zeros(10, 1, dtype=torch.uint8), "holds 10 values where its quant_state needs 3072"),
        ("weight.nested_absmax", torch.zeros(2), "nested_absmax holds 2 values"),
        ("weight.quant_map", torch.linspace(-1, 1, 16), "other levels"),
        ("weight.nested_quant_map", torch.linspace(-1, 1, 256), "other levels"),
    ],
)
def test_a_damaged_layer_is_refused_with_its_name(key: str, value: Tensor | None, message: str) -> None:
    with pytest.raises(CheckpointError, match="layer") as caught:
        parse_4bit("layer", broken(key, value))
    assert message in str(caught.value)


def test_other_schemes_are_refused() -> None:
    scheme = QuantScheme.parse("w4a16-g64")
    with pytest.raises(InputError, match="nf4 and fp4 only"):
        config_4bit(scheme, torch.bfloat16, [])
    packed = PackedWeight.from_float(make_weight((8, 64), torch.float32), scheme, torch.float32)
    with pytest.raises(InputError, match="w4a16-g64"):
        tensors_4bit("layer", packed, torch.float32)


@each_scheme
def test_transformers_reads_the_config_and_writes_it_back(text: str) -> None:
    config = config_4bit(QuantScheme.parse(text), torch.bfloat16, ["lm_head"])
    read = BitsAndBytesConfig.from_dict(config)
    assert read.quantization_method() == text[:3]
    assert {key: value for key, value in read.to_dict().items() if not key.startswith("_")} == config


def tiny_llama() -> LlamaForCausalLM:
    """Two blocks whose linears all have in_features that hold whole blocks of 64."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def write_checkpoint(model: LlamaForCausalLM, folder: Path, scheme: QuantScheme) -> dict[str, PackedWeight]:
    """A folder with config.json and model.safetensors, linears quantized but for lm_head and one; their weights."""
    skip = ["lm_head", "model.layers.1.mlp.down_proj"]
    tensors = dict(model.state_dict())
    quantized = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in skip:
            weight = tensors.pop(f"{name}.weight")
            quantized[name] = PackedWeight.from_float(weight, scheme, weight.dtype)
            tensors |= tensors_4bit(name, quantized[name], weight.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": config_4bit(scheme, torch.float32, skip),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return quantized


@each_scheme
def test_stock_transformers_loads_a_folder_with_our_weights(text: str, tmp_path: Path) -> None:
    quantized = write_checkpoint(tiny_llama(), tmp_path, QuantScheme.parse(text))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    linears = {name: module for name, module in loaded.named_modules() if isinstance(module, Linear4bit)}
    assert linears.keys() == quantized.keys()
    assert len(linears) == 13
    for name, module in linears.items():
        weights = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(weights, quantized[name].dequantize(torch.float32)), name
