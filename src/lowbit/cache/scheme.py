"""How keys and values are stored in few bits, and back.

    values   along the channels of a token                     [b, h, n, G, D], in groups along D
    keys     along the tokens of a channel (KIVI)              [b, h, n, D, G], in groups along G
             or, token_keys, as values are

R3 (SpinQuant, arXiv:2405.16406) turns queries and keys after their rotary embedding by one matrix Q, (q Q)(k Q)^T =
q k^T. Here keys turn on their way into few bits and turn back when decoded, q (k^ Q^T)^T = (q Q) k^^T: attention
computes the same, and neither the model nor its queries need to know.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.cache.blocks import PackedBlocks
from lowbit.kernels.ops import rotate
from lowbit.numerics.hadamard import Hadamard


@dataclass(frozen=True)
class CacheScheme:
    """bits a code; group: tokens of a channel of keys, and channels of a token of values, that share a scale.

    token_keys: keys are grouped as values are; rotate_keys: by R3. window and sinks: tokens that stay in float.
    """

    bits: int = 4
    group: int = 32
    window: int = 128
    sinks: int = 4
    token_keys: bool = False
    rotate_keys: bool = False

    def encode_keys(self, keys: Tensor) -> PackedBlocks:
        """Blocks of `group` tokens of keys [b, h, nG, D]."""
        if self.rotate_keys:
            keys = rotate(keys, Hadamard.of(keys.shape[-1]))
        if self.token_keys:
            return self.encode_values(keys)
        blocks = keys.unflatten(2, (-1, self.group)).transpose(-1, -2)  # [b, h, nG, D] -> [b, h, n, D, G]
        return PackedBlocks.encode(blocks, self.bits, self.group)

    def decode_keys(self, blocks: PackedBlocks, dtype: torch.dtype) -> Tensor:
        """[b, h, nG, D]"""
        keys = blocks.decode(dtype)
        keys = (keys if self.token_keys else keys.transpose(-1, -2)).flatten(2, 3)  # [b, h, n, G, D] -> [b, h, nG, D]
        return rotate(keys, Hadamard.of(keys.shape[-1]), inverse=True) if self.rotate_keys else keys

    def encode_values(self, values: Tensor) -> PackedBlocks:
        """Blocks of `group` tokens of values [b, h, nG, D]."""
        blocks = values.unflatten(2, (-1, self.group))  # [b, h, nG, D] -> [b, h, n, G, D]
        return PackedBlocks.encode(blocks, self.bits, _divisor(values.shape[-1], self.group))

    def decode_values(self, blocks: PackedBlocks, dtype: torch.dtype) -> Tensor:
        """[b, h, nG, D]"""
        return blocks.decode(dtype).flatten(2, 3)  # [b, h, n, G, D] -> [b, h, nG, D]


def _divisor(size: int, group: int) -> int:
    """The largest divisor of a head's size that is no larger than `group`."""
    return next(part for part in range(min(group, size), 0, -1) if size % part == 0)
