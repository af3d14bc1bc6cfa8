"""Write a quantized model as its source's files with the quantized weights exchanged, shard by shard.

Every tensor that was not quantized is copied with its bytes, and so are tokenizer, generation_config and the rest of
the folder; config.json gains a quantization_config: compressed-tensors', bitsandbytes' for nf4 and fp4, or our own for
what they can't hold (searched or outlying activations, inputs that are turned at run time). Shards keep
their names. One shard is in memory at a time.
"""

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lowbit.io.bitsandbytes import config_4bit, tensors_4bit
from lowbit.io.compressed_tensors import quantization_config, refusal
from lowbit.io.hf import LowbitConfig, described
from lowbit.io.llm_int8 import config_8bit, tensors_8bit
from lowbit.io.names import Piece
from lowbit.io.source import INDEX, Source
from lowbit.nn.experts import QuantExperts
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.scheme import QuantScheme

_NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_REWRITTEN = {
    *("config.json", INDEX, "README.md", "report.json", "report.html"),
    *("quantize_config.json", "quant_config.json"),  # how AutoGPTQ and AutoAWQ say it a second time
}


@dataclass(frozen=True)
class _Stored:
    """A quantized layer and the rows of it that one disk module holds."""

    layer: QuantLinear
    start: int
    stop: int

    def tensors(self, name: str, dtype: torch.dtype, own: bool) -> dict[str, Tensor]:
        """The disk tensors of module `name`, in our own form or in that which the scheme's readers know."""
        packed, foreign = self.layer.packed, not own
        if foreign and self.layer.scheme.weights.format.kind == "codebook":
            return tensors_4bit(name, packed, dtype)
        if (self.start, self.stop) != (0, self.layer.out_features):
            packed = packed.rows(self.start, self.stop)
        if foreign and _has_outliers(self.layer.scheme):
            return tensors_8bit(name, packed)
        named = packed.tensors()
        buffers = dict(self.layer.named_buffers())
        named |= {key: buffers[key] for key in ("input_scale", "input_zero_point") if key in buffers}
        return {f"{name}.{key}": tensor.detach().cpu().contiguous().clone() for key, tensor in named.items()}


