"""Every op in plain torch: what it means, the oracle of the tests, and the candidate that runs anywhere.

    wna16    y = x decode(W)^T + b                        the product in x's dtype
    wa8      y = decode(encode(x)) decode(W)^T + b        activations quantized per token, group or tensor first

Both are what a compressed-tensors reader computes on the decompressed weights, to the last bit in float32.

    wa8, int8-t6    y = x_O W_O^T + s_m s_n (sum over k not in O of qx_mk qw_nk) + b

LLM.int8() (arXiv:2208.07339, section 3.2): O are the columns with max_m |x_mk| >= threshold, multiplied in x's dtype.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from lowbit.numerics.dynamic import INT8_LARGEST, dynamic_scale, round_activations
from lowbit.numerics.scheme import TensorScheme
from lowbit.tensors import PackedWeight


def activation_scale(
    x: Tensor, scheme: TensorScheme, static_scale: Tensor | None, static_zero: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(scale, zero) for activations x [M, K]: the calibrated ones [1] where given, else [M, 1] from x itself."""
    if static_scale is not None:
        return static_scale, static_zero
    return dynamic_scale(x, scheme)


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
    """x [M, K] quantized and back, times the dequantized weight [N, K], transposed: [M, N] in x's dtype."""
    scheme = weight.scheme.activations
    assert scheme is not None
    if scheme.outlier is not None:
        return _outlier_linear(x, weight, bias, scheme.outlier)
    columns = x.shape[1]
    if scheme.granularity == "group" and columns % (scheme.group_size or 1):  # the last tile may be narrower
        x = pad(x, (0, -columns % (scheme.group_size or 1)))
    rounded = round_activations(x, scheme, static_scale, static_zero)[:, :columns]
    return linear(rounded.to(x.dtype), _decoded(weight, x.dtype), bias)


def _outlier_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, threshold: float) -> Tensor:
    """x [M, K] times int8 weights [N, K], transposed, with x's outlying columns in x's own dtype: [M, N].

    A token's scale is the largest magnitude among what stays, over 127. Codes are those of bitsandbytes, which rounds x
    to float16 first: without that, one code in twenty differs by one.
    """
    assert isinstance(weight.scale, Tensor)
    bound = torch.finfo(torch.float16).max
    half = x.clamp(-bound, bound).to(torch.float16)
    is_outlier = half.abs() >= threshold if threshold > 0 else torch.zeros_like(x, dtype=torch.bool)
    columns = is_outlier.any(0)  # [K]
    inliers = half.float().masked_fill(is_outlier, 0)
    largest = inliers.abs().amax(-1, keepdim=True)  # [M, 1]
    q = (inliers * (INT8_LARGEST / largest)).nan_to_num(0).round().to(torch.int8)
    q = q.masked_fill(columns, 0)
    product = int8_product(q, weight.codes).float()
    y = product * (largest / INT8_LARGEST) * weight.scale.float().reshape(1, -1)
    if bias is not None:
        y = y + bias.float()
    y = y.to(x.dtype)
    if not columns.any():
        return y
    kept = columns.nonzero().squeeze(1)
    return torch.addmm(y, x[:, kept], weight.dequantize(x.dtype)[:, kept].T)


def int8_product(q: Tensor, codes: Tensor) -> Tensor:
    """q int8 [M, K] times codes int8 [N, K], transposed: int32 [M, N], exact. The oracle of int8 kernels."""
    return (q.double() @ codes.double().T).to(torch.int32)  # sums below 2^53 are exact, and torch has fast products
