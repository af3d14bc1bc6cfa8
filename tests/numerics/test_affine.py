"""The oracles are the equations in the docstring of numerics/affine.py, in float64, and the bounds that follow."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit.numerics.affine import (
    choose_scale,
    decode,
    encode,
    group_view,
    per_element,
    quantize_dequantize,
    value_range,
)
from lowbit.numerics.formats import FP8_E4M3, INT_BITS, int_format
from lowbit.numerics.scheme import Granularity, TensorScheme

few = settings(max_examples=50, deadline=None, derandomize=True)
N, K, G = 6, 48, 16
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "channel", "group", "token")
SCALE_SHAPES = {"tensor": (1,), "channel": (N, 1), "group": (N, K // G), "token": (N, 1)}


def scheme_of(bits: int, granularity: Granularity, symmetric: bool) -> TensorScheme:
    return TensorScheme(int_format(bits), granularity, symmetric, G if granularity == "group" else None)


schemes = st.builds(scheme_of, st.sampled_from(INT_BITS), st.sampled_from(GRANULARITIES), st.booleans())
all_schemes = pytest.mark.parametrize(
    "scheme",
    [scheme_of(*choice) for choice in product(INT_BITS, GRANULARITIES, (True, False))],
    ids=lambda scheme: f"{scheme.format}-{scheme.granularity}-{'sym' if scheme.symmetric else 'asym'}",
)


def random_weight(seed: int, spread: float = 3.0) -> Tensor:
    """[N, K] with rows of very different size and a common shift, so that neither side of zero is empty by rule."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (spread * (torch.rand(N, 1, generator=generator) - 0.5))
    return size * (torch.randn(N, K, generator=generator) + torch.randn(1, generator=generator))


def random_grid(scheme: TensorScheme, seed: int) -> tuple[Tensor, Tensor | None]:
    """(scale, zero) drawn at random, not from a tensor."""
    generator = torch.Generator().manual_seed(seed)
    shape, bound = SCALE_SHAPES[scheme.granularity], scheme.format
    scale = 10 ** (4 * torch.rand(shape, generator=generator) - 2)
    if scheme.symmetric:
        return scale, None
    return scale, torch.randint(int(bound.low), int(bound.high) + 1, shape, generator=generator, dtype=torch.int8)


