"""Uniform grids that begin at a float: x ~ low + (q + 2^(B-1)) * scale, for groups that may lie far from zero.

Unlike affine.py's asymmetric grids these need not contain zero: a channel of keys with a large bias keeps all levels.
Scale and low are stored in float16. Codes are found with the zero-point -2^(B-1) - low / scale in float32, by
affine.py.

    start   low = min + (1 - r) (max - min) / 2,  scale = r (max - min) / (2^B - 1),  for r in SHRINKS
    refit   with the codes fixed, the line through (q, x) of least squares: scale = cov(q, x) / var(q)

Refits are taken in turns with rounding; a group keeps the grid of the smallest squared error that it met, min/max
included. In groups of 32 normal values this takes 2 bits from 8.1 to 10.4 dB, 4 bits from 22.1 to 22.8 (an exhaustive
shrink search: 10.5 and 23.0).
"""

import torch
from torch import Tensor

from lowbit.numerics.affine import decode, encode, stored_scale
from lowbit.numerics.formats import int_format
from lowbit.numerics.scheme import TensorScheme

SHRINKS = (1.0, 0.8)
REFITS = 3
STORED = torch.float16


def choose_offset(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(scale, low), float16 [...], of a grid for each group of x [..., G]; infinite where float16 is too small."""
    x = x.float()
    smallest, largest = torch.aminmax(x, dim=-1)
    width = largest - smallest
    best_scale = best_low = best_error = torch.empty(0)
    for shrink in SHRINKS:
        scale, low = _stored(width * shrink / (2**bits - 1), smallest + width * (1 - shrink) / 2)
        for refit in range(REFITS + 1):
            q = encode_offset(x, scale, low, bits)
            error = (decode_offset(q, scale, low, bits) - x).square().sum(-1)
            if shrink == SHRINKS[0] and refit == 0:
                best_scale, best_low, best_error = scale, low, error
            better = error < best_error
            best_scale, best_low = torch.where(better, scale, best_scale), torch.where(better, low, best_low)
            best_error = torch.where(better, error, best_error)
            if refit < REFITS:
                scale, low = _refitted(x, q, scale, bits)
    return best_scale, best_low


def encode_offset(x: Tensor, scale: Tensor, low: Tensor, bits: int) -> Tensor:
    """Nearest codes int8 [..., G] of x [..., G] under scale and low [...]."""
    return encode(x, scale.unsqueeze(-1), _zero(scale, low, bits), _scheme(bits))


def decode_offset(q: Tensor, scale: Tensor, low: Tensor, bits: int) -> Tensor:
    """float32 [..., G], what the codes q [..., G] stand for."""
    return decode(q, scale.unsqueeze(-1), _zero(scale, low, bits), _scheme(bits))


def _scheme(bits: int) -> TensorScheme:
    return TensorScheme(int_format(bits), "channel", symmetric=False)


def _zero(scale: Tensor, low: Tensor, bits: int) -> Tensor:
    """The code, not an integer, that stands for 0: float32 [..., 1]."""
    return (-(2 ** (bits - 1)) - low.float() / scale.float()).unsqueeze(-1)


def _stored(scale: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    return stored_scale(scale, STORED), low.to(STORED)


def _refitted(x: Tensor, q: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(scale, low) of least squares for given codes; a group whose codes are all equal keeps its scale."""
    codes = q.float()
    code_mean, mean = codes.mean(-1), x.mean(-1)
    spread = (codes - code_mean.unsqueeze(-1)).square().sum(-1)
    shared = ((codes - code_mean.unsqueeze(-1)) * (x - mean.unsqueeze(-1))).sum(-1)
    fitted = torch.where(shared > 0, shared / spread.clamp(min=0.1), scale.float())  # codes are integers: spread >= 0.5
    return _stored(fitted, mean - fitted * (code_mean + 2 ** (bits - 1)))
