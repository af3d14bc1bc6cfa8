"""Correction and choice. Oracle: least squares by torch.linalg.lstsq over the tokens themselves."""

import pytest
import torch
from torch import Tensor

from lowbit.algorithms.choose import Moments, choose_rows, distance_to_wanted, solve_chosen
from lowbit.algorithms.correction import Correction, corrected, corrected_bias
from lowbit.algorithms.gptq import GptqOptions, solve_gptq
from lowbit.numerics.scheme import QuantScheme

SCHEME = QuantScheme.parse("w3a16-g16-asym").weights
PLAIN_STEP = Correction(strength=0.0, residual=0.0)


def _tokens(seed: int, tokens: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """(x, x~, r - r~): inputs [M, 32], the same as the quantized model has them, and an error that x~ partly tells."""
    mixing = torch.randn(32, 32, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 32, generator=generator) @ mixing
    noisy = x + 0.1 * x.roll(1, -1) + 0.05 * torch.randn(tokens, 32, generator=generator)
    return x, noisy, 0.2 * noisy[:, :12] + 0.05 * torch.randn(tokens, 12, generator=generator)


def _moments(x: Tensor, noisy: Tensor, residual: Tensor | None) -> Moments:
    size = len(x)
    return Moments(
        noisy.T @ noisy / size, (x - noisy).T @ noisy / size, None if residual is None else residual.T @ noisy / size
    )


def _w() -> Tensor:
    return torch.randn(12, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("with_residual", [False, True], ids=["own output", "with the residual's error"])
def test_the_full_step_is_the_least_squares_fit_of_the_wanted_output(with_residual: bool) -> None:
    w, (x, noisy, residual) = _w(), _tokens(0)
    wanted = x @ w.T + (residual if with_residual else 0)
    expected = torch.linalg.lstsq(noisy.double(), wanted.double()).solution.T
    moments = _moments(x, noisy, residual if with_residual else None)
    found = moments.aim(w, Correction(strength=1.0, damping=0.0))
    assert torch.allclose(found.double(), expected, atol=1e-3)


def test_a_part_of_the_step_lies_between_the_weights_and_the_fit() -> None:
    w, (x, noisy, _) = _w(), _tokens(0)
    moments = _moments(x, noisy, None)
    full, half = (moments.aim(w, Correction(strength=s)) for s in (1.0, 0.5))
    assert torch.allclose(half, (w + full) / 2, atol=1e-5)
    assert torch.equal(moments.aim(w, PLAIN_STEP), w)


def test_equal_inputs_leave_the_weights_as_they_are() -> None:
    w, (x, _, _) = _w(), _tokens(0)
    assert torch.equal(corrected(w, x.T @ x, torch.zeros(12, 32), Correction()), w)


def test_rounding_the_corrected_weights_comes_closer_to_the_original_on_new_tokens() -> None:
    w, (x, noisy, _) = _w(), _tokens(0)
    moments = _moments(x, noisy, None)
    new_x, new_noisy, _ = _tokens(1)

    def distance(aim: Tensor) -> float:
        found = solve_gptq(aim, moments.moment, SCHEME, torch.float32)
        return (new_x @ w.T - new_noisy @ found.dequantized.T).square().mean().item()

    assert distance(moments.aim(w, Correction(strength=1.0))) < 0.8 * distance(w)


def test_the_distance_from_moments_is_that_over_the_tokens_but_for_a_constant() -> None:
    w, (x, noisy, residual) = _w(), _tokens(0)
    moments, wanted = _moments(x, noisy, residual), x @ w.T + residual
    candidates = [w + 0.1 * torch.randn(12, 32, generator=torch.Generator().manual_seed(s)) for s in (2, 3)]
    over_tokens = [(wanted - noisy @ candidate.T).square().mean(0) for candidate in candidates]
    from_moments = [distance_to_wanted(candidate, w, moments) for candidate in candidates]
    gaps = [pair[1] - pair[0] for pair in (over_tokens, from_moments)]
    assert torch.allclose(gaps[0], gaps[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("text", ["w3a16-g16-asym", "w3a16-g16", "w3a16-tensor"])
def test_every_row_takes_the_candidate_that_is_closest_on_held_out_tokens(text: str) -> None:
    scheme, w = QuantScheme.parse(text).weights, _w()
    seen, held_out, whole = _moments(*_tokens(0)), _moments(*_tokens(1)), _moments(*_tokens(2))
    candidates = [(GptqOptions(), PLAIN_STEP), (GptqOptions(polish=2), Correction(strength=1.0))]
    choice = choose_rows(w, seen, held_out, scheme, torch.bfloat16, candidates)
    distances, solved = [], []
    for options, correction in candidates:
        found = solve_gptq(seen.aim(w, correction), seen.moment, scheme, torch.bfloat16, options)
        distances.append(distance_to_wanted(found.dequantized, w, held_out))
        solved.append(solve_gptq(whole.aim(w, correction), whole.moment, scheme, torch.bfloat16, options))
    lowest = torch.stack(distances)
    expected = lowest.sum(1).argmin().expand(12) if text.endswith("tensor") else lowest.argmin(0)
    assert torch.equal(choice, expected)
    best = solve_chosen(w, whole, choice, scheme, torch.bfloat16, candidates)
    for row, number in enumerate(choice.tolist()):
        assert torch.equal(best.q[row], solved[number].q[row])
        assert torch.equal(best.dequantized[row], solved[number].dequantized[row])


def test_joined_moments_are_those_of_all_tokens() -> None:
    parts = [[tensor[rows] for tensor in _tokens(0)] for rows in (slice(0, 300), slice(300, 400))]
    joined, whole = _moments(*parts[0]).joined(_moments(*parts[1]), 0.75), _moments(*_tokens(0))
    for name in ("moment", "shift", "residual"):
        assert torch.allclose(getattr(joined, name), getattr(whole, name), rtol=1e-4, atol=1e-5)


def test_a_bias_takes_back_what_the_layer_loses_on_average() -> None:
    w, (x, noisy, _) = _w(), _tokens(0)
    noisy = noisy + 1.5
    bias, found = torch.randn(12, generator=torch.Generator().manual_seed(2)), w + 0.1 * w.roll(1, 0)
    better = corrected_bias(bias, w, found, noisy.mean(0), (x - noisy).mean(0), torch.float32)
    lost = x @ w.T + bias - noisy @ found.T - better
    torch.testing.assert_close(lost.mean(0), torch.zeros(12), atol=1e-4, rtol=0)
    assert lost.square().mean() < (x @ w.T - noisy @ found.T).square().mean()
