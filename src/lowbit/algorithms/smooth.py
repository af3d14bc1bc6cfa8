"""Smoothing: share the difficulty of a product between its two factors, channel by channel, before either is rounded.

    x W^T = (x / s) (W s)^T       s > 0 [K], folded into what writes x

    activations in few bits     s_j = max|x_j|^a / max|W_j|^(1-a)         SmoothQuant (arXiv:2211.10438), eq. 4
    weights alone               s_j = rms(x_j)^a                          AWQ (arXiv:2306.00978), eq. 5, on mean squares

For activations in few bits, three sizes of a channel stand in for max|x_j|: itself, the 99th percentile, the root mean
square; then the exponent of max|W_j| is freed. Every candidate is judged by the product itself on a sample of tokens,
with both factors rounded as they will be, and no smoothing at all is one of them. Scales are centred,
sqrt(max s min s) = 1.
"""

import torch
from torch import Tensor

from lowbit.algorithms.rtn import solve_rtn
from lowbit.algorithms.scales import ScaleSearch
from lowbit.numerics.affine import quantize_dequantize
from lowbit.numerics.scheme import QuantScheme

GRID = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # exponents for activations in few bits
INNER_GRID = (0.0, 0.25, 0.5)  # exponents of max|W_j| in place of 1 - a
WEIGHT_GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)  # for weights alone
SMALLEST = 1e-4


def choose_smoothing(x: Tensor, w: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> Tensor:
    """s [K] float32, of least |x w^T - Q(x / s) Q(w s)^T|^2 among the candidates, for x [M, K] and w [N, K].

    dtype is that of stored scales. Static activations are judged as one scale per tensor of this sample.
    """
    x, w = x.float(), w.float()
    wanted = x @ w.T

    def loss(scales: Tensor) -> float:
        return (_product(x / scales, w * scales, scheme, dtype) - wanted).square().mean().item()

    plain = torch.ones(w.shape[1], device=w.device)
    if scheme.activations is None:
        size = _rms(x)
        return min((plain, *(_centred(size**a) for a in WEIGHT_GRID)), key=loss)
    inner = w.abs().amax(0).clamp(min=SMALLEST)
    outers = [x.abs().amax(0).clamp(min=SMALLEST), _percentile(x), _rms(x)]
    shared = {(which, a, 1 - a): _centred(outers[which] ** a / inner ** (1 - a)) for which in range(3) for a in GRID}
    which, a, _ = min(shared, key=lambda exponents: loss(shared[exponents]))
    freed = [_centred(outers[which] ** a / inner**b) for b in INNER_GRID]
    return min((plain, shared[which, a, 1 - a], *freed), key=loss)


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(0).sqrt().clamp(min=SMALLEST)


def _percentile(x: Tensor) -> Tensor:
    """What 99 % of |x_j| stay below, of x [M, K]: [K]."""
    return x.abs().kthvalue(max(len(x) * 99 // 100, 1), dim=0).values.clamp(min=SMALLEST)


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
