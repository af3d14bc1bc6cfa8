"""Observers of ranges. Oracles: torch's min, max and quantile of all values at once, and brute force over a fine grid
of ranges, judged on the values themselves (mse) or by a KL divergence written out bin by bin (entropy)."""

import math

import pytest
import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.numerics.affine import choose_scale, decode, encode
from lowbit.numerics.formats import FP8_E4M3, int_format
from lowbit.numerics.scheme import TensorScheme
from lowbit.observe.histogram import HALF, Histogram
from lowbit.observe.ranges import OBSERVERS, clipping_divergence, make_observer

INT8 = TensorScheme(int_format(8), "tensor")
INT8_ASYM = TensorScheme(int_format(8), "tensor", symmetric=False)
INT4 = TensorScheme(int_format(4), "tensor")
INT4_ASYM = TensorScheme(int_format(4), "tensor", symmetric=False)
SCHEMES = {"int8": INT8, "int8-asym": INT8_ASYM, "int4": INT4, "int4-asym": INT4_ASYM}
by_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def _values(count: int = 50_000, mean: float = 0.0, outliers: int = 5) -> Tensor:
    """A Gaussian with a few values fifty times as far out."""
    x = torch.randn(count, generator=torch.Generator().manual_seed(0)) + mean
    x[:outliers] *= 50
    return x


def _observed(name: str, scheme: TensorScheme, batches: list[Tensor]) -> tuple[float, float]:
    observer = make_observer(name, scheme)
    for batch in batches:
        observer.update(batch)
    low, high = observer.range()
    assert low.shape == high.shape == (1,)
    assert low.dtype == high.dtype == torch.float32
    return low.item(), high.item()


def _squared_error(x: Tensor, low: float, high: float, scheme: TensorScheme) -> float:
    scale, zero = choose_scale(torch.tensor([low]), torch.tensor([high]), scheme, torch.float32)
    return (decode(encode(x, scale, zero, scheme), scale, zero, scheme) - x).double().square().mean().item()


@by_scheme
def test_minmax_is_the_smallest_and_largest_value(scheme: TensorScheme) -> None:
    x = _values()
    assert _observed("minmax", scheme, list(x.view(50, 10, 100))) == (x.min().item(), x.max().item())


def test_average_moves_by_a_hundredth_of_the_way() -> None:
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 6.0]), torch.tensor([0.0, 1.0])]
    low, high = _observed("average", INT8, batches)
    assert low == pytest.approx((-1 * 0.99 - 3 * 0.01) * 0.99 + 0 * 0.01, rel=1e-6)
    assert high == pytest.approx((2 * 0.99 + 6 * 0.01) * 0.99 + 1 * 0.01, rel=1e-6)


def test_symmetric_percentile_is_exact_to_one_bin() -> None:
    x = _values()
    low, high = _observed("percentile", INT8, list(x.split(7000)))
    exact = x.abs().sort().values[math.ceil(0.9999 * x.numel()) - 1].item()
    assert exact <= high <= exact + x.abs().max().item() / 4096
    assert low == -high


def test_asymmetric_percentile_leaves_half_out_on_either_side() -> None:
    x = _values(mean=1.5, outliers=8)
    low, high = _observed("percentile", INT8_ASYM, list(x.split(7000)))
    in_order, kept = x.sort().values, math.ceil(0.99995 * x.numel())
    bin_width = x.abs().max().item() / 4096
    assert in_order[kept - 1] <= high <= in_order[kept - 1] + bin_width
    assert in_order[-kept] - bin_width <= low <= in_order[-kept]


@by_scheme
def test_mse_is_as_good_as_brute_force(scheme: TensorScheme) -> None:
    x = _values(4000, mean=0.0 if scheme.symmetric else 0.7, outliers=3)
    low, high = x.min().item(), x.max().item()
    factors = [2 ** (-i / 6) for i in range(49)]
    if scheme.symmetric:
        bound = max(-low, high)
        ranges = [(-p * bound, p * bound) for p in factors]
    else:
        ranges = [(p * low, r * high) for p in factors for r in factors]
    found = _squared_error(x, *_observed("mse", scheme, list(x.split(900))), scheme)
    assert found <= 1.02 * min(_squared_error(x, *candidate, scheme) for candidate in ranges)
    assert found < _squared_error(x, low, high, scheme)


def test_mse_leaves_the_outliers_of_both_ends_together() -> None:
    """Clipping one end alone saves at most half a step: a search that moves one end at a time stays where it began."""
    x = _values(20_000, outliers=2)
    x[:2] = torch.tensor([-60.0, 60.0])
    low, high = _observed("mse", INT4_ASYM, [x])
    least = min(_squared_error(x, -60 / r, 60 / r, INT4_ASYM) for r in range(1, 40))
    assert _squared_error(x, low, high, INT4_ASYM) <= 1.02 * least


def test_mse_serves_fp8() -> None:
    x = _values()
    scheme = TensorScheme(FP8_E4M3, "tensor")
    found = _squared_error(x, *_observed("mse", scheme, [x]), scheme)
    assert found <= _squared_error(x, -x.abs().max().item(), x.abs().max().item(), scheme)


