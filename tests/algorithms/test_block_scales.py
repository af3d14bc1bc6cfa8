"""Solvers on nvfp4 and mxfp4. Oracles: PackedWeight.from_float for the plain rule, decoded codes, and output errors."""

import pytest
import torch
from torch import Tensor

from lowbit.algorithms.gptq import GptqOptions, solve_gptq
from lowbit.algorithms.rtn import solve_rtn
from lowbit.algorithms.scales import ScaleSearch
from lowbit.algorithms.solution import Solution
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

SCHEMES = [QuantScheme.parse("nvfp4a16"), QuantScheme.parse("mxfp4a16")]


def _layer() -> tuple[Tensor, Tensor]:
    """Weights [24, 96] of rows of different size, and inputs [500, 96] that depend on each other."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(24, 96, generator=generator) * 10 ** torch.rand(24, 1, generator=generator)
    x = torch.randn(500, 96, generator=generator) @ torch.randn(96, 96, generator=generator) / 10
    return w, x


def _packed(solution: Solution, scheme: QuantScheme) -> PackedWeight:
    return PackedWeight.from_codes(solution.q, solution.scale, solution.zero, scheme, solution.global_scale)


def _loss(w: Tensor, found: Tensor, x: Tensor) -> float:
    return float((x @ (found - w).T).square().sum())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_without_a_search_the_format_rule_decides(scheme: QuantScheme) -> None:
    w, _ = _layer()
    ours = _packed(solve_rtn(w, scheme.weights, torch.bfloat16), scheme)
    theirs = PackedWeight.from_float(w, scheme, torch.bfloat16)
    assert isinstance(ours.scale, Tensor)
    assert isinstance(theirs.scale, Tensor)
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.scale.view(torch.uint8), theirs.scale.view(torch.uint8))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_each_solver_loses_less_than_the_one_before_and_packs_exactly(scheme: QuantScheme) -> None:
    w, x = _layer()
    moment = x.T @ x / len(x)
    solutions = [
        solve_rtn(w, scheme.weights, torch.bfloat16),
        solve_rtn(w, scheme.weights, torch.bfloat16, ScaleSearch(), moment.diagonal()),
        solve_gptq(w, moment, scheme.weights, torch.bfloat16),
        solve_gptq(w, moment, scheme.weights, torch.bfloat16, GptqOptions(polish=2)),
    ]
    losses = [_loss(w, solution.dequantized, x) for solution in solutions]
    assert losses[1] <= 1.001 * losses[0]  # mxfp4 has hardly a choice of scales
    assert losses[1:] == sorted(losses[1:], reverse=True)
    assert losses[-1] < 0.6 * losses[0]
    for solution in solutions:
        assert torch.equal(_packed(solution, scheme).dequantize(), solution.dequantized)
