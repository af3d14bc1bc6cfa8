"""safetensors files, read tensor by tensor into memory of their own (tensorwriter.py writes them).

    u64 length of the header | header: JSON {name: {dtype, shape, data_offsets: [begin, end]}}, spaces | bytes

The header is checked whole before a byte is allocated: every tensor lies inside the file, no two overlap, and its
extent is what shape and dtype ask for. So no file makes a reader allocate more than the file holds. The safetensors
library maps the file instead, which counts every page that was touched as this process's memory.
Format: https://github.com/huggingface/safetensors, "Format"; limits as in its Rust code (header at most 100 MB).
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import CheckpointError

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Entry:
    """Where a file holds a tensor; start and stop count from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class TensorFile:
    """One safetensors file: its path, its tensors by name, its metadata."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> "TensorFile":
        """The file with its header read and checked. Raises CheckpointError for one that is missing or damaged."""
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                header, start = _header(path, file.read(8), size, file.read)
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} is missing, though the model's index names it; get the model again"
            ) from None
        except OSError as error:
            raise CheckpointError(f"{path} can't be read: {error.strerror}") from None
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise damaged(path, "its metadata is no object")
        entries = {name: _entry(path, name, value, start, size) for name, value in header.items()}
        _check_apart(path, entries)
        return cls(path, entries, {str(key): str(value) for key, value in metadata.items()})

    def read(self, name: str) -> Tensor:
        """The tensor, in new memory."""
        entry = self.entries[name]
        if entry.bytes == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        octets = np.empty(entry.bytes, np.uint8)  # in huge pages, as torch's are not: a third of the time of a read
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            view = octets.data
            while view:
                count = file.readinto(view)  # type: ignore[attr-defined]
                if not count:
                    raise damaged(self.path, f"it ends within {name}")
                view = view[count:]
        return torch.from_numpy(octets).view(entry.dtype).view(entry.shape)


def _header(path: Path, prefix: bytes, size: int, read: object) -> tuple[dict, int]:
    """(header, where the data begins)."""
    if len(prefix) < 8:
        raise damaged(path, "it is shorter than 8 bytes")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(_LONGEST_HEADER_BYTES, size - 8):
        raise damaged(path, f"its header of {length} bytes does not fit in {size}")
    try:
        header = json.loads(read(length))  # type: ignore[operator]
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its header is no JSON ({str(error)[:80]})") from None
    if not isinstance(header, dict):
        raise damaged(path, "its header is no JSON object")
    return header, 8 + length


def _entry(path: Path, name: str, value: object, start: int, size: int) -> Entry:
    """One header entry, checked. Raises CheckpointError."""
    if not isinstance(value, dict) or value.get("dtype") not in _DTYPES:
        raise damaged(path, f"{name[:80]!r} has no dtype that safetensors knows")
    shape, offsets = value.get("shape"), value.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:  # type: ignore[arg-type]
        raise damaged(path, f"{name[:80]!r} has no shape or no offsets")
    assert isinstance(shape, list)
    assert isinstance(offsets, list)
    dtype = _DTYPES[value["dtype"]]
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize or start + end > size:
        raise damaged(path, f"{name[:80]!r} of {value['dtype']} {shape[:8]} does not lie at {offsets} of {size} bytes")
    return Entry(dtype, tuple(shape), start + begin, start + end)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**48 for size in value)


def _check_apart(path: Path, entries: Mapping[str, Entry]) -> None:
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.start < end and entry.bytes:
            raise damaged(path, "two of its tensors overlap")
        end = max(end, entry.stop)


def damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or no safetensors file: {why}; get a clean copy")


def forget(file: FileIO, start: int = 0, size: int = 0) -> None:
    """Tell the system that these bytes (0: up to the end) are not needed again.

    Their pages then serve what is written next, in place of memory that was never touched: copying 2.1 GB took 1.6
    CPU-s instead of 7.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_DONTNEED)


@dataclass
class Files:
    """The tensors of all shards by name, and which of them were read."""

    places: dict[str, TensorFile]
    read: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, paths: Iterable[Path]) -> "Files":
        """Raises CheckpointError where a shard is damaged or two shards hold the same name."""
        places: dict[str, TensorFile] = {}
        for path in paths:
            shard = TensorFile.open(path)
            if twice := places.keys() & shard.entries.keys():
                raise CheckpointError(f"{path} and another shard both hold {min(twice)}; get a clean copy of the model")
            places |= dict.fromkeys(shard.entries, shard)
        return cls(places)

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def get(self, name: str) -> Tensor:
        """The tensor called `name`. Raises CheckpointError where there is none."""
        if name not in self.places:
            raise CheckpointError(f"the checkpoint has no {name}; it is damaged or its config describes another one")
        self.read.add(name)
        return self.places[name].read(name)

    def entry(self, name: str) -> Entry:
        """Shape, dtype and place of a tensor that is there."""
        return self.places[name].entries[name]

    def unread(self) -> list[str]:
        return sorted(set(self.places) - self.read)
