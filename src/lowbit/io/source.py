"""The model that the user names: a hub id, a folder, or a .gguf file, as a folder of safetensors with its tokenizer.

A GGUF file is dequantized by transformers into a temporary folder first, in bfloat16, the form that everything else
reads. Pickled weights (.bin, .pt) are not read: they may run code. Remote code is never run.
"""

import json
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from lowbit.errors import CheckpointError, InputError
from lowbit.optional import require

INDEX = "model.safetensors.index.json"
_WANTED = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")


@dataclass(frozen=True)
class Source:
    """A model as the user named it, and the folder with its files."""

    name: str
    folder: Path

    @property
    def shards(self) -> tuple[str, ...]:
        """The safetensors files of the model, in order. Raises CheckpointError for an index that leaves the folder."""
        index = self.folder / INDEX
        if index.is_file():
            return _shards_of(index)
        return tuple(sorted(path.name for path in self.folder.glob("*.safetensors")))

    @property
    def bytes(self) -> int:
        """Bytes of all safetensors files."""
        return sum((self.folder / shard).stat().st_size for shard in self.shards)

    @property
    def config(self) -> dict[str, Any]:
        return read_json(self.folder / "config.json")

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The quantization_config: of config.json, or of the file beside it that AutoGPTQ and AutoAWQ write."""
        config = self.config
        found = config.get("quantization_config") or config.get("compression_config")
        for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
            if not found and (self.folder / name).is_file():
                beside = read_json(self.folder / name)
                if {"bits", "w_bit"} & beside.keys():
                    found = {"quant_method": method} | beside
        if found is not None and not isinstance(found, dict):
            raise CheckpointError(f"{self.folder / 'config.json'} has a quantization_config that is no object")
        return found


def _shards_of(index: Path) -> tuple[str, ...]:
    """The files that an index names. Raises CheckpointError where it names none, or one outside its folder."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} holds no weight_map; get a clean copy of the model")
    for shard in places.values():
        if not isinstance(shard, str) or shard != Path(shard).name:
            raise CheckpointError(f"{index} names {shard!r}, which is not the name of a file in the folder")
    return tuple(sorted(set(places.values())))


@contextmanager
def open_source(model: str | Path) -> Iterator[Source]:
    """The model's files, checked: every shard is there and whole. Raises InputError or CheckpointError."""
    path = Path(model)
    if path.suffix == ".gguf":
        with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
            yield _checked(_from_gguf(path, Path(folder)))
    elif path.is_dir():
        yield _checked(Source(str(model), path))
    elif path.is_file():
        raise InputError(f"{model} is a file; give the model's folder, a .gguf file or a hub id")
    elif str(model).startswith(("/", ".", "~")) or str(model).count("/") > 1:
        raise InputError(f"there is no folder {model}")
    else:
        yield _checked(Source(str(model), _download(str(model))))


def _download(model: str) -> Path:
    try:
        return Path(snapshot_download(model, allow_patterns=list(_WANTED)))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise InputError(
            f"there is no folder {model} and no model of that name on the hub ({_first(error)})"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise InputError(
            f"there is no folder {model}, and the hub could not be asked for it ({_first(error)})"
        ) from error


def _first(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _from_gguf(path: Path, folder: Path) -> Source:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if path.open("rb").read(4) != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file: its first bytes are not 'GGUF'; download it again")
    require("gguf", "gguf")
    where: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    except (ValueError, KeyError, IndexError, OSError, OverflowError, TypeError, struct.error) as error:
        raise CheckpointError(f"{path} can't be read as a GGUF model ({_first(error)}); download it again") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Source(str(path), folder)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; give the folder of a Hugging Face model") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); get a clean copy of the model") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; get a clean copy of the model")
    return value


def _checked(source: Source) -> Source:
    if "model_type" not in source.config:
        raise CheckpointError(
            f"{source.folder / 'config.json'} has no model_type; give the folder of a Hugging Face model"
        )
    if not source.shards:
        pickled = [path.name for path in source.folder.glob("*.bin")]
        hint = f"; {pickled[0]} is a pickle, which lowbit does not read: convert it to safetensors" if pickled else ""
        raise CheckpointError(f"{source.folder} holds no *.safetensors files{hint}")
    for shard in source.shards:
        tensor_names(source.folder / shard)
    return source


def tensor_names(path: Path) -> list[str]:
    """The names in a safetensors file. Raises CheckpointError when it is missing, truncated or something else."""
    try:
        with safe_open(path, framework="pt") as shard:
            return list(shard.keys())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, though {INDEX} names it; download the model again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error}); download it again") from None


def load_float(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The model of an unquantized source on the CPU, in eval mode. Raises CheckpointError where tensors don't fit."""
    if source.quantization is not None:
        method = source.quantization.get("quant_method")
        raise InputError(f"{source.name} is quantized already ({method}); give the original 16-bit model")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=dtype, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{source.name} can't be loaded as a causal language model: {_first(error)}") from error
    model, found = loaded
    if missing := sorted(found["missing_keys"]):  # transformers has filled them with random numbers
        raise CheckpointError(f"{source.name} lacks {len(missing)} tensors, the first is {missing[0]}; get it again")
    for name, on_disk, wanted in found["mismatched_keys"]:
        raise CheckpointError(f"{name} is {list(on_disk)} on disk, and the model wants {list(wanted)}; get it again")
    return model.eval()


def load_tokenizer(source: Source) -> Any:
    """The model's tokenizer. Raises CheckpointError where it has none."""
    try:
        return AutoTokenizer.from_pretrained(source.folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{source.name} has no tokenizer that can be loaded: {_first(error)}") from error


def model_config(source: Source) -> Any:
    """The transformers config, without quantization_config. Raises CheckpointError for an unknown model type."""
    settings = source.config
    settings.pop("quantization_config", None)
    try:
        return AutoConfig.for_model(**settings)
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"{source.name}: transformers does not know this model ({_first(error)})") from error
