"""What the user may name as a model, and what is said where it cannot work. Oracle: transformers' own reader."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import tiny
from checkpoints import TOKENS, rewrite, rewrite_config, source_folder
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import save_file

from lowbit.errors import CheckpointError, InputError
from lowbit.io import source as source_module
from lowbit.io.source import INDEX, Source, load_float, load_tokenizer, open_source


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model in one file."""
    folder = tmp_path_factory.mktemp("whole") / "llama"
    source_folder(folder, "llama", torch.float32)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model in several files with an index."""
    folder = tmp_path_factory.mktemp("whole") / "sharded"
    source_folder(folder, "llama", torch.float32, shard_size="100KB")
    return folder


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A copy of the model in one file, to be damaged."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


@pytest.fixture
def copy_of_shards(sharded: Path, tmp_path: Path) -> Path:
    """A copy of the sharded model, to be damaged."""
    return Path(shutil.copytree(sharded, tmp_path / "shards"))


@torch.no_grad()
def test_one_file_and_many_give_the_same_model(llama: Path, sharded: Path) -> None:
    expected = tiny("llama")(TOKENS).logits
    for folder in (llama, sharded):
        with open_source(folder) as source:
            model = load_float(source, torch.float32)
        assert torch.equal(model(TOKENS).logits, expected)
        assert not model.training


def test_shards_and_bytes_are_those_on_disk(llama: Path, sharded: Path) -> None:
    with open_source(llama) as source:
        assert source.shards == ("model.safetensors",)
        assert source.bytes == (llama / "model.safetensors").stat().st_size
        assert source.name == str(llama)
        assert source.quantization is None
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 2
    with open_source(str(sharded)) as source:
        assert list(source.shards) == files
        assert source.bytes == sum((sharded / name).stat().st_size for name in files)


def test_the_index_decides_which_files_count(copy_of_shards: Path) -> None:
    save_file({"stray": torch.zeros(3)}, copy_of_shards / "adapter.safetensors")
    with open_source(copy_of_shards) as source:
        assert "adapter.safetensors" not in source.shards


def opened(path: str | Path) -> Source:
    with open_source(path) as source:
        return source


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "an empty folder": (
        lambda f: [path.unlink() for path in f.iterdir()],
        "has no config.json; give the folder of a Hugging Face model",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"holds no \*\.safetensors files$"),
    "a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"pytorch_model\.bin is a pickle, which lowbit does not read: convert it to safetensors",
    ),
    "a truncated file": (lambda f: truncate(f / "model.safetensors"), r"model\.safetensors is truncated or no"),
    "an empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), r"is truncated or no safetensors file"),
    "another file": (lambda f: (f / "model.safetensors").write_bytes(b"PK\3\4" * 99), "truncated or no safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    "half a config": (lambda f: (f / "config.json").write_text('{"model_type": "lla'), r"config\.json is not JSON"),
    "bytes for a config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\0"), r"config\.json is not JSON"),
    "a list for a config": (lambda f: (f / "config.json").write_text("[1]"), "holds no JSON object"),
    "no model type": (lambda f: (f / "config.json").write_text("{}"), "has no model_type"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_refused_in_a_sentence(damage: Callable[[Path], object], message: str, copy: Path) -> None:
    damage(copy)
    with pytest.raises(CheckpointError, match=message):
        opened(copy)


def test_a_shard_that_is_missing_is_named(copy_of_shards: Path) -> None:
    gone = sorted(copy_of_shards.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=rf"{gone.name} is missing, though {INDEX} names it"):
        opened(copy_of_shards)


@pytest.mark.parametrize(
    "index",
    ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}', "[]", "{"],
)
def test_an_index_without_a_weight_map_is_refused(index: str, copy_of_shards: Path) -> None:
    (copy_of_shards / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json|holds no \*\.safetensors"):
        opened(copy_of_shards)


def test_an_index_that_points_out_of_the_folder_is_refused(copy_of_shards: Path, llama: Path) -> None:
    """A checkpoint's output keeps the names of shards, so such a name would be written to as well."""
    outside = str(llama / "model.safetensors")
    (copy_of_shards / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": outside}}))
    with pytest.raises(CheckpointError, match="not the name of a file in the folder"):
        opened(copy_of_shards)


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such", "~/no-such", "a/b/c"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match=f"there is no folder {name}"):
        opened(name)


def test_a_single_file_is_refused(copy: Path) -> None:
    with pytest.raises(InputError, match=r"is a file; give the model's folder, a \.gguf file or a hub id"):
        opened(copy / "model.safetensors")


class _Response:
    """As much of a response as the hub's errors read."""

    headers: dict[str, str] = {}  # noqa: RUF012
    request = None
    status_code = 404
    text = ""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RepositoryNotFoundError("404 Client Error.\nmore", response=_Response()), "no model of that name on the hub"),  # type: ignore[arg-type]
        (HFValidationError("Repo id must use alphanumeric chars"), "no model of that name on the hub"),
        (LocalEntryNotFoundError("offline"), r"the hub could not be asked for it \(offline\)"),
        (ConnectionError("unreachable"), r"the hub could not be asked for it \(unreachable\)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_name_that_the_hub_does_not_give_is_said_so(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(source_module, "snapshot_download", fail)
    with pytest.raises(InputError, match=rf"there is no folder nobody/nothing.*{message}"):
        opened("nobody/nothing")


def test_a_hub_id_is_downloaded_without_pickles_and_code(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(llama)

    monkeypatch.setattr(source_module, "snapshot_download", download)
    assert opened("somebody/llama") == Source("somebody/llama", llama)
    assert "*.safetensors" in asked["somebody/llama"]
    assert not {"*", "*.bin", "*.pt", "*.py"} & set(asked["somebody/llama"])


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_an_original_that_lacks_a_tensor_is_refused(name: str, copy: Path) -> None:
    """transformers would fill it with random numbers."""
    rewrite(copy, {name: None})
    with pytest.raises(CheckpointError, match=rf"lacks 1 tensors, the first is {name}"):
        load_float(opened(copy), torch.float32)


def test_an_original_with_a_tensor_of_another_shape_is_refused(copy: Path) -> None:
    rewrite(copy, {"model.norm.weight": torch.zeros(63)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load_float(opened(copy), torch.float32)


def test_an_original_of_a_tied_model_lacks_nothing(tmp_path: Path) -> None:
    model = source_folder(tmp_path, "gemma2", torch.float32)
    with torch.no_grad():
        assert torch.equal(load_float(opened(tmp_path), torch.float32)(TOKENS).logits, model(TOKENS).logits)


def test_a_quantized_model_is_no_original(copy: Path) -> None:
    rewrite_config(copy, quantization_config={"quant_method": "awq"})
    with pytest.raises(InputError, match=r"is quantized already \(awq\); give the original 16-bit model"):
        load_float(opened(copy), torch.float32)


@pytest.mark.parametrize("kind", ["no_such_model", "clip"])
def test_a_model_that_is_no_causal_language_model_is_refused(kind: str, copy: Path) -> None:
    rewrite_config(copy, model_type=kind, architectures=None)
    with pytest.raises(CheckpointError, match="can't be loaded as a causal language model"):
        load_float(opened(copy), torch.float32)


def test_a_folder_without_a_tokenizer_is_refused(copy: Path) -> None:
    for path in copy.glob("*token*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer that can be loaded"):
        load_tokenizer(opened(copy))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no file"), (b"PK\3\4", "is not a GGUF file"), (b"GGUF\3\0\0\0", "can't be read as a GGUF model")],
    ids=["missing", "something else", "truncated"],
)
def test_a_gguf_file_that_cannot_be_read_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        opened(path)
