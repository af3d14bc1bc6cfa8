"""Loading a checkpoint packed. Oracle: the quantized model that the checkpoint was written from, still in memory, whose
logits must be met to the last bit."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import TOKENS, Written, rewrite, rewrite_config, source_folder, stored_tensors, write_quantized
from torch import Tensor, nn

import lowbit
from lowbit.errors import CheckpointError
from lowbit.nn.experts import QuantExperts
from lowbit.nn.linear import QuantLinear

ROUND_TRIPS = {
    "llama by gptq": ("llama", "gptq:w4a16-g16", []),
    "3 bits": ("phi3", "rtn:w3a16-g32", []),
    "zero-points": ("mistral", "rtn:w4a16-g16-asym", []),
    "one scale": ("stablelm", "rtn:w8a16-tensor-asym", []),
    "a tied head": ("gemma2", "rtn-clip:w8a16", []),
    "a tied head and another forward": ("smollm3", "rtn:w4a8", []),
    "biases": ("opt", "gptq:w4a16-g16-asym", []),
    "biases and static inputs": ("qwen2", "rtn:w8a8-static-asym", []),
    "one matrix for q, k and v": ("gpt_neox", "rtn:w8a8-dynamic-asym", []),
    "fp8": ("falcon", "rtn:fp8", []),
    "LLM.int8()": ("mistral", "rtn:int8-t6", []),
    "nf4": ("olmo2", "rtn:nf4-b64-dq", []),
    "fp4 and biases": ("starcoder2", "rtn:fp4-b32", []),
    "a rule and a head": ("qwen3", "rtn:w4a16-g16", ["*.down_proj=w8a16", "*.o_proj=w8a8", "lm_head=w8a16"]),
    "experts under other names": ("mixtral", "gptq:w4a16-g16", []),
    "experts to 8 bits": ("qwen2_moe", "rtn:w8a8", []),
    "experts in some blocks": ("qwen3_moe", "gptq:w4a16-g16", ["*.gate_up_proj=w8a16"]),
    "experts of deepseek": ("deepseek_v3", "rtn:w4a16-g16", []),
    "experts that stay as they are": ("gpt_oss", "rtn:w8a16", []),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A llama with a group, whose folder is copied by tests that damage it."""
    return write_quantized(tmp_path_factory.mktemp("llama"), "llama", "rtn:w4a16-g16")


