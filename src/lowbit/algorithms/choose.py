"""Choose among candidates: every row of a layer takes the solution that does best on tokens no candidate has seen.

With the wanted output t of algorithms/correction.py and moments of held-out tokens, the distance to t of a row w^ is

    E|t - w^ x~|^2 = w^ H w^T - 2 w^ T^T + const,     T = E[t x~^T] = W (H + E[(x - x~) x~^T]) + E[(r - r~) x~^T]

so candidates are compared without another forward. Rows are independent, so each may choose for itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.algorithms.columns import PLAIN, Columns
from lowbit.algorithms.correction import Correction, corrected
from lowbit.algorithms.gptq import GptqOptions, solve_gptq
from lowbit.algorithms.solution import Solution
from lowbit.numerics.affine import where_codes
from lowbit.numerics.scheme import TensorScheme


@dataclass(frozen=True)
class Moments:
    """What a layer saw: moment [K, K] = E[x~ x~^T], shift [K, K] = E[(x - x~) x~^T], residual [N, K] or None."""

    moment: Tensor
    shift: Tensor
    residual: Tensor | None = None

    def aim(self, w: Tensor, options: Correction) -> Tensor:
        """The weights [N, K] to round in place of w."""
        return corrected(w, self.moment, self.shift, self.residual, options)


def distance_to_wanted(dequantized: Tensor, w: Tensor, held_out: Moments) -> Tensor:
    """E|t - w^ x~|^2 of each row up to a constant: float32 [N]."""
    wanted = w @ (held_out.moment + held_out.shift)
    if held_out.residual is not None:
        wanted = wanted + held_out.residual
    return ((dequantized @ held_out.moment - 2 * wanted) * dequantized).sum(-1)


def solve_best(
    w: Tensor,
    seen: Moments,
    held_out: Moments,
    scheme: TensorScheme,
    dtype: torch.dtype,
    candidates: Sequence[tuple[GptqOptions, Correction]],
    columns: Columns = PLAIN,
) -> Solution:
    """The rows of w [N, K] solved by each candidate on `seen`, and of each the one closest to t on `held_out`.

    The first candidate is kept where no other is better. Under one scale per tensor all rows choose together.
    """
    best: Solution | None = None
    lowest = torch.empty(0)
    for gptq, correction in candidates:
        found = solve_gptq(seen.aim(w, correction), seen.moment, scheme, dtype, gptq, columns)
        distance = distance_to_wanted(found.dequantized, w.float(), held_out)
        if scheme.granularity == "tensor":
            distance = distance.sum().expand_as(distance)
        if best is None:
            best, lowest = found, distance
        else:
            best = _rows_of(found, best, distance < lowest)
            lowest = torch.minimum(lowest, distance)
    assert best is not None
    return best


def _rows_of(better: Solution, other: Solution, chosen: Tensor) -> Solution:
    """`better` in the rows where chosen [N] is true, else `other`."""
    rows = chosen[:, None]

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(chosen[0] if a.dim() == 1 else rows, a, b)

    zero = None if better.zero is None or other.zero is None else pick(better.zero, other.zero)
    damping = max(better.damping or 0.0, other.damping or 0.0)
    divisors = [part.global_scale for part in (better, other) if part.global_scale is not None]
    return Solution(
        where_codes(rows, better.q, other.q),
        pick(better.scale, other.scale),
        zero,
        pick(better.dequantized, other.dequantized),
        damping,
        torch.stack(divisors).amin(0) if divisors else None,  # powers of two: all scales stand under the smaller one
    )
