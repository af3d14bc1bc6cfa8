"""LLM.int8() (arXiv:2208.07339, section 3.2) by the int8 kernels: scheme int8-t6, whose meaning stands in reference.py.

    y = x_O W_O^T + s_m s_n (sum over k not in O of qx_mk qw_nk) + b        O: columns with max_m |x_mk| >= threshold

bitsandbytes counts the outlier columns, which stops the host until a CUDA device has caught up. Here, on such a device,
the MOST_OUTLIERS largest columns are looked at, and those below the threshold multiply zeros: nothing waits, and the
call can be captured in a graph. Where more columns hold outliers, the others stay among the int8 ones, and their values
count for the tokens' scales. On the CPU all are taken apart.
"""

import torch
from torch import Tensor

from lowbit.kernels import int8_fused
from lowbit.kernels.int8 import Quantized, pad_columns, weight_refusal
from lowbit.tensors import PackedWeight

MOST_OUTLIERS = 64  # columns; a fixed number keeps shapes, and so the host, independent of the data
_LARGEST = 127.0


def refusal(x: Tensor, weight: PackedWeight) -> str | None:
    """Why int8_outlier can't run for these arguments, or None."""
    if weight.scheme.activations is None or weight.scheme.activations.outlier is None:
        return f"{weight.scheme} keeps no columns of x in 16 bits"
    if x.device.type not in ("cpu", "cuda"):
        return f"x is on {x.device}, this kernel runs on CUDA devices and the CPU"
    return int8_fused.product_refusal(x) or weight_refusal(weight)


def linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, scale: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """x [M, K] times int8 weights [N, K], transposed, outlying columns of x in x's dtype: [M, N]."""
    assert weight.scheme.activations is not None
    threshold = weight.scheme.activations.outlier
    assert threshold is not None
    assert isinstance(weight.scale, Tensor)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    bound = torch.finfo(torch.float16).max
    half = x.clamp(-bound, bound).to(torch.float16)  # as bitsandbytes: one code in twenty differs without
    columns, apart = outlying(half, threshold, MOST_OUTLIERS if x.is_cuda else None)
    made = _quantize(half, columns, apart, threshold)
    y = int8_fused.multiply(made, weight, bias, x.dtype)
    kept = torch.where(apart, x.index_select(1, columns), 0)  # [M, outliers]
    outer = weight.codes.index_select(1, columns).float() * weight.scale.float().reshape(-1, 1)  # [N, outliers]
    return torch.addmm(y, kept, outer.to(x.dtype).T)


def outlying(half: Tensor, threshold: float, most: int | None) -> tuple[Tensor, Tensor]:
    """(numbers of columns of x [M, K], whether each is taken apart), both [outliers].

    most: look at so many columns, the largest, and ask nothing of the device; None: at all that hold outliers.
    """
    largest = half.abs().amax(0)  # [M, K] -> [K]
    if most is not None:
        values, columns = largest.topk(min(most, half.shape[1]))
        return columns, (values >= threshold) & (threshold > 0)
    columns = ((largest >= threshold) & (threshold > 0)).nonzero().squeeze(1)
    return columns, torch.ones_like(columns, dtype=torch.bool)


def _quantize(half: Tensor, columns: Tensor, apart: Tensor, threshold: float) -> Quantized:
    """Codes of x [M, K], zero in the columns taken apart; a token's scale is its largest other value over 127."""
    is_apart = torch.zeros(half.shape[1], dtype=torch.bool, device=half.device).index_copy(0, columns, apart)
    inliers = half.float().masked_fill(is_apart & (half.abs() >= threshold), 0)
    largest = inliers.abs().amax(-1, keepdim=True)  # [M, 1]
    q = (inliers * (_LARGEST / largest)).nan_to_num(0).round().to(torch.int8).masked_fill(is_apart, 0)
    return Quantized(pad_columns(q), (largest / _LARGEST).flatten())
