"""W8A8 on the CPU: x quantized by torch, multiplied by one of its int8 kernels (cpu_product.py), scaled.

    y_mn = sx_m sw_n (sum_k qx_mk qw_nk - zx_m sum_k qw_nk) + b_n

Scales multiply after the exact integer sum. On a processor with VNNI the product is three to twenty times as fast as
the float32 one. Others may have to emulate its instructions: there `winner` times both, once for each shape of weight
and class of M, when it is first used, and the float product runs where it is faster.
"""

import logging
from functools import cache

import torch
from torch import Tensor

from lowbit.kernels.cpu_product import least_seconds, product
from lowbit.kernels.int8 import activation_refusal, weight_refusal
from lowbit.kernels.reference import activation_scale, wa8_linear
from lowbit.numerics.affine import encode, stored_scale
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

_log = logging.getLogger(__name__)


def winners(x: Tensor, weight: PackedWeight) -> tuple[str, ...]:
    """The kernel to prefer for x [M, K] on the CPU; empty where the order of the registry stands."""
    if torch.cpu._is_vnni_supported() or int8_refusal(x, weight) is not None:
        return ()
    tokens = 1 << (x.shape[0] - 1).bit_length() if x.shape[0] else 1  # M, up to a power of two
    is_slower = int8_is_slower(min(tokens, 64), *weight.shape, x.dtype, torch.get_num_threads())
    return ("reference",) if is_slower else ()


@cache
def int8_is_slower(tokens: int, rows: int, columns: int, dtype: torch.dtype, threads: int) -> bool:
    """Whether int8_linear takes longer than the float product for x [tokens, columns] and a weight [rows, columns].

    Timed on weights made for it, and told in the log. threads: those that torch uses, a part of the question.
    """
    codes = torch.full((rows, columns), 3, dtype=torch.int8)  # the time is the same for all
    weight = PackedWeight(QuantScheme.parse("w8a8"), (rows, columns), codes, torch.ones(rows, 1, dtype=dtype))
    x = torch.ones(tokens, columns, dtype=dtype)
    int8_s, float_s = (least_seconds(lambda run=run: run(x, weight, None)) for run in (int8_linear, wa8_linear))  # type: ignore[misc]
    chosen = "float" if int8_s > float_s else "int8"
    _log.info(
        "this CPU has no VNNI: %d x %d at M up to %d takes %.0f us in int8, %.0f in float; %s runs",
        rows, columns, tokens, int8_s * 1e6, float_s * 1e6, chosen,
    )  # fmt: skip
    return int8_s > float_s


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
    if scheme.symmetric and scheme.dynamic:
        (q, scale), zero = quantize_tokens(x), None
    else:
        scale, zero = activation_scale(x, scheme, static_scale, static_zero)
        q = encode(x, scale, zero, scheme)
    if zero is None:
        sums = product(q, weight.codes)  # [M, K] x [N, K] -> [M, N]
    else:
        sums = torch._int_mm(q, weight.codes.T) - zero.to(torch.int32) * weight.codes.sum(-1, dtype=torch.int32)
    scaled = sums.float() * scale.float() * weight.scale.float().reshape(1, -1)  # weight scale [N, 1] or [1]
    return (scaled if bias is None else scaled + bias.float()).to(x.dtype)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 [M, K], scale [M, 1] in x's dtype) of x [M, K], symmetric per token.

    Bitwise those of choose_scale and encode, by half as many calls, which are what a small layer takes its time for.
    """
    values = x.float()
    scale = stored_scale(values.abs().amax(-1, keepdim=True).div_(127.5), x.dtype)
    return values.div(scale).round_().clamp_(-128, 127).to(torch.int8), scale
