"""The oracles are gptqmodel 7.7 and autoawq 0.2.9: checkpoints that they packed, and what they make of them.

make_foreign.py made the files; nothing of both packages is needed here. Weights are equal to float16's last bit; logits
to float32's rounding (sums in another order).
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowbit
from lowbit.errors import CheckpointError, InputError
from lowbit.io.awq import AwqReader, config_awq, tensors_awq
from lowbit.io.gptq import GptqReader, config_gptq, shift_zeros, tensors_gptq
from lowbit.io.stored import Reader
from lowbit.kernels.ops import dequantize
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.pack import pack
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

FIXTURES = Path(__file__).parent / "fixtures"
TOKENS = torch.arange(24).view(2, 12) * 7 % 32
LAYERS = load_file(FIXTURES / "layers.safetensors")
GPTQ = [
    f"gptq{bits}v{version}{kind}" for bits in (2, 3, 4, 8) for version in (1, 2) for kind in ("sym", "asym", "order")
]
AWQ = [f"awq{kind}{group}" for kind in ("gemm", "gemv") for group in (32, 64)]
ARCHITECTURES = ("llama", "qwen2", "mistral", "phi3")


def reader_for(name: str, tensors: dict[str, Tensor], **changes: object) -> Reader:
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if name.startswith("awq"):
        config = {"bits": 4, "group_size": int(name[7:]), "zero_point": True, "version": name[3:7]}
        return AwqReader(config | changes, shapes, tensors.__getitem__)
    form = "gptq" if name[6] == "1" else "gptq_v2"
    config = {"bits": int(name[4]), "group_size": 32, "sym": "asym" not in name, "checkpoint_format": form}
    return GptqReader(config | changes, shapes, tensors.__getitem__)


@pytest.mark.parametrize("name", [*GPTQ, *AWQ])
def test_their_layers_are_read_to_the_last_bit(name: str) -> None:
    reader = reader_for(name, LAYERS)
    weight = reader.read(name).weight
    weight.check(name)
    assert torch.equal(weight.dequantize(torch.float16), LAYERS[f"expected.{name}"])
    assert weight.scheme.weights.symmetric == ("asym" not in name and "awq" not in name)
    assert weight.scheme.weights.ordered == name.endswith("order")
    assert reader.warnings == []


@pytest.mark.parametrize("name", [*GPTQ, *AWQ[:2]])
def test_what_we_write_is_what_they_wrote(name: str) -> None:
    weight = reader_for(name, LAYERS).read(name).weight
    ours = tensors_awq(name, weight) if name.startswith("awq") else tensors_gptq(name, weight, int(name[6]))
    theirs = {key: tensor for key, tensor in LAYERS.items() if key.startswith(f"{name}.")}
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype, key
        assert torch.equal(tensor, theirs[key]), key


@torch.no_grad()
def test_act_order_runs_on_sorted_inputs() -> None:
    layer = QuantLinear.from_packed(reader_for("gptq4v1order", LAYERS).read("gptq4v1order").weight)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = x @ LAYERS["expected.gptq4v1order"].float().T
    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-3)  # the expected weights are in float16
    torch.testing.assert_close(layer(x), x @ layer.packed.dequantize().T)


@pytest.mark.parametrize(("name", "declared"), [("gptq4v1sym", "gptq_v2"), ("gptq4v2sym", "gptq")])
def test_symmetric_zero_points_tell_their_version_against_the_config(name: str, declared: str) -> None:
    reader = reader_for(name, LAYERS, checkpoint_format=declared)
    weight = reader.read(name).weight
    assert torch.equal(weight.dequantize(torch.float16), LAYERS[f"expected.{name}"])
    assert len(reader.warnings) == 1
    assert "the symmetric zero-points are those of" in reader.warnings[0]


def test_a_zero_point_of_0_in_v1_comes_back_from_whole_words_and_is_not_written() -> None:
    """gptqmodel subtracts 0x11111111 from the word: zero-points 5, 0, 3 become nibbles 4, F, 1, the third one borrowed
    from; adding it again gives all three back."""
    zero = torch.tensor([[5, 0, 3, 8, 0, 0, 1, 15]], dtype=torch.int8) - 8
    stored = shift_zeros(pack(zero, 4), -1, 4, 8)
    assert stored.item() & 0xFFF == 0x1F4
    assert torch.equal(shift_zeros(stored, 1, 4, 8), pack(zero, 4))
    scheme = QuantScheme.parse("w4a16-g32-asym")
    weight = PackedWeight.from_codes(torch.zeros(8, 32, dtype=torch.int8), torch.ones(8, 1), zero.T, scheme)
    with pytest.raises(InputError, match="zero-points are 0, which GPTQ v1 can't store; write gptq-v2"):
        tensors_gptq("m", weight, 1)
    assert tensors_gptq("m", weight, 2)["m.qzeros"].item() & 0xFFF == 0x305


@pytest.mark.parametrize("key", ["qweight", "qzeros", "scales"])
@pytest.mark.parametrize("name", ["gptq4v1asym", "awqgemm32", "awqgemv32"])
def test_a_layer_that_lost_a_tensor_or_a_row_is_named(name: str, key: str) -> None:
    whole = {part: tensor for part, tensor in LAYERS.items() if part.startswith(f"{name}.")}
    for broken in (
        {part: tensor for part, tensor in whole.items() if part != f"{name}.{key}"},
        whole | {f"{name}.{key}": whole[f"{name}.{key}"][1:]},
        whole | {f"{name}.{key}": whole[f"{name}.{key}"][0]},
        whole | {f"{name}.{key}": whole[f"{name}.{key}"].double()},
    ):
        reader = reader_for(name, broken)
        if key == "scales" and f"{name}.{key}" in broken and broken[f"{name}.{key}"].dtype == torch.float64:
            continue
        if name in reader.modules:
            with pytest.raises(CheckpointError, match=name):
                reader.read(name)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gptq4v1sym", {"bits": "4"}, "bits = '4', which is no whole number"),
        ("gptq4v1sym", {"bits": 5}, "5 bits are none of 2, 3, 4, 8"),
        ("gptq4v1sym", {"bits": 8}, "don't fit 8 bits"),
        ("gptq4v1sym", {"checkpoint_format": "marlin"}, "not 'marlin'"),
        ("gptq4v1sym", {"pack_dtype": "int16"}, "not 'int16'"),
        ("gptq4v1sym", {"dynamic": {"(": {"bits": 8}}}, "has the pattern"),
        ("awqgemm32", {"version": "marlin"}, "not 4 bits of 'marlin'"),
        ("awqgemm32", {"bits": 3}, "not 3 bits"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message.replace("(", r"\(")):
        reader_for(name, LAYERS, **changes).read(name)


def test_dynamic_rules_change_the_bits_of_a_layer() -> None:
    reader = reader_for("gptq4v1sym", LAYERS, dynamic={"+:.*gptq8.*": {"bits": 8}, "-:lm_head": {}})
    for name in ("gptq4v1sym", "gptq8v1sym"):
        weight = reader.read(name).weight
        assert torch.equal(weight.dequantize(torch.float16), LAYERS[f"expected.{name}"])


def test_a_g_idx_that_fills_groups_unevenly_is_refused() -> None:
    broken = dict(LAYERS)
    broken["gptq4v1order.g_idx"] = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(CheckpointError, match="does not put 32 inputs in each of 2 groups"):
        reader_for("gptq4v1order", broken).read("gptq4v1order")


def folder_of(name: str, folder: Path) -> Tensor:
    """A checkpoint folder out of a fixture; the owner's logits."""
    path = FIXTURES / f"{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        config = file.metadata()["config"]
    tensors = load_file(path)
    logits = tensors.pop("expected.logits")
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(config)
    return logits


