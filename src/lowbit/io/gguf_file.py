"""The GGUF container, version 3: metadata and tensors of one file, read and written with struct and numpy alone.

    "GGUF" | u32 version | u64 tensors | u64 keys
    key:    string (u64 length, UTF-8), u32 type, value          arrays: u32 type, u64 count, values
    tensor: string, u32 dimensions, u64 each, fastest first, u32 block type, u64 offset into the data
    padding to general.alignment (32) | data, each tensor aligned

Everything that is allocated is bounded by the file's size, which every count is held against first.
Source: ggml docs/gguf.md.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import CheckpointError
from lowbit.io.gguf_blocks import BLOCKS, Block

_MAGIC, _VERSION, _ALIGNMENT = b"GGUF", 3, 32
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_LONGEST_NAME_BYTES, _MOST_DIMENSIONS = 64, 4


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies; shape as PyTorch has it, slowest dimension first."""

    name: str
    shape: tuple[int, ...]
    block: Block
    start: int

    @property
    def bytes(self) -> int:
        return prod(self.shape) // self.block.size * self.block.bytes


@dataclass(frozen=True)
class GgufFile:
    """One file: its metadata by key and its tensors by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @classmethod
    def open(cls, path: Path) -> "GgufFile":
        """Raises CheckpointError for a file that is missing, damaged, of another version or with unknown blocks."""
        try:
            with path.open("rb") as file:
                return _Parser(path, file, path.stat().st_size).parse()
        except FileNotFoundError:
            raise CheckpointError(f"there is no file {path}") from None
        except (struct.error, UnicodeDecodeError, OverflowError):
            raise _damaged(path, "its header ends early or holds no text") from None

    def read(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes, [rows, bytes of a row], in new memory."""
        tensor = self.tensors[name]
        octets = np.empty(tensor.bytes, np.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(tensor.start)
            view = octets.data
            while view:
                count = file.readinto(view)  # type: ignore[attr-defined]
                if not count:
                    raise _damaged(self.path, f"it ends within {name}")
                view = view[count:]
        rows = prod(tensor.shape[:-1])
        return octets.reshape(rows, -1)

    def floats(self, name: str) -> NDArray[np.float32]:
        """The tensor's values."""
        tensor = self.tensors[name]
        return tensor.block.decode(self.read(name)).reshape(tensor.shape)


def gguf_family(path: Path) -> str | None:
    """llama.cpp's name of the architecture in a file. Raises CheckpointError for a file that is missing or damaged."""
    return GgufFile.open(path).metadata.get("general.architecture")


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or no GGUF file: {why}; download it again")


class _Parser:
    """Reads a header; every length is checked against what is left of the file before it is used."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size

    def parse(self) -> GgufFile:
        if self.file.read(4) != _MAGIC:
            raise _damaged(self.path, "its first bytes are not 'GGUF'")
        version = self._number("<I")
        if version != _VERSION:
            raise CheckpointError(f"{self.path} is GGUF version {version}; lowbit reads version {_VERSION}")
        tensors, keys = self._number("<Q"), self._number("<Q")
        self._check(tensors, 24, "tensors")
        self._check(keys, 12, "keys")
        metadata = {}
        for _ in range(keys):
            key = self._string()
            metadata[key] = self._value(self._number("<I"), 0)
        placed = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= 2**16:
            raise _damaged(self.path, f"its alignment is {alignment!r}")
        start = -(-self.file.tell() // alignment) * alignment
        found = {}
        for name, shape, block, offset in placed:
            tensor = GgufTensor(name, shape, block, start + offset)
            if name in found or tensor.start + tensor.bytes > self.size:
                raise _damaged(self.path, f"{name!r} is there twice or does not lie within the file")
            found[name] = tensor
        return GgufFile(self.path, metadata, found)

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self.file.read(struct.calcsize(form)))[0]

    def _check(self, count: int, each: int, what: str) -> None:
        if count * each > self.size - self.file.tell():
            raise _damaged(self.path, f"it says {count} {what}, which do not fit in it")

    def _string(self) -> str:
        length = self._number("<Q")
        self._check(length, 1, "characters")
        return self.file.read(length).decode("utf-8")

    def _value(self, kind: int, depth: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth > 1:
            raise _damaged(self.path, f"a key has the unknown type {kind}")
        inner, count = self._number("<I"), self._number("<Q")
        self._check(count, struct.calcsize(_SCALARS.get(inner, "<Q")), "elements")
        if inner in _SCALARS:
            form = _SCALARS[inner]
            octets = self.file.read(count * struct.calcsize(form))
            return list(struct.unpack(f"<{count}{form[1:]}", octets))
        return [self._value(inner, depth + 1) for _ in range(count)]

    def _tensor(self) -> tuple[str, tuple[int, ...], Block, int]:
        name, dimensions = self._string(), self._number("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise _damaged(self.path, f"{name[:80]!r} has {dimensions} dimensions")
        shape = tuple(reversed([self._number("<Q") for _ in range(dimensions)]))
        kind, offset = self._number("<I"), self._number("<Q")
        if kind not in BLOCKS:
            raise CheckpointError(
                f"{self.path}: {name[:80]} has the block type {kind}, which lowbit does not read; it reads "
                + ", ".join(block.name for block in BLOCKS.values())
            )
        block = BLOCKS[kind]
        if prod(shape) <= 0 or prod(shape) > 8 * self.size or shape[-1] % block.size:
            raise _damaged(self.path, f"{name[:80]!r} of {list(shape)} holds no whole blocks of {block.name}")
        return name, shape, block, offset


def write_gguf(
    path: Path, metadata: Mapping[str, Any], shapes: Sequence[tuple[str, tuple[int, ...], Block]],
    rows: Iterator[NDArray[np.uint8]],
) -> None:  # fmt: skip
    """Write a file: metadata (numbers, texts, lists), then the tensors, whose bytes `rows` gives in order.

    Integers are written as u32 (i32 in lists), floats as f32, truth values as bool.
    """
    header = [_MAGIC, struct.pack("<IQQ", _VERSION, len(shapes), len(metadata))]
    header += [_text(key) + _typed(value) for key, value in metadata.items()]
    offset = 0
    for name, shape, block in shapes:
        assert len(name.encode()) <= _LONGEST_NAME_BYTES, name
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header.append(_text(name) + sizes + struct.pack("<IQ", block.id, offset))
        offset += _aligned(GgufTensor(name, shape, block, 0).bytes)
    text = b"".join(header)
    with path.open("wb") as file:
        file.write(text.ljust(_aligned(len(text)), b"\0"))
        for (name, shape, block), octets in zip(shapes, rows, strict=True):
            assert octets.nbytes == GgufTensor(name, shape, block, 0).bytes, name
            file.write(octets.data)
            file.write(b"\0" * (_aligned(octets.nbytes) - octets.nbytes))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _text(value: str) -> bytes:
    octets = value.encode("utf-8")
    return struct.pack("<Q", len(octets)) + octets


def _typed(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    kind, form = (5, "i") if isinstance(value[0], int) else (6, "f")
    if isinstance(value[0], str):
        body = b"".join(_text(item) for item in value)
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + body
    return struct.pack(f"<IIQ{len(value)}{form}", _ARRAY, kind, len(value), *value)
