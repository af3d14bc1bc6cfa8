"""Round numbers along an axis."""

import math


def round_steps(high: float) -> list[float]:
    """0, step, 2 step, ... up to high, about five of them, step = 1, 2 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10(high / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= high / 5)
    return [count * step for count in range(math.floor(high / step) + 1)]


def decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within [low, high]."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [value for power in powers for factor in (1, 2, 5) if low <= (value := factor * 10.0**power) <= high]
