"""GPTAQ and Qronos: GPTQ whose layer reads x~ of the quantized model and must give what the original gave for x.

With H = E[x~ x~^T], S = E[(x - x~) x~^T] and U the upper Cholesky factor of the damped H^-1 (algorithms/gptq.py):

    GPTAQ (arXiv:2504.02692, algorithm 1)      after column i, w_j -= e U_ij - w_i P_ij  for all j > i,
                                               P = share triu(S U^T, 1) U, and w_i as it was before it was rounded
    Qronos (arXiv:2505.11695, section 3)       q_1 = round((C_1 - W_2.. H_2..,1) / H_11), C = W (H + S);
                                               W_2.. <- (C_2.. - w^_1 H_1,2..) H_2..,2..^-1; then GPTQ on columns 2..

Qronos needs no loop of its own: plain GPTQ on weights whose first column is the quotient above, v, and whose others are
W* + (v - w*_1) H^-1_1,2.. / H^-1_11 with W* = C H^-1, gives the same codes, since its answer to the first column's
error is the very solve. So from the second column on, it is GPTQ on the full step W* of algorithms/correction.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.algorithms.blocks import divisor_of
from lowbit.algorithms.columns import PLAIN, Columns
from lowbit.algorithms.gptq import GptqOptions, Problem, codes_in_place, grids_in_order, round_columns
from lowbit.algorithms.scales import search_scale
from lowbit.algorithms.solution import Solution
from lowbit.numerics.affine import decode, round_to
from lowbit.numerics.formats import NumberFormat
from lowbit.numerics.scheme import TensorScheme

SHARE = 0.25  # of the input's error that GPTAQ answers: alpha in the authors' code


@dataclass(frozen=True)
class _Loop:
    """A problem with its grid and carry [K, K], the matrix P in solving order."""

    problem: Problem
    carry: Tensor
    steps: Tensor
    shifts: Tensor
    limits: NumberFormat


def solve_gptaq(
    w: Tensor,
    second_moment: Tensor,
    shift: Tensor,
    scheme: TensorScheme,
    dtype: torch.dtype,
    options: GptqOptions | None = None,
) -> Solution:
    """Codes, scale (in `dtype`) and zero-point for w [N, K]; second_moment [K, K] = E[x~ x~^T], shift [K, K] = S.

    options.polish is not used: polishing aims at w. Raises InputError as solve_gptq does.
    """
    options = options or GptqOptions()
    problem = Problem.of(w, second_moment, scheme, options)
    scale, zero = search_scale(problem.w, scheme, dtype, options.search, problem.moment.diagonal())
    order, factor = problem.order, problem.factor
    carry = SHARE * (shift.float()[order][:, order] @ factor.T).triu(1) @ factor
    loop = _Loop(problem, carry, *grids_in_order(scale, zero, scheme, problem), scheme.format)
    q = codes_in_place(_round_and_carry(loop, options.block), order, scheme)
    divisor = divisor_of(problem.w, scheme.format, options.search is not None)
    return Solution(q, scale, zero, decode(q, scale, zero, scheme), problem.damping, divisor)


def _round_and_carry(loop: _Loop, block: int) -> Tensor:
    """Codes float32 [K, N] in solving order."""
    factor, carry = loop.problem.factor, loop.carry
    left = loop.problem.w.T[loop.problem.order].contiguous()  # [N, K] -> [K, N], in solving order
    codes, errors = torch.empty_like(left), torch.empty_like(left)
    for start in range(0, len(left), block):
        stop = min(start + block, len(left))
        for i in range(start, stop):
            codes[i] = round_to(left[i] / loop.steps[i] + loop.shifts[i], loop.limits).float()
            torch.div(left[i] - (codes[i] - loop.shifts[i]) * loop.steps[i], factor[i, i], out=errors[i])
            left[i + 1 : stop].addr_(factor[i, i + 1 : stop], errors[i], alpha=-1)
            left[i + 1 : stop].addr_(carry[i, i + 1 : stop], left[i])
        done = slice(start, stop)
        left[stop:].addmm_(factor[done, stop:].T, errors[done], alpha=-1)
        left[stop:].addmm_(carry[done, stop:].T, left[done])
    return codes


def solve_qronos(
    w: Tensor,
    second_moment: Tensor,
    shift: Tensor,
    scheme: TensorScheme,
    dtype: torch.dtype,
    options: GptqOptions | None = None,
    columns: Columns = PLAIN,
) -> Solution:
    """As solve_gptaq, by Qronos. Scales are chosen on w. H takes GPTQ's damping everywhere, the authors' is smaller."""
    options = options or GptqOptions()
    problem = Problem.of(w, second_moment, scheme, options)
    scale, zero = search_scale(problem.w, scheme, dtype, options.search, problem.moment.diagonal())
    aimed = Problem(_qronos_weights(problem, shift), problem.moment, problem.order, problem.factor, problem.damping)
    q = round_columns(aimed, scale, zero, scheme, options.block, columns.round_panel)
    divisor = divisor_of(problem.w, scheme.format, options.search is not None)
    return Solution(q, scale, zero, decode(q, scale, zero, scheme), problem.damping, divisor)


def _qronos_weights(problem: Problem, shift: Tensor) -> Tensor:
    """The weights [N, K] on which plain GPTQ is Qronos; in float64, as H is nearly singular."""
    w, order, factor = problem.w.double(), problem.order, problem.factor.double()
    moment = problem.moment.double()[order][:, order]
    moment.diagonal().add_(problem.damping * moment.diagonal().mean())
    w = w[:, order]
    cross = w @ (moment + shift.double()[order][:, order])  # C [N, K]
    full = cross @ factor.T @ factor  # W* = C H^-1
    first = (cross[:, 0] - w[:, 1:] @ moment[1:, 0]) / moment[0, 0]  # v [N]
    answer = factor[0] / factor[0, 0]  # H^-1_1,j / H^-1_11, with 1 at j = 1
    aimed = torch.empty_like(w)
    aimed[:, order] = full + torch.outer(first - full[:, 0], answer)
    return aimed.float()
