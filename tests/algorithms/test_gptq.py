"""GPTQ. Oracle: the paper's algorithm (arXiv:2210.17323, section 3.2) written slowly below in float64: one column at a
time, with the inverse of the second moment itself updated by Gaussian elimination instead of a Cholesky factor."""

import math

import pytest
import torch
from torch import Tensor

from lowbit.algorithms.gptq import ORDERS, GptqOptions, solve_gptq
from lowbit.algorithms.rtn import solve_rtn
from lowbit.algorithms.scales import ScaleSearch
from lowbit.algorithms.solution import Solution
from lowbit.errors import InputError
from lowbit.numerics.affine import decode
from lowbit.numerics.metrics import output_error
from lowbit.numerics.scheme import QuantScheme, TensorScheme

SCHEMES = ["w4a16-g16", "w4a16-g16-asym", "w3a16", "w8a16-asym", "w4a16-tensor", "w2a16-g32-asym"]
by_scheme = pytest.mark.parametrize("text", SCHEMES)


def _scheme(text: str) -> TensorScheme:
    return QuantScheme.parse(text).weights


def _problem(rows: int = 12, columns: int = 64, tokens: int = 300) -> tuple[Tensor, Tensor]:
    """(w [N, K], E[x x^T] [K, K]) with correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(-1, 1, columns)
    x = torch.randn(tokens, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator), x.T @ x / tokens


def _scale_of_column(parameter: Tensor, column: int, scheme: TensorScheme) -> Tensor:
    if scheme.granularity == "group":
        return parameter[:, column // (scheme.group_size or 1)].double()
    return parameter.flatten().double()


def _gptq_by_elimination(w: Tensor, moment: Tensor, like: Solution, scheme: TensorScheme, order: list[int]) -> Tensor:
    """Codes int8 [N, K] with the scales of `like`, columns taken in `order`, damping 0.01."""
    left, moment = w.double().clone(), moment.double().clone()
    moment.diagonal().add_(0.01 * moment.diagonal().mean())
    inverse = torch.linalg.inv(moment)
    q = torch.zeros(w.shape, dtype=torch.int8)
    remaining = list(order)
    while remaining:
        i = remaining.pop(0)
        scale = _scale_of_column(like.scale, i, scheme)
        zero = _scale_of_column(like.zero, i, scheme) if like.zero is not None else 0.0
        code = (left[:, i] / scale + zero).round().clamp(scheme.format.low, scheme.format.high)
        q[:, i] = code.to(torch.int8)
        error = (left[:, i] - (code - zero) * scale) / inverse[i, i]
        left[:, remaining] -= torch.outer(error, inverse[i, remaining])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return q


def _order(moment: Tensor, scheme: TensorScheme, named: str) -> list[int]:
    size = moment.diagonal().tolist()
    width = scheme.group_size if named == "group" and scheme.granularity == "group" else 64
    groups = [range(start, start + (width or 64)) for start in range(0, 64, width or 64)]
    if named != "natural":
        groups = sorted(groups, key=lambda group: -max(size[i] for i in group))
    return [i for group in groups for i in (group if named == "natural" else sorted(group, key=lambda i: -size[i]))]


@by_scheme
@pytest.mark.parametrize("named", ORDERS)
@pytest.mark.parametrize("search", [None, ScaleSearch(steps=8)], ids=["min/max", "search"])
def test_codes_are_those_of_the_papers_algorithm(text: str, named: str, search: ScaleSearch | None) -> None:
    scheme, (w, moment) = _scheme(text), _problem()
    solution = solve_gptq(w, moment, scheme, torch.float32, GptqOptions(order=named, search=search))
    order = _order(moment, scheme, named)
    expected = _gptq_by_elimination(w, moment, solution, scheme, order)
    # float32 updates may tip a value that lies within 1e-5 of a rounding boundary; 768 codes hold hardly one of them
    assert (solution.q != expected).float().mean() < 0.01
    slow = output_error(decode(expected, solution.scale, solution.zero, scheme) - w, w, moment)
    assert output_error(solution.dequantized - w, w, moment) == pytest.approx(slow, rel=0.02)


@by_scheme
def test_output_error_is_not_above_that_of_rounding(text: str) -> None:
    scheme, (w, moment) = _scheme(text), _problem()
    for options in (GptqOptions(), GptqOptions(order="natural", search=None), GptqOptions(order="group")):
        gptq = solve_gptq(w, moment, scheme, torch.float32, options)
        rtn = solve_rtn(w, scheme, torch.float32)
        assert output_error(gptq.dequantized - w, w, moment) < output_error(rtn.dequantized - w, w, moment)


def test_inputs_that_are_independent_make_it_plain_rounding() -> None:
    w, _ = _problem()
    scheme, moment = _scheme("w4a16-g16-asym"), torch.diag(torch.logspace(-2, 2, 64))
    gptq = solve_gptq(w, moment, scheme, torch.float32, GptqOptions(search=None))
    rtn = solve_rtn(w, scheme, torch.float32)
    assert torch.equal(gptq.q, rtn.q)
    assert torch.equal(gptq.dequantized, rtn.dequantized)


@by_scheme
def test_dequantized_is_what_codes_scales_and_zeros_decode_to(text: str) -> None:
    """So nothing about the order of columns needs to be stored."""
    scheme, (w, moment) = _scheme(text), _problem()
    solution = solve_gptq(w, moment, scheme, torch.bfloat16, GptqOptions())
    assert solution.scale.dtype == torch.bfloat16
    assert solution.q.dtype == torch.int8
    assert solution.q.shape == w.shape
    assert torch.equal(solution.dequantized, decode(solution.q, solution.scale, solution.zero, scheme))
    groups = {"tensor": (1,), "channel": (12, 1)}.get(scheme.granularity, (12, 64 // (scheme.group_size or 64)))
    assert solution.scale.shape == groups


@pytest.mark.parametrize("block", [1, 7, 64, 500])
def test_the_size_of_lazy_blocks_does_not_matter(block: int) -> None:
    scheme, (w, moment) = _scheme("w4a16-g16"), _problem()
    one = solve_gptq(w, moment, scheme, torch.float32, GptqOptions(block=block))
    other = solve_gptq(w, moment, scheme, torch.float32, GptqOptions(block=32))
    assert (one.q != other.q).float().mean() < 0.01  # other orders of the same float32 sums


def test_rows_are_solved_independently() -> None:
    scheme, (w, moment) = _scheme("w4a16-g16-asym"), _problem()
    stacked = solve_gptq(w, moment, scheme, torch.float32)
    parts = [solve_gptq(part, moment, scheme, torch.float32) for part in w.split(5)]
    assert (torch.cat([part.q for part in parts]) != stacked.q).float().mean() < 0.01


@by_scheme
def test_a_dead_column_is_zero_and_disturbs_no_other(text: str) -> None:
    scheme, (w, moment) = _scheme(text), _problem()
    dead = [3, 40]
    moment[dead] = 0
    moment[:, dead] = 0
    w[:, dead] = 7.0  # would widen its group's range if it counted
    solution = solve_gptq(w, moment, scheme, torch.float32)
    assert (solution.dequantized[:, dead] == 0).all()
    assert solution.dequantized.isfinite().all()
    cleared = w.clone()
    cleared[:, dead] = 0
    assert torch.equal(solution.q, solve_gptq(cleared, moment, scheme, torch.float32).q)


def test_inputs_that_are_all_dead_leave_zeros() -> None:
    w, _ = _problem()
    solution = solve_gptq(w, torch.zeros(64, 64), _scheme("w4a16-g16"), torch.float32)
    assert (solution.dequantized == 0).all()


def test_damping_grows_until_a_singular_moment_can_be_factored() -> None:
    scheme, (w, _) = _scheme("w4a16-g16"), _problem()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    singular = x.T @ x / 5  # rank 5 of 64
    solution = solve_gptq(w, singular, scheme, torch.float32, GptqOptions(damping=0.0))
    assert solution.damping is not None
    assert solution.damping > 0
    gptq = output_error(solution.dequantized - w, w, singular)
    assert gptq < output_error(solve_rtn(w, scheme, torch.float32).dequantized - w, w, singular)


def test_a_moment_with_a_negative_eigenvalue_gets_more_damping() -> None:
    scheme, (w, _) = _scheme("w4a16-g16"), _problem()
    moment = torch.eye(64)
    moment[0, 1] = moment[1, 0] = 1.5  # eigenvalues 2.5 and -0.5
    solution = solve_gptq(w, moment, scheme, torch.float32, GptqOptions(damping=0.01))
    assert solution.damping is not None
    assert 0.5 < solution.damping <= 10
    assert solution.dequantized.isfinite().all()


def test_a_sound_moment_keeps_the_damping_that_was_asked_for() -> None:
    w, moment = _problem()
    assert solve_gptq(w, moment, _scheme("w4a16-g16"), torch.float32, GptqOptions(damping=0.02)).damping == 0.02


def test_a_moment_that_no_damping_repairs_is_refused() -> None:
    w, _ = _problem()
    moment = torch.eye(64)
    moment[0, 1] = moment[1, 0] = 100.0
    with pytest.raises(InputError, match="not positive definite"):
        solve_gptq(w, moment, _scheme("w4a16-g16"), torch.float32)


def test_inputs_of_the_solver_are_left_as_they_were() -> None:
    w, moment = _problem()
    moment[3] = 0
    moment[:, 3] = 0  # a dead column, whose diagonal the solver replaces
    kept_w, kept_moment = w.clone(), moment.clone()
    solve_gptq(w, moment, _scheme("w4a16-g16"), torch.float32)
    assert torch.equal(w, kept_w)
    assert torch.equal(moment, kept_moment)


def test_eight_bits_lose_less_than_four() -> None:
    w, moment = _problem()
    errors = [
        output_error(solve_gptq(w, moment, _scheme(text), torch.float32).dequantized - w, w, moment)
        for text in ("w8a16", "w6a16", "w4a16", "w3a16")
    ]
    assert errors == sorted(errors)
    assert errors[0] < math.exp(-3)


def test_an_order_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(InputError, match="unknown order of columns 'best'; choose one of act, group, natural"):
        GptqOptions(order="best")
