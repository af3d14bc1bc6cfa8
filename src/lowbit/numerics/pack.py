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
    if 8 % bits == 0:
        return _pack_bytes(q, bits)
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
    if 8 % bits == 0:
        return _unpack_bytes(packed, bits, elements)
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


# A word of as many bytes as codes share a byte; shifts move each code of the word next to the one before it.
_WIDE = {2: torch.int32, 4: torch.int16, 8: torch.uint8}


def _pack_bytes(q: Tensor, bits: int) -> Tensor:
    """`pack` for codes that never straddle bytes (2, 4, 8 bits), on contiguous words: 10 times as fast."""
    elements, per_byte = q.shape[-1], 8 // bits
    unsigned = (q.contiguous().view(torch.uint8) + 2 ** (bits - 1)) & (2**bits - 1)
    if missing := -elements * bits % 32:
        unsigned = torch.nn.functional.pad(unsigned, (0, missing // bits))
    wide = unsigned.reshape(-1).view(_WIDE[bits])  # flat: a lone row may have any stride
    packed = wide
    for place in range(1, per_byte):
        packed = packed | (wide >> (place * (8 - bits)))
    words = packed.to(torch.uint8).view(torch.int32)  # the low bytes, little-endian
    return words.view(*q.shape[:-1], words_per_row(elements, bits))


def _unpack_bytes(packed: Tensor, bits: int, elements: int) -> Tensor:
    """`unpack` for 2, 4 and 8 bits."""
    octets, per_byte, mask = packed.reshape(-1).view(torch.uint8).to(_WIDE[bits]), 8 // bits, 2**bits - 1
    wide = octets & mask
    for place in range(1, per_byte):
        wide |= (octets & (mask << (place * bits))) << (place * (8 - bits))
    q = (wide.view(torch.uint8) - 2 ** (bits - 1)).view(torch.int8)
    return q.view(*packed.shape[:-1], packed.shape[-1] * 32 // bits)[..., :elements]


def _chunk(bits: int) -> tuple[int, int]:
    """(codes, words) of the shortest run of codes that ends on a word boundary."""
    common = gcd(32, bits)
    return 32 // common, bits // common
