"""A kernel that is named: `use` and `explain`. Oracle: a record of the kernels that ran."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.kernels import registry
from lowbit.kernels.ops import quantized_linear
from lowbit.kernels.registry import CANDIDATES, Candidate, explain, pick, use
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def made(text: str) -> PackedWeight:
    w = torch.randn(17, 64, generator=torch.Generator().manual_seed(1))
    return PackedWeight.from_float(w, QuantScheme.parse(text), torch.float32)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that ran, in order."""
    ran: list[str] = []

    def watched(candidate: Candidate) -> Candidate:
        def run(*arguments: object) -> Tensor:
            ran.append(candidate.name)
            return candidate.run(*arguments)

        return replace(candidate, run=run)

    table = {op: tuple(watched(candidate) for candidate in candidates) for op, candidates in CANDIDATES.items()}
    monkeypatch.setattr(registry, "CANDIDATES", table)
    return ran


def test_use_names_the_kernel_within_its_block_only(calls: list[str]) -> None:
    weight = made("w8a8")
    unnamed = pick("wa8_linear", X, weight).name
    quantized_linear(X, weight)
    with use("reference"):
        quantized_linear(X, weight)
        with use("cpu_int8"):
            quantized_linear(X, weight)
        quantized_linear(X, weight)
    quantized_linear(X, weight)
    assert calls == [unnamed, "reference", "cpu_int8", "reference", unnamed]


def test_use_ends_with_an_error_too(calls: list[str]) -> None:
    weight = made("w8a8")
    for name in ("reference", "cpu_int8"):
        with pytest.raises(ZeroDivisionError), use(name):
            raise ZeroDivisionError
        quantized_linear(X, weight)
    assert calls == 2 * [pick("wa8_linear", X, weight).name]


def test_a_named_kernel_that_refuses_is_not_replaced_by_another(calls: list[str]) -> None:
    with use("cpu_int8"), pytest.raises(InputError, match=r"kernel 'cpu_int8' can't run wa8_linear: w8a8-g32 has a"):
        quantized_linear(X, made("w8a8-g32"))
    assert calls == []


def test_a_named_kernel_leaves_ops_alone_that_it_is_no_candidate_of(calls: list[str]) -> None:
    weight = made("w4a16-g32")
    with use("cpu_int8"):
        quantized_linear(X, weight)
    assert calls == [pick("wna16_linear", X, weight).name]


def test_explain_tells_what_each_candidate_says_in_order_of_preference() -> None:
    said = explain("wa8_linear", X, made("w8a8-g32"))
    assert said["cpu_int8"] == "w8a8-g32 has a scale per group, inside the integer sum"
    assert said["reference"] == "ready"
    assert list(said) == [candidate.name for candidate in CANDIDATES["wa8_linear"]]
    assert explain("wa8_linear", X, made("w8a8"))["cpu_int8"] == "ready"


@pytest.mark.parametrize("op", CANDIDATES)
def test_the_last_candidate_of_every_op_is_the_reference_which_runs_anywhere(op: str) -> None:
    last = CANDIDATES[op][-1]
    assert last.name == "reference"
    assert last.refusal(torch.empty(1, 64, device="meta"), made("w8a8")) is None
    assert len({candidate.name for candidate in CANDIDATES[op]}) == len(CANDIDATES[op])