def write_checkpoint(
    source: Source,
    folder: Path,
    model: nn.Module,
    layout: Mapping[str, Piece],
    dtype: torch.dtype,
    rewritten: Collection[str] = (),
    added: Collection[str] = (),
) -> None:
    """Fill the empty `folder` with the quantized form of `source`; layout is that of the model before it was quantized.

    dtype is that of the source's weights. rewritten names float parameters of the model that the source has otherwise,
    added those that it does not have: a head that shared the embedding's weight.
    """
    changed = {name: piece for name, piece in layout.items() if piece.parameter in rewritten}
    stored, own = _stored(model, layout), _needs_own_form(model)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for shard in source.shards:
        tensors: dict[str, Tensor] = {}
        with safe_open(source.folder / shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (a handle, not a mapping)
                if name in stored:
                    tensors |= stored.pop(name).tensors(name.removesuffix(".weight"), dtype, own)
                elif name in changed:
                    piece = changed[name]
                    tensors[name] = _like(file.get_tensor(name), model.get_parameter(piece.parameter), piece)
                elif name not in added:
                    tensors[name] = file.get_tensor(name)
        if shard == source.shards[-1]:
            tensors |= {name: model.get_parameter(name).detach().cpu().to(dtype).contiguous() for name in added}
        weight_map |= dict.fromkeys(tensors, shard)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        shutil.copymode(source.folder / shard, folder / shard)  # safetensors makes files that only their owner reads
    assert not stored, f"quantized, but not found in the source's files: {sorted(stored)[:3]}"
    _write_index(source, folder, weight_map, total_bytes)
    copy_files(source, folder)
    config = source.config | {
        "quantization_config": _own_config(model, layout) if own else _config(model, layout, dtype)
    }
    if added:
        config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _like(old: Tensor, new: Tensor, piece: Piece) -> Tensor:
    """The piece of `new` in the dtype of old, which it replaces whole."""
    if new.shape != old.shape:
        new = new[piece.start : piece.stop]
    assert old.shape == new.shape, f"{list(new.shape)} can't take the place of {list(old.shape)}"
    return new.detach().cpu().to(old.dtype).contiguous()


def _layer_of(model: nn.Module, piece: Piece) -> QuantLinear | None:
    """The quantized layer that took the place of the piece's parameter, or None."""
    if piece.expert is not None:
        parent, _, attribute = piece.parameter.rpartition(".")
        experts = getattr(model.get_submodule(parent), attribute)
        return experts[piece.expert].layer if isinstance(experts, QuantExperts) else None
    owner, _, attribute = piece.parameter.rpartition(".")
    module = model.get_submodule(owner)
    return module if attribute == "weight" and isinstance(module, QuantLinear) else None


def _stored(model: nn.Module, layout: Mapping[str, Piece]) -> dict[str, _Stored]:
    """Disk name of each quantized weight -> what is stored for it."""
    found = ((name, _layer_of(model, piece), piece) for name, piece in layout.items())
    return {name: _Stored(layer, piece.start, piece.stop) for name, layer, piece in found if layer is not None}


def _config(model: nn.Module, layout: Mapping[str, Piece], dtype: torch.dtype) -> dict[str, Any]:
    schemes: dict[str, QuantScheme] = {}
    ignore = {name for name, module in model.named_modules() if type(module) is nn.Linear and name == "lm_head"}
    embeddings = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    for name, piece in layout.items():
        module = name.removesuffix(".weight")
        owner = piece.parameter.rpartition(".")[0]
        if (layer := _layer_of(model, piece)) is not None:
            schemes[module] = layer.scheme
        elif name.endswith(".weight") and owner not in embeddings and _is_matrix(model, piece):
            ignore.add(module)
    first = next(iter(schemes.values()))
    if first.weights.format.kind == "codebook":
        return config_4bit(first, dtype, sorted(ignore))
    if _has_outliers(first):
        return config_8bit(first, sorted(ignore))
    return quantization_config(schemes, ignore)


def _has_outliers(scheme: QuantScheme) -> bool:
    """Whether it is LLM.int8(), which bitsandbytes' files hold and compressed-tensors' do not."""
    return scheme.activations is not None and scheme.activations.outlier is not None


def _needs_own_form(model: nn.Module) -> bool:
    """Whether the model rotates inputs at run time or has a scheme that no other library's files hold."""
    layers = [part for part in model.modules() if isinstance(part, QuantLinear)]
    schemes = {layer.scheme for layer in layers}
    known = [s for s in schemes if s.weights.format.kind == "codebook" or _has_outliers(s) or refusal(s) is None]
    return len(known) < len(schemes) or any(layer.rotation is not None for layer in layers)


def _own_config(model: nn.Module, layout: Mapping[str, Piece]) -> dict[str, Any]:
    """Our own config (io/own.py): every disk module with its layer's scheme and its own rows."""
    modules = {}
    for name, piece in layout.items():
        if (layer := _layer_of(model, piece)) is not None:
            shape = [piece.stop - piece.start, layer.in_features]
            modules[name.removesuffix(".weight")] = described(layer) | {"shape": shape}
    first = next(iter(modules.values()))["scheme"]
    return LowbitConfig(first, (), modules).to_dict()


def _is_matrix(model: nn.Module, piece: Piece) -> bool:
    return model.get_parameter(piece.parameter).dim() == 2


def _write_index(source: Source, folder: Path, weight_map: dict[str, str], total_bytes: int) -> None:
    if not (source.folder / INDEX).is_file():
        return
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def copy_files(source: Source, folder: Path) -> None:
    """Copy tokenizer, generation_config and whatever else is neither weights nor written anew."""
    for path in sorted(source.folder.iterdir()):
        if path.is_file() and path.suffix not in _NOT_COPIED and path.name not in _REWRITTEN:
            shutil.copyfile(path, folder / path.name)
