"""Second moment and absolute maximum. Oracle: x^T x / M in float64 over all tokens at once, and torch's own amax."""

import pytest
import torch

from lowbit.errors import InputError
from lowbit.observe.moments import PANEL, AbsMax, SecondMoment, finite_range


def _tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("in_features", [1, 7, PANEL - 1, PANEL, PANEL + 1, 3 * PANEL + 5])
def test_second_moment_is_that_of_all_tokens_at_once(in_features: int) -> None:
    x = _tokens(6, 20, in_features)
    moment = SecondMoment(in_features)
    for batch in x.split(2):
        moment.update(batch)
    rows = x.reshape(-1, in_features).double()
    assert moment.tokens == 120
    # 120 products and sums in float32, each rounded once: 121 * 2^-24 = 7.2e-6 of E[|x_i x_j|] <= about 1
    torch.testing.assert_close(moment.value.double(), rows.T @ rows / 120, rtol=0, atol=2e-5)


def test_second_moment_is_symmetric_to_the_last_bit() -> None:
    moment = SecondMoment(2 * PANEL + 3)
    moment.update(_tokens(50, 2 * PANEL + 3))
    assert torch.equal(moment.value, moment.value.T)


def test_reading_the_second_moment_does_not_disturb_its_sum() -> None:
    x = _tokens(30, PANEL + 9)
    read, unread = SecondMoment(PANEL + 9), SecondMoment(PANEL + 9)
    for batch in x.split(10):
        read.update(batch)
        read.value.zero_()
        unread.update(batch)
    assert torch.equal(read.value, unread.value)


def test_second_moment_keeps_its_precision_over_many_updates() -> None:
    x = _tokens(8, 4).abs() + 1  # no cancellation: a sum that stagnates would show
    moment = SecondMoment(4)
    for _ in range(4000):
        moment.update(x)
    exact = x.double().T @ x.double() / 8
    relative = ((moment.value.double() - exact) / exact).abs().max().item()
    assert relative < 4000 * 2**-24  # each addition rounds once


def test_second_moment_adds_up_in_float32_whatever_the_activations_are_in() -> None:
    x = _tokens(64, 16).bfloat16()
    narrow, wide = SecondMoment(16), SecondMoment(16)
    narrow.update(x)
    wide.update(x.float())
    assert narrow.value.dtype == torch.float32
    assert torch.equal(narrow.value, wide.value)


def test_updates_without_tokens_count_nothing() -> None:
    moment, largest = SecondMoment(5), AbsMax(5)
    moment.update(torch.empty(0, 5))
    largest.update(torch.empty(2, 0, 5))
    assert moment.tokens == largest.tokens == 0
    assert torch.equal(largest.value, torch.zeros(5))
    with pytest.raises(InputError, match="no token reached"):
        _ = moment.value


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("statistic", [SecondMoment, AbsMax])
def test_activations_that_are_not_finite_are_refused(statistic: type, bad: float) -> None:
    x = _tokens(3, 4, 6)
    x[1, 2, 3] = bad
    with pytest.raises(InputError, match="not finite"):
        statistic(6).update(x)


def test_squares_that_overflow_are_refused_when_the_moment_is_read() -> None:
    moment = SecondMoment(2)
    moment.update(torch.tensor([[1e30, 1.0]]))
    with pytest.raises(InputError, match="overflows float32"):
        _ = moment.value


def test_absmax_is_the_largest_magnitude_of_each_channel() -> None:
    x = _tokens(5, 7, 12)
    largest = AbsMax(12)
    for batch in x:
        largest.update(batch)
    assert largest.tokens == 35
    assert torch.equal(largest.value, x.abs().amax((0, 1)))


def test_finite_range_is_exact() -> None:
    x = _tokens(100).bfloat16()
    low, high = finite_range(x)
    assert low == x.float().min()
    assert high == x.float().max()
