"""Descent with rows weighed against each other. Oracle: f = tr(G E H E^T), written out."""

import pytest
import torch
from torch import Tensor

from lowbit.algorithms.columns import PLAIN
from lowbit.algorithms.gptq import GptqOptions, solve_gptq
from lowbit.algorithms.joint import Joint, descend_jointly
from lowbit.algorithms.solution import Solution
from lowbit.numerics.affine import decode
from lowbit.numerics.scheme import QuantScheme


def _moment(size: int, seed: int, shared: float = 2.0) -> Tensor:
    x = torch.randn(4 * size, size, generator=torch.Generator().manual_seed(seed))
    x = x + shared * x[:, :1]  # channels that go together
    return x.T @ x / len(x)


def _f(w: Tensor, found: Solution, moment: Tensor, outputs: Tensor) -> float:
    error = found.dequantized - w
    return torch.trace(outputs @ error @ moment @ error.T).item()


@pytest.mark.parametrize("text", ["w3a16-g32-asym", "w4a16-g32", "w3a16"])
def test_the_loss_of_coupled_rows_falls_where_independent_rows_had_settled(text: str) -> None:
    scheme = QuantScheme.parse(text).weights
    w = torch.randn(48, 192, generator=torch.Generator().manual_seed(0))
    moment, outputs = _moment(192, 1), _moment(48, 2, 0.5)
    options = GptqOptions(polish=3)
    alone = solve_gptq(w, moment, scheme, torch.bfloat16, options)
    joint = solve_gptq(w, moment, scheme, torch.bfloat16, options, joint=(outputs, Joint(shrink=0.0)))
    assert _f(w, joint, moment, outputs) < 0.95 * _f(w, alone, moment, outputs)
    assert torch.equal(joint.dequantized, decode(joint.q, joint.scale, joint.zero, scheme))


def test_independent_rows_that_settled_stay_within_a_little() -> None:
    scheme = QuantScheme.parse("w3a16-g32-asym").weights
    w = torch.randn(48, 192, generator=torch.Generator().manual_seed(0))
    moment, order = _moment(192, 1), torch.arange(192)
    alone = solve_gptq(w, moment, scheme, torch.bfloat16, GptqOptions(polish=3))
    q, scale = descend_jointly(
        w, moment, torch.eye(48), alone.q, alone.scale, alone.zero, scheme, order, PLAIN, Joint()
    )  # fmt: skip
    found = Solution(q, scale, alone.zero, decode(q, scale, alone.zero, scheme))
    before, after = (_f(w, solution, moment, torch.eye(48)) for solution in (alone, found))
    assert 0.9 * before < after <= before * (1 + 1e-5)
