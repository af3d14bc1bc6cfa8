"""The search for scales. Oracle: the weighted error of each returned scale, computed in float64 on its own, against
that of min/max scales and of every clip on a grid finer than the search's."""

import pytest
import torch
from torch import Tensor

from lowbit.algorithms.scales import ScaleSearch, search_scale
from lowbit.numerics.affine import choose_scale, decode, encode, group_view, value_range
from lowbit.numerics.scheme import QuantScheme, TensorScheme

SCHEMES = ["w4a16-g16", "w4a16-g16-asym", "w3a16", "w3a16-asym", "w8a16-asym", "w4a16-tensor", "w2a16-g32-asym"]
by_scheme = pytest.mark.parametrize("text", SCHEMES)
by_importance = pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])


def _scheme(text: str) -> TensorScheme:
    return QuantScheme.parse(text).weights


def _weights() -> Tensor:
    w = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    w[2, 5] = 9.0
    return w


def _importance(weighted: bool) -> Tensor | None:
    return torch.rand(64, generator=torch.Generator().manual_seed(1)) ** 2 * 10 if weighted else None


def _error(
    w: Tensor, scale: Tensor, zero: Tensor | None, scheme: TensorScheme, importance: Tensor | None, norm: float = 2.0
) -> Tensor:
    """The error of every group, float64, in the shape of the scale."""
    difference = (decode(encode(w, scale, zero, scheme), scale, zero, scheme).double() - w.double()).abs() ** norm
    if importance is not None:
        difference = difference * importance.double()
    return group_view(difference, scheme).sum(-1)


@by_scheme
@by_importance
@pytest.mark.parametrize("norm", [2.0, 2.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_never_above_that_of_min_and_max(text: str, weighted: bool, norm: float, dtype: torch.dtype) -> None:
    scheme, w, importance = _scheme(text), _weights(), _importance(weighted)
    found = _error(w, *search_scale(w, scheme, dtype, ScaleSearch(norm=norm), importance), scheme, importance, norm)
    plain = _error(w, *choose_scale(*value_range(w, scheme), scheme, dtype), scheme, importance, norm)
    assert (found <= plain * (1 + 1e-5)).all()  # float32 sums of up to 640 terms in the search
    if scheme.bits < 8:
        assert found.sum() < plain.sum()


@by_scheme
@by_importance
def test_error_is_near_that_of_the_best_clip(text: str, weighted: bool) -> None:
    scheme, w, importance = _scheme(text), _weights(), _importance(weighted)
    found = _error(w, *search_scale(w, scheme, torch.float32, ScaleSearch(), importance), scheme, importance)
    low, high = value_range(w, scheme)
    clips = torch.linspace(0.5, 1, 101).tolist()
    scales = [choose_scale(p * low, p * high, scheme, torch.float32) for p in clips]
    best = torch.stack([_error(w, *scale, scheme, importance) for scale in scales]).amin(0)
    assert found.sum() <= 1.15 * best.sum()


@by_scheme
def test_without_a_search_scales_are_those_of_min_and_max(text: str) -> None:
    scheme, w = _scheme(text), _weights()
    scale, zero = search_scale(w, scheme, torch.bfloat16, None, _importance(True))
    expected_scale, expected_zero = choose_scale(*value_range(w, scheme), scheme, torch.bfloat16)
    assert torch.equal(scale, expected_scale)
    assert (zero is None and expected_zero is None) or torch.equal(zero, expected_zero)


@by_scheme
def test_scales_and_zeros_keep_shape_and_dtype(text: str) -> None:
    scheme, w = _scheme(text), _weights()
    scale, zero = search_scale(w, scheme, torch.float16, ScaleSearch(), _importance(True))
    low, _ = value_range(w, scheme)
    assert (scale.shape, scale.dtype) == (low.shape, torch.float16)
    assert (zero is None) == scheme.symmetric
    if zero is not None:
        assert (zero.shape, zero.dtype) == (low.shape, torch.int8)
        assert (zero >= scheme.format.low).all()
        assert (zero <= scheme.format.high).all()


def test_the_sign_of_a_symmetric_scale_points_to_the_larger_tail() -> None:
    """-8 to 7 covers a range whose negative end is longer; a negative scale turns it around."""
    w = torch.linspace(-7, 8, 16).view(1, 16)
    scheme, search = _scheme("w4a16-g16"), ScaleSearch(signed=True)
    for turned in (w, -w):
        scale, zero = search_scale(turned, scheme, torch.float32, search)
        assert zero is None
        assert (
            _error(turned, scale, zero, scheme, None)
            < 0.1 * _error(turned, *choose_scale(*value_range(turned, scheme), scheme, torch.float32), scheme, None)
        ).all()
    unsigned, _ = search_scale(w, scheme, torch.float32, ScaleSearch(signed=False))
    assert (unsigned > 0).all()


def test_groups_are_searched_independently() -> None:
    scheme, w, importance = _scheme("w4a16-g16-asym"), _weights(), _importance(True)
    scale, zero = search_scale(w, scheme, torch.float32, ScaleSearch(), importance)
    alone_scale, alone_zero = search_scale(w[3:4, 16:32], scheme, torch.float32, ScaleSearch(), importance[16:32])
    assert torch.equal(scale[3:4, 1:2], alone_scale)
    assert torch.equal(zero[3:4, 1:2], alone_zero)


def test_a_group_that_nothing_excites_still_has_a_scale() -> None:
    scheme, w = _scheme("w4a16-g16"), _weights()
    importance = torch.ones(64)
    importance[:16] = 0
    scale, _ = search_scale(w, scheme, torch.float32, ScaleSearch(), importance)
    assert scale.isfinite().all()
    assert (scale != 0).all()
