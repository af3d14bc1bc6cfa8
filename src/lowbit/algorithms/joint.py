"""Descend with the outputs weighed against each other: what the model loses is not the sum of what its rows lose.

To second order KL(original || quantized) is E[(g . E x)^2], E = w^ - w the layer's error and g the gradient of the
log-likelihood of a token that the original model would say, with respect to the layer's output. With the gradients'
moment taken apart from the inputs' (K-FAC, arXiv:1503.05671; for rounding: YAQA, arXiv:2505.22988)

    f = tr(G E H E^T),    H [K, K] = E[x x^T],    G [N, N] = E[g g^T]

Rows are no longer independent. A part of the rows descends at a time, each on the gradient (G E H)_n / G_nn as if it
were alone, over one panel of columns; then all rows hear of it. A panel whose f would rise is not taken, so f never
rises. The same for scales: those of a part of the rows are refitted to w_n - sum_{m != n} G_nm E_m / G_nn.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.algorithms.columns import PANEL, Columns
from lowbit.algorithms.polish import refit_scale
from lowbit.numerics.affine import per_column
from lowbit.numerics.scheme import TensorScheme

FEWEST = 8  # rows at a time: fewer take longer and gain little


@dataclass(frozen=True)
class Joint:
    """passes over all rows, at most `rows` at a time, drawn anew each pass; shrink: the share of G's diagonal in it.

    Rows that descend together overshoot where G has few directions, so no more go together than it has of them.
    """

    passes: int = 2
    rows: int = 64
    shrink: float = 0.1
    seed: int = 0


@dataclass
class _State:
    """A layer in the order in which its columns are taken: target, codes [K, N]; moment [K, K]; weigh = G [N, N]."""

    target: Tensor
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: TensorScheme
    order: Tensor
    moment: Tensor
    weigh: Tensor

    def grids(self, rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(steps, zero-points) of some rows under their `scale`, [K, n] both."""
        shape = len(rows), len(self.order)
        steps = per_column(scale, self.scheme, shape)[self.order]
        if self.zero is None:
            return steps, torch.zeros_like(steps)
        return steps, per_column(self.zero[rows], self.scheme, shape)[self.order]

    def error(self, rows: Tensor, scale: Tensor) -> Tensor:
        """w^ - w of some rows under their `scale`, [K, n]."""
        steps, shifts = self.grids(rows, scale)
        return (self.codes[:, rows] - shifts) * steps - self.target[:, rows]


def descend_jointly(
    w: Tensor,
    moment: Tensor,
    outputs: Tensor,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scheme: TensorScheme,
    order: Tensor,
    columns: Columns,
    options: Joint,
) -> tuple[Tensor, Tensor]:
    """(q, scale) with an f at most that of the ones given; outputs = G [N, N]; the rest as in polish.py."""
    if scheme.granularity == "tensor":
        return q, scale  # one scale: rows can't be taken in parts
    weigh = outputs.float() / outputs.float().diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    weigh = weigh * (1 - options.shrink) + torch.diag(weigh.diagonal() * options.shrink + 1e-4)
    state = _State(
        w.T[order], q.T[order].float(), scale.clone(), zero, scheme, order, moment[order][:, order], weigh
    )  # fmt: skip
    error = state.error(torch.arange(len(w), device=w.device), scale)  # [K, N]
    together = max(min(options.rows, int(_directions(weigh))), FEWEST)
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.passes):
        for rows in torch.randperm(len(w), generator=generator).to(w.device).split(together):
            state.scale[rows] = _refitted(state, rows, error)
            error[:, rows] = state.error(rows, state.scale[rows])
            _descend(state, rows, error, columns)
            error[:, rows] = state.error(rows, state.scale[rows])
    natural = torch.empty_like(q.T)
    natural[order] = state.codes.to(torch.int8)
    return natural.T.contiguous(), state.scale


def _directions(weigh: Tensor) -> float:
    """How many directions G has: (sum of eigenvalues)^2 / sum of their squares."""
    return (weigh.diagonal().sum() ** 2 / weigh.square().sum()).item()


def _descend(state: _State, rows: Tensor, error: Tensor, columns: Columns) -> None:
    """Better codes for some rows, panel by panel."""
    steps, _ = state.grids(rows, state.scale[rows])
    inner = state.weigh[rows][:, rows]
    gradient = state.moment @ (error @ state.weigh[:, rows])  # [K, n], of these rows
    for start in range(0, len(state.order), PANEL):
        part = slice(start, min(start + PANEL, len(state.order)))
        codes, corner = state.codes[part][:, rows], state.moment[part, part]
        slope = gradient[part] / inner.diagonal()
        found, moved = columns.descend_panel(slope, corner, codes, steps[part], state.scheme.format)
        spread = moved @ inner
        falls = 2 * (moved * gradient[part]).sum() + ((corner @ moved) * spread).sum() < 0
        state.codes[part, rows] = torch.where(falls, found, codes)
        gradient.addmm_(state.moment[:, part], spread * falls)


def _refitted(state: _State, rows: Tensor, error: Tensor) -> Tensor:
    """Scales of some rows fitted to what the other rows leave them; as they were where f would rise."""
    inner, scale = state.weigh[rows][:, rows], state.scale[rows]
    mixed = error @ state.weigh[:, rows]  # [K, n]
    aim = state.target[:, rows] - mixed / inner.diagonal() + error[:, rows]
    natural = state.order.argsort()
    fitted = refit_scale(
        aim[natural].T.contiguous(), state.moment[natural][:, natural],
        state.codes[:, rows][natural].T.to(torch.int8), scale,
        None if state.zero is None else state.zero[rows], state.scheme,
    )  # fmt: skip
    moved = state.error(rows, fitted) - error[:, rows]
    slope = (state.moment @ mixed * moved).sum()
    falls = 2 * slope + ((state.moment @ moved) * (moved @ inner)).sum() < 0
    return torch.where(falls, fitted, scale)
