"""Observers: the range [low, high] that a static activation scale shall cover, from a stream of activations.

    minmax       smallest and largest value seen                                                              exact
    average      moving average of each update's smallest and largest value, weight 0.01                      exact
    percentile   leaves out 0.01 % of the values: the largest |x| (symmetric), or half on either side         one bin
    mse          least  sum over bins of count * (x - decode(encode(x)))^2  at the bins' centres
    entropy      least  KL(P || Q): P the histogram with what is clipped added to the last bin that is kept, Q the
                 unclipped part of it at the resolution of the grid    (TensorRT's calibration: Migacz, GTC 2017)

The last three see a histogram (histogram.py) of constant size with bins at most max|x| / 4096 wide: percentile returns
the outer edge of the bin in which the exact percentile lies. None of them depends on the order of updates, and all but
average not on how the values are divided among them. Each channel's largest magnitude is moments.AbsMax.

mse and entropy try ranges that are smaller than minmax by factors 2^(-i/8) down to 1/256, then 2^(i/64) around the
best. Where the grid is asymmetric, both ends are first shrunk together and then, twice, one after the other.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.numerics.affine import choose_scale, round_to
from lowbit.numerics.scheme import TensorScheme
from lowbit.observe.histogram import HALF, Histogram
from lowbit.observe.moments import finite_range

_COARSE = tuple(2 ** (-i / 8) for i in range(65))
_FINE = tuple(2 ** (i / 64) for i in range(-7, 8))

Loss = Callable[[float, float], float]


class Observer(Protocol):
    """Sees activations, and then tells the range that a scale shall cover."""

    def update(self, x: Tensor) -> None:
        """Take x into account, any shape and floating dtype. Raises InputError where x is not finite."""

    def range(self) -> tuple[Tensor, Tensor]:
        """(low, high), float32 [1] on the CPU, for numerics.affine.choose_scale. Raises InputError before any x."""


class MinMax:
    """The running minimum and maximum; weight < 1 averages instead: bound += weight * (bound of x - bound)."""

    def __init__(self, scheme: TensorScheme, weight: float | None = None) -> None:
        self._weight = weight
        self._bounds: tuple[Tensor, Tensor] | None = None

    def update(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        low, high = (bound.cpu() for bound in finite_range(x.detach()))
        if self._bounds is None:
            self._bounds = low, high
        elif self._weight is None:
            self._bounds = torch.minimum(self._bounds[0], low), torch.maximum(self._bounds[1], high)
        else:
            self._bounds = self._bounds[0].lerp(low, self._weight), self._bounds[1].lerp(high, self._weight)

    def range(self) -> tuple[Tensor, Tensor]:
        if self._bounds is None:
            raise InputError("no activation was observed here: calibrate on more or longer samples")
        return self._bounds[0].view(1), self._bounds[1].view(1)


class _HistogramObserver:
    """What percentile, mse and entropy have in common; a subclass chooses (low, high) from self.histogram."""

    def __init__(self, scheme: TensorScheme) -> None:
        self.scheme = scheme
        self.histogram = Histogram()

    def update(self, x: Tensor) -> None:
        self.histogram.update(x)

    def range(self) -> tuple[Tensor, Tensor]:
        self.histogram.check_filled()
        low, high = self.choose()
        return torch.tensor([low], dtype=torch.float32), torch.tensor([high], dtype=torch.float32)

    def choose(self) -> tuple[float, float]:
        raise NotImplementedError


class Percentile(_HistogramObserver):
    """Covers `share` of the values; see the module's docstring."""

    def __init__(self, scheme: TensorScheme, share: float = 0.9999) -> None:
        super().__init__(scheme)
        self.share = share

    def choose(self) -> tuple[float, float]:
        seen = self.histogram
        if self.scheme.symmetric:
            bound = seen.width * _bins_to_cover(seen.magnitudes(), self.share)
            return max(-bound, seen.low), min(bound, seen.high)
        counts, tail = seen.counts, (1 - self.share) / 2
        high = seen.width * (_bins_to_cover(counts, 1 - tail) - HALF)
        low = -seen.width * (_bins_to_cover(counts.flip(0), 1 - tail) - HALF)
        return max(low, seen.low), min(high, seen.high)


def _bins_to_cover(counts: Tensor, share: float) -> int:
    """How many bins from the first on hold at least `share` of all counts."""
    running = counts.cumsum(0)
    return int(torch.searchsorted(running.double(), share * running[-1].item())) + 1


