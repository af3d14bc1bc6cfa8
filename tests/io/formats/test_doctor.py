"""The oracle is the damage that was done: each check finds it, says for whom, and a healthy checkpoint has none."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowbit
from lowbit.doctor import examine, fix
from lowbit.errors import InputError
from lowbit.io.convert import convert
from lowbit.io.gptq import shift_zeros

FIXTURES = Path(__file__).parents[2] / "interop" / "fixtures"
TOKENS = torch.arange(24).view(2, 12) * 7 % 32
UP = "model.layers.0.mlp.up_proj"


def foreign(name: str, folder: Path) -> Path:
    with safe_open(FIXTURES / f"{name}.safetensors", framework="pt") as file:
        config = file.metadata()["config"]
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    del tensors["expected.logits"]
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(config)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    return folder


def change(folder: Path, tensors: dict[str, Tensor | None], **config: object) -> None:
    """Replace, add or (None) drop tensors, and keys of quantization_config."""
    named = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        named.pop(name, None)
        if tensor is not None:
            named[name] = tensor
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] |= config
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("name", ["gptq-llama", "awq-qwen2", "gptq-phi3"])
def test_what_its_owner_wrote_is_healthy(name: str, tmp_path: Path) -> None:
    diagnosis = examine(foreign(name, tmp_path / "m"))
    assert [finding.words for finding in diagnosis.findings] == []
    assert diagnosis.healthy
    assert diagnosis.verdicts["vLLM"] == "reads it"
    assert "gptqmodel" in diagnosis.verdicts["transformers"]
    known = name != "gptq-phi3"
    assert diagnosis.verdicts["llama.cpp"].startswith(
        "reads GGUF only: lowbit" if known else "reads GGUF only; lowbit has no"
    )


@torch.no_grad()
def test_zero_points_against_the_config_are_found_and_repaired(tmp_path: Path) -> None:
    folder = foreign("gptq-llama", tmp_path / "m")
    expected = lowbit.load(folder, torch.float32)(TOKENS).logits
    change(folder, {}, checkpoint_format="gptq_v2")
    diagnosis = examine(folder)
    assert "the config says gptq_v2 (zero-points as they are)" in diagnosis.findings[0].words
    assert diagnosis.findings[0].fixable
    assert not diagnosis.healthy
    fix(folder, tmp_path / "fixed")
    assert examine(tmp_path / "fixed").healthy
    zeros = load_file(tmp_path / "fixed" / "model.safetensors")[f"{UP}.qzeros"]
    assert zeros.unique().item() == -2004318072  # 0x88888888, as v2 declares
    assert torch.equal(lowbit.load(tmp_path / "fixed", torch.float32)(TOKENS).logits, expected)


def test_integers_under_no_layer_are_found_and_left_out(tmp_path: Path) -> None:
    folder = foreign("gptq-llama", tmp_path / "m")
    change(folder, {"lm_head.g_idx": torch.zeros(32, dtype=torch.int32), "odd.weight": torch.zeros(2, 2)})
    diagnosis = examine(folder)
    words = " | ".join(finding.words for finding in diagnosis.findings)
    assert "1 integer or fp8 tensors belong to no quantized layer: lm_head.g_idx" in words
    assert "1 tensors have no place in the model: odd.weight" in words
    assert diagnosis.verdicts["transformers"].startswith("reads it")
    assert "lm_head.g_idx" in diagnosis.verdicts["vLLM"]
    fix(folder, tmp_path / "fixed")
    assert "lm_head.g_idx" not in load_file(tmp_path / "fixed" / "model.safetensors")
    assert examine(tmp_path / "fixed").healthy


def test_missing_tensors_and_damaged_modules_are_named(tmp_path: Path) -> None:
    folder = foreign("gptq-llama", tmp_path / "m")
    change(folder, {"model.norm.weight": None, f"{UP}.scales": torch.ones(3, 64).half()})
    diagnosis = examine(folder)
    words = " | ".join(finding.words for finding in diagnosis.findings)
    assert "1 tensors are missing: model.norm.weight" in words
    assert UP in words
    assert diagnosis.verdicts["SGLang"] != "reads it"


def test_layers_that_vllm_fuses_must_be_alike(tmp_path: Path) -> None:
    folder = foreign("gptq-qwen2", tmp_path / "m")
    named = load_file(folder / "model.safetensors")
    zeros = torch.full_like(named[f"{UP}.qzeros"], -2004318072)
    change(folder, {f"{UP}.qzeros": zeros}, sym=True)
    diagnosis = examine(folder)
    words = " | ".join(finding.words for finding in diagnosis.findings)
    assert "model.layers.0.mlp: gate_proj, up_proj are one layer there, but" in words
    assert "are one layer" in diagnosis.verdicts["vLLM"]
    assert "are one layer" not in diagnosis.verdicts["transformers"]


def test_a_tokenizer_with_a_calibration_in_it_is_found_and_repaired(tmp_path: Path) -> None:
    folder = foreign("gptq-llama", tmp_path / "m")
    tokenizer = {"truncation": {"max_length": 512}, "padding": None, "model": {"type": "BPE"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "truncation saved in it" in examine(folder).findings[0].words
    fix(folder, tmp_path / "fixed")
    repaired = json.loads((tmp_path / "fixed" / "tokenizer.json").read_text())
    assert repaired["truncation"] is None
    assert repaired["model"] == {"type": "BPE"}


def test_generation_config_and_prediction_heads(tmp_path: Path) -> None:
    folder = foreign("gptq-llama", tmp_path / "m")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7]}')
    settings = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(settings))
    words = " | ".join(finding.words for finding in examine(folder).findings)
    assert "does not end at token 2" in words
    assert "promises 1 multi-token-prediction layers, and the files have none" in words
    (folder / "generation_config.json").unlink()
    change(folder, {"model.layers.1.mtp.weight": torch.zeros(4, 4)})
    words = " | ".join(finding.words for finding in examine(folder).findings)
    assert "there is no generation_config.json" in words
    assert "1 tensors of extra prediction heads or layers" in words


def test_versions_that_misread_three_bits_are_told(tmp_path: Path) -> None:
    folder = foreign("gptq-llama", tmp_path / "m")
    named = load_file(folder / "model.safetensors")
    changes: dict[str, Tensor | None] = {}
    for module in {name.removesuffix(".qweight") for name in named if name.endswith(".qweight")}:
        columns, rows = len(named[f"{module}.g_idx"]), named[f"{module}.scales"].shape[1]
        changes[f"{module}.qweight"] = torch.zeros(columns * 3 // 32, rows, dtype=torch.int32)
        groups = named[f"{module}.scales"].shape[0]
        middle = torch.full((groups, rows * 3 // 32), 0, dtype=torch.int32)
        changes[f"{module}.qzeros"] = shift_zeros(middle, -1, 3, rows)
    change(folder, changes, bits=3, sym=False, checkpoint_format="gptq_v2")
    convert(folder, tmp_path / "ct", "compressed-tensors")
    words = " | ".join(finding.words for finding in examine(tmp_path / "ct").findings)
    assert "compressed-tensors from 0.17 on reads its 3, 5, 6 or 7 bits" in words


def test_what_can_t_be_repaired_is_said(tmp_path: Path) -> None:
    folder = foreign("gptq-llama", tmp_path / "m")
    convert(folder, tmp_path / "float", "float")
    with pytest.raises(InputError, match="repairs compressed-tensors, gptq, awq, not not quantized"):
        fix(tmp_path / "float", tmp_path / "out")
