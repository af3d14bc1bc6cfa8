"""Mutated checkpoints for the fuzzer: every readable format on one tiny layer stack, damaged in one place each.

`Mutants(folder)` keeps a sound base of each format; `write(random, folder)` writes one with a damage drawn from
`random`: bytes of the header, entries of the header, a tensor's shape or dtype, a key of a config, the index, or a
GGUF's bytes. `probe(path)` opens it in every way that lowbit has; whatever it raises but LowbitError is a finding.
"""

import json
import math
import random as random_module
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import lowbit
from lowbit.inspection import inspect_checkpoint
from lowbit.io.conversion import Options
from lowbit.io.convert import convert
from lowbit.io.gguf_blocks import BY_NAME
from lowbit.io.gguf_encode import encode_floats
from lowbit.io.gguf_file import GgufFile, write_gguf
from lowbit.io.reading import reader_of
from lowbit.io.source import open_source
from lowbit.io.stored import Stored
from lowbit.io.targets import TARGETS
from lowbit.io.tensorfile import Files
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

SIZES = {
    **{"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
BASES = {
    **{"w4a16-g32": "compressed-tensors", "w3a16-g32-asym": "compressed-tensors", "w8a8": "compressed-tensors"},
    **{"fp8": "compressed-tensors", "fp8-tile128": "compressed-tensors", "nvfp4a16": "compressed-tensors"},
    **{"w4a16-g16": "gptq", "w8a16-g32-asym": "gptq-v2", "w4a16-g32-asym": "awq", "nf4-b64-dq": "bitsandbytes"},
}
_JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 7, 33, 64, 2**31, 10**18, 0.5, float("nan"), "", "x", "group", "re:(", "float32"),
    *([], {}, [[]], [128, 128], ["Linear"], {"a": None}),
)
_DTYPES = ("F32", "F16", "BF16", "I32", "I8", "U8", "I64", "F8_E4M3", "BOOL", "F64", "F4", None, 7)


def _base(folder: Path, text: str, target: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    tensors, schemes = dict(model.state_dict()), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = PackedWeight.from_float(tensors.pop(f"{name}.weight"), QuantScheme.parse(text), torch.float16)
            tensors |= TARGETS[target].tensors(name, Stored(weight), torch.float16)
            schemes[name] = weight.scheme
    quantization = TARGETS[target].config(schemes, ["lm_head"], torch.float16)
    _finish(folder, model.config.to_dict(), tensors, quantization)


def _llm_int8(folder: Path) -> None:
    """bitsandbytes' int8 and, in the same way, DeepSeek's fp8 blocks, out of our own int8 and fp8."""
    tensors = load_file(folder / "model.safetensors")
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("weight_scale")}
    for name, scale in scales.items():
        tensors[name.replace("weight_scale", "SCB")] = (scale.float() * 127).view(-1)
    config = json.loads((folder / "config.json").read_text())
    _finish(folder, config, tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0})


def _deepseek(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.replace("weight_scale", "weight_scale_inv"): value.float() if "scale" in name else value
               for name, value in tensors.items()}  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    _finish(folder, config, tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]})


def _finish(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config |= {"quantization_config": quantization, "dtype": "float16", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def _gguf(path: Path) -> None:
    w = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).numpy()
    shapes, rows = [], []
    for name, kind in (("token_embd", "Q8_0"), ("output", "F16"), ("blk.0.attn_q", "Q4_0"), ("blk.0.ffn_up", "Q4_1")):
        shapes.append((f"{name}.weight", (32, 32), BY_NAME[kind]))
        rows.append(encode_floats(w, BY_NAME[kind]))
    metadata = {"general.architecture": "llama", "llama.block_count": 1, "llama.embedding_length": 32,
                "llama.attention.head_count": 2, "llama.context_length": 8, "llama.feed_forward_length": 32,
                "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.tokens": ["a"] * 32}  # fmt: skip
    write_gguf(path, metadata, shapes, iter(rows))


class Mutants:
    """Sound bases, and damaged copies of them."""

    def __init__(self, folder: Path) -> None:
        self.bases = []
        for text, target in BASES.items():
            _base(folder / text, text, target)
            self.bases.append(folder / text)
        for text, change in (("w8a8", _llm_int8), ("fp8-tile128", _deepseek)):
            place = folder / change.__name__
            shutil.copytree(folder / text, place)
            change(place)
            self.bases.append(place)
        self.gguf = folder / "model.gguf"
        _gguf(self.gguf)

    def write(self, random: random_module.Random, folder: Path) -> Path:
        """One mutant in the empty `folder`; the path to open."""
        if random.random() < 0.2:
            path = folder / "model.gguf"
            path.write_bytes(_damaged_bytes(self.gguf.read_bytes(), 1200, random))
            return path
        base = random.choice(self.bases)
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(base / name, folder / name)
        for _ in range(random.choice((1, 1, 1, 2))):
            random.choice((_bytes, _header, _tensor, _tensor, _config, _config, _index))(folder, random)
        return folder


def _damaged_bytes(octets: bytes, reach: int, random: random_module.Random) -> bytes:
    """Flipped, cut, lengthened or overwritten within the first `reach` bytes."""
    changed = bytearray(octets)
    kind = random.randrange(4)
    if kind == 0:
        for _ in range(random.randint(1, 4)):
            changed[random.randrange(min(reach, len(changed)))] = random.randrange(256)
    elif kind == 1:
        del changed[random.randrange(len(changed)) :]
    elif kind == 2:
        place = random.randrange(min(reach, len(changed)))
        changed[place : place + 8] = random.choice((b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 2**40)))
    else:
        place = random.randrange(min(reach, len(changed)))
        changed[place:place] = bytes(random.randrange(256) for _ in range(random.randint(1, 9)))
    return bytes(changed)