@torch.no_grad()
@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_their_models_give_their_logits(method: str, model_type: str, tmp_path: Path) -> None:
    expected = folder_of(f"{method}-{model_type}", tmp_path)
    model = lowbit.load(tmp_path, torch.float32)
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == (4 if model_type == "phi3" else 7)
    assert sum(layer.packed.bytes for layer in layers) < 2 * sum(
        layer.in_features * layer.out_features for layer in layers
    )


def test_configs_say_what_vllm_asks_for() -> None:
    """Its get_from_keys raises where bits, group_size, desc_act or sym (GPTQ), zero_point or bits (AWQ) is missing."""
    scheme, other = QuantScheme.parse("w4a16-g32"), QuantScheme.parse("w8a16-g32-order")
    config = config_gptq({"a": scheme, "b": other}, 1, "lowbit:0.1")
    assert config["quant_method"] == "gptq"
    assert (config["bits"], config["group_size"], config["desc_act"], config["sym"]) == (4, 32, False, True)
    assert config["dynamic"] == {"+:^b$": {"bits": 8, "desc_act": True}}
    assert json.loads(json.dumps(config)) == config
    awq = config_awq({"a": scheme}, ["lm_head"])
    assert (awq["bits"], awq["group_size"], awq["zero_point"], awq["modules_to_not_convert"]) == (
        4,
        32,
        True,
        ["lm_head"],
    )
    with pytest.raises(InputError, match="one group size for all layers"):
        config_awq({"a": scheme, "b": QuantScheme.parse("w4a16-g64")}, [])


def test_act_order_survives_the_way_to_the_kernels_and_gradients() -> None:
    """The op that dequantizes gives the columns back their places, whatever kernel runs it."""
    layer = QuantLinear.from_packed(reader_for("gptq4v1order", LAYERS).read("gptq4v1order").weight)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    w = layer.packed.dequantize()
    assert torch.equal(dequantize(layer.packed, x), w)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, w.sum(0).expand(3, 64))
