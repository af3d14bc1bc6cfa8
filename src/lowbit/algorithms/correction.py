"""Correction: aim a layer at what the original model computed, although its inputs are no longer the original's.

In the quantized model a layer reads x~ where the original reads x. Its best weights are not W but

    W* = argmin E|t - W* x~|^2 = W + E[(t - W x~) x~^T] H^-1,    H = E[x~ x~^T],  t the wanted output

and since |t - W^ x~|^2 = |(W* - W^) x~|^2 + const, rounding W* under H minimizes the distance to t (GPTAQ,
arXiv:2504.02692, and Qronos, arXiv:2505.11695, spread the same least squares over GPTQ's columns). t is

    W x              for any layer
    W x + (r - r~)   for a layer whose output is added to the residual stream: r there in the original, r~ here,
                     so that it also takes back what earlier layers lost

Where t itself is at hand, one moment is enough: E[(t - W x~) x~^T] = E[t x~^T] - W H.

The full step fits the calibration tokens too closely: `strength` < 1 takes a part of it.

A bias takes back what the layer loses on average, which no weight has to:

    b* = b + W E[x] - W^ E[x~]
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Correction:
    """strength: the share of the least-squares step; residual: that of the residual stream's error in the target.

    sequential: inputs are observed again after each quantized layer of a block, not once a block. damping: as in GPTQ.
    """

    strength: float = 0.5
    residual: float = 1.0
    sequential: bool = True
    damping: float = 0.01


def corrected(w: Tensor, moment: Tensor, cross: Tensor, options: Correction) -> Tensor:
    """W* [N, K] float32 for w [N, K]; moment [K, K] = E[x~ x~^T]; cross [N, K] = E[(t - W x~) x~^T]."""
    double = moment.double()
    ridge = options.damping * double.diagonal().mean() + torch.finfo(torch.float64).tiny
    double.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(double)
    wanted = cross.double().T
    step = torch.linalg.solve(double, wanted) if failed else torch.cholesky_solve(wanted, factor)
    return w.float() + options.strength * step.T.float()


def corrected_bias(
    bias: Tensor, w: Tensor, dequantized: Tensor, mean: Tensor, shift: Tensor | None, stored: torch.dtype
) -> Tensor:
    """b* [N] in bias's dtype, as `stored` rounds it.

    w, dequantized [N, K]; mean [K] = E[x~]; shift [K] = E[x - x~], or None for zero.
    """
    lost = (w - dequantized) @ mean
    if shift is not None:
        lost = lost + w @ shift
    return (bias.float() + lost).to(stored).to(bias.dtype)
