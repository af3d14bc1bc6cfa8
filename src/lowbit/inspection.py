"""What is in a checkpoint, tensor by tensor, read from the files' headers; for nf4 and fp4 also from a little JSON."""

from dataclasses import dataclass
from pathlib import Path

from lowbit.errors import CheckpointError
from lowbit.io.gguf_file import GgufFile
from lowbit.io.reading import reader_of
from lowbit.io.source import Source, open_source
from lowbit.io.tensorfile import DTYPE_NAMES, Files


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file holds it; scheme is that of its module, empty where it is not quantized."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    scheme: str


@dataclass(frozen=True)
class Contents:
    """A checkpoint: its name, how it is quantized ("compressed-tensors", or "not quantized"), its tensors by name."""

    name: str
    method: str
    tensors: tuple[StoredTensor, ...]


def inspect_checkpoint(path: str | Path) -> Contents:
    """The contents of a folder, hub id or .gguf file. Raises InputError where there is none, or it is damaged."""
    if Path(path).suffix == ".gguf":
        return _gguf(Path(path))
    with open_source(path) as source:
        files = Files.open(source.folder / shard for shard in source.shards)
        schemes = _schemes(source, files)
        method = (source.quantization or {}).get("quant_method", "not quantized")
        tensors = []
        for name in sorted(files.places):
            entry = files.entry(name)
            dtype = DTYPE_NAMES[entry.dtype]
            tensors.append(StoredTensor(name, entry.shape, dtype, entry.bytes, schemes.get(name, "")))
    return Contents(source.name, str(method), tuple(tensors))


def _gguf(path: Path) -> Contents:
    file = GgufFile.open(path)
    tensors = tuple(
        StoredTensor(name, tensor.shape, tensor.block.name, tensor.bytes, tensor.block.name * bool(tensor.block.grid))
        for name, tensor in sorted(file.tensors.items())
    )
    return Contents(str(path), f"gguf, {file.metadata.get('general.architecture')}", tensors)


def _schemes(source: Source, files: Files) -> dict[str, str]:
    """Tensor name -> scheme of its module, for the formats that lowbit reads; others are listed without."""
    config = source.quantization
    if config is None:
        return {}
    try:
        reader = reader_of(config, files)
        modules = [*reader.modules, *reader.experts]
        return {name: reader.describe(module) for module in modules for name in reader.names(module)}
    except CheckpointError:
        return {}  # a scheme that lowbit can't run can still be listed
