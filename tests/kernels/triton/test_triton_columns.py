"""The solvers' column loops in Triton; the oracle is the plain torch of algorithms/columns.py.

Without a GPU Triton's interpreter runs them. E2M1 levels are rounded by other arithmetic in the kernel than in torch.
"""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from lowbit.algorithms import columns as plain
from lowbit.kernels.triton import columns
from lowbit.numerics.formats import NVFP4, NumberFormat, int_format

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("limits", [int_format(4), NVFP4], ids=str)
def test_rounding_and_descent_are_those_of_plain_torch(limits: NumberFormat) -> None:
    count, rows = 6, 5
    panel, corner = 3 * _random(count, rows, seed=0), (0.2 * _random(count, count, seed=1)).triu(1)
    corner += torch.eye(count, device=DEVICE)
    steps = _random(count, rows, seed=2).abs() + 0.5
    shifts = torch.zeros_like(steps) if limits.kind == "float" else _random(count, rows, seed=3).round()
    wanted = plain.round_panel(panel, corner, steps, shifts, limits)
    found = columns.round_panel(panel, corner, steps, shifts, limits)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    moment = corner.T @ corner
    wanted = plain.descend_panel(panel, moment, wanted[0], steps, limits)
    found = columns.descend_panel(panel, moment, found[0], steps, limits)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
