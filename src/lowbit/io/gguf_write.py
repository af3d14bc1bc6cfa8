"""A checkpoint folder -> one GGUF file that llama.cpp loads: tensors, settings, tokenizer.

"gguf" carries integers over as they are (gguf_encode.py), refuses what has no block, and keeps embedding and head in
their own dtype; "gguf-q4_k" and its like round the float weights of a checkpoint that is not quantized, or, where that
loss was asked for, of one that is, with embedding and head in Q8_0. Vectors go as float32. Written tensor by tensor.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lowbit.errors import CheckpointError, InputError
from lowbit.io.decoders import decode
from lowbit.io.gguf_blocks import BY_NAME, Block
from lowbit.io.gguf_encode import block_of, encode_codes, encode_floats, fitting
from lowbit.io.gguf_file import GgufFile, write_gguf
from lowbit.io.gguf_names import FACTORS, heads_of, rope_factors, rows_to_gguf, settings_of, to_gguf
from lowbit.io.gguf_tokenizer import tokenizer_keys
from lowbit.io.source import Source
from lowbit.io.stored import Reader
from lowbit.io.tensorfile import Files
from lowbit.tensors import PackedWeight

_PLAIN = {torch.bfloat16: "BF16", torch.float16: "F16"}
FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K": 14, "Q6_K": 18}  # general.file_type: llama.cpp's LLAMA_FTYPE
Rows = NDArray[np.uint8]


@dataclass
class GgufWriter:
    """One file: the source, its reader where it is quantized, and the block type of float weights (None: codes as
    they are)."""

    source: Source
    files: Files
    reader: Reader | None
    block: Block | None
    fallbacks: set[str] = field(default_factory=set)

    def write(self, path: Path, tool: str) -> int:
        """Fill `path`; the number of tensors that hold codes. Raises InputError for what GGUF can't hold."""
        config = self.source.config
        settings = settings_of(config)
        plan = self._plan()
        kinds = [block.name for name, _, block in plan if name.startswith("blk.") and block.grid is not None]
        main = self.block.name if self.block else max(sorted(set(kinds)), key=kinds.count)
        metadata = settings | {
            "general.name": Path(self.source.name).name,
            "general.file_type": FILE_TYPES[main],
            "general.quantization_version": 2,
            "general.quantized_by": tool,
        }
        metadata |= tokenizer_keys(self.source.folder, config["vocab_size"])
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        try:
            write_gguf(partial, metadata, plan, self._rows(plan))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return len(kinds)

    def _names(self) -> list[str]:
        """transformers' names of all weights, quantized ones by their module's weight."""
        if self.reader is None:
            return list(self.files.places)
        own = {name for module in self.reader.modules for name in self.reader.names(module)}
        return [*(name for name in self.files.places if name not in own), *(f"{m}.weight" for m in self.reader.modules)]

    def _plan(self) -> list[tuple[str, tuple[int, ...], Block]]:
        self.ours = {to_gguf(name): name for name in self._names() if not name.endswith("rotary_emb.inv_freq")}
        plan = []
        for theirs, name in self.ours.items():
            weight = self._packed(name)
            shape = weight.shape if weight is not None else self.files.entry(name).shape
            plan.append((theirs, tuple(shape), self._block(name, tuple(shape), weight)))
        if (factors := rope_factors(self.source.config)) is not None:
            plan.append((FACTORS, tuple(factors.shape), BY_NAME["F32"]))
        return plan

    def _packed(self, name: str) -> PackedWeight | None:
        module = name.removesuffix(".weight")
        is_quantized = self.reader is not None and module in self.reader.modules and name.endswith(".weight")
        return self.reader.read(module).weight if self.reader and is_quantized else None

    def _block(self, name: str, shape: tuple[int, ...], weight: PackedWeight | None) -> Block:
        if len(shape) == 1:
            return BY_NAME["F32"]
        if weight is not None and self.block is None:
            found = block_of(weight)
            if isinstance(found, str):
                raise InputError(
                    f"GGUF can't hold the codes of {name}: {found}. To round its weights again, which loses something, "
                    "use --format gguf-q8_0, gguf-q6_k or gguf-q4_k with --lossy requantize"
                )
            return found
        if self.block is None:
            return BY_NAME[_PLAIN.get(self.files.entry(name).dtype, "F32")]
        wanted = self.block if name.endswith("_proj.weight") else BY_NAME["Q8_0"]
        block = fitting(wanted, shape[-1])
        if block != wanted:
            self.fallbacks.add(f"rows of {shape[-1]} hold no whole blocks of {wanted.name}; those are {block.name}")
        return block

    def _rows(self, plan: list[tuple[str, tuple[int, ...], Block]]) -> Iterator[Rows]:
        for theirs, _, block in plan:
            if theirs in self.ours:
                yield self._encoded(self.ours[theirs], block)
            elif (factors := rope_factors(self.source.config)) is not None:
                yield factors.numpy().view(np.uint8)

    def _encoded(self, name: str, block: Block) -> Rows:
        """The tensor's bytes, rows in llama.cpp's order."""
        weight = self._packed(name)
        if weight is not None and self.block is None:
            octets = encode_codes(weight, block)
        else:
            w = self.files.get(name) if weight is None else weight.dequantize()
            floats = w.to(torch.float32).numpy()
            octets = encode_floats(floats.reshape(-1, floats.shape[-1]), block)
        if (heads := heads_of(name, self.source.config)) is not None:
            rows = octets if name.endswith(".weight") else octets.reshape(-1, block.bytes)
            octets = rows[rows_to_gguf(len(rows), heads).numpy()]
        return np.ascontiguousarray(octets)

    def verify(self, path: Path) -> int:
        """Decode what carries codes and compare with the source's weights; how many did. Raises CheckpointError."""
        file, equal = GgufFile.open(path), 0
        for theirs, name in self.ours.items():
            weight = self._packed(name)
            if weight is None or self.block is not None:
                continue
            w = decode(self.files.get, self.source.quantization or {}, name.removesuffix(".weight")).weight()
            if (heads := heads_of(name, self.source.config)) is not None:
                w = w[rows_to_gguf(len(w), heads).numpy()]
            if not np.array_equal(file.floats(theirs), w):
                raise CheckpointError(f"{name} does not decode to the same numbers from {path}; please report this")
            equal += 1
        return equal
