"""Hadamard rotations. Oracle: the definition, H H^T = n I with entries of +1 and -1, and the dense product."""

import pytest
import torch

from lowbit.errors import SchemeError
from lowbit.numerics.hadamard import Hadamard, factors, hadamard_matrix, largest_block, signs_of

F64 = torch.float64


@pytest.mark.parametrize("n", [1, 2, 64, 12, 20, 28, 36, 44, 60, 76, 108])
def test_rows_of_a_hadamard_matrix_are_orthogonal_signs(n: int) -> None:
    h = hadamard_matrix(n)
    assert set(h.flatten().tolist()) <= {1.0, -1.0}
    assert torch.equal(h @ h.T, n * torch.eye(n))


@pytest.mark.parametrize(
    ("n", "found"), [(64, (1, 64)), (576, (36, 16)), (1536, (12, 128)), (11008, None), (14336, (28, 512)), (52, None)]
)
def test_sizes_are_taken_apart(n: int, found: tuple[int, int] | None) -> None:
    assert factors(n) == found


@pytest.mark.parametrize("text", ["hadamard-576-s0", "hadamard-1536-s3", "hadamard-96-b32-s1", "hadamard-52-b4-s0"])
def test_a_rotation_is_orthogonal_and_is_undone(text: str) -> None:
    rotation = Hadamard.parse(text)
    assert str(rotation) == text
    matrix = rotation.apply(torch.eye(rotation.size, dtype=F64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(rotation.size, dtype=F64))
    x = torch.randn(2, 3, rotation.size, dtype=F64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation.apply(x), x @ matrix)
    torch.testing.assert_close(rotation.undo(rotation.apply(x)), x)


def test_one_large_value_is_spread_over_its_block_alone() -> None:
    x = torch.zeros(96)
    x[40] = 32.0
    y = Hadamard.of(96, block=32).apply(x)
    assert torch.allclose(y[32:64].abs(), torch.full((32,), 32**0.5))
    assert not y[:32].any()
    assert not y[64:].any()


def test_seeds_give_other_signs_that_never_change() -> None:
    # splitmix64 of seed 0 begins with 0xe220a8397b1dcdaf, taken from its low bits on
    assert signs_of(8, 0).tolist() == [-1, -1, -1, -1, 1, -1, 1, -1]
    assert not torch.equal(signs_of(64, 0), signs_of(64, 1))


def test_sizes_without_a_matrix_are_refused_with_the_blocks_that_work() -> None:
    assert largest_block(11008) == 256
    with pytest.raises(
        SchemeError, match="no Hadamard rotation of 11008 columns in blocks of 11008; use blocks of 256"
    ):
        Hadamard(11008, 11008)
    with pytest.raises(SchemeError, match="written hadamard-1536-s0"):
        Hadamard.parse("hadamard-0-s0")
