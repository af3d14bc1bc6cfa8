"""Load a quantized checkpoint with its weights packed: each quantized module becomes a QuantLinear.

The model is built from its config without initializing, so that the float weights it will never have cost no memory
that is touched; then every disk tensor goes to its place in memory (names.py), quantized ones as PackedWeight.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from lowbit.errors import CheckpointError
from lowbit.io.empty import empty_model
from lowbit.io.gguf_file import gguf_family
from lowbit.io.gguf_names import MODEL_TYPES
from lowbit.io.gguf_read import GgufFiles, empty_gguf_model
from lowbit.io.hf import attach
from lowbit.io.names import Piece, disk_layout
from lowbit.io.reading import reader_of
from lowbit.io.source import Source, load_float, model_config, open_source
from lowbit.io.stored import Reader, Stored
from lowbit.io.tensorfile import Files
from lowbit.nn.experts import QuantExperts, run_experts_plainly
from lowbit.nn.linear import QuantLinear
from lowbit.tensors import PackedWeight

_LOG = logging.getLogger("lowbit")


def load(path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The model at a folder, hub id or .gguf file, in eval mode on `device`; quantized weights stay packed.

    dtype is that of activations and of weights which are not quantized; by default the checkpoint's. Raises
    CheckpointError where files are missing, damaged, or quantized in a way that lowbit does not read.
    """
    if Path(path).suffix == ".gguf":
        family = gguf_family(Path(path))
        if family in MODEL_TYPES:
            return _load_gguf(Path(path), dtype).to(device)  # type: ignore[arg-type]
        known = ", ".join(MODEL_TYPES)
        _LOG.warning("%s: weights of the architecture %s are dequantized; packed are those of %s", path, family, known)
    with open_source(path) as source:
        return load_source(source, dtype).to(device)  # type: ignore[arg-type]


