"""What is known of one layer's input: its second moment, its range, what the original's input was, a sample of it."""

import torch
from torch import Tensor

from lowbit.algorithms.choose import Moments
from lowbit.kernels.ops import rotate
from lowbit.numerics.dynamic import round_activations
from lowbit.numerics.hadamard import Hadamard
from lowbit.numerics.scheme import TensorScheme
from lowbit.observe.moments import CrossMoment, SecondMoment, finite_range
from lowbit.observe.ranges import Observer
from lowbit.report import Histogram

BINS = 64
SAMPLE = 256  # tokens of the first batch that stand for all in a histogram


class Statistics:
    """What a solver may ask of one input: its second moment, its range, and a sample for the report.

    shift and residual, or wanted in place of both (algorithms/correction.py), are there when the original is seen
    beside it; held_out keeps tokens apart that judge candidates (algorithms/choose.py). rounding: how the layer will
    round its input at run time, in so few bits that the moments are taken of what it then multiplies.
    """

    def __init__(
        self,
        moment: SecondMoment | None,
        observer: Observer | None,
        rounding: TensorScheme | None = None,
        rotation: Hadamard | None = None,
    ) -> None:
        self.moment, self.observer, self.rounding, self.rotation = moment, observer, rounding, rotation
        self.shift: CrossMoment | None = None
        self.residual: CrossMoment | None = None
        self.wanted: CrossMoment | None = None
        self.held_out: Statistics | None = None
        self.sample: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many tokens the second moment was taken of."""
        return 0 if self.moment is None else self.moment.tokens

    def moments(self, moment: Tensor) -> Moments:
        """What algorithms/choose.py and correction.py work on; only where shift was observed."""
        assert self.shift is not None
        return Moments(moment, self.shift.value, None if self.residual is None else self.residual.value)

    def turned(self, x: Tensor) -> Tensor:
        """x [..., K] as the layer rotates it; x itself where it does not."""
        return x if self.rotation is None else rotate(x, self.rotation)

    def as_read(self, x: Tensor) -> Tensor:
        """x [..., K] as the quantized layer will multiply it: rotated, and in few bits rounded."""
        x = self.turned(x)
        if self.rounding is None:
            return x
        finite_range(x)
        rows = x.reshape(-1, x.shape[-1])  # [..., K] -> [M, K]
        return round_activations(rows, self.rounding).to(x.dtype).view(x.shape)

    def update(self, x: Tensor, read: Tensor | None = None) -> None:
        """Take the tokens of x [..., K] into account; read is `as_read(x)` where it is at hand."""
        if self.moment is not None:
            self.moment.update(self.as_read(x) if read is None else read)
        if self.observer is not None:
            self.observer.update(self.turned(x))
        if self.sample is None:
            self.sample = x.detach().reshape(-1, x.shape[-1])[:SAMPLE].clone()  # [..., K] -> [SAMPLE, K]


def histogram(x: Tensor, layer: str, of: str) -> Histogram:
    """Counts of x in 64 equal bins from its smallest to its largest element. Raises InputError unless it is finite."""
    values = x.detach().flatten().float()
    low, high = (bound.item() for bound in finite_range(values))
    counts = torch.histc(values, BINS, low, high) if low < high else torch.tensor([float(values.numel())])
    return Histogram(layer, of, low, high, tuple(int(count) for count in counts.tolist()))
