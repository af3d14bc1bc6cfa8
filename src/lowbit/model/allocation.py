"""Bits where they pay: the cheapest scheme of each group of layers under a budget, and the whole trade-off curve.

A group g (layers that read one input, so that q, k and v share a scheme) has options o with size_go bits and a cost
kl_go: the divergence that this option alone adds. Costs of several groups are taken to add up, and then

    minimize  sum_g kl_g,o(g)    subject to    sum_g size_g,o(g) <= budget

is a knapsack. On the lower convex hull of each group's (size, cost) every step up has a gain per bit; taking steps in
order of falling gain, of all groups together, is optimal wherever a step ends (Shoham and Gersho, IEEE Trans. ASSP
36(9), 1988), and the steps in this order are the trade-off curve.

Sizes are as stored: packed codes, scales and zero-points.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lowbit.numerics.pack import words_per_row
from lowbit.numerics.scheme import QuantScheme
from lowbit.numerics.storage import storage_of

FLOAT_BITS = 16


@dataclass(frozen=True)
class Option:
    """One way to store a group: its scheme (None: as it is), its size in bits, its cost in nats a token."""

    scheme: QuantScheme | None
    size: float
    cost: float


@dataclass(frozen=True)
class Group:
    """Layers that get one scheme. names as in Selection.schemes; weights: how many; options: by growing size."""

    names: tuple[str, ...]
    weights: int
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Allocation:
    """An option for each group, by number, and what they add up to: bits a weight and expected cost."""

    chosen: tuple[int, ...]
    bits: float
    cost: float


def stored_bits(scheme: QuantScheme, shape: tuple[int, ...], scale_bits: int) -> int:
    """Bits that a weight [N, K] or [E, N, K] takes on disk under an integer scheme: codes, scales, zero-points."""
    weights, columns = scheme.weights, shape[-1]
    rows = 1
    for size in shape[:-1]:
        rows *= size
    scales = {"group": columns // (weights.group_size or 1) * rows, "tensor": rows // shape[-2]}
    count = scales.get(weights.granularity, rows)
    packed = storage_of(scheme) == "packed"
    codes = rows * (words_per_row(columns, weights.bits) * 32 if packed else columns * 8)
    zero_bits = 0 if weights.symmetric else weights.bits if packed else 8
    return codes + count * (scale_bits + zero_bits)


def curve(groups: Sequence[Group], most_float: float = 0) -> list[Allocation]:
    """Every point of the trade-off, from all options at their smallest upwards; at least one point.

    most_float: how many weights may stay as they are; steps that would leave more are passed over.
    """
    return _walk(groups, most_float, None)


def allocate(groups: Sequence[Group], bits: float, most_float: float = 0) -> Allocation:
    """The least expected cost within `bits` a weight; a step that does not fit is passed over for later ones."""
    return _walk(groups, most_float, bits)[-1]


def _walk(groups: Sequence[Group], most_float: float, most_bits: float | None) -> list[Allocation]:
    weights = sum(group.weights for group in groups)
    hulls = [_hull(group.options) for group in groups]
    chosen, floats = [hull[0] for hull in hulls], 0.0
    size = sum(group.options[index].size for group, index in zip(groups, chosen, strict=True))
    cost = sum(group.options[index].cost for group, index in zip(groups, chosen, strict=True))
    points = [Allocation(tuple(chosen), size / weights, cost)]
    for number, before, after in _steps(groups, hulls):
        low, high = groups[number].options[before], groups[number].options[after]
        left = floats + groups[number].weights * (high.scheme is None)
        grown = size + high.size - low.size
        fits = (most_bits is None or grown <= most_bits * weights) and left <= max(most_float, floats)
        if chosen[number] != before or not fits:  # an earlier step of this group was passed over, or this one must be
            continue
        chosen[number], size, floats = after, grown, left
        cost += high.cost - low.cost
        points.append(Allocation(tuple(chosen), size / weights, max(cost, 0.0)))
    return points


def _hull(options: Sequence[Option]) -> list[int]:
    """Numbers of the options on the lower convex hull of (size, cost), from the smallest to the least cost."""
    hull: list[int] = []
    for index, option in enumerate(options):
        if hull and option.cost >= options[hull[-1]].cost:
            continue
        while hull and option.size <= options[hull[-1]].size:
            hull.pop()
        while len(hull) > 1 and _gain(options[hull[-2]], options[hull[-1]]) <= _gain(options[hull[-1]], option):
            hull.pop()
        hull.append(index)
    return hull


def _gain(low: Option, high: Option) -> float:
    """Cost saved a bit."""
    return (low.cost - high.cost) / (high.size - low.size)


def _steps(groups: Sequence[Group], hulls: Sequence[list[int]]) -> list[tuple[int, int, int]]:
    """(group, option before, option after) by falling gain; equal gains in the order of the model."""
    steps = [(number, before, after) for number, hull in enumerate(hulls) for before, after in pairwise(hull)]
    return sorted(steps, key=lambda step: -_gain(groups[step[0]].options[step[1]], groups[step[0]].options[step[2]]))
