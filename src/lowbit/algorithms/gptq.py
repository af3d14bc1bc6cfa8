"""GPTQ: round one column at a time and let the columns still to come repair the error (arXiv:2210.17323).

Minimizes |x (w - w^)^T|^2 over the calibration tokens, whose second moment is H = E[x x^T]:

    U = upper Cholesky factor of (H + damping mean(diag H) I)^-1
    for each column i:   q_i = round(w_i / scale);   e = (w_i - w^_i) / U_ii;   w_j -= e U_ij  for all j > i

Columns are taken in the order of falling H_ii ("act-order"), with scales chosen beforehand on the original weights in
their natural groups ("static groups"), so nothing about the order needs to be stored. With plain min/max scales that
order loses to the natural one; with scales searched under the weights H_jj it wins (see docs/log.md).

A column that no token excites (H_jj = 0) leaves its weights at zero. When H is not positive definite even so, the
damping grows tenfold and the solution says by how much.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.algorithms.blocks import divisor_of
from lowbit.algorithms.columns import PANEL, PLAIN, Columns
from lowbit.algorithms.polish import polish
from lowbit.algorithms.scales import ScaleSearch, search_scale
from lowbit.algorithms.solution import Solution
from lowbit.errors import InputError
from lowbit.numerics.affine import decode, per_column
from lowbit.numerics.scheme import TensorScheme

MAX_DAMPING = 10.0


@dataclass(frozen=True)
class GptqOptions:
    """damping: a share of mean(diag H); act_order: columns by falling diag H; block: columns updated lazily.

    polish: rounds of refitted scales and descent afterwards (algorithms/polish.py).
    """

    damping: float = 0.01
    act_order: bool = True
    block: int = PANEL
    search: ScaleSearch | None = field(default_factory=ScaleSearch)
    polish: int = 0


def solve_gptq(
    w: Tensor,
    second_moment: Tensor,
    scheme: TensorScheme,
    dtype: torch.dtype,
    options: GptqOptions | None = None,
    columns: Columns = PLAIN,
) -> Solution:
    """Codes, scale and zero-point for w [N, K] given second_moment [K, K] = E[x x^T].

    Rows are independent: layers that read the same input may be stacked along N. `dtype` is that of the stored scale.
    columns: the inner loops, for a GPU. Raises InputError when no damping up to 10 makes the second moment positive
    definite.
    """
    options = options or GptqOptions()
    moment = second_moment.float().clone()
    dead = moment.diagonal() == 0
    moment.diagonal()[dead] = 1
    w = torch.where(dead, 0, w.float())
    order = moment.diagonal().argsort(descending=True, stable=True)
    if not options.act_order:
        order = torch.arange(len(order), device=order.device)
    factor, damping = inverse_factor(moment[order][:, order], options.damping)
    scale, zero = search_scale(w, scheme, dtype, options.search, moment.diagonal())
    q = _round_columns(w, factor, scale, zero, scheme, order, options.block, columns)
    if options.polish:
        q, scale = polish(w, moment, q, scale, zero, scheme, order, options.polish, columns)
    divisor = divisor_of(w, scheme.format, options.search is not None)
    return Solution(q, scale, zero, decode(q, scale, zero, scheme), damping, divisor)


def inverse_factor(moment: Tensor, damping: float) -> tuple[Tensor, float]:
    """(U, damping used) with U^T U = (H + damping mean(diag H) I)^-1, U upper triangular float32 [K, K].

    Factored in float64. The damping grows tenfold until the factorization succeeds.
    """
    double = moment.double()
    mean = double.diagonal().mean()
    while damping <= MAX_DAMPING:
        damped = double.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and factor.isfinite().all():
                return factor.float(), damping
        damping = max(damping * 10, 1e-4)
    raise InputError(
        f"the second moment of a layer's inputs is not positive definite, even with damping {MAX_DAMPING}; "
        "calibrate on more tokens or choose --method rtn"
    )


def _round_columns(
    w: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scheme: TensorScheme,
    order: Tensor,
    block: int,
    loops: Columns,
) -> Tensor:
    """Codes [N, K] (int8, or levels in float8_e4m3fn) in natural column order.

    Works on the transpose, whose rows (columns of w) are contiguous.
    """
    rows, columns = w.shape
    left = w.T[order].contiguous()  # [N, K] -> [K, N], in solving order
    steps = per_column(scale, scheme, w.shape)[order]
    shifts = torch.zeros_like(steps) if zero is None else per_column(zero, scheme, w.shape)[order]
    is_int = scheme.format.kind == "int"
    q = torch.empty(columns, rows, dtype=torch.int8 if is_int else torch.float32, device=w.device)
    for start in range(0, columns, block):
        part = slice(start, min(start + block, columns))
        codes, errors = loops.round_panel(left[part], factor[part, part], steps[part], shifts[part], scheme.format)
        q[part] = codes
        left[part.stop :].addmm_(factor[part, part.stop :].T, errors, alpha=-1)
    natural = torch.empty_like(q)
    natural[order] = q
    return natural.T.contiguous().to(torch.int8 if is_int else torch.float8_e4m3fn)  # [K, N] -> [N, K]
