"""safetensors files, read tensor by tensor into memory of their own, and written tensor by tensor.

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
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from types import TracebackType

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
_PIECE_BYTES = 2**20  # 2 GB in writes of 29 MB cost 1.6 to 2.7 CPU-s, in writes of 1 MB 0.4 (Linux 6.18, ext4)
_KERNEL_PIECE_BYTES = 64 * 2**20
_WAITING_BYTES = 128 * 2**20


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
            raise _damaged(path, "its metadata is no object")
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
                    raise _damaged(self.path, f"it ends within {name}")
                view = view[count:]
        return torch.from_numpy(octets).view(entry.dtype).view(entry.shape)


def _header(path: Path, prefix: bytes, size: int, read: object) -> tuple[dict, int]:
    """(header, where the data begins)."""
    if len(prefix) < 8:
        raise _damaged(path, "it is shorter than 8 bytes")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(_LONGEST_HEADER_BYTES, size - 8):
        raise _damaged(path, f"its header of {length} bytes does not fit in {size}")
    try:
        header = json.loads(read(length))  # type: ignore[operator]
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is no JSON ({str(error)[:80]})") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    return header, 8 + length


def _entry(path: Path, name: str, value: object, start: int, size: int) -> Entry:
    """One header entry, checked. Raises CheckpointError."""
    if not isinstance(value, dict) or value.get("dtype") not in _DTYPES:
        raise _damaged(path, f"{name[:80]!r} has no dtype that safetensors knows")
    shape, offsets = value.get("shape"), value.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:  # type: ignore[arg-type]
        raise _damaged(path, f"{name[:80]!r} has no shape or no offsets")
    assert isinstance(shape, list)
    assert isinstance(offsets, list)
    dtype = _DTYPES[value["dtype"]]
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize or start + end > size:
        raise _damaged(path, f"{name[:80]!r} of {value['dtype']} {shape[:8]} does not lie at {offsets} of {size} bytes")
    return Entry(dtype, tuple(shape), start + begin, start + end)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**48 for size in value)


def _check_apart(path: Path, entries: Mapping[str, Entry]) -> None:
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.start < end and entry.bytes:
            raise _damaged(path, "two of its tensors overlap")
        end = max(end, entry.stop)


def _damaged(path: Path, why: str) -> CheckpointError:
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


class TensorWriter:
    """A safetensors file that is written tensor by tensor: space for the header first, the header at the end.

    header_bytes bounds the header, which is padded with spaces (the format allows them). A thread writes, so that the
    next tensors can be made meanwhile; what waits for it is bounded by _WAITING_BYTES.
    """

    def __init__(self, path: Path, header_bytes: int) -> None:
        self.path, self._room = path, -(-header_bytes // 8) * 8
        self._header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._end = 0
        self._file = path.open("wb", buffering=0)
        self._file.seek(8 + self._room)
        self._kernel_copies = hasattr(os, "copy_file_range")
        self._thread = ThreadPoolExecutor(1, "writer")
        self._waiting: deque[tuple[Future[None], int]] = deque()

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: BaseException | TracebackType | None) -> None:
        try:
            if kind is None:
                self._wait(0)
                self._finish()
        finally:
            self._thread.shutdown(cancel_futures=True)
            self._file.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor, which must not be changed afterwards."""
        self._note(name, tensor.dtype, tensor.shape, tensor.nbytes)
        if tensor.numel():
            octets = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            self._later(self._write, tensor.nbytes, octets)

    def copy(self, name: str, source: TensorFile) -> None:
        """Append a tensor of another file, byte for byte, in pieces."""
        entry = source.entries[name]
        self._note(name, entry.dtype, entry.shape, entry.bytes)
        self._later(self._copy, min(entry.bytes, _PIECE_BYTES), name, source)

    def _later(self, work: Callable[..., None], size: int, *arguments: object) -> None:
        """Have the thread do `work`, which holds `size` bytes, once there is room; raises what it raised before."""
        self._wait(_WAITING_BYTES - size)
        self._waiting.append((self._thread.submit(work, *arguments), size))

    def _wait(self, size: int) -> None:
        """Until at most `size` bytes wait, or none."""
        while self._waiting and (self._waiting[0][0].done() or sum(waiting for _, waiting in self._waiting) > size):
            self._waiting.popleft()[0].result()

    def _copy(self, name: str, source: TensorFile) -> None:
        with source.path.open("rb", buffering=0) as file:
            file.seek(source.entries[name].start)
            left = source.entries[name].bytes
            while left:
                count = self._copy_some(file, left)
                if not count:
                    raise _damaged(source.path, f"it ends within {name}")
                left -= count

    def _copy_some(self, file: FileIO, most: int) -> int:
        """Bytes that were copied from where `file` stands: by the kernel, as cp does, where system and disk can."""
        if self._kernel_copies:
            try:
                count = os.copy_file_range(file.fileno(), self._file.fileno(), min(most, _KERNEL_PIECE_BYTES))
                forget(file, file.tell() - count, count)
                return count
            except OSError:
                self._kernel_copies = False
        piece = file.read(min(most, _PIECE_BYTES))
        self._write(memoryview(piece))
        return len(piece)

    def _write(self, view: memoryview) -> None:
        while view:
            view = view[self._file.write(view[:_PIECE_BYTES]) :]

    def _note(self, name: str, dtype: torch.dtype, shape: Sequence[int], size: int) -> None:
        assert name not in self._header, name
        begin, self._end = self._end, self._end + size
        self._header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, self._end]}

    def _finish(self) -> None:
        text = json.dumps(self._header, separators=(",", ":")).encode()
        assert len(text) <= self._room, f"{self.path}: the header needs {len(text)} bytes, {self._room} were kept"
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + text.ljust(self._room))


def header_bound(names: Sequence[str]) -> int:
    """Bytes that a header with up to eight entries for each of `names` needs at most."""
    return 4096 + sum(8 * (len(json.dumps(name)) + 200) for name in names)
