"""The oracle is stock transformers with compressed-tensors or bitsandbytes: what they make of the folders we write.

Both sides run in float32 on the CPU. The logits of compressed-tensors must be equal to ours to the last bit; ours are
those of the reference kernel, which multiplies with the dequantized weight as they do (an int8 product sums in another
order).

Three habits of the readers (transformers 5.23, compressed-tensors 0.20, bitsandbytes 0.50) show here:
- compressed-tensors 0.18 to 0.20 gives a packed zero-point the shape of an unpacked one before it loads, so that no
  packed asymmetric checkpoint loads, whoever wrote it, unless weights are dequantized while they load (0.17 loads ours
  bit-equal, but packs 3, 5, 6 and 7 bits in another way). That route multiplies in the dtype of the scale.
- transformers dequantizes experts while it loads them, in the dtype of the scale, and drops their activations' scheme.
  So both are exact for a float32 source, whose scales are float32.
- On a processor with AVX-512 BF16 bitsandbytes rounds activations and absmax to bfloat16; its generic code doesn't.
"""

from pathlib import Path

import pytest
import torch
from architectures import tiny
from saved import DEMO_MODEL, cut_demo_model, save_tiny, write_text
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

import lowbit
from lowbit import Calibration, Conditions, Gates, QuantLinear, Recipe, Rule
from lowbit.kernels import registry

pytestmark = pytest.mark.demo
SYMMETRIC = ["gptq:w4a16-g64", "rtn:w8a16", "rtn:w3a16", "rtn:w5a16-g32", "rtn:w4a16-tensor",
             "rtn:w8a8", "rtn:w4a8-g64", "rtn:w8a8-dynamic-asym", "rtn:w8a8-static", "rtn:w8a8-static-asym",
             "rtn:fp8"]  # fmt: skip
ASYMMETRIC = ["gptq:w4a16-g64-asym", "rtn:w8a16-asym", "rtn:w3a16-g96-asym"]


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut_demo_model(tmp_path_factory.mktemp("demo") / "two_blocks")


@pytest.fixture(scope="module")
def two_blocks_float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut_demo_model(tmp_path_factory.mktemp("demo") / "two_blocks", torch.float32)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    return Calibration(write_text(tmp_path_factory.mktemp("text") / "calibration.txt", seed=0), samples=50, seq_len=32)


def quantized(source: Path, out: Path, recipe: Recipe, calibration: Calibration) -> Path:
    lowbit.quantize(source, out, recipe, Conditions(calibration, evaluation=None, gates=Gates(None)))
    return out


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with registry.use("reference"):
        return model(input_ids=ids, use_cache=False).logits


def some_ids(vocabulary: int) -> Tensor:
    return torch.randint(4, vocabulary, (2, 24), generator=torch.Generator().manual_seed(0))


def stock(folder: Path, dequantized: bool = False) -> PreTrainedModel:
    where = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantized else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)


def assert_equal_to_the_last_bit(folder: Path, vocabulary: int, dequantized: bool = False) -> None:
    ids = some_ids(vocabulary)
    ours = lowbit.load(folder, dtype=torch.float32)
    assert any(isinstance(module, QuantLinear) for module in ours.modules())
    theirs = stock(folder, dequantized)
    assert not any(isinstance(module, QuantLinear) for module in theirs.modules())
    expected = logits(theirs, ids)
    assert expected.isfinite().all()
    assert torch.equal(logits(ours, ids), expected)


@pytest.mark.parametrize("text", SYMMETRIC)
def test_two_blocks_of_the_demo_model_are_equal_to_the_last_bit(
    text: str, two_blocks: Path, calibration: Calibration, tmp_path: Path
) -> None:
    out = quantized(two_blocks, tmp_path / "out", Recipe.parse(text), calibration)
    assert_equal_to_the_last_bit(out, 49152)


def test_several_schemes_in_one_model_are_equal_to_the_last_bit(
    two_blocks: Path, calibration: Calibration, tmp_path: Path
) -> None:
    rules = (Rule.parse("*.down_proj=w8a16"), Rule.parse("*.q_proj=w8a8"), Rule("*.0.self_attn.k_proj", None))
    recipe = Recipe(Recipe.parse("rtn:w4a16-g64").scheme, "rtn", rules)
    assert_equal_to_the_last_bit(quantized(two_blocks, tmp_path / "out", recipe, calibration), 49152)


