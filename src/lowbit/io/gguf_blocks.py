"""GGUF's block formats in numpy: bytes -> integers with scales, -> float32.

    type   block  bytes   layout                                                       w
    Q4_0    32     18     f16 d; qs[16]: low nibble j, high nibble j + 16               d (q - 8)
    Q4_1    32     20     f16 d, m; qs[16]                                              d q + m
    Q5_0    32     22     f16 d; u32 fifth bits; qs[16]                                 d (q - 16)
    Q5_1    32     24     f16 d, m; u32 fifth bits; qs[16]                              d q + m
    Q8_0    32     34     f16 d; int8 qs[32]                                            d q
    Q2_K   256     84     4-bit scale | 4-bit min [16]; qs[64]; f16 d, dmin             d s q - dmin m
    Q3_K   256    110     hmask[32]; qs[64]; 6-bit scales[12]; f16 d                    d (s - 32) (q - 4)
    Q4_K   256    144     f16 d, dmin; 6-bit scales and mins[12]; qs[128]               d s q - dmin m
    Q5_K   256    176     f16 d, dmin; scales[12]; qh[32]; qs[128]                      d s q - dmin m
    Q6_K   256    210     ql[128]; qh[64]; int8 scales[16]; f16 d                       d s (q - 32)

Source: ggml src/ggml-common.h and ggml-quants.c; values are equal to gguf-py's to the last bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
QK = 256


@dataclass(frozen=True)
class Grid:
    """q: uint8 or int8 [blocks, groups, G]; the value is scale * (q - zero) or, with minimum, scale * q - minimum.

    scale, minimum: float32 [blocks, groups]. Symmetric types have a zero and no minimum.
    """

    q: Array
    scale: Array
    zero: int = 0
    minimum: Array | None = None

    def decode(self) -> Array:
        """float32 [blocks, elements], in ggml's order of operations."""
        scale = self.scale[..., None]
        if self.minimum is not None:
            w = scale * self.q.astype(np.float32) - self.minimum[..., None]
        else:
            w = scale * (self.q.astype(np.float32) - np.float32(self.zero))
        return w.reshape(len(w), -1)


def _half(octets: Array) -> Array:
    """f16 [blocks, 2 n bytes] -> float32 [blocks, n]."""
    return np.ascontiguousarray(octets).view(np.float16).astype(np.float32)


def _nibbles(octets: Array) -> Array:
    """[blocks, n] -> [blocks, 2 n]: all low nibbles, then all high ones."""
    return np.concatenate([octets & 15, octets >> 4], axis=1)


def _fifth_bits(octets: Array) -> Array:
    """u32 [blocks, 4 bytes] -> uint8 [blocks, 32], 16 where the bit is set."""
    return np.unpackbits(np.ascontiguousarray(octets), axis=1, bitorder="little") << np.uint8(4)


def _q4_0(b: Array) -> Grid:
    return Grid(_nibbles(b[:, 2:])[:, None], _half(b[:, :2]), 8)


def _q4_1(b: Array) -> Grid:
    return Grid(_nibbles(b[:, 4:])[:, None], _half(b[:, :2]), minimum=-_half(b[:, 2:4]))


def _q5_0(b: Array) -> Grid:
    return Grid((_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6]))[:, None], _half(b[:, :2]), 16)


def _q5_1(b: Array) -> Grid:
    q = (_nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8]))[:, None]
    return Grid(q, _half(b[:, :2]), minimum=-_half(b[:, 2:4]))


def _q8_0(b: Array) -> Grid:
    return Grid(np.ascontiguousarray(b[:, 2:]).view(np.int8)[:, None], _half(b[:, :2]))


def _pairs(qs: Array) -> Array:
    """2-bit codes of Q2_K and Q3_K: qs [blocks, 64] -> [blocks, 256]; byte l of a half holds elements l, l + 32, ..."""
    halves = qs.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    return (halves & 3).reshape(-1, QK)


