"""Writing a checkpoint. Oracles: the source's own bytes for what was not quantized, PackedWeight for what was, and
bitsandbytes for its 4-bit codes. That stock transformers loads the result is in tests/interop."""

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from checkpoints import COPIED, Written, metadata, quantize_folder, same_bytes, stored_tensors, write_quantized
from safetensors.torch import load_file
from torch import nn

from lowbit.io.source import INDEX, Source
from lowbit.nn.linear import QuantLinear

PACKED = ["weight_packed", "weight_scale", "weight_shape"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """w4a16-g16 but for the down projections, from a source with more files than a model needs."""
    folder = tmp_path_factory.mktemp("checkpoint")
    first = write_quantized(folder, "llama", "rtn:w8a16")
    (first.source / "pytorch_model.bin").write_bytes(b"a pickle")
    (first.source / "README.md").write_text("of the original")
    (first.source / "report.json").write_text("{}")
    (first.source / "assets").mkdir()
    return quantize_folder(first.source, folder / "again", "rtn:w4a16-g16", ["*.down_proj=w8a8-static-asym"])


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A mixture whose source has several shards."""
    return write_quantized(tmp_path_factory.mktemp("sharded"), "mixtral", "rtn:w4a16-g16", shard_size="50KB")


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]


def test_a_quantized_weight_is_exchanged_for_the_tensors_of_its_module(llama: Written) -> None:
    before, after = stored_tensors(llama.source), stored_tensors(llama.out)
    gone = {name for name in before if name not in after}
    assert gone == {
        f"{name}.weight" for name in linear_names(llama.model) if not name.endswith("down_proj")
    }  # w8a8 keeps its codes under the name "weight"
    q_proj = "model.layers.0.self_attn.q_proj"
    assert sorted(name for name in after if name.startswith(q_proj)) == [f"{q_proj}.{key}" for key in PACKED]
    for name in linear_names(llama.model):
        layer = llama.model.get_submodule(name)
        for key, tensor in layer.state_dict().items():
            assert same_bytes(after[f"{name}.{key}"], tensor), f"{name}.{key}"


def test_scales_have_the_dtype_of_the_source(llama: Written) -> None:
    scales = {name: t.dtype for name, t in stored_tensors(llama.out).items() if name.endswith("_scale")}
    assert set(scales.values()) == {torch.bfloat16}
    assert "model.layers.0.mlp.down_proj.input_scale" in scales


@pytest.mark.parametrize("which", ["llama", "sharded"])
def test_everything_else_keeps_its_bytes(which: str, request: pytest.FixtureRequest) -> None:
    written: Written = request.getfixturevalue(which)
    before, after = stored_tensors(written.source), stored_tensors(written.out)
    kept = [name for name in before if name in after and not name.endswith("down_proj.weight")]
    assert "model.embed_tokens.weight" in kept
    assert "lm_head.weight" in kept
    assert [name for name in kept if not same_bytes(before[name], after[name])] == []
    for name in [*COPIED, "generation_config.json"]:
        assert (written.out / name).read_bytes() == (written.source / name).read_bytes()


def test_only_what_belongs_to_the_model_is_copied(llama: Written) -> None:
    expected = {*COPIED, "config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in llama.out.iterdir()} == expected


def test_config_differs_by_its_quantization_only(llama: Written) -> None:
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (llama.source, llama.out))
    quantization = after.pop("quantization_config")
    assert after == before
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["format"] == "mixed-precision"
    assert quantization["ignore"] == ["lm_head"]
    groups = quantization["config_groups"].values()
    first, second = sorted(groups, key=lambda group: group["weights"]["num_bits"])
    assert first["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "dynamic": False, "group_size": 16
    }  # fmt: skip
    assert "input_activations" not in first
    assert first["format"] == "pack-quantized"
    assert second["targets"] == [f"model.layers.{index}.mlp.down_proj" for index in range(3)]
    assert second["input_activations"] == {
        "num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False
    }  # fmt: skip


def test_one_scheme_is_one_group_that_targets_linear(sharded: Written) -> None:
    config = json.loads((sharded.out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    routers = [f"model.layers.{index}.block_sparse_moe.gate" for index in range(3)]
    assert config["ignore"] == ["lm_head", *routers]  # by their names on disk


def test_files_say_that_they_hold_torch_tensors(llama: Written) -> None:
    """transformers refuses a file that does not."""
    assert metadata(llama.out / "model.safetensors") == {"format": "pt"}


def test_shards_keep_their_names_and_their_tensors(sharded: Written) -> None:
    source, out = Source("", sharded.source), Source("", sharded.out)
    assert out.shards == source.shards
    assert len(out.shards) > 3
    index = json.loads((sharded.out / INDEX).read_text())
    found = {name: shard for shard in out.shards for name in load_file(sharded.out / shard)}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored_tensors(sharded.out).values())
    old_map = json.loads((sharded.source / INDEX).read_text())["weight_map"]
    for name, shard in found.items():
        module = name.rpartition(".")[0]
        assert shard == old_map.get(name, old_map.get(f"{module}.weight"))


def test_each_expert_is_a_module_on_disk(sharded: Written) -> None:
    after = stored_tensors(sharded.out)
    experts = sharded.model.get_submodule("model.layers.1.mlp.experts")
    whole = experts.gate_up_proj[2].layer.packed.dequantize()
    for part, rows in (("w1", slice(0, 96)), ("w3", slice(96, 192))):
        name = f"model.layers.1.block_sparse_moe.experts.2.{part}"
        assert sorted(key for key in after if key.startswith(f"{name}.")) == [f"{name}.{key}" for key in PACKED]
        q = experts.gate_up_proj[2].layer.packed.rows(rows.start, rows.stop)
        assert same_bytes(after[f"{name}.weight_packed"], q.codes)
        assert torch.equal(q.dequantize(), whole[rows])


@pytest.mark.parametrize("text", ["nf4-b64", "nf4-b64-dq", "fp4-b32"])
def test_codebooks_are_written_as_bitsandbytes_does(text: str, tmp_path: Path) -> None:
    written = write_quantized(tmp_path, "llama", f"rtn:{text}")
    before, after = stored_tensors(written.source), stored_tensors(written.out)
    config = json.loads((written.out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes"
    assert config["bnb_4bit_quant_type"] == text[:3]
    assert config["bnb_4bit_use_double_quant"] == text.endswith("dq")
    assert config["llm_int8_skip_modules"] == ["lm_head"]
    assert len(linear_names(written.model)) == 21
    for name in linear_names(written.model):
        theirs, state = bnb.quantize_4bit(
            before[f"{name}.weight"],
            blocksize=int(text.split("-")[1][1:]),
            quant_type=text[:3],
            compress_statistics=text.endswith("dq"),
        )
        expected = {"": theirs} | {f".{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
        for key, tensor in expected.items():
            assert same_bytes(after[f"{name}.weight{key}"], tensor), name + key
