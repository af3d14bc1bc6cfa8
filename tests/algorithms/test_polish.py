"""Polish. Oracles: least squares by torch.linalg.lstsq for the scales; trying every code for the descent."""

import pytest
import torch
from torch import Tensor

from lowbit.algorithms.columns import PLAIN
from lowbit.algorithms.gptq import GptqOptions, solve_gptq
from lowbit.algorithms.polish import descend, polish, refit_scale, row_errors
from lowbit.algorithms.rtn import solve_rtn
from lowbit.numerics.affine import decode
from lowbit.numerics.scheme import QuantScheme, TensorScheme

SCHEMES = ["w4a16-g16", "w4a16-g16-asym", "w3a16", "w4a16-tensor", "w2a16-g32-asym"]
by_scheme = pytest.mark.parametrize("text", SCHEMES)


def _problem(text: str) -> tuple[Tensor, Tensor, TensorScheme]:
    """(w [12, 64], E[x x^T], scheme) with correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 64, generator=generator) * torch.logspace(-1, 1, 64)
    x = torch.randn(300, 64, generator=generator) @ mixing
    return torch.randn(12, 64, generator=generator), x.T @ x / 300, QuantScheme.parse(text).weights


@by_scheme
def test_refitted_scales_are_the_least_squares_solution(text: str) -> None:
    w, moment, scheme = _problem(text)
    start = solve_rtn(w, scheme, torch.float32)
    fitted = refit_scale(w, moment, start.q, start.scale, start.zero, scheme)
    root = torch.linalg.cholesky(moment.double())  # H = L L^T, so f = |(w^ - w) L|^2
    u = decode(start.q, torch.ones_like(start.scale), start.zero, scheme).double()
    if scheme.granularity == "tensor":
        expected = torch.linalg.lstsq((u @ root).reshape(-1, 1), (w.double() @ root).reshape(-1, 1)).solution
    else:
        groups = start.scale.shape[1]
        parts = u.view(12, groups, -1)
        rows = []
        for n in range(12):
            basis = torch.block_diag(*parts[n].split(1)) @ root  # [K/G, K]
            rows.append(torch.linalg.lstsq(basis.T, (w[n].double() @ root)[:, None]).solution[:, 0])
        expected = torch.stack(rows)
    kept = fitted == start.scale
    assert torch.allclose(fitted.double()[~kept], expected.view_as(fitted)[~kept], rtol=1e-3)
    assert kept.float().mean() < 0.2


@by_scheme
def test_no_row_becomes_worse_and_most_improve(text: str) -> None:
    w, moment, scheme = _problem(text)
    start = solve_gptq(w, moment, scheme, torch.bfloat16)
    better = solve_gptq(w, moment, scheme, torch.bfloat16, GptqOptions(polish=3))
    before, after = (row_errors(found.dequantized - w, moment) for found in (start, better))
    if scheme.granularity == "tensor":
        assert after.sum() <= before.sum()
    else:
        assert (after <= before).all()
        assert (after < before).float().mean() > 0.5


@by_scheme
def test_what_descent_leaves_cannot_be_improved_by_changing_one_code_of_the_last_column(text: str) -> None:
    w, moment, scheme = _problem(text)
    start = solve_rtn(w, scheme, torch.float32)
    order = torch.arange(64).flip(0)
    q = descend(w, moment, start.q, start.scale, start.zero, scheme, order, PLAIN)
    errors = []
    for code in range(int(scheme.format.low), int(scheme.format.high) + 1):
        other = q.clone()
        other[:, 0] = code  # the column that was decided last
        errors.append(row_errors(decode(other, start.scale, start.zero, scheme) - w, moment))
    best = torch.stack(errors).amin(0)
    now = row_errors(decode(q, start.scale, start.zero, scheme) - w, moment)
    assert torch.allclose(now, best, rtol=1e-4)


def test_a_group_of_zeros_keeps_its_scale() -> None:
    w, moment, scheme = _problem("w4a16-g16")
    w[:, :16] = 0
    start = solve_rtn(w, scheme, torch.float32)
    fitted = refit_scale(w, moment, start.q, start.scale, start.zero, scheme)
    assert torch.equal(fitted[:, 0], start.scale[:, 0])
    assert fitted.isfinite().all()


def test_polish_leaves_its_inputs_as_they_were() -> None:
    w, moment, scheme = _problem("w4a16-g16-asym")
    start = solve_rtn(w, scheme, torch.float32)
    kept = [tensor.clone() for tensor in (w, moment, start.q, start.scale)]
    polish(w, moment, start.q, start.scale, start.zero, scheme, torch.arange(64), 2, PLAIN)
    assert all(torch.equal(a, b) for a, b in zip(kept, (w, moment, start.q, start.scale), strict=True))
