"""A histogram of activations in constant memory that does not depend on the order in which they came.

The span [-2^e, 2^e) is cut into 2 x HALF bins of width 2^e / HALF, where 2^e is the smallest power of two above every
|x| seen. When a larger value comes, e grows and neighbouring bins are added up: their edges are edges of the old bins,
so the counts stay exact, and the histogram of a stream is bitwise equal to that of all its values at once.

    counts[HALF + j]  how many values x lie in  [j, j + 1) * width,    j from -HALF to HALF - 1

2^e < 2 max|x|, so a bin is at most max|x| / 4096 wide. Counts are int64; smallest and largest value are kept exactly.
"""

import math

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.observe.moments import finite_range

HALF = 8192
_SMALLEST_EXPONENT = -100  # 2^-100 / HALF is still a normal float32
_CHUNK = 1 << 22  # values binned at a time: 16 MB of bin numbers


class Histogram:
    """counts int64 [2 HALF] on the CPU, and the exact low and high as floats."""

    def __init__(self) -> None:
        self.exponent = _SMALLEST_EXPONENT
        self.counts = torch.zeros(2 * HALF, dtype=torch.int64)
        self.low, self.high = math.inf, -math.inf

    @property
    def width(self) -> float:
        """The width of a bin."""
        return 2.0**self.exponent / HALF

    def update(self, x: Tensor) -> None:
        """Count the values of x, any shape. Raises InputError where x is not finite."""
        if x.numel() == 0:
            return
        low, high = (bound.item() for bound in finite_range(x))
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(math.frexp(max(-low, high))[1])  # |x| < 2^exponent
        for values in x.detach().reshape(-1).split(_CHUNK):
            # a product with a power of two is exact, so every value gets into its own bin
            bins = (values.float() * (1 / self.width)).floor_().add_(HALF).to(torch.int32)
            self.counts += torch.bincount(bins, minlength=2 * HALF).cpu()

    def _widen(self, exponent: int) -> None:
        if exponent <= self.exponent:
            return
        merged = min(2 ** min(exponent - self.exponent, 30), HALF)  # HALF: all of a side ends in its first bin
        left = HALF // merged
        counts = torch.zeros_like(self.counts)
        counts[HALF - left : HALF + left] = self.counts.view(-1, merged).sum(-1)  # [2 HALF] -> [2 HALF / merged]
        self.counts, self.exponent = counts, exponent

    def magnitudes(self) -> Tensor:
        """Counts int64 [HALF] of |x|, both sides added up."""
        return self.counts[:HALF].flip(0) + self.counts[HALF:]

    def centres(self) -> tuple[Tensor, Tensor]:
        """(middle of each bin that is not empty, its count), float32 and float64, from low to high."""
        filled = self.counts.nonzero().squeeze(1)
        middle = (filled - HALF + 0.5).double() * self.width
        return middle.float().clamp(self.low, self.high), self.counts[filled].double()

    def check_filled(self) -> None:
        """Raise InputError when nothing was counted."""
        if self.low > self.high:
            raise InputError("no activation was observed here: calibrate on more or longer samples")
