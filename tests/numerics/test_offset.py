"""Grids with a float offset. Oracle: min/max grids in plain arithmetic, and exhaustive search over shrinks."""

import pytest
import torch

from lowbit.numerics.offset import choose_offset, decode_offset, encode_offset

X = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))


def _error(x: torch.Tensor, bits: int, scale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    q = ((x - low.float()[..., None]) / scale.float()[..., None]).round().clamp(0, 2**bits - 1)
    return (q * scale.float()[..., None] + low.float()[..., None] - x).square().sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("offset", [0.0, 100.0, -7.0])
def test_no_group_is_worse_than_under_its_smallest_and_largest_value(bits: int, offset: float) -> None:
    x = X + offset
    scale, low = choose_offset(x, bits)
    plain_low = x.amin(-1).half()
    plain_scale = ((x.amax(-1) - x.amin(-1)) / (2**bits - 1)).half()
    found = (decode_offset(encode_offset(x, scale, low, bits), scale, low, bits) - x).square().sum(-1)
    slack = 1e-4 * (1 + abs(offset))  # float16 scales and offsets, codes at ties
    assert (found <= _error(x, bits, plain_scale, plain_low) * (1 + 1e-3) + slack).all()


def test_two_bits_come_near_an_exhaustive_search() -> None:
    scale, low = choose_offset(X, 2)
    found = (decode_offset(encode_offset(X, scale, low, 2), scale, low, 2) - X).square().sum()
    best = torch.full((len(X),), torch.inf)
    middle, width = (X.amax(-1) + X.amin(-1)) / 2, X.amax(-1) - X.amin(-1)
    for shrink in (1 - step / 20 for step in range(12)):
        best = best.minimum(_error(X, 2, width * shrink / 3, middle - width * shrink / 2))
    assert found < best.sum()


def test_a_constant_group_comes_back_at_least_as_float16_holds_it() -> None:
    x = torch.tensor([[3.14159] * 32, [0.0] * 32, [-200.0] * 32])
    scale, low = choose_offset(x, 2)
    assert scale.dtype == low.dtype == torch.float16
    error = (decode_offset(encode_offset(x, scale, low, 2), scale, low, 2) - x).abs()
    assert (error <= (x.half().float() - x).abs()).all()


def test_a_range_beyond_float16_shows_as_infinite() -> None:
    scale, low = choose_offset(torch.tensor([[-1e6, 0.0]]), 4)
    assert not (scale.isfinite() & low.isfinite()).all()