def _q2_k(b: Array) -> Grid:
    packed, d = b[:, :16], _half(b[:, 80:84])
    scale, minimum = (packed & 15).astype(np.float32), (packed >> 4).astype(np.float32)
    return Grid(_pairs(b[:, 16:80]).reshape(-1, 16, 16), d[:, :1] * scale, minimum=d[:, 1:] * minimum)


def _q3_k(b: Array) -> Grid:
    mask, qs, packed, d = b[:, :32], b[:, 32:96], b[:, 96:108], _half(b[:, 108:110])
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = (packed[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 4, 1)) & 3
    scale = (low | (high.reshape(-1, 16) << 4)).astype(np.int8) - np.int8(32)
    third = (mask[:, None, :] >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)) & 1
    q = _pairs(qs) | (third.reshape(-1, QK) << 2)
    return Grid(q.reshape(-1, 16, 16), d * scale.astype(np.float32), 4)


def _six_bits(packed: Array) -> tuple[Array, Array]:
    """The eight scales and eight minima of Q4_K and Q5_K: [blocks, 12] -> two uint8 [blocks, 8]."""
    first, second, last = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = np.concatenate([first & 63, (last & 15) | ((first >> 6) << 4)], axis=1)
    minimum = np.concatenate([second & 63, (last >> 4) | ((second >> 6) << 4)], axis=1)
    return scale, minimum


def _k_grid(b: Array, q: Array) -> Grid:
    d = _half(b[:, :4])
    scale, minimum = (part.astype(np.float32) for part in _six_bits(b[:, 4:16]))
    return Grid(q.reshape(-1, 8, 32), d[:, :1] * scale, minimum=d[:, 1:] * minimum)


def _k_nibbles(qs: Array) -> Array:
    """qs [blocks, 128] -> [blocks, 256]: 32 bytes hold 64 elements, the low nibbles first."""
    quarters = qs.reshape(-1, 4, 1, 32) >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)
    return (quarters & 15).reshape(-1, QK)


def _q4_k(b: Array) -> Grid:
    return _k_grid(b, _k_nibbles(b[:, 16:]))


def _q5_k(b: Array) -> Grid:
    fifth = (b[:, None, 16:48] >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)) & 1
    return _k_grid(b, _k_nibbles(b[:, 48:]) | (fifth.reshape(-1, QK) << 4))


def _q6_k(b: Array) -> Grid:
    low = b[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)
    high = b[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    q = (low & 15).reshape(-1, QK) | ((high & 3).reshape(-1, QK) << 4)
    scale = np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32)
    return Grid(q.reshape(-1, 16, 16), _half(b[:, 208:210]) * scale, 32)


@dataclass(frozen=True)
class Block:
    """One block type: its number in files, elements and bytes a block, and its integers, where it has any."""

    name: str
    id: int
    size: int
    bytes: int
    grid: Callable[[Array], Grid] | None = None

    def decode(self, rows: Array) -> Array:
        """Bytes uint8 [R, bytes of a row] -> float32 [R, K]."""
        if self.grid is not None:
            return self.grid(rows.reshape(-1, self.bytes)).decode().reshape(len(rows), -1)
        flat = np.ascontiguousarray(rows)
        if self.name == "F32":
            return flat.view(np.float32)
        if self.name == "F16":
            return flat.view(np.float16).astype(np.float32)
        return (flat.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


BLOCKS = {
    block.id: block
    for block in (
        Block("F32", 0, 1, 4),
        Block("F16", 1, 1, 2),
        Block("BF16", 30, 1, 2),
        Block("Q4_0", 2, 32, 18, _q4_0),
        Block("Q4_1", 3, 32, 20, _q4_1),
        Block("Q5_0", 6, 32, 22, _q5_0),
        Block("Q5_1", 7, 32, 24, _q5_1),
        Block("Q8_0", 8, 32, 34, _q8_0),
        Block("Q2_K", 10, QK, 84, _q2_k),
        Block("Q3_K", 11, QK, 110, _q3_k),
        Block("Q4_K", 12, QK, 144, _q4_k),
        Block("Q5_K", 13, QK, 176, _q5_k),
        Block("Q6_K", 14, QK, 210, _q6_k),
    )
}
BY_NAME = {block.name: block for block in BLOCKS.values()}