class LeastSquares(_HistogramObserver):
    """The range whose grid loses least squared error on the histogram."""

    def choose(self) -> tuple[float, float]:
        values, counts = self.histogram.centres()

        def loss(low: float, high: float) -> float:
            scale, zero = choose_scale(torch.tensor([low]), torch.tensor([high]), self.scheme, torch.float32)
            shift = 0 if zero is None else zero.float()
            decoded = (round_to(values / scale + shift, self.scheme.format).float() - shift) * scale
            return torch.dot((decoded - values).double().square_(), counts).item()

        return _least(loss, self.histogram.low, self.histogram.high, self.scheme.symmetric)


class Entropy(_HistogramObserver):
    """The range whose grid keeps the histogram's shape best: least KL divergence."""

    def choose(self) -> tuple[float, float]:
        seen, levels = self.histogram, 2**self.scheme.bits
        if self.scheme.symmetric:
            magnitudes = seen.magnitudes().double()

            def loss(low: float, high: float) -> float:
                return clipping_divergence(magnitudes, 0, round(high / seen.width), levels // 2)
        else:
            counts = seen.counts.double()

            def loss(low: float, high: float) -> float:
                start, end = round(low / seen.width) + HALF, round(high / seen.width) + HALF
                return clipping_divergence(counts, start, end, levels)

        return _least(loss, seen.low, seen.high, self.scheme.symmetric)


def clipping_divergence(counts: Tensor, start: int, end: int, levels: int) -> float:
    """KL(P || Q) in nats when only bins start to end of counts [bins] float64 are kept, in `levels` equal steps.

    P: the kept bins, what lies outside added to the first and last of them. Q: the kept bins alone, each step's count
    spread evenly over those of its bins that P fills. Infinite where there are fewer bins than levels.
    """
    start, end = max(start, 0), min(end, counts.numel())
    if end - start < levels:
        return float("inf")
    kept = counts[start:end]
    p = kept.clone()
    p[0] += counts[:start].sum()
    p[-1] += counts[end:].sum()
    level = torch.arange(end - start) * levels // (end - start)
    filled = (p > 0).double()
    mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, kept)
    holders = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, filled)
    q = (mass / holders.clamp(min=1))[level] * filled
    total = q.sum()
    if total == 0:
        return float("inf")
    p, q = p / p.sum(), q / total
    return torch.special.xlogy(p, p / q.clamp(min=1e-12)).sum().item()  # 1e-12 where only clipped mass fills a step


def _least(loss: Loss, low: float, high: float, symmetric: bool) -> tuple[float, float]:
    """The range of least loss within [low, high], the largest of equals; see the module's docstring."""
    if symmetric:
        bound = max(-low, high)
        p = _best_factor(lambda p: loss(-p * bound, p * bound))
        return -p * bound, p * bound
    low, high = min(low, 0.0), max(high, 0.0)
    p_low = p_high = _best_factor(lambda p: loss(p * low, p * high))

    def loss_of_low(p: float) -> float:
        return loss(p * low, p_high * high)

    def loss_of_high(p: float) -> float:
        return loss(p_low * low, p * high)

    for _ in range(2):
        p_high = _best_factor(loss_of_high, p_high)
        p_low = _best_factor(loss_of_low, p_low)
    return p_low * low, p_high * high


def _best_factor(loss: Callable[[float], float], start: float = 1.0) -> float:
    """The factor of least loss among start, the coarse ones, and the fine ones around the best of these."""
    best = min((start, *_COARSE), key=loss)  # min gives the first of equals
    return min((best, *(min(factor * best, 1.0) for factor in _FINE)), key=loss)


_MAKERS: dict[str, Callable[[TensorScheme], Observer]] = {
    "minmax": MinMax,
    "average": lambda scheme: MinMax(scheme, weight=0.01),
    "percentile": Percentile,
    "mse": LeastSquares,
    "entropy": Entropy,
}
OBSERVERS = tuple(_MAKERS)


def make_observer(name: str, scheme: TensorScheme) -> Observer:
    """A new observer for activations under scheme, which has one scale per tensor. Raises InputError on other names."""
    if name not in _MAKERS:
        raise InputError(f"unknown observer {name!r}; choose one of {', '.join(OBSERVERS)}")
    if name == "entropy" and scheme.format.kind != "int":
        raise InputError(f"the entropy observer needs equal steps, {scheme.format} has none; choose minmax or mse")
    assert scheme.granularity == "tensor", "a static scale belongs to a whole tensor"
    return _MAKERS[name](scheme)
