"""What a second opinion says of a module, and whether two of them agree: codes, zero-points and scales in numpy.

Codes are decoded a few rows at a time, so that what is decoded and compared stays in the processor's cache: 3 times as
fast as whole matrices, whose fresh pages cost more than the arithmetic.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]

_CHUNK_CODES = 2**18


@dataclass(frozen=True)
class Decoded:
    """shape: (N, K). codes: gives uint8 [R, K], unsigned, for R rows; zero: uint8 [N, G]; scale: float32 [N, G]; group:
    the group of each column [K].

    w: float32 [N, K] where the format has no integers; then the others are None.
    """

    shape: tuple[int, int]
    codes: Callable[[slice], Array] | None = None
    zero: Array | None = None
    scale: Array | None = None
    group: Array | None = None
    w: Array | None = None

    def weight(self, rows: slice = slice(None)) -> Array:
        """The float32 weight, or some rows of it."""
        if self.w is not None:
            return self.w[rows]
        assert self.codes is not None
        assert self.zero is not None
        assert self.scale is not None
        assert self.group is not None
        difference = self.codes(rows).astype(np.float32) - self.zero[rows].astype(np.float32)[:, self.group]
        return difference * self.scale[rows][:, self.group]

    def chunks(self) -> Iterator[slice]:
        """All rows, a few at a time; each begins at a multiple of eight."""
        step = max(8, _CHUNK_CODES // max(self.shape[1], 1) // 8 * 8)
        return (slice(start, start + step) for start in range(0, self.shape[0], step))


def same(a: Decoded, b: Decoded) -> bool:
    """Whether both are the same numbers: codes, zero-points, scales and groups where both have them, else weights."""
    if a.shape != b.shape:
        return False
    if a.codes is not None and b.codes is not None:
        pairs = ((a.zero, b.zero), (a.scale, b.scale), (a.group, b.group))
        grids = all(x is not None and y is not None and np.array_equal(x, y) for x, y in pairs)
        if isinstance(a.codes, Stream) and isinstance(b.codes, Stream) and a.codes.is_like(b.codes):
            words = [torch.from_numpy(side.codes.words) for side in (a, b) if isinstance(side.codes, Stream)]
            return grids and all(
                torch.equal(words[0][rows], words[1][rows]) for rows in a.chunks()
            )  # 2 x numpy's speed
        return grids and all(np.array_equal(a.codes(rows), b.codes(rows)) for rows in a.chunks())
    return all(_same_floats(a.weight(rows), b.weight(rows)) for rows in a.chunks())


def _same_floats(a: Array, b: Array) -> bool:
    """Equal bit for bit, but that -0 is 0."""
    first, second = (side.astype(np.float32).view(np.uint32) for side in (a, b))
    return first.shape == second.shape and bool(np.all((first == second) | ((first | second) << 1 == 0)))


def bit_stream(words: Array, bits: int, count: int) -> Array:
    """uint8 codes [R, count] of rows of int32 words, the first code in the lowest bits."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return octets[:, :count]
    if bits == 4:
        pairs = octets.astype(np.uint16)  # the high nibble of each byte moves to a byte of its own
        pairs |= pairs << 4
        pairs &= 0x0F0F
        return pairs.view(np.uint8)[:, :count]
    single = np.unpackbits(octets, axis=1, bitorder="little")[:, : count * bits]
    return (single.reshape(-1, count, bits) << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)


@dataclass(frozen=True)
class Stream:
    """The codes of some rows of int32 `words` [N, W]: `count` codes of `bits` bits a row, the first in the low bits."""

    words: Array
    bits: int
    count: int

    def __call__(self, rows: slice) -> Array:
        return bit_stream(self.words[rows], self.bits, self.count)

    def is_like(self, other: "Stream") -> bool:
        """Whether both have codes of the same bits that fill their words: then the words are equal where codes are."""
        sizes = (self.bits, self.count, self.words.shape) == (other.bits, other.count, other.words.shape)
        return sizes and self.bits * self.count == 32 * self.words.shape[1]
