"""Scales that lose least: clip search, judged by a weighted error.

For each group of weights under one scale, shrink the range by p and keep the p with the smallest

    error(p) = sum_j importance_j |w_j - decode(encode(w_j))|^norm

importance is E[x_j^2], the diagonal of the layer's second moment (importance matrix), or 1 without data. norm 2.4 is
GPTQ's `--mse` search (IST-DASLab/gptq, quant.py); with importances 2 is the layer's own squared output error.
A symmetric grid holds one more step below zero than above, [-2^(B-1), 2^(B-1) - 1], so the sign of its scale is free:
both signs are tried, and the longer side goes to the larger tail (as in GGUF's Q4_0).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.algorithms.blocks import divisor_of, is_blocks, plain_blocks, search_blocks
from lowbit.numerics.affine import choose_scale, group_view, round_to, value_range
from lowbit.numerics.scheme import TensorScheme

AT_A_TIME = 1 << 25  # numbers


@dataclass(frozen=True)
class ScaleSearch:
    """The candidates p = 1 down to `smallest` in `steps` steps, and the error's exponent."""

    steps: int = 12
    smallest: float = 0.55
    norm: float = 2.0
    signed: bool = True


def search_scale(
    w: Tensor, scheme: TensorScheme, dtype: torch.dtype, search: ScaleSearch | None, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(scale in `dtype`, zero) for w [N, K] float32 with the least weighted error; min/max scales when search is None.

    importance [K] float32 >= 0, or None for equal weights. Shapes of scale and zero as in numerics/affine.py; for nvfp4
    and mxfp4 the scale is the float32 multiplier that the stored one stands for (algorithms/blocks.py).
    """
    if is_blocks(scheme.format):
        divisor = divisor_of(w, scheme.format, search is not None)
        if search is None:
            return plain_blocks(group_view(w.float(), scheme).abs().amax(-1), scheme.format, divisor), None
        return search_blocks(w, scheme, search.norm, importance, divisor), None
    low, high = value_range(w, scheme)
    best_scale, best_zero = choose_scale(low, high, scheme, dtype)
    if search is None:
        return best_scale, best_zero
    weight = _importance_view(w, scheme, importance)
    grouped = group_view(w, scheme)
    best_error = torch.full_like(low, torch.inf)
    shares = [1 - step * (1 - search.smallest) / search.steps for step in range(search.steps + 1)]
    for some in torch.tensor(shares, device=w.device).split(_at_a_time(w)):
        p = some.view(-1, *[1] * low.dim())
        scale, zero = choose_scale(p * low, p * high, scheme, dtype)  # [candidates, *the scale's shape]
        if scheme.symmetric and search.signed:
            scale = torch.stack([scale, -scale], 1).flatten(0, 1)
        error = _weighted_error(grouped, scale, zero, scheme, weight, search.norm)
        least, index = error.nan_to_num_(torch.inf, torch.inf).min(
            0, keepdim=True
        )  # NaN: a scale that overflows its dtype
        better = least[0] < best_error
        best_error = torch.where(better, least[0], best_error)
        best_scale = torch.where(better, scale.gather(0, index)[0], best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero.gather(0, index)[0], best_zero)
    return best_scale, best_zero


def _at_a_time(w: Tensor) -> int:
    """How many candidates are tried together: one on a CPU, whose caches then hold it; on a GPU a launch does many."""
    return 1 if w.device.type == "cpu" else max(AT_A_TIME // w.numel(), 1)


def _importance_view(w: Tensor, scheme: TensorScheme, importance: Tensor | None) -> Tensor | None:
    """importance [K] shaped like group_view(w), without copying it for each row; None where all are alike."""
    if importance is None:
        return None
    if scheme.granularity == "tensor":
        return importance.expand_as(w).reshape(1, -1)
    return group_view(importance, scheme)


def _weighted_error(
    grouped: Tensor, scale: Tensor, zero: Tensor | None, scheme: TensorScheme, weight: Tensor | None, norm: float
) -> Tensor:
    """sum over each group of weight * |w - decode(encode(w))|^norm, in the shape of scale."""
    step = scale.float().unsqueeze(-1)
    scaled = grouped / step
    if zero is not None:
        shift = zero.float().unsqueeze(-1)
        error = (round_to(scaled + shift, scheme.format).float() - shift - scaled) * step
    else:
        error = (round_to(scaled, scheme.format).float() - scaled) * step
    error = error.square_() if norm == 2 else error.abs_().pow_(norm)
    return (error if weight is None else error * weight).sum(-1)
