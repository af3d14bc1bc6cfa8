"""Codebooks: 16 levels in [-1, 1], one absolute maximum per block, and that maximum in 8 bits.

    absmax_i = max |w| over block i of the flattened weight          code = the level nearest to w / absmax_i
    w ~ levels[code] * absmax_i

nf4 (QLoRA, arXiv:2305.14314, appendix E): quantiles of the normal distribution, an exact zero, both ends.
fp4: bitsandbytes' own 1-2-1 float. It is not OCP's E2M1: its smallest step is 1/192, not 1/12 of the largest.

Double quantization (QLoRA, section 3): the mean of all absmax is taken off, the rest is coded in blocks of 256 with
the signed dynamic map of 256 levels (arXiv:1511.04561): 32/64 -> 8/64 + 32/(64 256) bits a weight. The same map holds
the first moment of 8-bit optimizers (arXiv:2110.02861), and its unsigned twin the second.

Codes, absmax and nested codes are bitwise equal to those of bitsandbytes 0.50 on a CPU, of which three habits follow:
a value halfway between two levels takes the lower one; a last block that is not full is divided by its absmax (never
below 1e-38) where a full one is multiplied by the reciprocal; nested values are first rounded to a grid of 2^16 points
over [-1, 1] (bitsandbytes on CUDA has no such grid: its nested codes can differ by one).

This is the only place that looks numbers up in a table. Work goes in slices, so memory is the result's plus some MiB.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

NESTED_BLOCK = 256
_SLICE = 2**20  # elements worked on at once: four float32 temporaries of 4 MiB
_SMALLEST_ABSMAX = 1e-38
_NESTED_GRID = 2**16 - 1

# float32 values as bitsandbytes stores them; the levels of QLoRA, appendix E, to the last bit
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# code = sign << 3 | exponent and fraction; both zeros are +0
_FP4_MAGNITUDES = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
_LEVELS = {"nf4": _NF4, "fp4": (*_FP4_MAGNITUDES, 0.0, *(-magnitude for magnitude in _FP4_MAGNITUDES[1:]))}


@dataclass(frozen=True)
class NestedAbsmax:
    """Block maxima in 8 bits: absmax_i ~ dynamic_map[codes_i] * absmax[i // 256] + offset.

    codes: uint8 [blocks]. absmax: float32 [ceil(blocks / 256)]. offset: float32, a single number.
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor

    def decode(self) -> Tensor:
        """The block maxima, float32 [blocks]."""
        levels = dynamic_map().to(self.codes.device)
        shape = (self.codes.numel(),)
        return decode_blocks(self.codes, self.absmax, levels, NESTED_BLOCK, shape, torch.float32) + self.offset


def levels_of(name: str) -> Tensor:
    """The 16 levels of "nf4" or "fp4", float32, in the order of their codes."""
    return torch.tensor(_LEVELS[name])


def dynamic_map(signed: bool = True, bits: int = 8) -> Tensor:
    """The dynamic map of 2^bits ascending float32 levels, zero and 1 among them, over bits - 1 decades.

    8 bits: signed from -0.993, smallest step 5.5e-7; unsigned from 0, smallest step 3.25e-7.
    """
    return torch.tensor(_dynamic_levels(signed, bits))


@cache
def _dynamic_levels(signed: bool, bits: int) -> tuple[float, ...]:
    """Each decade up to 1 is cut in twice as many steps as the one below; a level is the middle of a step."""
    positive: list[float] = []
    for decade in range(bits - 1):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2
        positive += (10 ** (decade - bits + 2) * middles).tolist()
    return tuple(sorted([*positive, *((-level for level in positive) if signed else ()), 0.0, 1.0]))


def state_levels(bits: int, signed: bool) -> Tensor:
    """The ascending levels of an optimizer's state (train/states.py), float32 [2^bits]."""
    if bits == 4 and not signed:
        return torch.arange(1, 17, dtype=torch.float32) / 16
    return dynamic_map(signed, bits)


def zero_code(levels: Tensor) -> int:
    """The first code that stands for zero: what fills the spare nibble of an odd number of codes."""
    return int((levels == 0).nonzero()[0])


def _boundaries(ascending: Tensor) -> Tensor:
    """Midpoints between neighbours: what lies on one belongs to the lower level (torch.bucketize)."""
    return (ascending[:-1] + ascending[1:]) / 2


def _slices(elements: int, block: int) -> Iterator[tuple[slice, slice]]:
    """(slice of the elements, slice of their blocks), whole blocks each but for the last."""
    step = max(1, _SLICE // block) * block
    for start in range(0, elements, step):
        stop = min(start + step, elements)
        yield slice(start, stop), slice(start // block, -(-stop // block))


def encode_blocks(w: Tensor, levels: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(codes uint8 [numel], absmax float32 [ceil(numel / block)]) of w, any shape, flattened row by row."""
    flat = w.reshape(-1)
    elements, whole = flat.numel(), flat.numel() // block * block
    levels = levels.to(w.device)
    order = levels.argsort(stable=True)
    boundaries, order = _boundaries(levels[order]), order.to(torch.uint8)
    codes = torch.empty(elements, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-elements // block), dtype=torch.float32, device=w.device)
    for part, blocks in _slices(whole, block):
        values = flat[part].float().view(-1, block)
        largest = values.abs().amax(-1)
        scaled = values * (1.0 / largest.clamp(min=_SMALLEST_ABSMAX)).unsqueeze(-1)
        codes[part] = order[torch.bucketize(scaled, boundaries, out_int32=True)].view(-1)
        absmax[blocks] = largest
    if whole < elements:
        values = flat[whole:].float()
        absmax[-1] = values.abs().amax().clamp(min=_SMALLEST_ABSMAX)
        codes[whole:] = order[torch.bucketize(values / absmax[-1], boundaries, out_int32=True)]
    return codes, absmax


def decode_blocks(
    codes: Tensor, absmax: Tensor, levels: Tensor, block: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """levels[code] * absmax of its block, multiplied in float32 and rounded to dtype: [*shape]."""
    flat = codes.reshape(-1)
    levels = levels.to(codes.device)
    decoded = torch.empty(flat.numel(), dtype=dtype, device=codes.device)
    for part, blocks in _slices(flat.numel(), block):
        chosen = levels[flat[part].int()]
        decoded[part] = chosen * absmax[blocks].repeat_interleave(block)[: chosen.numel()]
    return decoded.view(shape)


def encode_dynamic(x: Tensor, signed: bool = True, gridded: bool = True) -> tuple[Tensor, Tensor]:
    """(codes uint8 [n], absmax float32 [ceil(n / 256)]) of x float32 [n] under the dynamic map, in blocks of 256.

    gridded: round to the grid of 2^16 points first, as bitsandbytes does on a CPU but not on CUDA.
    """
    blocks = torch.nn.functional.pad(x, (0, -x.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(-1)
    # a block of zeros divides to NaN and takes code 0: its absmax of zero makes any level zero
    scaled = (blocks * (1.0 / absmax).unsqueeze(-1)).nan_to_num(nan=-1.0).clamp(-1, 1)
    if gridded:
        grid_point = ((scaled + 1) * 0.5 * _NESTED_GRID + 0.5).int()
        scaled = grid_point.float() / _NESTED_GRID * 2 - 1
    codes = torch.bucketize(scaled, _boundaries(dynamic_map(signed).to(x.device)))
    return codes.view(-1)[: x.numel()].to(torch.uint8), absmax


def double_quantize(absmax: Tensor) -> NestedAbsmax:
    """absmax float32 [blocks] in 8 bits each: their mean is taken off, the rest coded under the dynamic map."""
    offset = absmax.mean()
    return NestedAbsmax(*encode_dynamic(absmax - offset), offset)


def pack_nibbles(codes: Tensor, filler: int = 0) -> Tensor:
    """4-bit codes uint8 [n] -> uint8 [ceil(n / 2)], the first of each pair in the high nibble; filler ends an odd n."""
    flat = torch.nn.functional.pad(codes.reshape(-1), (0, codes.numel() % 2), value=filler)
    return (flat[::2] << 4) | flat[1::2]


def unpack_nibbles(packed: Tensor, n: int) -> Tensor:
    """The first n codes, uint8 [n], of packed bytes."""
    flat = packed.reshape(-1)
    return torch.stack((flat >> 4, flat & 0xF), dim=-1).view(-1)[:n]  # [bytes] -> [bytes, 2] -> [n]
