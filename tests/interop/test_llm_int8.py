"""The oracle is bitsandbytes' Linear8bitLt on the CPU: the codes of LLM.int8() and its products.

It works in float16, we in the input's dtype; the bound on the difference is float16's rounding of x, of the weight
columns in 16 bits and of the output.
"""

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from architectures import tiny
from bitsandbytes.nn import Int8Params, Linear8bitLt
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lowbit
from lowbit.errors import InputError, SchemeError
from lowbit.io.conversion import Options
from lowbit.io.convert import convert
from lowbit.io.llm_int8 import refusal, tensors_8bit
from lowbit.model.recipe import Recipe
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

N, K, M = 40, 64, 9


def make_layers(threshold: float) -> tuple[Linear8bitLt, QuantLinear]:
    generator = torch.Generator().manual_seed(0)
    w, bias = torch.randn(N, K, generator=generator).half(), torch.randn(N, generator=generator).half()
    theirs = Linear8bitLt(K, N, has_fp16_weights=False, threshold=threshold)
    theirs.weight, theirs.bias = Int8Params(w, requires_grad=False), nn.Parameter(bias)
    codes, maxima, _ = bnb.int8_vectorwise_quant(w)
    theirs.weight.CB, theirs.weight.SCB, theirs.weight.data = codes, maxima, codes
    packed = PackedWeight(QuantScheme.parse(f"int8-t{threshold:g}"), (N, K), codes, (maxima / 127).view(-1, 1))
    return theirs.eval(), QuantLinear.from_packed(packed, bias)


def make_input(outliers: bool) -> Tensor:
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).clamp(-5, 5)
    if outliers:
        x[3, 10], x[5, 41], x[0, 10], x[8, 0] = 30.0, -6.0, 7.5, 6.01
    x[2] = 0
    return x.half()


@pytest.mark.parametrize("outliers", [False, True], ids=["no outliers", "outliers"])
@pytest.mark.parametrize("threshold", [0.0, 6.0, 2.5])
@torch.no_grad()
def test_products_are_theirs_within_float16_rounding(threshold: float, outliers: bool) -> None:
    theirs, ours = make_layers(threshold)
    x = make_input(outliers)
    expected, y = theirs(x).float(), ours(x).float()
    assert (y - expected).abs().max() <= 3 * 2**-11 * expected.abs().max()
    if outliers and threshold == 6.0:  # and the decomposition is worth its work
        exact = x.float() @ ours.packed.dequantize().T + ours.bias.float()
        plain = make_layers(0.0)[1](x).float()
        assert (y - exact).norm() < 0.5 * (plain - exact).norm()


@torch.no_grad()
def test_a_value_at_the_threshold_is_an_outlier_and_its_whole_column_goes() -> None:
    _, ours = make_layers(6.0)
    x = torch.zeros(2, K)
    x[0, 5], x[1, 5], x[1, 6] = 6.0, 0.123, 1.0
    w = ours.packed.dequantize()
    expected = x @ w.T + ours.bias.float()  # 0.123 in column 5 is not rounded, and 1.0 is the largest of its row
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_gradients_reach_the_input() -> None:
    _, ours = make_layers(6.0)
    x = make_input(True).float().requires_grad_()
    with torch.enable_grad():
        ours(x).sum().backward()
    torch.testing.assert_close(x.grad, ours.packed.dequantize().sum(0).expand(M, K))


TOKENS = torch.arange(24).view(2, 12) * 7 % 100 + 1


def written_by_them(folder: Path, model_type: str) -> Path:
    tiny(model_type).save_pretrained(folder / "float")
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=2.0)
    model = AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=config, dtype=torch.float16)
    model.save_pretrained(folder / "theirs")
    return folder / "theirs"


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "phi3"])
def test_what_we_write_is_what_bitsandbytes_wrote(model_type: str, tmp_path: Path) -> None:
    """Codes and layouts byte for byte; SCB so that its 127th part is the same number."""
    theirs = written_by_them(tmp_path, model_type)
    result = convert(theirs, tmp_path / "ours", "bitsandbytes")
    assert result.verified == len(result.schemes) > 0
    first, last = (load_file(folder / "model.safetensors") for folder in (theirs, tmp_path / "ours"))
    assert first.keys() == last.keys()
    for name, tensor in first.items():
        assert tensor.dtype == last[name].dtype, name
        assert tensor.shape == last[name].shape, name
        scale = 127 if name.endswith("SCB") else 1
        assert torch.equal(tensor / scale, last[name] / scale), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (theirs, tmp_path / "ours")]
    kept = ("load_in_8bit", "load_in_4bit", "llm_int8_threshold", "quant_method")
    before, after = ({key: config["quantization_config"][key] for key in kept} for config in configs)
    assert before == after


@torch.no_grad()
def test_stock_transformers_runs_what_we_rounded_to_llm_int8(tmp_path: Path) -> None:
    """Layer by layer on the same inputs: within float16's rounding, as above."""
    theirs = written_by_them(tmp_path, "llama")
    convert(theirs, tmp_path / "gptq", "gptq-v2", Options("requantize", QuantScheme.parse("w8a16-g32")))
    options = Options("requantize", QuantScheme.parse("int8-t6"))
    result = convert(tmp_path / "gptq", tmp_path / "ours", "bitsandbytes", options)
    assert len(result.requantized) == 21
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    ours = lowbit.load(tmp_path / "ours", torch.float32)
    assert sum(isinstance(module, Linear8bitLt) for module in stock.modules()) == 21
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for name, module in stock.named_modules():
        if isinstance(module, Linear8bitLt) and module.in_features == 64:
            y = module(x)
            assert (ours.get_submodule(name)(x) - y).abs().max() < 2.5e-5 * y.abs().max(), name


def test_a_scale_that_is_no_127th_part_is_refused() -> None:
    scale = torch.nextafter(torch.ones(4096), torch.tensor(2.0)).cumsum(0).view(-1, 1) * 1e-3
    packed = PackedWeight(QuantScheme.parse("int8-t6"), (4096, 8), torch.zeros(4096, 8, dtype=torch.int8), scale)
    assert refusal(packed) == "one of its float32 scales is no 127th part of a float32 number"
    with pytest.raises(InputError, match="no 127th part"):
        tensors_8bit("m", packed)
    half = PackedWeight(packed.scheme, packed.shape, packed.codes, scale.half())
    assert torch.equal(tensors_8bit("m", half)["m.SCB"] / 127, scale.half().float().view(-1))
    assert "not w8a8" in str(refusal(PackedWeight(QuantScheme.parse("w8a8"), half.shape, half.codes, half.scale)))


def test_other_schemes_can_t_stand_beside_it() -> None:
    rule = lowbit.Rule("*down_proj", QuantScheme.parse("w8a8"))
    with pytest.raises(SchemeError, match="under one threshold"):
        Recipe(QuantScheme.parse("int8-t6"), "rtn", (rule,))
