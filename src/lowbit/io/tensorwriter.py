"""safetensors files, written tensor by tensor: the format is tensorfile.py's."""

import json
import os
import struct
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from lowbit.io.tensorfile import DTYPE_NAMES, TensorFile, damaged, forget

_PIECE_BYTES = 2**20  # 2 GB in writes of 29 MB cost 1.6 to 2.7 CPU-s, in writes of 1 MB 0.4 (Linux 6.18, ext4)
_KERNEL_PIECE_BYTES = 64 * 2**20
_WAITING_BYTES = 128 * 2**20


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
                    raise damaged(source.path, f"it ends within {name}")
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
