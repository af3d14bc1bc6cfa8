"""What a checkpoint holds. Oracle: its tensors, loaded."""

import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import rewrite, rewrite_config, source_folder, stored_tensors, write_quantized
from safetensors.torch import save_file

from lowbit.errors import CheckpointError
from lowbit.inspection import Contents, StoredTensor, inspect_checkpoint

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """w4a16-g16 with down projections in w8a8-static-asym."""
    folder = tmp_path_factory.mktemp("mixed")
    return write_quantized(folder, "llama", "rtn:w4a16-g16", ["*.down_proj=w8a8-static-asym"]).out


def by_name(contents: Contents) -> dict[str, StoredTensor]:
    return {tensor.name: tensor for tensor in contents.tensors}


@pytest.mark.parametrize(
    ("model_type", "text"), [("llama", "rtn:fp8"), ("mixtral", "rtn:w8a16"), ("opt", "rtn:nf4-b64")]
)
def test_every_tensor_is_listed_by_name_with_shape_dtype_and_bytes(model_type: str, text: str, tmp_path: Path) -> None:
    out = write_quantized(tmp_path, model_type, text, shard_size="100KB").out
    stored, listed = stored_tensors(out), inspect_checkpoint(out).tensors
    assert [tensor.name for tensor in listed] == sorted(stored)
    for tensor in listed:
        assert tensor.shape == tuple(stored[tensor.name].shape)
        assert tensor.bytes == stored[tensor.name].nbytes, tensor


def test_each_tensor_tells_the_scheme_of_its_module(mixed: Path) -> None:
    contents = inspect_checkpoint(str(mixed))
    found = by_name(contents)
    assert contents.method == "compressed-tensors"
    assert contents.name == str(mixed)
    for key in ("weight_packed", "weight_scale", "weight_shape"):
        assert found[f"{Q_PROJ}.{key}"].scheme == "w4a16-g16"
    for key in ("weight", "weight_scale", "input_scale", "input_zero_point"):
        assert found[f"model.layers.1.mlp.down_proj.{key}"].scheme == "w8a8-static-asym"
    for name in ("lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"):
        assert found[name].scheme == ""
    assert found[f"{Q_PROJ}.weight_packed"].dtype == "I32"


@pytest.mark.parametrize("text", ["nf4-b64", "nf4-b64-dq", "fp4-b128"])
def test_bitsandbytes_layers_tell_their_scheme(text: str, tmp_path: Path) -> None:
    contents = inspect_checkpoint(write_quantized(tmp_path, "llama", f"rtn:{text}").out)
    found = by_name(contents)
    assert contents.method == "bitsandbytes"
    assert {t.scheme for name, t in found.items() if name.startswith(f"{Q_PROJ}.")} == {text}
    assert found["lm_head.weight"].scheme == ""


def test_an_original_is_not_quantized(tmp_path: Path) -> None:
    source_folder(tmp_path, "qwen2")
    contents = inspect_checkpoint(tmp_path)
    assert contents.method == "not quantized"
    assert {tensor.scheme for tensor in contents.tensors} == {""}
    assert {tensor.dtype for tensor in contents.tensors} == {"BF16"}


def test_a_scheme_that_lowbit_cannot_run_is_still_listed(mixed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mixed, tmp_path / "copy"))
    weights = {"num_bits": 6, "type": "float", "strategy": "group", "group_size": 32}
    config = {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": ["Linear"], "weights": weights}}}
    rewrite_config(folder, quantization_config=config)
    assert by_name(inspect_checkpoint(folder))[f"{Q_PROJ}.weight_packed"].scheme == ""


def test_methods_that_lowbit_does_not_read_are_named(tmp_path: Path) -> None:
    source_folder(tmp_path, "llama")
    rewrite(tmp_path, {f"{Q_PROJ}.weight": None, f"{Q_PROJ}.qweight": torch.zeros(8, 64, dtype=torch.int32)})
    rewrite_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    contents = inspect_checkpoint(tmp_path)
    assert contents.method == "gptq"
    assert by_name(contents)[f"{Q_PROJ}.qweight"].bytes == 8 * 64 * 4


def test_a_damaged_checkpoint_is_refused(mixed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mixed, tmp_path / "copy"))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
        inspect_checkpoint(folder)


def test_bytes_of_every_dtype_are_counted(tmp_path: Path) -> None:
    dtypes = [torch.float64, torch.int64, torch.float32, torch.int32, torch.float16, torch.bfloat16, torch.int16]
    dtypes += [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {str(dtype): torch.zeros(3, 5).to(dtype) for dtype in dtypes}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert {t.name: t.bytes for t in inspect_checkpoint(tmp_path).tensors} == {
        name: tensor.nbytes for name, tensor in tensors.items()
    }
