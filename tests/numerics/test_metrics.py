"""The oracles are torch's own kl_div, the definitions in float64 and, for output_error, the outputs themselves."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.numerics.metrics import kl_divergence, output_error, relative_error, sqnr_db

few = settings(max_examples=50, deadline=None, derandomize=True)


@few
@given(seed=st.integers(0, 2**31), size=st.floats(0, 2))
def test_relative_error_is_the_ratio_of_two_norms(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, noise = torch.randn(2, 7, 11, generator=generator)
    expected = (size * noise).double().norm() / a.double().norm()
    # a + noise is rounded to 2^-24 of its elements before it is compared
    assert relative_error(a, a + size * noise) == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)


def test_relative_error_of_zeros_is_zero_or_infinite() -> None:
    zeros = torch.zeros(3, 3)
    assert relative_error(zeros, zeros) == 0
    assert relative_error(zeros, torch.ones(3, 3)) == math.inf


def test_relative_error_is_computed_in_float32() -> None:
    a = torch.full((4096,), 300.0, dtype=torch.float16)  # 300^2 is beyond float16
    assert relative_error(a, 0.5 * a) == pytest.approx(0.5)


def test_sqnr_counts_twenty_decibels_per_power_of_ten() -> None:
    assert sqnr_db(1.0) == 0
    assert sqnr_db(0.1) == pytest.approx(20)
    assert sqnr_db(0.0) == 999


@few
@given(seed=st.integers(0, 2**31), temperature=st.floats(0.1, 3))
def test_kl_divergence_is_that_of_torch(seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = temperature * torch.randn(2, 5, 50, generator=generator)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    # p is off by 2^-23 p |log p| < 0.4 * 2^-23; with |log p - log q| < 30 that makes 1.5e-6 in each of 50 terms
    torch.testing.assert_close(kl_divergence(p, q).double(), expected, rtol=0, atol=8e-5)
    assert (expected >= 0).all()


def test_kl_divergence_keeps_the_rows_and_is_not_symmetric() -> None:
    p, q = torch.tensor([[[4.0, 0.0], [0.0, 0.0]]]), torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
    assert kl_divergence(p, q).shape == (1, 2)
    assert kl_divergence(p, q)[0, 1] == 0
    assert kl_divergence(p, q)[0, 0] != kl_divergence(q, p)[0, 0]


def test_kl_divergence_takes_half_precision_logits_in_float32() -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert kl_divergence(logits, logits.flip(-1)).dtype == torch.float32
    assert torch.equal(kl_divergence(logits, logits), torch.zeros(3))


def test_output_error_is_the_relative_error_of_the_layers_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(100, 12, generator=generator), torch.randn(8, 12, generator=generator)
    error = 0.01 * torch.randn(8, 12, generator=generator)
    expected = (x.double() @ error.double().T).norm() / (x.double() @ w.double().T).norm()
    # 12 * 12 * 8 products in float32: relative 1e-5 leaves a factor of 10 over the 144 roundings of 2^-24
    assert output_error(error, w, x.T @ x / 100) == pytest.approx(expected.item(), rel=1e-5)


def test_output_error_without_a_signal_is_zero() -> None:
    assert output_error(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(3, 3)) == 0