def _load_gguf(path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    model, files, reader = empty_gguf_model(path, dtype)
    fill(model, str(path), files, reader)
    return model.eval()


def load_source(source: Source, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """`load` for a source that is open, on the CPU."""
    config = model_config(source)
    dtype = dtype or config.dtype or torch.float32
    if source.quantization is None:
        return load_float(source, dtype)
    files = Files.open(source.folder / shard for shard in source.shards)
    reader = reader_of(source.quantization, files)
    model = empty_model(config, source.name, dtype, len(files.places), source.bytes)
    fill(model, source.name, files, reader)
    if surplus := files.unread():
        _LOG.warning(
            "%s: %d tensors have no place in the model, the first is %s", source.name, len(surplus), surplus[0]
        )
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return model.eval()


def fill(model: PreTrainedModel, name: str, files: Files | GgufFiles, reader: Reader) -> None:
    """Give an empty model its weights: quantized ones packed, in layers that take the place of the float ones.

    name is what errors call the checkpoint.
    """
    model.tie_weights()  # without initializing, it has not been done; a tied head has no tensor on disk
    with torch.no_grad():
        packed = _collect(model, name, files, reader)
        _replace(model, packed)
    run_experts_plainly(model)
    attach(model)
    for words in reader.warnings:
        _LOG.warning("%s: %s", name, words)


@dataclass(frozen=True)
class _Part:
    """One disk module's share of a weight, from row `start` on."""

    start: int
    stored: Stored


_SPLIT = {"gate_up_proj": ("gate_proj", "up_proj"), "qkv_proj": ("q_proj", "k_proj", "v_proj")}
"""One matrix in memory -> the modules that gptqmodel makes of it before it quantizes (Phi-3)."""

_Packed = dict[str, dict[int | None, list[_Part]]]
"""Parameter -> expert or None -> its parts by rows."""


def _collect(model: nn.Module, source: str, files: Files | GgufFiles, reader: Reader) -> _Packed:
    """Copy float tensors into their parameters and collect the quantized ones."""
    parameters, packed, missing = dict(model.named_parameters()), _Packed(), []
    for name, piece in disk_layout(model).items():  # type: ignore[arg-type]
        module = name.removesuffix(".weight")
        target: Tensor = parameters[piece.parameter]
        if name.endswith(".weight") and module in reader.modules:
            stored = reader.read(module)
            packed.setdefault(piece.parameter, {}).setdefault(piece.expert, []).append(_Part(piece.start, stored))
        elif name in reader.experts:
            matrices = reader.read_experts(name)
            packed[piece.parameter] = {expert: [_Part(0, part)] for expert, part in enumerate(matrices)}
        elif name in files:
            _copy(name, files.get(name), target, piece)
        elif parts := _split(module, reader):
            packed[piece.parameter] = {piece.expert: parts}
        else:
            missing.append(name)
    for name, buffer in model.named_buffers():
        if name in files and files.entry(name).shape == tuple(buffer.shape):
            buffer.copy_(files.get(name))
    if missing:
        raise CheckpointError(f"{source} lacks {len(missing)} tensors, the first is {missing[0]}; get it again")
    return packed


def _split(module: str, reader: Reader) -> list[_Part]:
    """The parts of a matrix that the files hold as several modules, one below the other; none where they don't."""
    parent, _, last = module.rpartition(".")
    modules = [f"{parent}.{part}" for part in _SPLIT.get(last, ())]
    if not modules or any(part not in reader.modules for part in modules):
        return []
    parts: list[_Part] = []
    for part in modules:
        start = parts[-1].start + parts[-1].stored.weight.shape[0] if parts else 0
        parts.append(_Part(start, reader.read(part)))
    return parts


def _copy(name: str, value: Tensor, target: Tensor, piece: Piece) -> None:
    target = target if piece.expert is None else target[piece.expert]
    if piece.expert is not None or target.shape != value.shape:
        target = target[piece.start : piece.stop]
    if target.shape != value.shape:
        raise CheckpointError(f"{name} is {list(value.shape)} on disk, and the model wants {list(target.shape)}")
    if not value.is_floating_point():
        raise CheckpointError(
            f"{name} holds {value.dtype} without scales; the checkpoint's config describes another one"
        )
    target.copy_(value)


def _replace(model: nn.Module, packed: _Packed) -> None:
    """Put quantized layers in the place of the float ones."""
    for parameter, experts in packed.items():
        layers: dict[int | None, QuantLinear] = {}
        owner, _, attribute = parameter.rpartition(".")
        module = model.get_submodule(owner)
        is_transposed = bool(getattr(module, "is_transposed", False)) and None not in experts
        _check_whole(parameter, model.get_parameter(parameter).shape, experts, is_transposed)
        for expert, parts in experts.items():
            parts.sort(key=lambda part: part.start)
            weight = PackedWeight.stack([part.stored.weight for part in parts])
            inputs = parts[0].stored.inputs
            bias = getattr(module, "bias", None) if expert is None else None
            scale = inputs.get("input_scale", inputs.get("input_global_scale"))
            zero, rotation = inputs.get("input_zero_point"), parts[0].stored.rotation
            layers[expert] = QuantLinear.from_packed(weight, bias, scale, zero, rotation)
        if None in layers:
            parent, _, name = owner.rpartition(".")
            setattr(model.get_submodule(parent), name, layers[None])
        else:
            delattr(module, attribute)
            setattr(module, attribute, QuantExperts([layers[expert] for expert in range(len(layers))], is_transposed))


def _check_whole(
    parameter: str, shape: torch.Size, experts: Mapping[int | None, list[_Part]], is_transposed: bool
) -> None:
    """Raise CheckpointError unless the parts make up the parameter [N, K] or [E, N, K], under one scheme per matrix."""
    whole = len(experts) == (shape[0] if len(shape) == 3 else 1)
    rows, columns = (shape[-1], shape[-2]) if is_transposed else (shape[-2], shape[-1])
    for parts in experts.values():
        weights = [part.stored.weight for part in parts]
        kinds = {(part.stored.weight.scheme, part.stored.weight.shape[1], part.stored.rotation) for part in parts}
        whole = whole and sum(weight.shape[0] for weight in weights) == rows
        whole = whole and len(kinds) == 1 and weights[0].shape[1] == columns
    if not whole:
        raise CheckpointError(
            f"{parameter} is {list(shape)} in the model, and its quantized tensors do not make that up under one "
            "scheme; the checkpoint is damaged, or quantizes a part of what is one matrix in memory"
        )
