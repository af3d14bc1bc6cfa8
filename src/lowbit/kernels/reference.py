"""Every op in plain torch: what it means, the oracle of the tests, and the candidate that runs anywhere.

    wna16    y = x decode(W)^T + b                        the product in x's dtype
    wa8      y = decode(encode(x)) decode(W)^T + b        activations quantized per token or per tensor first

Both are what a compressed-tensors reader computes on the decompressed weights, to the last bit in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from lowbit.numerics.affine import choose_scale, decode, encode, value_range
from lowbit.numerics.scheme import TensorScheme
from lowbit.tensors import PackedWeight


def activation_scale(
    x: Tensor, scheme: TensorScheme, static_scale: Tensor | None, static_zero: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(scale, zero) for activations x [M, K]: the calibrated ones [1] where given, else [M, 1] from x itself."""
    if static_scale is not None:
        return static_scale, static_zero
    return choose_scale(*value_range(x, scheme), scheme, x.dtype)


_Decoded = dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]]  # by the codes' address; the codes, their weight
_kept: ContextVar[_Decoded | None] = ContextVar("lowbit_decoded", default=None)


@contextmanager
def keeping_decoded() -> Iterator[None]:
    """Within the block, the reference decodes each weight once and keeps it, at the cost of its memory."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def _decoded(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    kept = _kept.get()
    if kept is None:
        return weight.dequantize(dtype)
    key = weight.codes.data_ptr(), dtype
    if key not in kept:
        kept[key] = weight.codes, weight.dequantize(dtype)  # the codes too, so that no other takes their address
    return kept[key][1]


def dequantize(x: Tensor, weight: PackedWeight) -> Tensor:
    """The weight [N, K] in x's dtype."""
    return weight.dequantize(x.dtype)


def wna16_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x [M, K] times the dequantized weight [N, K], transposed: [M, N] in x's dtype."""
    return linear(x, _decoded(weight, x.dtype), bias)


def wa8_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    static_scale: Tensor | None = None,
    static_zero: Tensor | None = None,
) -> Tensor:
    """x [M, K] quantized to 8 bits and back, times the dequantized weight [N, K], transposed: [M, N] in x's dtype."""
    scheme = weight.scheme.activations
    assert scheme is not None
    scale, zero = activation_scale(x, scheme, static_scale, static_zero)
    rounded = decode(encode(x, scale, zero, scheme), scale, zero, scheme)
    return linear(rounded.to(x.dtype), _decoded(weight, x.dtype), bias)


def int8_product(q: Tensor, codes: Tensor) -> Tensor:
    """q int8 [M, K] times codes int8 [N, K], transposed: int32 [M, N], exact. The oracle of int8 kernels."""
    return (q.to(torch.int64) @ codes.to(torch.int64).T).to(torch.int32)