@pytest.fixture
def damaged(written: Written, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be damaged."""
    return Path(shutil.copytree(written.out, tmp_path / "damaged"))


@pytest.mark.parametrize(("model_type", "text", "rules"), ROUND_TRIPS.values(), ids=ROUND_TRIPS)
@torch.no_grad()
def test_logits_are_those_of_the_model_in_memory(model_type: str, text: str, rules: list[str], tmp_path: Path) -> None:
    written = write_quantized(tmp_path, model_type, text, rules)
    loaded = lowbit.load(written.out, dtype=torch.float32)
    assert torch.equal(loaded(TOKENS).logits, written.model(TOKENS).logits)
    assert not loaded.training


@pytest.mark.parametrize(("model_type", "text"), [("llama", "rtn:w4a16-g16"), ("mixtral", "gptq:w8a8")])
def test_modules_are_those_of_the_model_in_memory(model_type: str, text: str, tmp_path: Path) -> None:
    written = write_quantized(tmp_path, model_type, text)
    ours, loaded = written.model, lowbit.load(written.out)

    def kinds(model: nn.Module) -> dict[str, type]:
        return {name: type(module) for name, module in model.named_modules()}

    assert kinds(loaded) == kinds(ours)
    assert {QuantLinear} < set(kinds(loaded).values())
    assert (QuantExperts in kinds(loaded).values()) == (model_type == "mixtral")
    for name, module in loaded.named_modules():
        if isinstance(module, QuantLinear):
            twin = ours.get_submodule(name)
            assert isinstance(twin, QuantLinear)
            assert torch.equal(module.packed.dequantize(), twin.packed.dequantize()), name


def test_weights_stay_packed(written: Written) -> None:
    loaded = lowbit.load(written.out)
    held = sum(tensor.nbytes for tensor in [*loaded.parameters(), *loaded.buffers()])
    layer = loaded.get_submodule("model.layers.0.self_attn.q_proj")
    assert held < 1.1 * sum(tensor.nbytes for tensor in stored_tensors(written.out).values())
    assert [(name, tensor.dtype) for name, tensor in layer.state_dict().items()] == [
        ("weight_packed", torch.int32),
        ("weight_scale", torch.bfloat16),
        ("weight_shape", torch.int64),
    ]


def test_the_dtype_is_the_checkpoints_unless_another_is_asked_for(written: Written) -> None:
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        loaded = lowbit.load(written.out, dtype=dtype)
        assert loaded.get_input_embeddings().weight.dtype == expected
        assert loaded(TOKENS).logits.dtype == expected


def test_a_loaded_model_writes_text_with_its_own_generation_config(written: Written) -> None:
    loaded = lowbit.load(written.out)
    assert loaded.generation_config.eos_token_id == 2
    assert loaded.generate(TOKENS[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 27)


@torch.no_grad()
def test_an_original_is_loaded_as_it_is(tmp_path: Path) -> None:
    model = source_folder(tmp_path / "llama", "llama", torch.float32)
    loaded = lowbit.load(tmp_path / "llama")
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert not any(isinstance(module, QuantLinear) for module in loaded.modules())


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, r"lacks 1 tensors, the first is model\.norm\.weight"),
        ({f"{Q}.weight_packed": None}, rf"{Q}\.weight_packed"),
        ({f"{Q}.weight_scale": None}, rf"{Q}\.weight"),
        ({f"{Q}.weight_packed": torch.zeros(64, 8, dtype=torch.int64)}, rf"{Q}\.weight_packed is torch\.int64"),
        ({f"{Q}.weight_packed": torch.zeros(64, 7, dtype=torch.int32)}, rf"{Q}\.weight_packed is .*\[64, 7\]"),
        ({f"{Q}.weight_scale": torch.zeros(64, 1)}, rf"{Q}\.weight_scale is .*\[64, 1\]"),
        ({f"{Q}.weight_shape": torch.tensor([64, 128])}, rf"{Q}\."),
        ({"model.norm.weight": torch.zeros(63)}, r"model\.norm\.weight is \[63\] on disk, and the model wants \[64\]"),
        ({"model.embed_tokens.weight": torch.zeros(127, 64)}, r"embed_tokens\.weight is \[127, 64\] on disk"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_damaged_tensor_is_named(changes: dict[str, Tensor | None], message: str, damaged: Path) -> None:
    rewrite(damaged, changes)
    with pytest.raises(CheckpointError, match=message):
        lowbit.load(damaged)


def test_a_tensor_without_a_place_is_a_warning(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lowbit"):
        lowbit.load(damaged)
        assert caplog.messages == []
        rewrite(damaged, {"model.layers.9.weight": torch.zeros(2), "vision.weight": torch.zeros(2)})
        lowbit.load(damaged)
    assert len(caplog.messages) == 1
    assert "2 tensors have no place in the model, the first is model.layers.9.weight" in caplog.messages[0]


@pytest.mark.parametrize("key", ["input_scale", "input_zero_point"])
def test_a_static_grid_that_is_missing_is_not_made_up(key: str, tmp_path: Path) -> None:
    written = write_quantized(tmp_path, "llama", "rtn:w8a8-static-asym")
    rewrite(written.out, {f"{Q}.{key}": None})
    with pytest.raises(CheckpointError, match=rf"{Q}\.{key}"):
        lowbit.load(written.out)


@pytest.mark.parametrize("part", ["w1", "w3"])
def test_half_an_expert_is_refused(part: str, tmp_path: Path) -> None:
    """Where another program quantized some of the experts' matrices only, which are one in memory."""
    written = write_quantized(tmp_path, "mixtral", "rtn:w8a16")
    name = f"model.layers.0.block_sparse_moe.experts.1.{part}"
    shape = stored_tensors(written.out)[f"{name}.weight_shape"].tolist()
    gone = {f"{name}.{key}": None for key in ("weight_packed", "weight_scale", "weight_shape")}
    rewrite(written.out, {**gone, f"{name}.weight": torch.zeros(shape, dtype=torch.bfloat16)})
    with pytest.raises(CheckpointError, match=r"mlp\.experts\.gate_up_proj"):
        lowbit.load(written.out)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "hqq", "nbits": 4}, "quantized by 'hqq'; lowbit reads compressed-tensors, gptq, awq"),
        ({"quant_method": "gptq", "bits": 4}, r"lacks 21 tensors, the first is model\.layers\.0"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "no group of quantization_config names it"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": None}}}, "config_groups"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float"}}},
            },
            "does not read compressed-tensors weights of",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}},
            },
            "the checkpoint is damaged or its config describes another one",
        ),
    ],
    ids=["method", "other method", "no groups", "no weights", "4-bit floats", "other bits"],
)
def test_a_config_that_does_not_fit_is_refused(config: dict[str, object], message: str, damaged: Path) -> None:
    rewrite_config(damaged, quantization_config=config)
    with pytest.raises(CheckpointError, match=message):
        lowbit.load(damaged)


def test_an_unknown_architecture_is_refused(damaged: Path) -> None:
    rewrite_config(damaged, model_type="no_such_model")
    with pytest.raises(CheckpointError, match="transformers does not know this model"):
        lowbit.load(damaged)


@torch.no_grad()
def test_a_matrix_that_is_several_modules_on_disk_is_put_together(tmp_path: Path) -> None:
    """gptqmodel cuts Phi-3's gate_up_proj in two before it quantizes."""
    written = write_quantized(tmp_path, "phi3", "rtn:w4a16-g16")
    changes: dict[str, Tensor | None] = {}
    for name, whole in stored_tensors(written.out).items():
        if ".gate_up_proj." not in name:
            continue
        changes[name] = None
        halves = (whole // torch.tensor([2, 1])).expand(2, 2) if name.endswith("weight_shape") else whole.chunk(2)
        for part, half in zip(("gate_proj", "up_proj"), halves, strict=True):
            changes[name.replace("gate_up_proj", part)] = half.contiguous().clone()
    assert len(changes) == 3 * 3 * 3  # blocks, tensors, the old name and two new ones
    rewrite(written.out, changes)
    loaded = lowbit.load(written.out, dtype=torch.float32)
    assert torch.equal(loaded(TOKENS).logits, written.model(TOKENS).logits)
