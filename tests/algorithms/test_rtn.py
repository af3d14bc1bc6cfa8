"""Round to nearest. Oracle: for every weight, the nearest of all points of its grid, listed in float64."""

import pytest
import torch
from torch import Tensor

from lowbit.algorithms.rtn import solve_rtn
from lowbit.algorithms.scales import ScaleSearch
from lowbit.numerics.affine import choose_scale, decode, per_element, value_range
from lowbit.numerics.scheme import QuantScheme

SCHEMES = ["w4a16-g16", "w4a16-g16-asym", "w3a16", "w8a16-asym", "w4a16-tensor", "w2a16-g32-asym"]


def _weights() -> Tensor:
    return torch.randn(10, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("search", [None, ScaleSearch(steps=8)], ids=["min/max", "search"])
@pytest.mark.parametrize("text", SCHEMES)
def test_every_weight_goes_to_the_nearest_point_of_its_grid(text: str, search: ScaleSearch | None) -> None:
    scheme, w = QuantScheme.parse(text).weights, _weights()
    solution = solve_rtn(w, scheme, torch.float32, search)
    codes = torch.arange(scheme.format.low, scheme.format.high + 1, dtype=torch.float64)
    scale = per_element(solution.scale.double(), scheme).expand_as(w).unsqueeze(-1)
    zero = 0.0 if solution.zero is None else per_element(solution.zero.double(), scheme).expand_as(w).unsqueeze(-1)
    nearest = ((codes - zero) * scale - w.double().unsqueeze(-1)).abs().amin(-1)  # [N, K, codes] -> [N, K]
    distance = (solution.dequantized.double() - w.double()).abs()
    torch.testing.assert_close(distance, nearest, rtol=0, atol=1e-6)  # float32 products of numbers below 5


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_a_search_scales_are_those_of_min_and_max(text: str, dtype: torch.dtype) -> None:
    scheme, w = QuantScheme.parse(text).weights, _weights()
    solution = solve_rtn(w, scheme, dtype)
    scale, zero = choose_scale(*value_range(w, scheme), scheme, dtype)
    assert torch.equal(solution.scale, scale)
    assert solution.scale.dtype == dtype
    assert (solution.zero is None) == scheme.symmetric
    assert zero is None or torch.equal(solution.zero, zero)
    assert torch.equal(solution.dequantized, decode(solution.q, scale, zero, scheme))
    assert solution.damping is None


def test_weights_in_bfloat16_are_rounded_in_float32() -> None:
    scheme, w = QuantScheme.parse("w4a16-g16").weights, _weights().bfloat16()
    narrow, wide = solve_rtn(w, scheme, torch.bfloat16), solve_rtn(w.float(), scheme, torch.bfloat16)
    assert torch.equal(narrow.q, wide.q)
    assert narrow.dequantized.dtype == torch.float32


@pytest.mark.parametrize("search", [None, ScaleSearch()], ids=["min/max", "search"])
@pytest.mark.parametrize("text", SCHEMES)
def test_zeros_stay_zeros(text: str, search: ScaleSearch | None) -> None:
    scheme, w = QuantScheme.parse(text).weights, _weights()
    w[:, :32] = 0
    w[5] = 0
    solution = solve_rtn(w, scheme, torch.float16, search)
    assert solution.scale.isfinite().all()
    assert (solution.scale != 0).all()
    assert (solution.dequantized[w == 0] == 0).all()


def test_fp8_codes_decode_to_what_torch_casts_to() -> None:
    scheme, w = QuantScheme.parse("fp8").weights, _weights()
    solution = solve_rtn(w, scheme, torch.float32)
    assert solution.q.dtype == torch.float8_e4m3fn
    scale = w.abs().amax(1, keepdim=True) / 448
    assert torch.equal(solution.dequantized, (w / scale).to(torch.float8_e4m3fn).float() * scale)


def test_importance_moves_the_error_away_from_what_matters() -> None:
    scheme, w = QuantScheme.parse("w3a16").weights, _weights()
    importance = torch.ones(64)
    importance[:8] = 1000
    plain = solve_rtn(w, scheme, torch.float32, ScaleSearch())
    weighed = solve_rtn(w, scheme, torch.float32, ScaleSearch(), importance)
    before, after = ((solution.dequantized - w)[:, :8].square().sum() for solution in (plain, weighed))
    assert after < before