@pytest.mark.filterwarnings("ignore:You passed .quantization_config.")  # it says that it takes the one attribute given
@pytest.mark.parametrize("text", ASYMMETRIC)
def test_zero_points_are_equal_to_the_last_bit_where_weights_are_dequantized_while_they_load(
    text: str, two_blocks_float32: Path, calibration: Calibration, tmp_path: Path
) -> None:
    out = quantized(two_blocks_float32, tmp_path / "out", Recipe.parse(text), calibration)
    assert_equal_to_the_last_bit(out, 49152, dequantized=True)


def test_compressed_tensors_does_not_load_packed_zero_points_by_itself(
    calibration: Calibration, tmp_path: Path
) -> None:
    """When this fails, the reader has been repaired: move ASYMMETRIC to SYMMETRIC, and simplify the docstring."""
    save_tiny("llama", tmp_path / "model")
    out = quantized(tmp_path / "model", tmp_path / "out", Recipe.parse("rtn:w4a16-g16-asym"), calibration)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        stock(out)


def test_the_whole_demo_model_is_equal_to_the_last_bit(calibration: Calibration, tmp_path: Path) -> None:
    out = quantized(DEMO_MODEL, tmp_path / "out", Recipe.parse("rtn:w4a16-g64"), calibration)
    assert_equal_to_the_last_bit(out, 49152)


@pytest.mark.parametrize(
    ("model_type", "text"), [("mixtral", "rtn:w8a16"), ("qwen2_moe", "rtn:w4a16-g16"), ("qwen3_moe", "gptq:w4a16-g16")]
)
def test_experts_are_equal_to_the_last_bit(
    model_type: str, text: str, calibration: Calibration, tmp_path: Path
) -> None:
    save_tiny(model_type, tmp_path / "model")
    out = quantized(tmp_path / "model", tmp_path / "out", Recipe.parse(text), calibration)
    assert_equal_to_the_last_bit(out, 100)


def test_experts_with_bfloat16_scales_differ_by_the_rounding_of_their_weights(
    calibration: Calibration, tmp_path: Path
) -> None:
    save_tiny("mixtral", tmp_path / "model", torch.bfloat16)
    out = quantized(tmp_path / "model", tmp_path / "out", Recipe.parse("rtn:w4a16-g16"), calibration)
    ids = some_ids(100)
    ours, theirs = lowbit.load(out, dtype=torch.float32), stock(out)
    for name, parameter in theirs.named_parameters():
        if "experts" in name:
            experts = ours.get_submodule(name)
            exact = torch.stack([layer.packed.dequantize(torch.bfloat16) for layer in experts.children()])
            assert torch.equal(parameter, exact.float())
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=0, atol=0.02)  # measured: 0.0043 of 1.66


@pytest.mark.parametrize("text", ["nf4-b64", "nf4-b64-dq", "fp4-b64", "fp4-b64-dq"])
def test_bitsandbytes_gives_the_same_logits_within_float32_rounding(
    text: str, two_blocks_float32: Path, calibration: Calibration, tmp_path: Path
) -> None:
    out = quantized(two_blocks_float32, tmp_path / "out", Recipe.parse(f"rtn:{text}"), calibration)
    ids, theirs = some_ids(49152), stock(out)
    layers = [module for module in theirs.modules() if type(module).__name__ == "Linear4bit"]
    assert len(layers) == 14
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    ours = logits(lowbit.load(out, dtype=torch.float32), ids)
    torch.testing.assert_close(ours, logits(theirs, ids), rtol=0, atol=1e-4)  # of 80; measured: no difference


def test_the_oracle_can_tell_models_apart(tmp_path: Path) -> None:
    """The float model's logits are far from the quantized ones, so equality says something."""
    ids = some_ids(100)
    model = tiny("llama")
    before = logits(model, ids)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] += 1e-3
    assert not torch.equal(logits(model, ids), before)
