"""What the int8 products share: operands whose rows are padded once, and the scales that make floats of int32 sums.

    y[m,n] = x_scale[m] w_scale[n] (sum_k qx[m,k] qw[n,k] - x_zero[m] w_sum[n]) + bias[n]

w_sum[n] = sum_k qw[n,k]. Rows of codes are padded with zeros to a multiple of 16 bytes, the reach of one load of every
kernel; the columns beyond K multiply zeros of the weight, so it does not matter what the activations hold there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary

from lowbit.numerics.storage import storage_of
from lowbit.tensors import PackedWeight

ROW_BYTES = 16
LARGEST_K = (2**31 - 1) // (128 * 128)  # 131071: the longest row whose int32 sum can't overflow


@dataclass(frozen=True)
class Quantized:
    """Activations in int8: q [M, K padded], scale float32 [M] (or [1]: one for all), zero int32 alike, or None."""

    q: Tensor
    scale: Tensor
    zero: Tensor | None = None


@dataclass(frozen=True)
class Scaling:
    """How an int32 sum becomes a float of `dtype`.

    x_scale float32 [M] or [1]; x_zero int32 alike, or None; w_scale [N] or [1] in any float dtype; w_sum int32 [N],
    needed beside x_zero; bias [N] in any float dtype, or None.
    """

    dtype: torch.dtype
    x_scale: Tensor
    w_scale: Tensor
    x_zero: Tensor | None = None
    w_sum: Tensor | None = None
    bias: Tensor | None = None

    def apply(self, sums: Tensor) -> Tensor:
        """The floats [M, N] of int32 sums [M, N], in plain torch: what every kernel's epilogue computes."""
        if self.x_zero is not None:
            assert self.w_sum is not None
            sums = sums - self.x_zero.reshape(-1, 1) * self.w_sum
        y = sums.float() * (self.x_scale.reshape(-1, 1) * self.w_scale.float().reshape(1, -1))
        return (y if self.bias is None else y + self.bias.float()).to(self.dtype)


@dataclass(frozen=True)
class Int8Weight:
    """What the kernels read of a weight [N, K]: codes int8 [N, K padded], and their row sums int32 [N]."""

    codes: Tensor
    sums: Tensor


_ready = WeakIdKeyDictionary()  # codes -> (their version, Int8Weight): goes with the weight, is never saved


def int8_weight(weight: PackedWeight) -> Int8Weight:
    """The weight as int8 kernels read it; derived at first use, and again when its codes were written to."""
    known = _ready.get(weight.codes)
    if known is None or known[0] != weight.codes._version:
        codes = pad_columns(weight.codes)
        known = _ready[weight.codes] = (weight.codes._version, Int8Weight(codes, codes.sum(1, dtype=torch.int32)))
    return known[1]


def weight_refusal(weight: PackedWeight) -> str | None:
    """Why int8 products can't multiply by `weight`, or None."""
    if storage_of(weight.scheme) != "int8" or weight.zero is not None:
        return f"weights under {weight.scheme} are not symmetric int8 codes"
    if weight.scheme.weights.granularity == "group":
        return f"{weight.scheme} has a scale per group, inside the integer sum"
    activations = weight.scheme.activations
    if activations is not None and (activations.bits != 8 or activations.searched):
        return f"{weight.scheme} does not round activations to int8 by their largest value"
    if weight.shape[1] > LARGEST_K:
        return f"in_features {weight.shape[1]} is above {LARGEST_K}, and an int32 sum may overflow"
    return None


def activation_refusal(weight: PackedWeight) -> str | None:
    """Why int8 products alone can't quantize activations as `weight` asks, or None."""
    if weight.scheme.activations is not None and weight.scheme.activations.outlier is not None:
        return f"{weight.scheme} keeps the outlying columns of x in 16 bits"
    return None


def padded_columns(columns: int) -> int:
    """`columns` int8 columns, padded."""
    return -(-columns // ROW_BYTES) * ROW_BYTES


def pad_columns(q: Tensor) -> Tensor:
    """q int8 [rows, K] with zeros appended to each row as the kernels want it; q itself where nothing is missing."""
    missing = padded_columns(q.shape[1]) - q.shape[1]
    return pad(q, (0, missing)) if missing else q.contiguous()