def _divergence_bin_by_bin(counts: list[float], start: int, end: int, levels: int) -> float:
    """KL(P || Q) as the slides describe it, with plain loops."""
    p = counts[start:end]
    p[0] += sum(counts[:start])
    p[-1] += sum(counts[end:])
    kept, width = counts[start:end], end - start
    q = [0.0] * width
    for level in range(levels):
        members = [i for i in range(width) if i * levels // width == level]
        filled = [i for i in members if p[i] > 0]
        for i in filled:
            q[i] = sum(kept[j] for j in members) / len(filled)
    total_p, total_q = sum(p), sum(q)
    return sum(a / total_p * math.log(a / total_p / (b / total_q)) for a, b in zip(p, q, strict=True) if a > 0)


def test_clipping_divergence_is_that_of_plain_loops() -> None:
    counts = torch.randint(1, 50, (64,), generator=torch.Generator().manual_seed(1)).double()
    counts[20:23] = 0
    for start, end in [(0, 64), (0, 40), (10, 50), (3, 19)]:
        expected = _divergence_bin_by_bin(counts.tolist(), start, end, 8)
        assert clipping_divergence(counts, start, end, 8) == pytest.approx(expected, abs=1e-12)
    assert clipping_divergence(counts, 0, 7, 8) == math.inf


def test_entropy_is_as_good_as_brute_force_over_every_threshold() -> None:
    x = _values(outliers=20)
    _, high = _observed("entropy", INT4, [x])
    seen = Histogram()
    seen.update(x)
    magnitudes = seen.magnitudes().double()
    found = clipping_divergence(magnitudes, 0, round(high / seen.width), 8)
    least = min(clipping_divergence(magnitudes, 0, end, 8) for end in range(8, HALF, 3))
    assert found <= 1.05 * least


@by_scheme
def test_entropy_clips_outliers_and_keeps_the_bulk(scheme: TensorScheme) -> None:
    x = _values(mean=0.0 if scheme.symmetric else 0.7, outliers=20)
    low, high = _observed("entropy", scheme, list(x.split(9000)))
    assert 2 < high < 0.3 * x.max().item()
    assert 0.3 * x.min().item() < low < -1
    inside = (x >= low) & (x <= high)
    assert inside.float().mean() > 0.98


@pytest.mark.parametrize("name", OBSERVERS)
@by_scheme
def test_constants_and_zeros_have_a_range(name: str, scheme: TensorScheme) -> None:
    assert _observed(name, scheme, [torch.zeros(3, 4)]) == (0, 0)
    low, high = _observed(name, scheme, [torch.full((100,), 2.5)])
    assert max(-low, high) == pytest.approx(2.5, rel=0.05)


@pytest.mark.parametrize("name", [name for name in OBSERVERS if name != "average"])
@by_scheme
def test_the_order_and_size_of_updates_does_not_matter(name: str, scheme: TensorScheme) -> None:
    x = _values(20_000, mean=0.3)
    once = _observed(name, scheme, [x])
    growing = x[x.abs().argsort()]  # every update widens the range
    assert _observed(name, scheme, list(growing.split(300))) == once
    assert _observed(name, scheme, list(growing.flip(0).split(5000))) == once


def test_histogram_of_a_growing_stream_is_bitwise_that_of_all_values_at_once() -> None:
    x = _values(10_000) * torch.logspace(-6, 6, 10_000)
    streamed, whole = Histogram(), Histogram()
    for batch in x.split(100):
        streamed.update(batch)
    whole.update(x)
    assert streamed.exponent == whole.exponent
    assert torch.equal(streamed.counts, whole.counts)
    assert whole.counts.sum() == x.numel()


def test_histogram_counts_what_lies_between_its_edges() -> None:
    x = torch.tensor([-1.0, -0.75, -1e-9, 0.0, 0.5, 0.5 - 2**-20, 1.0])
    seen = Histogram()
    seen.update(x)
    assert seen.exponent == 1  # 1 < 2^1
    filled = [(i - HALF) * seen.width for i in seen.counts.nonzero().flatten().tolist()]
    assert filled == [-1.0, -0.75, -seen.width, 0.0, 0.5 - seen.width, 0.5, 1.0]


def test_histogram_survives_the_extremes_of_float32() -> None:
    seen = Histogram()
    for value in (1e-45, 1e-38, 3e38):
        seen.update(torch.tensor([value, -value]))
    assert seen.counts.sum() == 6
    assert seen.counts[HALF - 1] == seen.counts[HALF] == 2  # the tiny ones share the bins beside zero


def test_memory_does_not_grow_with_tokens() -> None:
    seen = Histogram()
    for seed in range(20):
        seen.update(torch.randn(1000, generator=torch.Generator().manual_seed(seed)))
    assert seen.counts.shape == (2 * HALF,)
    assert all(not isinstance(value, list | dict) for value in vars(seen).values())


@pytest.mark.parametrize("name", OBSERVERS)
def test_an_observer_without_activations_says_so(name: str) -> None:
    observer = make_observer(name, INT8)
    observer.update(torch.empty(0, 4))
    with pytest.raises(InputError, match="no activation was observed"):
        observer.range()


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    with pytest.raises(InputError, match="not finite"):
        make_observer(name, INT8).update(torch.tensor([1.0, bad]))


def test_an_unknown_observer_names_those_there_are() -> None:
    with pytest.raises(InputError, match=r"'median'.*minmax, average, percentile, mse, entropy"):
        make_observer("median", INT8)


def test_entropy_refuses_a_format_without_equal_steps() -> None:
    with pytest.raises(InputError, match="fp8"):
        make_observer("entropy", TensorScheme(FP8_E4M3, "tensor"))
