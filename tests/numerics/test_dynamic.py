"""Activations rounded at run time. Oracles: every candidate computed here again; known ratios of signal to noise."""

import math

import pytest
import torch

from lowbit.numerics import microscale
from lowbit.numerics.affine import round_to
from lowbit.numerics.dynamic import SHRINKS, round_activations
from lowbit.numerics.formats import NVFP4
from lowbit.numerics.scheme import QuantScheme, TensorScheme


def _activations(text: str) -> TensorScheme:
    scheme = QuantScheme.parse(text).activations
    assert scheme is not None
    return scheme


def _noise_db(x: torch.Tensor, text: str) -> float:
    error = round_activations(x, _activations(text)) - x
    return -10 * math.log10(float(error.square().mean() / x.square().mean()))


@pytest.mark.parametrize("text", ["w4a4", "w4a4-dynamic-asym", "nvfp4", "mxfp4"])
def test_a_search_never_loses_more_in_any_token(text: str) -> None:
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(0)) ** 3
    plain, searched = (round_activations(x, _activations(t)) - x for t in (text, f"{text}-search"))
    assert bool((searched.square().sum(-1) <= plain.square().sum(-1) * (1 + 1e-6)).all())
    assert searched.square().sum() < plain.square().sum()


def test_a_token_takes_the_best_of_the_shrunk_ranges() -> None:
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1)) ** 3
    steps = x.abs().amax(-1, keepdim=True) / 7.5
    trips = [(x / (p * steps)).round().clamp(-8, 7) * (p * steps) for p in SHRINKS]
    least = torch.stack([(trip - x).square().sum(-1) for trip in trips]).amin(0)
    found = (round_activations(x, _activations("w4a4-search")) - x).square().sum(-1)
    torch.testing.assert_close(found, least)


def test_normal_values_lose_what_four_over_six_is_known_to_lose() -> None:
    """20.4 and 21.2 dB: E2M1 under e4m3 scales of 16 normal values, and the better of two scales."""
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    assert _noise_db(x, "nvfp4") == pytest.approx(20.4, abs=0.1)
    assert _noise_db(x, "nvfp4-search") == pytest.approx(21.2, abs=0.1)
    assert _noise_db(x, "mxfp4-search") == pytest.approx(19.04, abs=0.1)


def test_levels_by_arithmetic_are_those_of_the_table() -> None:
    x = torch.linspace(-7, 7, 29 * 8 + 1)  # ties among them
    levels = microscale.nearest_levels(x)
    assert torch.equal(levels, microscale.levels_of_codes(microscale.round_to_levels(x)))
    codes = microscale.codes_of_levels(round_to(x, NVFP4))
    assert torch.equal(microscale.levels_of_codes(codes), levels)
