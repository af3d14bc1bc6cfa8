"""Spreading bits. Oracle: brute force over all allocations of small problems, and sizes of real packed tensors."""

from itertools import product

import pytest
import torch

from lowbit.model.allocation import Group, Option, allocate, curve, stored_bits
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

SCHEMES = [QuantScheme.parse(f"w{bits}a16-g16") for bits in (2, 4, 8)]


def _groups(seed: int, count: int = 5, may_skip: bool = False) -> list[Group]:
    """Groups with falling convex costs, of several sizes."""
    random = torch.Generator().manual_seed(seed)
    groups = []
    for number in range(count):
        weights = int(torch.randint(1, 5, (), generator=random)) * 100
        cost = float(torch.rand((), generator=random)) + 0.01
        options = [
            Option(scheme, weights * (scheme.weights.bits + 1.0), cost * 4.0**-scheme.weights.bits)
            for scheme in SCHEMES
        ]
        options += [Option(None, weights * 16.0, 0.0)] if may_skip else []
        groups.append(Group((f"layer{number}",), weights, tuple(options)))
    return groups


def _cost(groups: list[Group], chosen: tuple[int, ...]) -> tuple[float, float]:
    """(bits a weight, cost)"""
    picked = [group.options[place] for group, place in zip(groups, chosen, strict=True)]
    return sum(o.size for o in picked) / sum(g.weights for g in groups), sum(o.cost for o in picked)


@pytest.mark.parametrize("seed", range(4))
def test_every_point_of_the_curve_is_the_best_for_its_size(seed: int) -> None:
    groups = _groups(seed)
    everything = [_cost(groups, chosen) for chosen in product(range(3), repeat=len(groups))]
    points = curve(groups)
    assert len(points) == 1 + 2 * len(groups)
    for point in points:
        assert (point.bits, point.cost) == pytest.approx(_cost(groups, point.chosen))
        assert point.cost <= min(cost for bits, cost in everything if bits <= point.bits + 1e-9) + 1e-12


@pytest.mark.parametrize("bits", [3.0, 3.7, 4.25, 6.1, 9.0, 12.0])
def test_an_allocation_keeps_the_budget_and_leaves_less_than_any_step_over(bits: int) -> None:
    groups = _groups(1)
    found = allocate(groups, bits)
    assert found.bits <= bits
    weights = sum(group.weights for group in groups)
    for group, place in zip(groups, found.chosen, strict=True):
        if place + 1 < len(group.options):
            assert found.bits + (group.options[place + 1].size - group.options[place].size) / weights > bits
    assert found == allocate(groups, bits)


def test_layers_stay_as_they_are_only_as_far_as_coverage_allows() -> None:
    groups = _groups(2, may_skip=True)
    total = sum(group.weights for group in groups)
    for share in (0.0, 0.3, 1.0):
        last = curve(groups, share * total)[-1]
        left = sum(g.weights for g, place in zip(groups, last.chosen, strict=True) if g.options[place].scheme is None)
        assert left <= share * total
        assert (left > 0) == (share > 0)


def test_an_option_that_costs_more_and_loses_more_is_never_taken() -> None:
    odd = Group(("a",), 10, (Option(SCHEMES[0], 30, 1.0), Option(SCHEMES[1], 50, 1.5), Option(SCHEMES[2], 90, 0.5)))
    assert [point.chosen for point in curve([odd])] == [(0,), (2,)]


@pytest.mark.parametrize("text", ["w4a16-g16", "w3a16-g32-asym", "w8a8", "w2a16-g16-asym", "w8a16-tensor"])
def test_sizes_are_those_of_the_packed_tensors(text: str) -> None:
    scheme = QuantScheme.parse(text)
    w = torch.randn(32, 64)
    packed = PackedWeight.from_float(w, scheme, torch.bfloat16)
    parts = (packed.codes, packed.scale, packed.zero)
    size = 8 * sum(part.nbytes for part in parts if part is not None)
    assert stored_bits(scheme, (32, 64), 16) == size
    assert stored_bits(scheme, (3, 32, 64), 16) == 3 * size
