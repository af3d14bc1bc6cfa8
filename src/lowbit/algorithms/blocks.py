"""Scales of E2M1 blocks (nvfp4, mxfp4) that lose least, among those that the format can store.

    nvfp4   scale_b = e4m3 / divisor. The largest value of a block lies on 6 with p = 1 and on 4 with p = 3/2 (Four Over
            Six, arXiv:2512.02010); every p of the grid is tried, rounded to e4m3, and clips where p < 1
    mxfp4   scale_b = 2^e for the three exponents around the largest value

    error(scale) = sum_j importance_j |w_j - scale level_j|^norm        as in algorithms/scales.py

A search leaves e4m3 room above the largest block: the divisor is the power of two below 256 6 / max|w| instead of
448 6 / max|w|. Under powers of two, rows that were solved with different divisors still stand under one.
"""

import torch
from torch import Tensor

from lowbit.numerics import microscale
from lowbit.numerics.affine import group_view
from lowbit.numerics.formats import NumberFormat
from lowbit.numerics.scheme import TensorScheme

GRID = tuple(0.65 + 0.05 * step for step in range(23))  # of largest / 6; 1.75 is the room above the largest block
ROOM = 256.0 / 448.0


def is_blocks(number_format: NumberFormat) -> bool:
    """Whether this is E2M1 under small scales."""
    return number_format.kind == "float" and number_format.bits == 4


def divisor_of(w: Tensor, number_format: NumberFormat, searched: bool) -> Tensor | None:
    """nvfp4's divisor float32 [1] for w; None for mxfp4. searched: with room for larger scales."""
    if number_format.name != "nvfp4":
        return None
    divisor = microscale.choose_global_scale(w)
    return torch.exp2((divisor * ROOM).log2().floor()) if searched else divisor


def search_blocks(
    w: Tensor, scheme: TensorScheme, norm: float, importance: Tensor | None, divisor: Tensor | None
) -> Tensor:
    """The multipliers float32 [N, K/G] of w [N, K] with the least error. importance [K] or None for equal weights."""
    grouped = group_view(w.float(), scheme)  # [N, K] -> [N, K/G, G]
    weight = None if importance is None else group_view(importance, scheme)
    best, least = torch.empty(0), torch.empty(0)
    for index, scale in enumerate(_candidates(grouped.abs().amax(-1), scheme.format, divisor)):
        step = scale.unsqueeze(-1)
        error = (microscale.nearest_levels(grouped / step) * step - grouped).abs_().pow_(norm)
        total = (error if weight is None else error * weight).sum(-1)
        better = total < least if index else torch.ones_like(total, dtype=torch.bool)
        best = torch.where(better, scale, best) if index else scale
        least = torch.where(better, total, least) if index else total
    return best


def _candidates(largest: Tensor, number_format: NumberFormat, divisor: Tensor | None) -> list[Tensor]:
    plain = plain_blocks(largest, number_format, divisor)
    if number_format.name == "mxfp4":
        low, high = microscale.scale_pair(largest, number_format, None)
        pair = microscale.scale_values(low, None), microscale.scale_values(high, None)
        return [plain, *pair, 0.5 * pair[0]]
    step = largest / number_format.high
    return [plain, *(microscale.snap(p * step, number_format, divisor) for p in GRID)]


def plain_blocks(largest: Tensor, number_format: NumberFormat, divisor: Tensor | None) -> Tensor:
    """The multipliers that the format's own rule gives for these largest magnitudes [N, K/G]."""
    return microscale.scale_values(microscale.choose_scale(largest, number_format, divisor), divisor)
