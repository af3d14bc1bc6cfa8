"""int8 products on the CPU through torch's own kernel, oneDNN's s8 x s8 -> s32 (`torch._int_mm`).

    y_mn = sx_m sw_n (sum_k qx_mk qw_nk - zx_m sum_k qw_nk) + b_n

Scales multiply after the exact integer sum. On a processor with VNNI this is three to six times as fast as the float32
product (docs/log-int8.md). Others may have to emulate its instructions: there `winner` times both, once for each shape
of weight and class of M, when it is first used, and the float product runs where it is faster.

torch's other ways are no candidates: `onednn.qlinear_pointwise` and fbgemm take unsigned activations, and without VNNI
add pairs of products in 16 bits, which overflow; with it `_int_mm` is as fast or faster (docs/log-int8.md).
"""

import logging
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from lowbit.kernels.int8 import activation_refusal, weight_refusal
from lowbit.kernels.reference import activation_scale, wa8_linear
from lowbit.numerics.affine import encode
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

_log = logging.getLogger(__name__)


def winner(x: Tensor, weight: PackedWeight) -> str | None:
    """The kernel to prefer for x [M, K] on the CPU, "reference" or None for the order of the registry."""
    if torch.cpu._is_vnni_supported() or int8_refusal(x, weight) is not None:
        return None
    tokens = 1 << (x.shape[0] - 1).bit_length() if x.shape[0] else 1  # M, up to a power of two
    is_slower = int8_is_slower(min(tokens, 64), *weight.shape, x.dtype, torch.get_num_threads())
    return "reference" if is_slower else None


@cache
def int8_is_slower(tokens: int, rows: int, columns: int, dtype: torch.dtype, threads: int) -> bool:
    """Whether int8_linear takes longer than the float product for x [tokens, columns] and a weight [rows, columns].

    Timed on weights made for it, and told in the log. threads: those that torch uses, a part of the question.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, columns, generator=generator)
    weight = PackedWeight.from_float(w, QuantScheme.parse("w8a8"), dtype)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    int8_s, float_s = (_seconds(lambda run=run: run(x, weight, None)) for run in (int8_linear, wa8_linear))  # type: ignore[misc]
    chosen = "float" if int8_s > float_s else "int8"
    _log.info(
        "this CPU has no VNNI: %d x %d at M up to %d takes %.0f us in int8, %.0f in float; %s runs",
        rows, columns, tokens, int8_s * 1e6, float_s * 1e6, chosen,
    )  # fmt: skip
    return int8_s > float_s


def _seconds(call: Callable[[], Tensor]) -> float:
    """The least time of five calls after one."""
    call()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def int8_refusal(x: Tensor, weight: PackedWeight) -> str | None:
    """Why the int8 product can't run for these arguments, or None."""
    if x.device.type != "cpu":
        return f"x is on {x.device}, this kernel runs on the CPU"
    if weight.shape[1] == 1:
        return "torch._int_mm reads beyond a matrix of one column (torch 2.13)"
    return activation_refusal(weight) or weight_refusal(weight)


def int8_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    static_scale: Tensor | None = None,
    static_zero: Tensor | None = None,
) -> Tensor:
    """x [M, K] quantized to int8, times int8 codes [N, K], transposed, scaled: [M, N] in x's dtype."""
    scheme = weight.scheme.activations
    assert scheme is not None
    assert isinstance(weight.scale, Tensor)
    scale, zero = activation_scale(x, scheme, static_scale, static_zero)
    q = encode(x, scale, zero, scheme)
    product = torch._int_mm(q, weight.codes.T)  # [M, K] x [K, N] -> int32 [M, N]
    if zero is not None:
        product = product - zero.to(torch.int32) * weight.codes.sum(-1, dtype=torch.int32)
    scaled = product.float() * scale.float() * weight.scale.float().reshape(1, -1)  # weight scale [N, 1] or [1]
    return (scaled if bias is None else scaled + bias.float()).to(x.dtype)
