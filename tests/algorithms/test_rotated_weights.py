"""Rotating weights. Oracle: the dense product with the rotation's matrix; the sums that a deal of channels gives."""

import torch

from lowbit.algorithms.rotate import balanced_order, rotate_columns, rotate_rows
from lowbit.numerics.hadamard import Hadamard


def test_columns_and_rows_turn_in_parts_of_the_size() -> None:
    turn = Hadamard.of(12, seed=1)
    matrix = torch.block_diag(*[turn.apply(torch.eye(12, dtype=torch.float64))] * 2)
    w = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate_columns(w, turn), w @ matrix)
    torch.testing.assert_close(rotate_rows(w.T, turn), matrix.T @ w.T)
    torch.testing.assert_close(rotate_rows(w[0], turn), w[0] @ matrix)


def test_a_deal_of_channels_levels_the_blocks() -> None:
    mass = torch.tensor([100.0, 90.0, 80.0, 70.0, 1.0, 1.0, 1.0, 1.0])
    order = balanced_order(mass, 2)
    assert sorted(order.tolist()) == list(range(8))
    assert mass[order].view(4, 2).sum(1).tolist() == [101.0, 91.0, 81.0, 71.0]
