"""Rotations of weights: fold an orthogonal Q into the linears on both sides of a stream, and balance its blocks.

    readers of the stream   W <- W Q        writers to it   W <- Q^T W, b <- Q^T b

(QuaRot, arXiv:2404.00456, section 3; SpinQuant, arXiv:2405.16406, figure 2: R1 turns the residual stream, R2 the values
of each head.) Products are formed in float64, so that only the rounding to the weight's dtype is added.

Where Q has blocks, a permutation deals the channels out to them so that every block carries about the same sum of
squares (MassDiff: MR-GPTQ's successors deal channels by mass): the largest first, to the block with the least so far.
"""

import torch
from torch import Tensor

from lowbit.numerics.hadamard import Hadamard


def rotate_columns(w: Tensor, rotation: Hadamard) -> Tensor:
    """W Q for w [N, K]; where K is a multiple of the rotation's size, each part of that size is rotated alike."""
    parts = w.double().unflatten(-1, (-1, rotation.size))  # [N, K] -> [N, K / size, size]
    return rotation.apply(parts).flatten(-2).to(w.dtype)


def rotate_rows(w: Tensor, rotation: Hadamard) -> Tensor:
    """Q^T W for w [N, K], or Q^T b for a bias [N]; parts along N as in `rotate_columns`."""
    if w.dim() == 1:
        return rotate_columns(w[None], rotation)[0]
    return rotate_columns(w.T, rotation).T.contiguous()


def balanced_order(mass: Tensor, block: int) -> Tensor:
    """An order int64 [K] of channels with mass [K] >= 0 in which blocks of `block` neighbours have like sums."""
    values = mass.tolist()
    blocks = len(values) // block
    members: list[list[int]] = [[] for _ in range(blocks)]
    sums = [0.0] * blocks
    for channel in sorted(range(len(values)), key=lambda c: (-values[c], c)):
        target = min((b for b in range(blocks) if len(members[b]) < block), key=lambda b: (sums[b], b))
        members[target].append(channel)
        sums[target] += values[channel]
    return torch.tensor([channel for part in members for channel in part])
