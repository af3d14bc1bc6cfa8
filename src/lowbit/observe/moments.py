"""Sums over tokens that a solver needs: the second moment of a layer's inputs, and each channel's largest magnitude.

    H = E[x x^T] = 1/M sum_m x_m x_m^T,   x_m [K] the activations of token m   (2 M H: GPTQ's Hessian, arXiv:2210.17323)

The sum is kept in float32 and divided by M when it is read: no running mean, whose rescaling would round the whole
matrix at every update. H is symmetric, so only the panels on and right of the diagonal are multiplied, and mirrored
when read; the result is symmetric to the last bit. 512 tokens, one CPU thread, against one addmm of the whole matrix:

    K                    576      1536     4096
    whole, ms            3.2      33       255
    panels of 128, ms    2.1      18       153        of 96 to 256: within 12 % of that

A GPU is fed otherwise: one product of the whole matrix, 16-bit activations as they are, whose products are exact in
float32; and whether they are finite is asked of the sums when they are read, not at each update, which would wait.
"""

import torch
from torch import Tensor

from lowbit.errors import InputError

PANEL = 128  # rows of H per product; see the table above

_CPU = torch.device("cpu")


def finite_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and largest element of x (not empty), 0-d float32. Raises InputError where x has NaN or infinity."""
    low, high = torch.aminmax(x)  # NaN spreads to both
    if not (low.isfinite() & high.isfinite()):
        raise InputError("activations are not finite: the model overflows or its weights hold NaN or infinity")
    return low.float(), high.float()


def products(d: Tensor, x: Tensor) -> Tensor:
    """d^T x, float32 [N, K], for d [M, N] and x [M, K] on a GPU."""
    if d.dtype == x.dtype and d.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(d.T, x, out_dtype=torch.float32)
    return d.T.float() @ x.float()


def check_sums(total: Tensor) -> None:
    """Raise InputError unless the sums [K] over tokens are finite: one NaN or infinity makes them so for good."""
    if not total.isfinite().all():
        raise InputError("activations are not finite: the model overflows or its weights hold NaN or infinity")


class SecondMoment:
    """Accumulates E[x x^T] over tokens on device; `tokens` counts them."""

    def __init__(self, in_features: int, device: torch.device = _CPU) -> None:
        self.tokens = 0
        self._sum = torch.zeros(in_features, in_features, device=device)  # below the panels: never written
        self._total = torch.zeros(in_features, device=device)

    def update(self, x: Tensor) -> None:
        """Add the tokens of x [..., K], any floating dtype. Raises InputError where x is not finite."""
        x = x.detach().reshape(-1, x.shape[-1])  # [..., K] -> [M, K]
        if x.shape[0] == 0:
            return
        if x.device.type == "cuda":
            x = x.to(self._sum.device)
            self._sum += products(x, x)
        else:
            finite_range(x)
            x = x.to(self._sum.device, torch.float32)
            for start in range(0, x.shape[1], PANEL):
                rows = slice(start, start + PANEL)
                self._sum[rows, start:].addmm_(x[:, rows].T, x[:, start:])
        self._total += x.sum(0, dtype=torch.float32)
        self.tokens += x.shape[0]

    @property
    def mean(self) -> Tensor:
        """E[x], float32 [K]; zeros when no token was seen."""
        return self._total / max(self.tokens, 1)

    @property
    def value(self) -> Tensor:
        """E[x x^T], float32 [K, K], bitwise symmetric; a new tensor at every call.

        Raises InputError when no token was seen, or when squares of activations overflow float32.
        """
        if self.tokens == 0:
            raise InputError("no token reached this layer: calibrate on more or longer samples")
        if not self._sum.diagonal().isfinite().all():
            check_sums(self._total)
            raise InputError("activations are too large: the sum of their squares overflows float32")
        moment = self._sum / self.tokens
        if moment.device.type == "cuda":
            return moment.triu() + moment.triu(1).T
        for start in range(0, moment.shape[0], PANEL):
            rows = slice(start, start + PANEL)
            corner = moment[rows, rows]
            corner.copy_(corner.triu() + corner.triu(1).T)
            moment[start + PANEL :, rows] = moment[rows, start + PANEL :].T
        return moment


class CrossMoment:
    """Accumulates E[d x^T] over tokens on device, d [..., N] beside x [..., K]: what of d is linear in x."""

    def __init__(self, rows: int, in_features: int, device: torch.device = _CPU) -> None:
        self.tokens = 0
        self._sum = torch.zeros(rows, in_features, device=device)
        self._total = torch.zeros(rows, device=device)

    def update(self, d: Tensor, x: Tensor) -> None:
        """Add the tokens of d [..., N] and x [..., K], any floating dtype. Raises InputError where d is not finite."""
        d = d.detach().reshape(-1, d.shape[-1])  # [..., N] -> [M, N]
        x = x.detach().reshape(-1, x.shape[-1])  # [..., K] -> [M, K]
        if x.shape[0] == 0:
            return
        if d.device.type == "cuda":
            d = d.to(self._sum.device)
            self._sum += products(d, x.to(self._sum.device))
        else:
            finite_range(d)
            d = d.to(self._sum.device, torch.float32)
            self._sum.addmm_(d.T, x.to(self._sum.device, torch.float32))
        self._total += d.sum(0, dtype=torch.float32)
        self.tokens += x.shape[0]

    @property
    def mean(self) -> Tensor:
        """E[d], float32 [N]; zeros when no token was seen."""
        return self._total / max(self.tokens, 1)

    @property
    def value(self) -> Tensor:
        """E[d x^T], float32 [N, K]; zeros when no token was seen. Raises InputError where d was not finite."""
        if self._total.device.type == "cuda":
            check_sums(self._total)
        return self._sum / max(self.tokens, 1)


class AbsMax:
    """The largest magnitude of each channel over all tokens: `value` float32 [K], zero where none was seen."""

    def __init__(self, in_features: int, device: torch.device = _CPU) -> None:
        self.tokens = 0
        self.value = torch.zeros(in_features, device=device)

    def update(self, x: Tensor) -> None:
        """Take the tokens of x [..., K] into account, any floating dtype. Raises InputError where x is not finite."""
        x = x.detach().reshape(-1, x.shape[-1])  # [..., K] -> [M, K]
        if x.shape[0] == 0:
            return
        finite_range(x)
        self.value = torch.maximum(self.value, x.abs().amax(0).to(self.value.device, torch.float32))
        self.tokens += x.shape[0]
