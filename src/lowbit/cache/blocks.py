"""A run of cached keys or values in few bits: packed codes with a scale and an offset per group, added block by block.

A block is x [b, h, R, C] with groups of G along C. Keys come transposed, channels x tokens, so a group is G tokens of
one channel; values come as they are, tokens x channels, so a group is G channels of one token (KIVI, arXiv:2402.02750).

    codes   int32 [b, h, n, R, ceil(C B / 32)]      bit order of numerics/pack.py
    scale   float16 [b, h, n, R, C / G]             grid of numerics/offset.py
    low     float16 [b, h, n, R, C / G]
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.numerics.offset import choose_offset, decode_offset, encode_offset
from lowbit.numerics.pack import pack, unpack


@dataclass(frozen=True)
class PackedBlocks:
    """n blocks of R x C values under one scheme: `bits` a code, `group` codes a scale."""

    codes: Tensor
    scale: Tensor
    low: Tensor
    bits: int
    group: int

    @classmethod
    def encode(cls, x: Tensor, bits: int, group: int) -> "PackedBlocks":
        """The blocks x [b, h, n, R, C] in few bits; G must divide C."""
        groups = x.unflatten(-1, (-1, group))  # [b, h, n, R, C] -> [b, h, n, R, C/G, G]
        scale, low = choose_offset(groups, bits)
        q = encode_offset(groups, scale, low, bits).flatten(-2)  # [b, h, n, R, C]
        return cls(pack(q, bits), scale, low, bits, group)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """[b, h, n, R, C] in `dtype`; computed in float32."""
        columns = self.scale.shape[-1] * self.group
        q = unpack(self.codes, self.bits, columns).unflatten(-1, (-1, self.group))  # [..., C] -> [..., C/G, G]
        return decode_offset(q, self.scale, self.low, self.bits).flatten(-2).to(dtype)

    @property
    def count(self) -> int:
        return self.codes.shape[2]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + self.low.nbytes

    def of_each(self, change: Callable[[Tensor], Tensor]) -> "PackedBlocks":
        """The blocks with `change` done to codes, scale and low; all have b first and n third."""
        return PackedBlocks(change(self.codes), change(self.scale), change(self.low), self.bits, self.group)

    def between(self, start: int, stop: int) -> "PackedBlocks":
        """Blocks start to stop - 1, in memory of their own."""
        return self.of_each(lambda part: part[:, :, start:stop].clone())

    def then(self, other: "PackedBlocks") -> "PackedBlocks":
        """These blocks, then those of `other`."""
        pairs = ((self.codes, other.codes), (self.scale, other.scale), (self.low, other.low))
        codes, scale, low = (torch.cat(pair, dim=2) for pair in pairs)
        return PackedBlocks(codes, scale, low, self.bits, self.group)
