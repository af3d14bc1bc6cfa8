"""nf4 and fp4 weights to 16 bits straight from the packed bytes: no layout of its own, so training keeps one copy.

    w = levels[code] * absmax of its block,   absmax = map[code of the block] * nested absmax + offset where doubled

A program decodes BLOCKS blocks of consecutive codes: a byte holds two, the first in the high nibble. Level and map are
looked up in the first-level cache. Products are in float32 and rounded once, as in numerics/codebook.py.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.numerics.codebook import NESTED_BLOCK, NestedAbsmax, dynamic_map, levels_of
from lowbit.tensors import PackedWeight

_ELEMENTS = 8192  # a program's


@triton.jit
def _dequantize_kernel(
    codes, absmax, nested, table, offset, levels, to, blocks, SIZE: tl.constexpr, BLOCKS: tl.constexpr,
    DOUBLED: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < blocks
    scale = tl.load(absmax + block, mask=there, other=0)
    if DOUBLED:
        outer = tl.load(nested + block // NESTED, mask=there, other=0.0)
        scale = tl.load(table + scale.to(tl.int32)) * outer + tl.load(offset)
    place = block[:, None].to(tl.int64) * (SIZE // 2) + tl.arange(0, SIZE // 2)[None]
    pair = tl.load(codes + place, mask=there[:, None], other=0).to(tl.int32)
    pair_levels = tl.join(tl.load(levels + (pair >> 4)), tl.load(levels + (pair & 15)))  # [BLOCKS, SIZE / 2, 2]
    w = tl.reshape(pair_levels, (BLOCKS, SIZE)) * scale[:, None]
    at = block[:, None].to(tl.int64) * SIZE + tl.arange(0, SIZE)[None]
    tl.store(to + at, w.to(to.dtype.element_ty), mask=there[:, None])


@cache
def _tables(name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    return levels_of(name).to(device), dynamic_map().to(device)


def dequantize(like: Tensor, weight: PackedWeight) -> Tensor:
    """The weight [N, K] in the dtype of `like`; its elements are a multiple of the block."""
    scheme, scale = weight.scheme.weights, weight.scale
    size = scheme.group_size
    assert size is not None
    levels, table = _tables(scheme.format.name, like.device)
    w = torch.empty(weight.shape, dtype=like.dtype, device=like.device)
    blocks = w.numel() // size
    doubled = isinstance(scale, NestedAbsmax)
    parts = (scale.codes, scale.absmax, table, scale.offset) if isinstance(scale, NestedAbsmax) else (scale,) * 4
    rows = max(1, _ELEMENTS // size)
    _dequantize_kernel[(triton.cdiv(blocks, rows),)](
        weight.codes, *parts, levels, w, blocks, size, rows, doubled, NESTED_BLOCK, num_warps=8
    )
    return w
