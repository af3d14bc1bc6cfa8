"""Correction: aim a layer at what the original model computed, although its inputs are no longer the original's.

In the quantized model a layer reads x~ where the original reads x. Its best weights are not W but

    W* = argmin E|t - W* x~|^2 = W + E[(t - W x~) x~^T] H^-1,    H = E[x~ x~^T],  t the wanted output

and since |t - W^ x~|^2 = |(W* - W^) x~|^2 + const, rounding W* under H minimizes the distance to t (GPTAQ,
arXiv:2504.02692, and Qronos, arXiv:2505.11695, spread the same least squares over GPTQ's columns). t is

    W x              for any layer
    W x + (r - r~)   for a layer whose output is added to the residual stream: r there in the original, r~ here,
                     so that it also takes back what earlier layers lost

The full step fits the calibration tokens too closely. How much of it serves other tokens is found by fitting it on one
half of them and judging it on the other, both ways (`cross_fitted`), in closed form: with D_1 and D_2 the steps towards
the two parts of the target, |t - (W + a_1 D_1 + a_2 D_2) x~|^2 on unseen tokens is a quadratic of two shares.

A bias takes back what the layer loses on average, which no weight has to:

    b* = b + W E[x] - W^ E[x~]
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

UNFITTED = 0.5


@dataclass(frozen=True)
class Correction:
    """The step is strength (inputs W E[(x - x~) x~^T] + residual E[(r - r~) x~^T]) H^-1.

    strength None: `inputs` and `residual` are found for each layer by cross-fitting, and strength is 1; UNFITTED where
    there is but one batch of tokens.
    sequential: inputs are observed again after each quantized layer of a block, not once a block. damping: as in GPTQ.
    """

    strength: float | None = None
    residual: float = 1.0
    inputs: float = 1.0
    sequential: bool = True
    damping: float = 0.01


def corrected(w: Tensor, moment: Tensor, shift: Tensor, residual: Tensor | None, options: Correction) -> Tensor:
    """W* [N, K] float32 for w [N, K].

    moment [K, K] = E[x~ x~^T]; shift [K, K] = E[(x - x~) x~^T]; residual [N, K] = E[(r - r~) x~^T] or None.
    """
    w = w.float()
    cross = options.inputs * (w @ shift)
    if residual is not None:
        cross = cross + options.residual * residual
    strength = UNFITTED if options.strength is None else options.strength
    return w + strength * _steps(moment, [cross], options.damping)[0]


def _steps(moment: Tensor, crosses: Sequence[Tensor], damping: float) -> list[Tensor]:
    """C H^-1 [N, K] float32 for each C [N, K], H damped by a share of its mean diagonal."""
    double = moment.double()
    double.diagonal().add_(damping * double.diagonal().mean() + torch.finfo(torch.float64).tiny)
    steps = torch.linalg.solve(double, torch.cat(list(crosses)).double().T).T.float()
    return list(steps.split([len(cross) for cross in crosses]))


class Half(Protocol):
    """Moments of a part of the tokens (algorithms/choose.py)."""

    @property
    def moment(self) -> Tensor: ...
    @property
    def shift(self) -> Tensor: ...
    @property
    def residual(self) -> Tensor | None: ...


def cross_fitted(w: Tensor, halves: tuple[Half, Half], options: Correction) -> Correction:
    """options with the shares of the step, fitted on all tokens, that serve tokens it was not fitted on; w [N, K]."""
    w = w.float()
    crosses = [[w @ half.shift, *([] if half.residual is None else [half.residual])] for half in halves]
    gram = torch.zeros(len(crosses[0]), len(crosses[0]), dtype=torch.float64)
    slope = torch.zeros(len(crosses[0]), dtype=torch.float64)
    for seen, unseen in ((0, 1), (1, 0)):
        steps = _steps(halves[seen].moment, crosses[seen], options.damping)
        wanted = sum(crosses[unseen])
        for i, step in enumerate(steps):
            slope[i] += (step * wanted).sum().item()
            spread = step @ halves[unseen].moment
            gram[i] += torch.tensor([(spread * other).sum().item() for other in steps])
    found = [_of_all_tokens(share) for share in _shares(gram, slope)]
    return replace(options, strength=1.0, inputs=found[0], residual=found[-1])


def _shares(gram: Tensor, slope: Tensor) -> list[float]:
    """a in [0, 1] with the least a^T gram a - 2 slope^T a, one or two numbers; 0 where a step is nothing."""
    tiny = torch.finfo(torch.float64).tiny
    a = torch.linalg.lstsq(gram, slope).solution.clamp(0, 1)
    for _ in range(20):  # coordinate descent: the quadratic is convex, and the box has no other minimum
        for i in range(len(a)):
            rest = gram[i] @ a - gram[i, i] * a[i]
            a[i] = ((slope[i] - rest) / (gram[i, i] + tiny)).clamp(0, 1)
    return [float(share) for share in a]


def _of_all_tokens(share: float) -> float:
    """The share of a step from all tokens, of the share a that serves when half of them made it.

    With S the step's signal and N the noise of half the tokens a = S / (S + N); twice the tokens leave N / 2.
    """
    return 2 * share / (1 + share)


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