@few
@given(scheme=schemes, seed=st.integers(0, 2**31))
def test_encode_gives_back_the_codes_that_were_decoded(scheme: TensorScheme, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = int(scheme.format.low), int(scheme.format.high)
    q = torch.randint(low, high + 1, (N, K), generator=generator, dtype=torch.int8)
    scale, zero = random_grid(scheme, seed)
    assert torch.equal(encode(decode(q, scale, zero, scheme), scale, zero, scheme), q)


@few
@given(scheme=schemes, seed=st.integers(0, 2**31))
def test_a_value_in_range_moves_by_at_most_half_a_step(scheme: TensorScheme, seed: int) -> None:
    """With float32 scales every value between minimum and maximum is in range: the grid's end is half a step off.

    Slack: x / scale, the addition of zero and the product of decode are rounded to 2^-24 of numbers of at most 256
    steps, 3 * 2^-16 steps together; 2^-14 covers it.
    """
    w = random_weight(seed)
    scale, zero = choose_scale(*value_range(w, scheme), scheme, torch.float32)
    moved = (decode(encode(w, scale, zero, scheme), scale, zero, scheme).double() - w.double()).abs()
    assert (moved <= (0.5 + 2**-14) * per_element(scale, scheme).double()).all()


@few
@given(scheme=schemes, seed=st.integers(0, 2**31))
def test_a_value_inside_any_grid_moves_by_at_most_half_a_step(scheme: TensorScheme, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale, zero = random_grid(scheme, seed)
    inside = scheme.format.low + torch.rand(N, K, generator=generator) * (scheme.format.high - scheme.format.low)
    w = decode(inside, scale, zero, scheme)
    moved = (decode(encode(w, scale, zero, scheme), scale, zero, scheme).double() - w.double()).abs()
    assert (moved <= (0.5 + 2**-14) * per_element(scale, scheme).double()).all()


@all_schemes
def test_scale_and_zero_follow_the_equations(scheme: TensorScheme) -> None:
    w = random_weight(seed=5, spread=1.0)
    scale, zero = choose_scale(*value_range(w, scheme), scheme, torch.float32)
    assert scale.shape == SCALE_SHAPES[scheme.granularity]
    grouped = group_view(w, scheme).double()
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    steps = 2**scheme.bits - 1
    if scheme.symmetric:
        assert zero is None
        torch.testing.assert_close(scale.double(), 2 * torch.maximum(-low, high) / steps, rtol=2**-23, atol=0)
    else:
        assert zero is not None
        assert zero.shape == scale.shape
        torch.testing.assert_close(scale.double(), (high - low) / steps, rtol=2**-22, atol=0)
        assert torch.equal(zero.double(), (scheme.format.low - low / scale.double()).round())


@all_schemes
def test_zeros_stay_zero_and_every_scale_is_positive(scheme: TensorScheme) -> None:
    w = torch.zeros(N, K)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scale, _ = choose_scale(*value_range(w, scheme), scheme, dtype)
        assert scale.dtype == dtype
        assert (scale > 0).all()
        assert torch.equal(quantize_dequantize(w, scheme, dtype), w)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_zero_is_on_the_grid_when_all_weights_have_one_sign(symmetric: bool) -> None:
    scheme = scheme_of(4, "channel", symmetric)
    w = random_weight(seed=1).abs() + 1
    w[:, 0] = 0
    assert (quantize_dequantize(w, scheme)[:, 0] == 0).all()
    assert (quantize_dequantize(-w, scheme)[:, 0] == 0).all()


def test_halves_are_rounded_to_even_codes() -> None:
    scheme = scheme_of(8, "tensor", True)
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert encode(x, torch.ones(1), None, scheme).tolist() == [0, 2, 2, 0, -2, -2]


def test_values_out_of_range_saturate() -> None:
    x = torch.tensor([[-100.0, 100.0]])
    assert encode(x, torch.ones(1), None, scheme_of(4, "tensor", True)).tolist() == [[-8, 7]]
    fp8 = TensorScheme(FP8_E4M3, "tensor")
    assert encode(10 * x, torch.ones(1), None, fp8).tolist() == [[-448, 448]]


def test_a_negative_scale_gives_the_longer_side_to_positive_values() -> None:
    scheme = scheme_of(4, "tensor", True)
    x = torch.tensor([8.0, -7.0])
    assert decode(encode(x, -torch.ones(1), None, scheme), -torch.ones(1), None, scheme).tolist() == [8, -7]


def test_a_bfloat16_scale_is_the_float32_one_rounded_once() -> None:
    scheme = scheme_of(4, "group", False)
    bounds = value_range(random_weight(seed=2), scheme)
    exact, _ = choose_scale(*bounds, scheme, torch.float32)
    rounded, zero = choose_scale(*bounds, scheme, torch.bfloat16)
    assert torch.equal(rounded, exact.bfloat16())
    assert zero is not None
    assert zero.dtype == torch.int8


@few
@given(seed=st.integers(0, 2**31), granularity=st.sampled_from(["tensor", "channel", "token"]))
def test_fp8_keeps_four_bits_of_every_value(seed: int, granularity: Granularity) -> None:
    """e4m3 has 3 fraction bits: half a unit is 2^-4 of a normal number, 2^-10 of the scale below 2^-6.

    Slack: the division and the product of decode are rounded to 2^-24 of the value each; 2^-22 covers both.
    """
    scheme = TensorScheme(FP8_E4M3, granularity)
    w = random_weight(seed)
    scale, zero = choose_scale(*value_range(w, scheme), scheme, torch.float32)
    assert zero is None
    moved = (decode(encode(w, scale, None, scheme), scale, None, scheme).double() - w.double()).abs()
    bound = torch.maximum((2**-4 + 2**-22) * w.double().abs(), 2**-10 * scale.double())
    assert (moved <= bound).all()


def test_every_finite_fp8_code_survives_a_round_trip() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[codes.float().isfinite()].view(1, -1)
    scheme = TensorScheme(FP8_E4M3, "channel")
    for size in (0.37, 1.0, 91.3):
        scale = torch.full((1, 1), size)
        again = encode(decode(codes, scale, None, scheme), scale, None, scheme)
        assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
