"""Half-quadratic quantization. Oracle: the published iteration (float zero-point, fixed scale) written out for one
group at a time; and plain rounding, which no group may lose to."""

import math

import pytest
import torch

from lowbit.algorithms.hqq import HalfQuadratic, mean_zero, shrink, solve_hqq
from lowbit.algorithms.rtn import solve_rtn
from lowbit.numerics.scheme import QuantScheme

OPTIONS = HalfQuadratic()


def _heavy(rows: int, columns: int) -> torch.Tensor:
    """Weights with the heavy tails that half-quadratic splitting is for."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, columns, generator=generator)
    return w * torch.where(torch.rand(rows, columns, generator=generator) < 0.03, 6.0, 1.0)


def test_shrink_is_the_proximal_step_element_by_element() -> None:
    x = torch.tensor([-2.0, -0.01, 0.0, 0.2, 3.0])
    wanted = [math.copysign(max(abs(v) - abs(v) ** (0.7 - 1) / 10.0, 0.0), v) if v else 0.0 for v in x.tolist()]
    assert torch.allclose(shrink(x, 10.0, 0.7), torch.tensor(wanted))


def test_the_zero_points_of_one_group_walk_as_the_published_iteration_does() -> None:
    w = _heavy(1, 64)[0].double().tolist()
    low, high = min(w), max(w)
    step = (high - low) / 15
    zero, beta = -low / step, OPTIONS.beta
    ours_zero = torch.tensor([zero], dtype=torch.float64)
    x, scale = torch.tensor([w], dtype=torch.float64), torch.tensor([step], dtype=torch.float64)
    for _ in range(5):
        codes = [min(max(round(v / step + zero), 0), 15) for v in w]
        errors = [v - (c - zero) * step for v, c in zip(w, codes, strict=True)]
        parts = [math.copysign(max(abs(e) - abs(e) ** (OPTIONS.p - 1) / beta, 0.0), e) if e else 0.0 for e in errors]
        zero = sum(c - (v - e) / step for v, c, e in zip(w, codes, parts, strict=True)) / len(w)
        q = (x / step + ours_zero[:, None]).round().clamp(0, 15)
        rest = x - shrink(x - (q - ours_zero[:, None]) * step, beta, OPTIONS.p)
        ours_zero = mean_zero(rest, q, scale)
        assert ours_zero.item() == pytest.approx(zero, rel=1e-9)
        beta *= OPTIONS.kappa


@pytest.mark.parametrize("text", ["w4a16-g32-asym", "w4a16-g32", "w3a16-g32-asym", "w4a16", "w2a16-g32-asym"])
def test_no_group_loses_to_rounding_and_the_whole_wins(text: str) -> None:
    w, scheme = _heavy(16, 128), QuantScheme.parse(text).weights
    found, plain = (solve(w, scheme, torch.bfloat16) for solve in (solve_hqq, solve_rtn))
    size = scheme.group_size or w.shape[1]

    def loss(solution) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return (w - solution.dequantized).abs().pow(OPTIONS.p).unflatten(1, (-1, size)).sum(-1)

    assert (loss(found) <= loss(plain) * (1 + 1e-5)).all()
    assert loss(found).sum() < 0.97 * loss(plain).sum()
    assert found.scale.dtype == torch.bfloat16
