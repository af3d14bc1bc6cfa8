"""Load a quantized checkpoint with its weights packed: each quantized module becomes a QuantLinear.

The model is built from its config without initializing, so that the float weights it will never have cost no memory
that is touched; then every disk tensor goes to its place in memory (names.py), quantized ones as PackedWeight.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from lowbit.errors import CheckpointError
from lowbit.io.bitsandbytes import parse_4bit
from lowbit.io.compressed_tensors import parse_config
from lowbit.io.names import Piece, disk_layout
from lowbit.io.source import Source, load_float, model_config, open_source, tensor_names
from lowbit.nn.experts import QuantExperts, run_experts_plainly
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

_LOG = logging.getLogger("lowbit")
_WEIGHT_KEYS = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape")
_INPUT_KEYS = ("input_scale", "input_zero_point")


def load(path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The model at a folder, hub id or .gguf file, in eval mode on `device`; quantized weights stay packed.

    dtype is that of activations and of weights which are not quantized; by default the checkpoint's. Raises
    CheckpointError where files are missing, damaged, or quantized in a way that lowbit does not read.
    """
    with open_source(path) as source:
        return load_source(source, dtype).to(device)  # type: ignore[arg-type]


def load_source(source: Source, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """`load` for a source that is open, on the CPU."""
    config = model_config(source)
    dtype = dtype or config.dtype or torch.float32
    if source.quantization is None:
        return load_float(source, dtype)
    method = source.quantization.get("quant_method")
    if method not in ("compressed-tensors", "bitsandbytes"):
        raise CheckpointError(
            f"{source.name} is quantized by {method!r}; lowbit reads compressed-tensors and bitsandbytes"
        )
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # without initializing, it has not been done; a tied head has no tensor on disk
    files = _Files.open(source)
    with torch.no_grad():
        packed = _fill(model, disk_layout(model), files)
        _replace(model, packed)
    run_experts_plainly(model)
    if surplus := files.unread():
        _LOG.warning(
            "%s: %d tensors have no place in the model, the first is %s", source.name, len(surplus), surplus[0]
        )
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return model.eval()


@dataclass
class _Files:
    """Random access to the tensors of all shards, and which of them were read."""

    places: dict[str, Path]
    quantized: dict[str, PackedWeight | None]  # disk module -> its weight, once read
    source: Source
    read: set[str] = field(default_factory=set)
    handles: dict[Path, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, source: Source) -> "_Files":
        places = {
            name: source.folder / shard for shard in source.shards for name in tensor_names(source.folder / shard)
        }
        endings = (".weight_scale", ".weight.absmax")
        modules = [name.removesuffix(end) for name in places for end in endings if name.endswith(end)]
        return cls(places, dict.fromkeys(modules), source)

    def get(self, name: str) -> Tensor:
        if name not in self.places:
            raise CheckpointError(
                f"{self.source.name} lacks {name}, which its quantization_config asks for; get it again"
            )
        self.read.add(name)
        path = self.places[name]
        if path not in self.handles:
            self.handles[path] = safe_open(path, framework="pt").__enter__()
        return self.handles[path].get_tensor(name)

    def unread(self) -> list[str]:
        return sorted(set(self.places) - self.read)


@dataclass(frozen=True)
class _Part:
    """One disk module's weight with its static activation grid."""

    start: int
    weight: PackedWeight
    inputs: dict[str, Tensor]


_Packed = dict[str, dict[int | None, list[_Part]]]
"""Parameter -> expert or None -> its parts by rows."""


def _fill(model: nn.Module, layout: Mapping[str, Piece], files: _Files) -> _Packed:
    """Copy float tensors into their parameters and collect the quantized ones."""
    parameters, packed, missing = dict(model.named_parameters()), _Packed(), []
    config = files.source.quantization or {}
    bitsandbytes = config.get("quant_method") == "bitsandbytes"
    schemes = {} if bitsandbytes else parse_config(config, files.quantized)
    for name, piece in layout.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in files.quantized:
            part = _read_4bit(module, files) if bitsandbytes else _read_part(module, schemes[module], files, piece)
            packed.setdefault(piece.parameter, {}).setdefault(piece.expert, []).append(part)
        elif name in files.places:
            target: Tensor = parameters[piece.parameter]
            target = target if piece.expert is None else target[piece.expert]
            value = files.get(name)
            if piece.expert is not None or target.shape != value.shape:
                target = target[piece.start : piece.stop]
            if target.shape != value.shape:
                raise CheckpointError(
                    f"{name} is {list(value.shape)} on disk, and the model wants {list(target.shape)}"
                )
            target.copy_(value)
        else:
            missing.append(name)
    for name, buffer in model.named_buffers():
        if name in files.places:
            buffer.copy_(files.get(name))
    if missing:
        raise CheckpointError(
            f"{files.source.name} lacks {len(missing)} tensors, the first is {missing[0]}; get it again"
        )
    return packed


def _read_part(module: str, scheme: QuantScheme, files: _Files, piece: Piece) -> _Part:
    named = {key: files.get(f"{module}.{key}") for key in _WEIGHT_KEYS if f"{module}.{key}" in files.places}
    keys: tuple[str, ...] = ()
    if scheme.activations is not None and not scheme.activations.dynamic:
        keys = _INPUT_KEYS[:1] if scheme.activations.symmetric else _INPUT_KEYS
    inputs = {key: files.get(f"{module}.{key}") for key in keys}
    codes = named["weight"] if "weight" in named else files.get(f"{module}.weight_packed")
    columns = int(named["weight_shape"][1]) if "weight_shape" in named else codes.shape[1]
    shape = (piece.stop - piece.start, columns)
    weight = PackedWeight.from_tensors(named, scheme, shape)
    weight.check(module)
    return _Part(piece.start, weight, inputs)


def _read_4bit(module: str, files: _Files) -> _Part:
    prefix = f"{module}.weight"
    tensors = {name: files.get(name) for name in files.places if name == prefix or name.startswith(f"{prefix}.")}
    return _Part(0, parse_4bit(module, tensors), {})


def _replace(model: nn.Module, packed: _Packed) -> None:
    """Put quantized layers in the place of the float ones."""
    for parameter, experts in packed.items():
        layers: dict[int | None, QuantLinear] = {}
        owner, _, attribute = parameter.rpartition(".")
        module = model.get_submodule(owner)
        _check_whole(parameter, model.get_parameter(parameter).shape, experts)
        for expert, parts in experts.items():
            parts.sort(key=lambda part: part.start)
            weight = PackedWeight.stack([part.weight for part in parts])
            inputs = parts[0].inputs
            bias = getattr(module, "bias", None) if expert is None else None
            layers[expert] = QuantLinear.from_packed(
                weight, bias, inputs.get("input_scale"), inputs.get("input_zero_point")
            )
        if None in layers:
            parent, _, name = owner.rpartition(".")
            setattr(model.get_submodule(parent), name, layers[None])
        else:
            delattr(module, attribute)
            setattr(module, attribute, QuantExperts([layers[expert] for expert in range(len(layers))]))


def _check_whole(parameter: str, shape: torch.Size, experts: Mapping[int | None, list[_Part]]) -> None:
    """Raise CheckpointError unless the parts make up the parameter [N, K] or [E, N, K], under one scheme per matrix."""
    whole = len(experts) == (shape[0] if len(shape) == 3 else 1)
    for parts in experts.values():
        rows = sum(part.weight.shape[0] for part in parts)
        kinds = {(part.weight.scheme, part.weight.shape[1]) for part in parts}
        whole = whole and rows == shape[-2] and len(kinds) == 1 and parts[0].weight.shape[1] == shape[-1]
    if not whole:
        raise CheckpointError(
            f"{parameter} is {list(shape)} in the model, and its quantized tensors do not make that up under one "
            "scheme; the checkpoint is damaged, or quantizes a part of what is one matrix in memory"
        )
