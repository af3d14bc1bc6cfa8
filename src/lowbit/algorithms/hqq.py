"""HQQ: half-quadratic quantization, a robust fit of the grid without data (Badri and Shaji, mobiusml.github.io/hqq).

Instead of the squared error, which a few large weights rule, minimize sum |w - w^|^p with p < 1. The error is split
into an outlier part e and the rest, and these three take turns, beta growing by kappa each time:

    q    = round(clamp(w / scale + zero))
    e    = shrink(w - w^),  shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0)     the proximal step of |x|^p
    zero = mean over the group of  q - (w - e) / scale

The published grid has a float zero-point and keeps its scale. Ours, like that of every file format we write, has an
integer one or none, so that mean can move little: zero is rounded, and the scale that fits w - e best under the codes
is taken as well. Of all iterates a group keeps the one with the least sum |w - w^|^p.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.algorithms.solution import Solution
from lowbit.numerics.affine import choose_scale, decode, encode, group_view, round_to, value_range
from lowbit.numerics.scheme import TensorScheme


@dataclass(frozen=True)
class HalfQuadratic:
    """p, beta, kappa and the number of iterations, with the defaults of the authors' code (hqq/core/optimize.py)."""

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    steps: int = 20


def solve_hqq(w: Tensor, scheme: TensorScheme, dtype: torch.dtype, options: HalfQuadratic | None = None) -> Solution:
    """Codes, scale (in `dtype`) and zero-point for w [N, K]; no group does worse in sum |error|^p than rounding."""
    options = options or HalfQuadratic()
    w = w.float()
    best_scale, best_zero = choose_scale(*value_range(w, scheme), scheme, dtype)
    scale, zero, grouped = best_scale.float(), None if best_zero is None else best_zero.float(), group_view(w, scheme)
    best, beta = _loss(grouped, best_scale, best_zero, scheme, options.p), options.beta
    for _ in range(options.steps):
        q = _codes(grouped, scale, zero, scheme)
        rest = grouped - shrink(grouped - _decoded(q, scale, zero), beta, options.p)
        if zero is not None:
            zero = mean_zero(rest, q, scale).round().clamp(scheme.format.low, scheme.format.high)
        scale = _fitted(rest, q if zero is None else q - zero.unsqueeze(-1), scale)
        beta *= options.kappa
        stored, stored_zero = scale.to(dtype), None if zero is None or best_zero is None else zero.to(best_zero.dtype)
        loss = _loss(grouped, stored, stored_zero, scheme, options.p)
        better = loss < best
        best, best_scale = torch.where(better, loss, best), torch.where(better, stored, best_scale)
        if best_zero is not None and stored_zero is not None:
            best_zero = torch.where(better, stored_zero, best_zero)
    q = encode(w, best_scale, best_zero, scheme)
    return Solution(q, best_scale, best_zero, decode(q, best_scale, best_zero, scheme))


def shrink(x: Tensor, beta: float, p: float) -> Tensor:
    """The proximal step of |x|^p: zero for small x, nearly x for large ones; generalized soft thresholding."""
    size = x.abs()
    return x.sign() * (size - size.pow(p - 1) / beta).clamp(min=0)  # 0^(p-1) is infinite, and is clamped to 0


def mean_zero(rest: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """The float zero-point that fits `rest` [..., G] best under codes q [..., G] and scale [...]: HQQ's update."""
    return (q - rest / scale.unsqueeze(-1)).mean(-1)


def _fitted(rest: Tensor, shifted: Tensor, scale: Tensor) -> Tensor:
    """The scale with the least squared error to `rest` under codes less zero; as it was where those are all zero."""
    square = shifted.square().sum(-1)
    fitted = (shifted * rest).sum(-1) / square
    return torch.where((square > 0) & fitted.isfinite() & (fitted * scale.sign() > 0), fitted, scale)


def _codes(grouped: Tensor, scale: Tensor, zero: Tensor | None, scheme: TensorScheme) -> Tensor:
    scaled = grouped / scale.unsqueeze(-1)
    return round_to(scaled if zero is None else scaled + zero.unsqueeze(-1), scheme.format).float()


def _decoded(q: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    return (q if zero is None else q - zero.unsqueeze(-1)) * scale.unsqueeze(-1)


def _loss(grouped: Tensor, scale: Tensor, zero: Tensor | None, scheme: TensorScheme, p: float) -> Tensor:
    """sum |w - w^|^p of each group, in the shape of scale."""
    scale, zero = scale.float(), None if zero is None else zero.float()
    return (grouped - _decoded(_codes(grouped, scale, zero, scheme), scale, zero)).abs().pow(p).sum(-1)
