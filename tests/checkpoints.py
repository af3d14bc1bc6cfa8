"""Folders of tiny models, and what the pipeline makes of them, for the tests of every room above numerics."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from architectures import tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lowbit.io.checkpoint import write_checkpoint
from lowbit.io.names import disk_layout
from lowbit.io.source import Source, load_float, open_source
from lowbit.model.log import LayerLog
from lowbit.model.quantize import Job, quantize_blocks
from lowbit.model.recipe import Recipe
from lowbit.model.select import Rule, Selection, select
from lowbit.observe.capture import find_blocks

TOKENS = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(0))
"""Token ids [4, 24] that tiny models are calibrated on and asked about."""

COPIED = {
    "tokenizer.json": b'{"written by": "hand"}\r\n',
    "tokenizer_config.json": b"{}",
    "merges.txt": b"a b\n",
    "chat_template.jinja": b"{{ messages }}\xc3\xa9",
}
"""Files beside the weights, which the pipeline has no business to understand."""


def source_folder(
    folder: Path, model_type: str, dtype: torch.dtype = torch.bfloat16, shard_size: str = "5GB"
) -> PreTrainedModel:
    """The tiny model that is saved into `folder` with the files of COPIED."""
    model = tiny(model_type).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    for name, content in COPIED.items():
        (folder / name).write_bytes(content)
    return model


def selection_of(model: PreTrainedModel, recipe: Recipe) -> Selection:
    """What the pipeline would quantize of a model, with the experts that its files keep apart."""
    splittable = {piece.parameter for piece in disk_layout(model).values() if piece.expert is not None}
    return select(model, find_blocks(model)[0], recipe.scheme, recipe.rules, splittable)


def quantize_in_memory(
    model: PreTrainedModel, recipe: Recipe, scale_dtype: torch.dtype = torch.float32, batches: Sequence[Tensor] = ()
) -> LayerLog:
    """Quantize `model` in place, by default calibrated on TOKENS."""
    job = Job(recipe, selection_of(model, recipe), batches or [TOKENS], scale_dtype)
    return quantize_blocks(model, job)


@dataclass(frozen=True)
class Written:
    """A source, the checkpoint made of it, and the quantized model (float32 where not quantized) in memory."""

    source: Path
    out: Path
    model: PreTrainedModel
    recipe: Recipe


def write_quantized(folder: Path, model_type: str, text: str, rules: Sequence[str] = (), **saving: str) -> Written:
    """A bfloat16 source in folder/source and its checkpoint under `text`, in folder/out."""
    source_folder(folder / "source", model_type, **saving)
    return quantize_folder(folder / "source", folder / "out", text, rules)


def quantize_folder(source_path: Path, out: Path, text: str, rules: Sequence[str] = ()) -> Written:
    """The checkpoint `out` of a bfloat16 source under `text`, worked out in float32 as `lowbit.quantize` does."""
    parsed = Recipe.parse(text)
    recipe = Recipe(parsed.scheme, parsed.method, tuple(Rule.parse(rule) for rule in rules))
    with open_source(source_path) as source:
        model = load_float(source, torch.float32)
        layout = disk_layout(model)
        log = quantize_in_memory(model, recipe, torch.bfloat16)
        out.mkdir()
        write_checkpoint(source, out, model, layout, torch.bfloat16, log.rewritten)
    return Written(source_path, out, model, recipe)


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor in the safetensors files of a folder."""
    return {
        name: tensor
        for shard in Source("", folder).shards
        for name, tensor in load_file(folder / shard).items()
    }  # fmt: skip


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Same dtype, shape and bytes."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    )


def rewrite(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Change tensors of the one safetensors file of `folder`, add some, or, for None, remove them."""
    path = folder / "model.safetensors"
    tensors: dict[str, Tensor | None] = {**load_file(path), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, path, metadata={"format": "pt"})


def rewrite_config(folder: Path, **changes: object) -> None:
    """Change entries of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says about itself."""
    with safe_open(path, framework="pt") as file:
        return file.metadata()
