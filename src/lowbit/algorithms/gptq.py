"""GPTQ: round one column at a time and let the columns still to come repair the error (arXiv:2210.17323).

Minimizes |x (w - w^)^T|^2 over the calibration tokens, whose second moment is H = E[x x^T]:

    U = upper Cholesky factor of (H + damping mean(diag H) I)^-1
    for each column i:   q_i = round(w_i / scale);   e = (w_i - w^_i) / U_ii;   w_j -= e U_ij  for all j > i

Scales are chosen beforehand on the original weights in their natural groups ("static groups"), so nothing about the
order of columns needs to be stored. Orders:

    act       by falling H_ii ("act-order"). With plain min/max scales it loses to the natural one; with scales searched
              under the weights H_jj it wins (docs/log.md)
    group     by falling H_ii within each group of columns, groups by their largest H_ii ("group-aware": GPTQModel)
    natural   as they stand

A column that no token excites (H_jj = 0) leaves its weights at zero. When H is not positive definite even so, the
damping grows tenfold and the solution says by how much.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.algorithms.blocks import divisor_of
from lowbit.algorithms.columns import PANEL, PLAIN, Columns
from lowbit.algorithms.joint import Joint, descend_jointly
from lowbit.algorithms.polish import polish
from lowbit.algorithms.scales import ScaleSearch, search_scale
from lowbit.algorithms.solution import Solution
from lowbit.errors import InputError
from lowbit.numerics.affine import decode, per_column
from lowbit.numerics.formats import NumberFormat
from lowbit.numerics.scheme import TensorScheme

MAX_DAMPING = 10.0
ORDERS = ("act", "group", "natural")


@dataclass(frozen=True)
class GptqOptions:
    """damping: a share of mean(diag H); order: one of ORDERS; block: columns updated lazily.

    polish: rounds of refitted scales and descent afterwards (algorithms/polish.py).
    """

    damping: float = 0.01
    order: str = "act"
    block: int = PANEL
    search: ScaleSearch | None = field(default_factory=ScaleSearch)
    polish: int = 0

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise InputError(f"unknown order of columns {self.order!r}; choose one of {', '.join(ORDERS)}")


@dataclass(frozen=True)
class Problem:
    """What the loop over columns works on: w [N, K] with dead columns at zero, H [K, K] without zeros on its diagonal.

    order int64 [K]: which columns come first; factor: U [K, K] of H in this order; damping: the share that it took.
    """

    w: Tensor
    moment: Tensor
    order: Tensor
    factor: Tensor
    damping: float

    @classmethod
    def of(cls, w: Tensor, second_moment: Tensor, scheme: TensorScheme, options: GptqOptions) -> "Problem":
        """Raises InputError when no damping up to 10 makes the second moment positive definite."""
        moment = second_moment.float().clone()
        dead = moment.diagonal() == 0
        moment.diagonal().add_(dead)
        order = column_order(moment.diagonal(), scheme, options.order)
        factor, damping = inverse_factor(moment[order][:, order], options.damping)
        return cls(torch.where(dead, 0, w.float()), moment, order, factor, damping)


def column_order(importance: Tensor, scheme: TensorScheme, order: str) -> Tensor:
    """The columns int64 [K] in one of ORDERS, for importance [K] = diag H."""
    if order == "natural":
        return torch.arange(len(importance), device=importance.device)
    if order == "act" or scheme.granularity != "group":
        return importance.argsort(descending=True, stable=True)
    groups = importance.view(-1, scheme.group_size or 1)  # [K] -> [K/G, G]
    inside = groups.argsort(dim=1, descending=True, stable=True)
    first = groups.amax(1).argsort(descending=True, stable=True)
    starts = torch.arange(len(groups), device=importance.device)[:, None] * groups.shape[1]
    return (starts + inside)[first].flatten()


def solve_gptq(
    w: Tensor,
    second_moment: Tensor,
    scheme: TensorScheme,
    dtype: torch.dtype,
    options: GptqOptions | None = None,
    columns: Columns = PLAIN,
    joint: tuple[Tensor, Joint] | None = None,
) -> Solution:
    """Codes, scale and zero-point for w [N, K] given second_moment [K, K] = E[x x^T].

    Rows are independent: layers that read the same input may be stacked along N. `dtype` is that of the stored scale.
    columns: the inner loops, for a GPU. Raises InputError when no damping up to 10 makes the second moment positive
    definite.
    """
    options = options or GptqOptions()
    problem = Problem.of(w, second_moment, scheme, options)
    w, moment, order = problem.w, problem.moment, problem.order
    scale, zero = search_scale(w, scheme, dtype, options.search, moment.diagonal())
    q = round_columns(problem, scale, zero, scheme, options.block, columns.round_panel)
    if options.polish:
        q, scale = polish(w, moment, q, scale, zero, scheme, order, options.polish, columns)
    if joint is not None:
        q, scale = descend_jointly(w, moment, joint[0], q, scale, zero, scheme, order, columns, joint[1])
    divisor = divisor_of(w, scheme.format, options.search is not None)
    return Solution(q, scale, zero, decode(q, scale, zero, scheme), problem.damping, divisor)


def inverse_factor(moment: Tensor, damping: float) -> tuple[Tensor, float]:
    """(U, damping used) with U^T U = (H + damping mean(diag H) I)^-1, U upper triangular float32 [K, K].

    With the last column first A = R R^T, R upper triangular, so that U = R^-1: one factorization, and one substitution.
    In float64. The damping grows tenfold until it succeeds.
    """
    mean = moment.diagonal().double().mean()
    while damping <= MAX_DAMPING:
        matrix = moment.flip(0, 1).double()  # one name for all steps: few matrices of float64 are alive at a time
        matrix.diagonal().add_(damping * mean)
        matrix, failed = torch.linalg.cholesky_ex(matrix)
        matrix = matrix.flip(0, 1)
        unit = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        matrix = torch.linalg.solve_triangular(matrix, unit, upper=True).float()
        if (failed == 0) & matrix.isfinite().all():  # asked once: a GPU would wait for each answer
            return matrix, damping
        damping = max(damping * 10, 1e-4)
    raise InputError(
        f"the second moment of a layer's inputs is not positive definite, even with damping {MAX_DAMPING}; "
        "calibrate on more tokens or choose --method rtn"
    )


def round_columns(
    problem: Problem,
    scale: Tensor,
    zero: Tensor | None,
    scheme: TensorScheme,
    block: int,
    round_panel: Callable[[Tensor, Tensor, Tensor, Tensor, NumberFormat], tuple[Tensor, Tensor]],
) -> Tensor:
    """Codes [N, K] (int8, or levels in float8_e4m3fn) in natural column order.

    Works on the transpose, whose rows (columns of w) are contiguous.
    """
    factor, order, (rows, columns) = problem.factor, problem.order, problem.w.shape
    left = problem.w.T[order].contiguous()  # [N, K] -> [K, N], in solving order
    steps, shifts = grids_in_order(scale, zero, scheme, problem)
    codes = torch.empty(columns, rows, device=left.device)
    for start in range(0, columns, block):
        part = slice(start, min(start + block, columns))
        codes[part], errors = round_panel(left[part], factor[part, part], steps[part], shifts[part], scheme.format)
        left[part.stop :].addmm_(factor[part, part.stop :].T, errors, alpha=-1)
    return codes_in_place(codes, order, scheme)


def grids_in_order(scale: Tensor, zero: Tensor | None, scheme: TensorScheme, problem: Problem) -> tuple[Tensor, Tensor]:
    """(steps, zero-points) [K, N] of each column in solving order; zeros where there are no zero-points."""
    steps = per_column(scale, scheme, problem.w.shape)[problem.order]
    shifts = torch.zeros_like(steps) if zero is None else per_column(zero, scheme, problem.w.shape)[problem.order]
    return steps, shifts


def codes_in_place(codes: Tensor, order: Tensor, scheme: TensorScheme) -> Tensor:
    """Codes float32 [K, N] in solving order as the codes [N, K] of the weight."""
    natural = torch.empty(codes.shape, dtype=torch.int8 if scheme.format.kind == "int" else torch.float32,
                          device=codes.device)  # fmt: skip
    natural[order] = codes.to(natural.dtype)
    return natural.T.contiguous().to(torch.int8 if scheme.format.kind == "int" else torch.float8_e4m3fn)
