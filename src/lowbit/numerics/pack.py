"""B-bit codes <-> int32 words: one dense bit order for the whole project.

A code q in [-2^(B-1), 2^(B-1) - 1] is stored as q + 2^(B-1). Element k takes bits kB to kB + B - 1 of the row's bit
stream, least significant bit first, so element 0 stands in the low bits of word 0:

    B = 4    word 0 = q7 q6 q5 q4 q3 q2 q1 q0            B = 3    a value may straddle two words

This is the layout of compressed-tensors (dense since 0.17) and of GPTQ's transpose. Rows end on a word boundary;
the bits after the last element are zero.
"""

from math import gcd

import torch
from torch import Tensor


def words_per_row(elements: int, bits: int) -> int:
    """int32 words that hold a row of `elements` codes."""
    return -(-elements * bits // 32)


def pack(q: Tensor, bits: int) -> Tensor:
    """Codes q int8 [..., K] -> int32 [..., ceil(K B / 32)]."""
    count, words = _chunk(bits)
    elements = q.shape[-1]
    unsigned = torch.zeros(*q.shape[:-1], -(-elements // count) * count, dtype=torch.int32, device=q.device)
    unsigned[..., :elements] = q.to(torch.int32) + 2 ** (bits - 1)
    chunks = unsigned.unflatten(-1, (-1, count))  # [..., K] -> [..., K/count, count]
    packed = torch.zeros(*chunks.shape[:-1], words, dtype=torch.int32, device=q.device)
    for element in range(count):
        word, shift = divmod(element * bits, 32)
        packed[..., word] |= chunks[..., element] << shift
        if shift + bits > 32:
            packed[..., word + 1] |= chunks[..., element] >> (32 - shift)
    return packed.flatten(-2)[..., : words_per_row(elements, bits)].contiguous()


def unpack(packed: Tensor, bits: int, elements: int) -> Tensor:
    """int32 [..., ceil(K B / 32)] -> codes int8 [..., K], K = elements."""
    count, words = _chunk(bits)
    missing = -packed.shape[-1] % words
    chunks = torch.nn.functional.pad(packed, (0, missing)).unflatten(-1, (-1, words))
    mask, offset = 2**bits - 1, 2 ** (bits - 1)
    q = torch.empty(*chunks.shape[:-1], count, dtype=torch.int8, device=packed.device)
    for element in range(count):
        word, shift = divmod(element * bits, 32)
        value = chunks[..., word] >> shift  # arithmetic: the sign bits that come in are masked off
        if shift + bits > 32:
            value = (value & (2 ** (32 - shift) - 1)) | (chunks[..., word + 1] << (32 - shift))
        q[..., element] = (value & mask) - offset
    return q.flatten(-2)[..., :elements]


def _chunk(bits: int) -> tuple[int, int]:
    """(codes, words) of the shortest run of codes that ends on a word boundary."""
    common = gcd(32, bits)
    return 32 // common, bits // common