def _bytes(folder: Path, random: random_module.Random) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(_damaged_bytes(path.read_bytes(), 3000, random))


def _header(folder: Path, random: random_module.Random) -> None:
    """An entry of the header says something else; the bytes stay."""
    path = folder / "model.safetensors"
    octets = path.read_bytes()
    try:
        (length,) = struct.unpack("<Q", octets[:8])
        header = json.loads(octets[8 : 8 + length])
        name = random.choice(sorted(header))
        entry = header[name]
        kind = random.randrange(5)
        if kind == 0:
            entry["dtype"] = random.choice(_DTYPES)
        elif kind == 1:
            entry["shape"] = random.choice(
                ([], [0], [-1], [2**40, 2**40], [1] * 40, None, "x", [1.5], [32, 4], [4, 32])
            )
        elif kind == 2:
            entry["data_offsets"] = random.choice(([0, 0], [0, 2**50], [-8, 8], [8], None, [64, 0], [0, 1e3]))
        elif kind == 3:
            header[random.choice(("..", "a" * 5000, "model.norm.weight", "x.weight_scale", "y.SCB"))] = entry
        else:
            header[name] = random.choice(_JUNK)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + octets[8 + length :])
    except (ValueError, struct.error, KeyError, TypeError, IndexError):  # damaged already
        return


def _tensor(folder: Path, random: random_module.Random) -> None:
    """A sound file in which one tensor has another shape, dtype or value, or is gone."""
    path = folder / "model.safetensors"
    try:
        tensors = load_file(path)
    except Exception:
        return
    if not tensors:
        return
    name = random.choice(sorted(tensors))
    tensor = tensors.pop(name)
    kind = random.randrange(9)
    changes: tuple[Callable[[], Tensor], ...] = (
        lambda: tensor[1:] if tensor.dim() else tensor.reshape(1),
        lambda: tensor.reshape(-1),
        lambda: tensor.reshape(*tensor.shape, 1),
        lambda: tensor.t().contiguous() if tensor.dim() == 2 else tensor.reshape(1, -1),
        lambda: torch.zeros(0, dtype=tensor.dtype),
        lambda: torch.zeros(tensor.shape, dtype=random.choice((torch.int64, torch.float32, torch.uint8, torch.bool))),
        lambda: torch.full(tensor.shape, 255 if not tensor.is_floating_point() else math.nan).to(tensor.dtype),
        lambda: torch.cat([tensor.reshape(-1), tensor.reshape(-1)]),
    )
    if kind < len(changes):
        tensors[name] = changes[kind]()
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)


def _config(folder: Path, random: random_module.Random) -> None:
    """A key of config.json, most often of quantization_config and what lies in it, has junk or is gone."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    place = config
    if random.random() < 0.85 and isinstance(config.get("quantization_config"), dict):
        place = config["quantization_config"]
        while random.random() < 0.6 and (inner := [v for v in place.values() if isinstance(v, dict) and v]):
            place = random.choice(inner)
    key = random.choice(sorted(place)) if place and random.random() < 0.9 else "bits"
    if random.random() < 0.2:
        place.pop(key, None)
    else:
        place[key] = random.choice(_JUNK)
    path.write_text(json.dumps(config))


def _index(folder: Path, random: random_module.Random) -> None:
    names = ("../secret.safetensors", "/etc/passwd", "model.safetensors", "", 7, None, "sub/model.safetensors", "none")
    index = random.choice((
        {"weight_map": {"a": random.choice(names)}}, {"weight_map": []}, {}, [], {"weight_map": {"a": ["b"]}},
    ))  # fmt: skip
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def probe(path: Path, deep: bool) -> None:
    """Open the mutant in every way; deep: also build the model, and convert."""
    for way in (_read, inspect_checkpoint, *((_load, _convert) if deep else ())):
        try:
            way(path)
        except lowbit.LowbitError:
            continue


def _read(path: Path) -> None:
    if path.suffix == ".gguf":
        file = GgufFile.open(path)
        for name in file.tensors:
            file.floats(name)
        return
    with open_source(path) as source:
        files = Files.open(source.folder / shard for shard in source.shards)
        if source.quantization is None:
            return
        reader = reader_of(source.quantization, files)
    for module in reader.modules:
        try:
            reader.read(module).weight.dequantize()
        except lowbit.LowbitError:
            continue


def _load(path: Path) -> None:
    lowbit.load(path, torch.float32)


def _convert(path: Path) -> None:
    out = path.parent / "converted"
    try:
        convert(path, out, "gptq-v2", Options(overwrite=True))
    finally:
        shutil.rmtree(out, ignore_errors=True)


class Watch:
    """An audit hook: notes each file opened outside the allowed folders, and each class that a pickle asks for."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.allowed: tuple[str, ...] = ()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self.allowed:
            return
        if event == "pickle.find_class":
            self.seen.append(f"pickle {arguments}")
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = arguments[0] if isinstance(arguments[0], str) else arguments[0].decode()
            if not path.startswith(self.allowed):
                self.seen.append(path)
