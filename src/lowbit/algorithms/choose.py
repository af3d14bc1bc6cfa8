"""Choose among candidates: every row of a layer takes the solution that does best on tokens no candidate has seen.

With the wanted output t of algorithms/correction.py and moments of held-out tokens, the distance to t of a row w^ is

    E|t - w^ x~|^2 = w^ H w^T - 2 w^ T^T + const,     T = E[t x~^T] = W (H + E[(x - x~) x~^T]) + E[(r - r~) x~^T]

so candidates are compared without another forward. Rows are independent, so each may choose for itself. What was chosen
is then solved once more on all tokens, those that judged among them.
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
    """What a layer saw: moment [K, K] = E[x~ x~^T], shift [K, K] = E[(x - x~) x~^T], and E[(r - r~) x~^T] [N, K]."""

    moment: Tensor
    shift: Tensor
    residual: Tensor | None = None

    def joined(self, other: "Moments", share: float) -> "Moments":
        """Those of both one's tokens, of which `share` are this one's."""
        residual = None
        if self.residual is not None and other.residual is not None:
            residual = torch.lerp(other.residual, self.residual, share)
        moment, shift = torch.lerp(other.moment, self.moment, share), torch.lerp(other.shift, self.shift, share)
        return Moments(moment, shift, residual)

    def aim(self, w: Tensor, options: Correction) -> Tensor:
        """The weights [N, K] to round in place of w."""
        cross = w.float() @ self.shift
        if self.residual is not None:
            cross = cross + options.residual * self.residual
        return corrected(w, self.moment, cross, options)


def distance_to_wanted(dequantized: Tensor, w: Tensor, held_out: Moments) -> Tensor:
    """E|t - w^ x~|^2 of each row up to a constant: float32 [N]."""
    wanted = w @ (held_out.moment + held_out.shift)
    if held_out.residual is not None:
        wanted = wanted + held_out.residual
    return ((dequantized @ held_out.moment - 2 * wanted) * dequantized).sum(-1)


Candidate = tuple[GptqOptions, Correction]


def choose_rows(
    w: Tensor,
    seen: Moments,
    held_out: Moments,
    scheme: TensorScheme,
    dtype: torch.dtype,
    candidates: Sequence[Candidate],
    columns: Columns = PLAIN,
) -> Tensor:
    """For each row of w [N, K] the number of the candidate that, solved on `seen`, is closest to t on `held_out`.

    int64 [N]. The first candidate is kept where no other is better. Under one scale per tensor all rows choose alike.
    """
    distances = []
    for gptq, correction in candidates:
        found = solve_gptq(seen.aim(w, correction), seen.moment, scheme, dtype, gptq, columns)
        distance = distance_to_wanted(found.dequantized, w.float(), held_out)
        distances.append(distance.sum().expand_as(distance) if scheme.granularity == "tensor" else distance)
    return torch.stack(distances).argmin(0)


def solve_chosen(
    w: Tensor,
    moments: Moments,
    choice: Tensor,
    scheme: TensorScheme,
    dtype: torch.dtype,
    candidates: Sequence[Candidate],
    columns: Columns = PLAIN,
) -> Solution:
    """The rows of w [N, K], each solved by the candidate of its number in choice [N]."""
    best: Solution | None = None
    for number in choice.unique().tolist():
        gptq, correction = candidates[number]
        found = solve_gptq(moments.aim(w, correction), moments.moment, scheme, dtype, gptq, columns)
        best = found if best is None else _rows_of(found, best, choice == number)
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
