"""GPTAQ and Qronos. Oracles: both papers' steps written slowly in float64, column by column, the other weights solved
for anew with what is left of the moment; distance to the wanted output on new tokens."""

import pytest
import torch
from torch import Tensor

from lowbit.algorithms.gptaq import SHARE, solve_gptaq, solve_qronos
from lowbit.algorithms.gptq import ORDERS, GptqOptions, solve_gptq
from lowbit.algorithms.solution import Solution
from lowbit.numerics.affine import per_column
from lowbit.numerics.scheme import QuantScheme, TensorScheme

SCHEMES = ["w3a16-g16-asym", "w4a16-g16", "w2a16"]
K = 48


def _tokens(seed: int, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """(x, x~) [M, K]: inputs in the original and in the quantized model, whose error x~ partly tells."""
    mixing = torch.randn(K, K, generator=torch.Generator().manual_seed(7)) * torch.logspace(-0.5, 0.5, K)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, K, generator=generator) @ mixing
    return x, x + 0.15 * x.roll(1, -1) + 0.05 * torch.randn(tokens, K, generator=generator)


def _problem() -> tuple[Tensor, Tensor, Tensor]:
    """(w [12, K], H, S)"""
    x, noisy = _tokens(0)
    w = torch.randn(12, K, generator=torch.Generator().manual_seed(1))
    return w, noisy.T @ noisy / len(x), (x - noisy).T @ noisy / len(x)


def _nearest(value: Tensor, column: int, like: Solution, scheme: TensorScheme) -> tuple[Tensor, Tensor]:
    """(codes, weights) of one column in float64, on the grid of `like`."""
    step = per_column(like.scale, scheme, like.q.shape)[column].double()
    zero = 0.0 if like.zero is None else per_column(like.zero, scheme, like.q.shape)[column].double()
    code = (value / step + zero).round().clamp(scheme.format.low, scheme.format.high)
    return code, (code - zero) * step


def _damped(moment: Tensor) -> Tensor:
    damped = moment.double().clone()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    return damped


def _qronos(w: Tensor, moment: Tensor, shift: Tensor, like: Solution, scheme: TensorScheme, order: list[int]) -> Tensor:
    """Codes: the first column as in the paper, the others solved for, then the same with one column less (GPTQ)."""
    h, w = _damped(moment), w.double().clone()
    cross = w @ (h + shift.double())
    q = torch.zeros(w.shape)
    first, *rest = order
    value = (cross[:, first] - w[:, rest] @ h[rest, first]) / h[first, first]
    q[:, first], rounded = _nearest(value, first, like, scheme)
    w[:, rest] = torch.linalg.solve(h[rest][:, rest], (cross[:, rest] - torch.outer(rounded, h[first, rest])).T).T
    while rest:
        i, *after = rest
        q[:, i], rounded = _nearest(w[:, i], i, like, scheme)
        lost = torch.outer(w[:, i] - rounded, h[i, after])
        w[:, after] += torch.linalg.solve(h[after][:, after], lost.T).T if after else 0
        rest = after
    return q


def _gptaq(w: Tensor, moment: Tensor, shift: Tensor, like: Solution, scheme: TensorScheme, order: list[int]) -> Tensor:
    """Codes: each column answers its own rounding as in GPTQ, and its input's error on the columns still to come."""
    h, w, shift = _damped(moment), w.double().clone(), shift.double()
    q, rest = torch.zeros(w.shape), list(order)
    while rest:
        i, *after = rest
        q[:, i], rounded = _nearest(w[:, i], i, like, scheme)
        if after:
            inverse = torch.linalg.inv(h[after][:, after])
            w[:, after] += torch.outer(w[:, i] - rounded, h[i, after] @ inverse)
            w[:, after] += SHARE * torch.outer(w[:, i], shift[i, after] @ inverse)
        rest = after
    return q


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("named", ORDERS)
def test_qronos_gives_the_codes_of_the_paper(text: str, named: str) -> None:
    (w, moment, shift), scheme = _problem(), QuantScheme.parse(text).weights
    found = solve_qronos(w, moment, shift, scheme, torch.float32, GptqOptions(order=named, block=10))
    order = {"natural": list(range(K))}.get(named)
    order = order or moment.diagonal().argsort(descending=True).tolist()
    if named == "group" and scheme.granularity == "group":
        groups = moment.diagonal().view(-1, 16)
        order = [16 * g + i for g in groups.amax(1).argsort(descending=True).tolist()
                 for i in groups[g].argsort(descending=True).tolist()]  # fmt: skip
    expected = _qronos(w, moment, shift, found, scheme, order)
    assert (found.q != expected).float().mean() < 0.01  # float32 may tip what lies at a boundary


@pytest.mark.parametrize("text", SCHEMES)
def test_gptaq_gives_the_codes_of_the_paper(text: str) -> None:
    (w, moment, shift), scheme = _problem(), QuantScheme.parse(text).weights
    found = solve_gptaq(w, moment, shift, scheme, torch.float32, GptqOptions(block=10))
    order = moment.diagonal().argsort(descending=True).tolist()
    assert (found.q != _gptaq(w, moment, shift, found, scheme, order)).float().mean() < 0.01


@pytest.mark.parametrize("solve", [solve_gptaq, solve_qronos])
def test_inputs_without_errors_make_it_gptq(solve) -> None:  # type: ignore[no-untyped-def]
    (w, moment, _), scheme = _problem(), QuantScheme.parse("w4a16-g16").weights
    plain = solve_gptq(w, moment, scheme, torch.float32)
    found = solve(w, moment, torch.zeros(K, K), scheme, torch.float32)
    assert (found.q != plain.q).float().mean() < 0.01
    assert torch.equal(found.scale, plain.scale)


@pytest.mark.parametrize("solve", [solve_gptaq, solve_qronos])
def test_both_come_closer_to_the_original_than_gptq_on_new_tokens(solve) -> None:  # type: ignore[no-untyped-def]
    (w, moment, shift), scheme = _problem(), QuantScheme.parse("w4a16-g16-asym").weights
    x, noisy = _tokens(5, 2000)

    def error(solution: Solution) -> float:
        return (noisy @ solution.dequantized.T - x @ w.T).square().mean().item()

    plain = solve_gptq(w, moment, scheme, torch.float32)
    assert error(solve(w, moment, shift, scheme, torch.float32)) < 0.95 * error(plain)
