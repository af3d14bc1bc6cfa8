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

from lowbit.numerics.affine import round_to
from lowbit.numerics.formats import NumberFormat

PANEL = 128  # columns to a panel; the rest of the weight hears of them in one matrix product


def round_panel(
    panel: Tensor, corner: Tensor, steps: Tensor, shifts: Tensor, limits: NumberFormat
) -> tuple[Tensor, Tensor]:
    """(codes, errors), float32 [B, N] both; errors are (w - w^) / U_ii.

    panel [B, N]: the weights; corner [B, B]: their part of the upper factor U; steps, shifts [B, N]: scale and zero.
    """
    panel, codes, errors = panel.clone(), torch.empty_like(panel), torch.empty_like(panel)
    for i in range(len(panel)):
        code = round_to(panel[i] / steps[i] + shifts[i], limits).float()
        codes[i] = code
        torch.div(panel[i] - (code - shifts[i]) * steps[i], corner[i, i], out=errors[i])
        panel[i + 1 :].addr_(corner[i, i + 1 :], errors[i], alpha=-1)
    return codes, errors


def descend_panel(
    gradient: Tensor, corner: Tensor, codes: Tensor, steps: Tensor, limits: NumberFormat
) -> tuple[Tensor, Tensor]:
    """(codes, change of w^), float32 [B, N] both.

    gradient [B, N]: (E H)^T of the panel; corner [B, B]: its part of H; codes [B, N]: where they are now.
    """
    gradient, found, moved = gradient.clone(), torch.empty_like(codes), torch.empty_like(codes)
    for i in range(len(codes)):
        wanted = codes[i] - gradient[i] / (corner[i, i] * steps[i])
        found[i] = round_to(wanted, limits).float()
        torch.mul(found[i] - codes[i], steps[i], out=moved[i])
        gradient.addr_(corner[i], moved[i])
    return found, moved


@dataclass(frozen=True)
class Columns:
    """Both loops."""

    round_panel: Callable[[Tensor, Tensor, Tensor, Tensor, NumberFormat], tuple[Tensor, Tensor]] = round_panel
    descend_panel: Callable[[Tensor, Tensor, Tensor, Tensor, NumberFormat], tuple[Tensor, Tensor]] = descend_panel


PLAIN = Columns()
