"""Activations rounded at run time: what a layer multiplies in place of its input.

    token, group, tensor   scale = 2 max|x| / (2^B - 1), or a scale and a zero-point       (numerics/affine.py)
    nvfp4, mxfp4           scales of 16 or 32 columns                                      (numerics/microscale.py)

A scheme with `searched` tries a few scales for each token or block and keeps the one with the least squared error:

    integers    the range times 1, 0.9, 0.8, 0.7, 0.6: rare large values are clipped where that serves the others
    nvfp4       the largest value on level 6 or on level 4 (Four Over Six, arXiv:2512.02010)
    mxfp4       the two exponents around the largest value

Under LLM.int8() (arXiv:2208.07339, section 3.2) columns with a value of `outlier` or more stay as they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.numerics import microscale
from lowbit.numerics.affine import choose_scale, decode, encode, group_view, value_range
from lowbit.numerics.scheme import TensorScheme

INT8_LARGEST = 127.0
SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6)  # of the range of a token in few bits


def round_activations(
    x: Tensor, scheme: TensorScheme, static_scale: Tensor | None = None, static_zero: Tensor | None = None
) -> Tensor:
    """x [M, K] after a trip through `scheme`, float32: under the calibrated grid if there is one, else under its own.

    For nvfp4 static_scale is the calibrated divisor. K must be a multiple of the scheme's group.
    """
    if scheme.outlier:
        return _round_inliers(x, scheme.outlier)
    if scheme.format.bits == 4 and scheme.format.kind == "float":
        return _round_blocks(x, scheme, static_scale)
    if static_scale is not None:
        return _trip(x, static_scale, static_zero, scheme)
    scale, zero = dynamic_scale(x, scheme)
    return _trip(x, scale, zero, scheme)


def dynamic_scale(x: Tensor, scheme: TensorScheme) -> tuple[Tensor, Tensor | None]:
    """(scale in x's dtype, zero) for x [M, K] under its own range."""
    low, high = value_range(x, scheme)
    if not scheme.searched:
        return choose_scale(low, high, scheme, x.dtype)
    candidates = [choose_scale(p * low, p * high, scheme, x.dtype) for p in SHRINKS]
    errors = [
        group_view((_trip(x, *pair, scheme) - x.float()).square(), scheme).sum(-1) for pair in candidates
    ]  # each in the shape of the scale
    chosen = torch.stack(errors).argmin(0, keepdim=True)
    zeros = [zero for _, zero in candidates if zero is not None]
    return _taken([scale for scale, _ in candidates], chosen), _taken(zeros, chosen) if zeros else None


def _round_inliers(x: Tensor, threshold: float) -> Tensor:
    """x [M, K]; columns that reach the threshold are kept, others rounded to int8, a token's scale by its inliers."""
    bound = torch.finfo(torch.float16).max
    half = x.clamp(-bound, bound).to(torch.float16).float()  # as bitsandbytes compares and rounds
    is_outlier = half.abs() >= threshold
    inliers = half.masked_fill(is_outlier, 0)
    scale = (inliers.abs().amax(-1, keepdim=True) / INT8_LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(is_outlier.flatten(0, -2).any(0), x.float(), (inliers / scale).round() * scale)


def _trip(x: Tensor, scale: Tensor, zero: Tensor | None, scheme: TensorScheme) -> Tensor:
    return decode(encode(x, scale, zero, scheme), scale, zero, scheme)


def _taken(candidates: Sequence[Tensor], chosen: Tensor) -> Tensor:
    return torch.stack(list(candidates)).gather(0, chosen).squeeze(0)


def _round_blocks(x: Tensor, scheme: TensorScheme, divisor: Tensor | None) -> Tensor:
    """x [M, K] under nvfp4 (with this divisor, or that of x) or mxfp4."""
    if scheme.format.name == "nvfp4" and divisor is None:
        divisor = microscale.choose_global_scale(x)
    largest = group_view(x.float(), scheme).abs().amax(-1)  # [M, K] -> [M, K/G]
    if not scheme.searched:
        scale = microscale.choose_scale(largest, scheme.format, divisor)
        return microscale.decode(microscale.encode(x, scale, divisor), scale, divisor)
    best: Tensor | None = None
    least = torch.empty(0)
    for scale in microscale.scale_pair(largest, scheme.format, divisor):
        rounded = microscale.decode(microscale.encode(x, scale, divisor), scale, divisor)
        error = group_view((rounded - x.float()).square(), scheme).sum(-1, keepdim=True)  # [M, K/G, 1]
        if best is None:
            best, least = rounded, error
            continue
        better = error < least
        best = torch.where(better, group_view(rounded, scheme), group_view(best, scheme)).flatten(-2)
        least = torch.minimum(error, least)
    assert best is not None
    return best
