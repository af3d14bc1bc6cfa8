"""The two loops over columns that solvers spend their time in, one panel of B columns at a time.

    round_panel      GPTQ: round column i, let columns j > i of the panel answer its error
    descend_panel    coordinate descent: give column i the best code beside all the others, and tell them

Everything is transposed, [B, N]: a column of the weight is a row in memory. `Columns` carries both, so that a caller
with a GPU may hand in fused kernels (kernels/triton/columns.py); here they are in plain torch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.numerics.affine import nearest
from lowbit.numerics.formats import NumberFormat

PANEL = 128  # columns to a panel; the rest of the weight hears of them in one matrix product


def round_panel(
    panel: Tensor, corner: Tensor, steps: Tensor, shifts: Tensor, limits: NumberFormat
) -> tuple[Tensor, Tensor]:
    """(codes, errors), float32 [B, N] both; errors are (w - w^) / U_ii.

    panel [B, N]: the weights; corner [B, B]: their part of the upper factor U; steps, shifts [B, N]: scale and zero.
    """
    panel, codes, errors = panel.clone(), torch.empty_like(panel), torch.empty_like(panel)
    pivots = corner.diagonal().tolist()
    rows = zip(*(part.unbind() for part in (panel, steps, shifts, codes, errors)), strict=True)
    for i, (w, step, shift, code, error) in enumerate(rows):
        code.copy_(nearest(torch.addcdiv(shift, w, step), limits))
        torch.sub(w, (code - shift).mul_(step), out=error).div_(pivots[i])
        panel[i + 1 :].addr_(corner[i, i + 1 :], error, alpha=-1)
    return codes, errors


def descend_panel(
    gradient: Tensor, corner: Tensor, codes: Tensor, steps: Tensor, limits: NumberFormat
) -> tuple[Tensor, Tensor]:
    """(codes, change of w^), float32 [B, N] both.

    gradient [B, N]: (E H)^T of the panel; corner [B, B]: its part of H; codes [B, N]: where they are now.
    """
    gradient, found, moved = gradient.clone(), torch.empty_like(codes), torch.empty_like(codes)
    pivots = corner.diagonal()[:, None] * steps
    rows = zip(*(part.unbind() for part in (gradient, pivots, codes, steps, found, moved)), strict=True)
    for i, (slope, pivot, code, step, new, change) in enumerate(rows):
        new.copy_(nearest(torch.addcdiv(code, slope, pivot, value=-1), limits))
        torch.sub(new, code, out=change).mul_(step)
        gradient.addr_(corner[i], change)
    return found, moved


@dataclass(frozen=True)
class Columns:
    """Both loops."""

    round_panel: Callable[[Tensor, Tensor, Tensor, Tensor, NumberFormat], tuple[Tensor, Tensor]] = round_panel
    descend_panel: Callable[[Tensor, Tensor, Tensor, Tensor, NumberFormat], tuple[Tensor, Tensor]] = descend_panel


PLAIN = Columns()
