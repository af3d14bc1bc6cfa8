"""What is in a checkpoint, tensor by tensor, read from the files' headers; for nf4 and fp4 also from a little JSON."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.io.bitsandbytes import scheme_4bit
from lowbit.io.compressed_tensors import parse_config
from lowbit.io.source import Source, open_source

_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


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
    with open_source(path) as source:
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        states: dict[str, Tensor] = {}
        for shard in source.shards:
            with safe_open(source.folder / shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (a handle, not a mapping)
                    part = file.get_slice(name)
                    found[name] = (tuple(part.get_shape()), part.get_dtype())
                    if ".quant_state." in name:  # a few bytes of JSON
                        states[name] = file.get_tensor(name)
        schemes = _schemes(source, list(found), states)
        method = (source.quantization or {}).get("quant_method", "not quantized")
        tensors = tuple(
            StoredTensor(name, shape, dtype, math.prod(shape) * _BYTES.get(dtype, 1), schemes.get(name, ""))
            for name, (shape, dtype) in sorted(found.items())
        )
    return Contents(source.name, method, tensors)


def _schemes(source: Source, names: list[str], states: Mapping[str, Tensor]) -> dict[str, str]:
    """Tensor name -> scheme of its module, for the formats that lowbit reads; others by their own method's name."""
    config = source.quantization
    if config is None:
        return {}
    method = config.get("quant_method", "quantized")
    marks = {"compressed-tensors": ".weight_scale", "bitsandbytes": ".weight.absmax"}
    modules = [name.removesuffix(mark) for mark in marks.values() for name in names if name.endswith(mark)]
    try:
        if method == "bitsandbytes":
            parsed = {module: scheme_4bit(module, states) for module in modules}
        else:
            parsed = parse_config(config, modules) if method == "compressed-tensors" else {}
    except CheckpointError:
        parsed = {}  # a scheme that lowbit can't run can still be listed
    by_module = {module: str(parsed.get(module, method)) for module in modules}
    owners = {
        name: next((m for m in (name.rpartition(".")[0], name.partition(".weight")[0]) if m in by_module), None)
        for name in names
    }
    return {name: by_module[owner] for name, owner in owners.items() if owner is not None}
