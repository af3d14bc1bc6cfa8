"""Smoothing: share the difficulty of a product between its two factors, channel by channel, before either is rounded.

    x W^T = (x / s) (W s)^T       s > 0 [K], folded into what writes x

    activations in few bits     s_j = max|x_j|^a / max|W_j|^(1-a)         SmoothQuant (arXiv:2211.10438), eq. 4
    weights alone               s_j = rms(x_j)^a                          AWQ (arXiv:2306.00978), eq. 5, on mean squares

a is searched: every candidate is judged by the product itself on a sample of tokens, with both factors rounded as they
will be, and no smoothing at all is one of them. Scales are centred, sqrt(max s min s) = 1.
"""

import torch
from torch import Tensor

from lowbit.algorithms.rtn import solve_rtn
from lowbit.algorithms.scales import ScaleSearch
from lowbit.numerics.affine import quantize_dequantize
from lowbit.numerics.scheme import QuantScheme

GRID = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # exponents for activations in few bits
WEIGHT_GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)  # for weights alone
SMALLEST = 1e-4


def choose_smoothing(x: Tensor, w: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> Tensor:
    """s [K] float32 with the least |x w^T - Q(x / s) Q(w s)^T|^2 for x [M, K] and w [N, K]; ones where none is better.

    dtype is that of stored scales. Static activations are judged as one scale per tensor of this sample.
    """
    x, w = x.float(), w.float()
    wanted = x @ w.T
    best = torch.ones(w.shape[1], device=w.device)
    lowest = (_product(x, w, scheme, dtype) - wanted).square().mean()
    for scales in _candidates(x, w, scheme):
        loss = (_product(x / scales, w * scales, scheme, dtype) - wanted).square().mean()
        if loss < lowest:
            best, lowest = scales, loss
    return best


def _candidates(x: Tensor, w: Tensor, scheme: QuantScheme) -> list[Tensor]:
    if scheme.activations is None:
        size = x.square().mean(0).sqrt().clamp(min=SMALLEST)
        return [_centred(size**a) for a in WEIGHT_GRID]
    outer, inner = x.abs().amax(0).clamp(min=SMALLEST), w.abs().amax(0).clamp(min=SMALLEST)
    return [_centred(outer**a / inner ** (1 - a)) for a in GRID]


def _centred(scales: Tensor) -> Tensor:
    scales = scales / (scales.max() * scales.min()).sqrt()
    return scales.clamp(min=SMALLEST)


def _product(x: Tensor, w: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> Tensor:
    """x w^T as the quantized layer will compute it."""
    if scheme.activations is not None:
        rounded = quantize_dequantize(x, scheme.activations)
        return rounded @ solve_rtn(w, scheme.weights, dtype).dequantized.T
    importance = x.square().mean(0)
    return x @ solve_rtn(w, scheme.weights, dtype, ScaleSearch(steps=4), importance).dequantized.T
