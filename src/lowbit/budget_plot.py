"""The trade-off of a budget, placed for report.html: expected KL along the curve, one level everywhere, and full runs.

x   stored bits a weight, from the smallest point to the largest
y   KL, nats a token, on a log axis; points below FLOOR of the largest KL stand on the axis
"""

import math
from dataclasses import dataclass

from lowbit.report import BudgetRecord
from lowbit.ticks import decades

FLOOR = 1e-4


@dataclass(frozen=True)
class Spot:
    """A point in per cent of the box, with its numbers. kind: "level" (one scheme everywhere) or "run"."""

    name: str
    kind: str
    x: float
    y: float
    bits: float
    kld: float


@dataclass(frozen=True)
class BudgetChart:
    """line: the curve as the points of an SVG polyline in a box of 100 x 100; ticks are (place in per cent, value)."""

    line: str
    spots: tuple[Spot, ...]
    x_ticks: tuple[tuple[float, float], ...]
    y_ticks: tuple[tuple[float, float], ...]


def budget_chart(record: BudgetRecord) -> BudgetChart | None:
    """The chart of one budget; None where every KL is zero."""
    shown = [(point.name, "level", point.bits, point.expected) for point in record.curve]
    shown += [(run.name, "run", run.bits, run.measured) for run in record.runs if run.measured is not None]
    klds = [kld for *_, kld in shown if kld > 0]
    if not klds:
        return None
    high = 1.5 * max(klds)
    low = max(min(klds) / 1.5, FLOOR * high)
    left, right = min(bits for _, _, bits, _ in shown), max(bits for _, _, bits, _ in shown)
    width = (right - left) or 1.0

    def height(kld: float) -> float:
        return 100 * math.log(max(kld, low) / low) / math.log(high / low)

    spots = [Spot(name, kind, 100 * (bits - left) / width, height(kld), bits, kld) for name, kind, bits, kld in shown]
    return BudgetChart(
        " ".join(f"{spot.x:.2f},{100 - spot.y:.2f}" for spot in spots if not spot.name),
        tuple(spot for spot in spots if spot.name),
        tuple((100 * (value - left) / width, float(value)) for value in range(math.ceil(left), math.floor(right) + 1)),
        tuple((height(value), value) for value in decades(low, high)),
    )
